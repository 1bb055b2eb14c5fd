"""Adapters to other frameworks. gkd_jax itself imports none of them; import the one you need."""

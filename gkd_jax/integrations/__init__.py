"""Adapters to other frameworks. Nothing in gkd_jax imports them: import the one you want."""

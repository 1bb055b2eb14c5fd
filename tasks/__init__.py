"""seqio tasks, one module a family: importing `gkd_jax.tasks.x` registers it."""

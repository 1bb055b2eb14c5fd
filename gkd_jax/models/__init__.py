"""Models behind plain functions; the only place where Flax is imported."""

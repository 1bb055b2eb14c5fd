"""Weights in and out: a run's own checkpoints, and models from anywhere else."""

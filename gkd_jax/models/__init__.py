"""The model families, as plain functions (`lm`); only this package imports Flax."""

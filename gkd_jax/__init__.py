"""On-policy distillation of T5 in JAX: GKD (Agarwal et al., ICLR 2024)."""

__version__ = "0.1.0"

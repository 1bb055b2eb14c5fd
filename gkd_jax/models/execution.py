"""The settings by which a model is run, which the configs of all model families have."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionSettings:
    """Settings that a run chooses for a model, whatever the model's checkpoint says.

    None of them changes the function that a model computes, except that `dtype` rounds it and that
    `dropout_rate` disturbs it in training. So they are no part of a checkpoint's identity (see
    `lm.architecture`). What changes the function is a field of a family's own config.

    Attributes:
        dropout_rate: the dropout while training. T5 drops activations and attention probabilities,
            and a decoder-only model embeddings and the outputs of attention and MLP.
        dtype: the compute dtype, "float32" or "bfloat16". Matrix products take operands of this
            dtype and accumulate in float32.
        remat: the backward pass recomputes each layer's activations.
        attention_by_row: attention goes through the batch row by row where the scores of all rows
            together exceed a CPU's cache.
        layers_on_host: the layers' kernels are kept in the host's memory and copied to the device
            when their layer runs; only for `encode`, `hidden` and `logits`.
        scan_unroll: the layers per iteration of the scan over layers; L or more unrolls the scan.
        unroll_decoding: decoding runs the layers one by one, also where training scans over them.
        cache_segment: the positions of the KV cache's first segment (see `kv_cache`).
    """

    dropout_rate: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    attention_by_row: bool = False
    layers_on_host: bool = False
    scan_unroll: int = 1
    unroll_decoding: bool = False
    cache_segment: int = 64

    def __post_init__(self):
        """Checks these settings, and that every integer of a family's config is positive."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must lie in [0, 1), got {self.dropout_rate}")
        check_dtype(self.dtype)


def check_dtype(dtype: str) -> None:
    """Checks a compute dtype.

    Raises:
        ValueError: unless models can compute in this dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")

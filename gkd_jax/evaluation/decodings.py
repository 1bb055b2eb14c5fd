"""The ways to decode, with the fields of `EvalConfig` that each of them uses.

`decode_rows` is left out: it decides how many rows are decoded at a time, and not what is decoded.
"""

USED_BY: dict[str, tuple[str, ...]] = {
    "greedy": ("calculator",),
    "sample": ("temperature", "num_samples", "seed"),
    "beam": ("num_beams", "alpha"),
    "likeliest": ("choices",),
}

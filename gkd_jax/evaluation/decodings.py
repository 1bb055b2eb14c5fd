"""The ways to decode, with the fields of `EvalConfig` that each of them uses."""

USED_BY: dict[str, tuple[str, ...]] = {
    "greedy": ("calculator",),
    "sample": ("temperature", "num_samples"),
    "beam": ("num_beams", "alpha"),
    "likeliest": ("choices",),
}

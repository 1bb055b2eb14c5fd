"""How fast a run is: the time of the device, the share of its peak, and its memory."""

from collections.abc import Sequence
import concurrent.futures
import time

import jax

from gkd_jax import gkd
from gkd_jax.models import flops, lm


# Dense bfloat16 FLOP/s of one JAX device, by `jax.Device.device_kind`. The sources are Google's
# pages of each TPU's system architecture and NVIDIA's data sheets (SXM modules).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip has two devices
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
GIB = 2**30


def step_flops(
    student: lm.Config,
    teachers: Sequence[tuple[lm.Config, float]],
    config: gkd.GKDConfig,
    *,
    prompt_tokens: float,
    target_tokens: float,
    batch_size: int,
    sampled_tokens: float,
) -> float:
    """Returns the FLOPs of one step's matrix products, by the count of `flops.forward_flops`.

    The student is run forwards and backwards and the teacher forwards. Sampling is one forward
    pass of the student over the prompts and the sampled tokens.

    Args:
        teachers: the config of each teacher, with the share of the batch that it scores; () where
            a cache has its scores.
        sampled_tokens: the number of tokens that the student wrote in this step.
    """
    drawn = sampled_tokens > 0
    lengths = {
        "prompt_tokens": prompt_tokens,
        "prompts": batch_size,
        "targets": batch_size * (config.num_samples if drawn else 1),
    }
    forward = flops.forward_flops(student, target_tokens=target_tokens, **lengths)
    total = 3 * forward
    for teacher, share in teachers:
        total += share * flops.forward_flops(teacher, target_tokens=target_tokens, **lengths)
    return total + (forward * min(sampled_tokens / max(target_tokens, 1), 1.0) if drawn else 0.0)


def peak_flops() -> float | None:
    """Returns the peak FLOP/s of all devices of the job; None for a kind without an entry."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()


def device_memory() -> dict[str, float]:
    """Returns the most memory that a device of this process has used, and its limit, in GiB.

    The result is empty where the backend does not tell, as on CPU.
    """
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"peak_bytes_in_use": "memory/device_peak_gib", "bytes_limit": "memory/device_gib"}
    return {
        ours: max(stats[theirs] for stats in found) / GIB
        for theirs, ours in names.items()
        if all(theirs in stats for stats in found)
    }


class DeviceClock:
    """Measures how long the device works on each result, without making the caller wait.

    The time of a result begins when the result before it is ready or, if that is later, when the
    result is dispatched. It ends when the result is ready.
    """

    def __init__(self):
        self._waiter = concurrent.futures.ThreadPoolExecutor(1)
        self._free_at = 0.0

    def close(self) -> None:
        self._waiter.shutdown()

    def seconds(self, began: float, result: jax.Array) -> concurrent.futures.Future[float]:
        """Returns the seconds of a result as a future. Call this in the order of dispatch.

        `began` is the `time.monotonic()` of the dispatch.
        """

        def wait() -> float:
            jax.block_until_ready(result)
            before, self._free_at = self._free_at, time.monotonic()
            return self._free_at - max(began, before)

        return self._waiter.submit(wait)

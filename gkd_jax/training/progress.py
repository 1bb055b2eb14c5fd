"""`Progress`: what a run prints to the terminal while it trains."""

from collections.abc import Mapping
import datetime
import sys
import time

import jax
import tqdm


class Progress:
    """Prints the progress of a run.

    In a terminal, a bar is redrawn after each step and never wider than the terminal. Elsewhere, a
    line is printed every `every` steps and at the end. Of several processes, only the first prints.
    """

    def __init__(self, total: int, *, start: int, every: int, name: str = ""):
        """Starts the clock of a run of `total` steps, of which `start` are done.

        Where standard error is not a terminal, there are `every` steps between lines. `name` is
        that of the run within a study, or "".
        """
        self._silent = jax.process_index() > 0
        self._total, self._start, self._every = total, start, every
        self._name = f"{name}: " if name else ""
        self._began = time.monotonic()
        self._sampling = self._updating = 0.0  # seconds of the device, over all steps
        self._bar = None
        if sys.stderr.isatty() and not self._silent:
            self._bar = tqdm.tqdm(
                total=total,
                initial=start,
                desc=self._name.removesuffix(": ") or None,
                dynamic_ncols=True,
                file=sys.stderr,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def step(self, done: int, values: Mapping[str, float]) -> None:
        """Records the numbers of one more step, after which `done` are done; prints if due."""
        self._sampling += values.get("time/sample_s", 0.0)
        self._updating += values.get("time/update_s", 0.0)
        if self._silent:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(_numbers(values)), refresh=False)
            self._bar.update(done - self._bar.n)
            if done == self._total:
                self.close()
        elif done == self._total or done % self._every == 0:
            print(self._line(done, values), file=sys.stderr, flush=True)

    def _line(self, done: int, values: Mapping[str, float]) -> str:
        per_step = (time.monotonic() - self._began) / max(done - self._start, 1)
        busy = max(self._sampling + self._updating, 1e-9)
        shares = f"sample {self._sampling / busy:.0%}, update {self._updating / busy:.0%}"
        loss, seconds, *speed = _numbers({**values, "time/step_s": per_step})
        parts = [f"step {done}/{self._total}", loss, f"{seconds} ({shares})", *speed]
        left = datetime.timedelta(seconds=round(per_step * (self._total - done)))
        return self._name + "  ".join([*parts, f"eta {left}"])

    def clear(self) -> None:
        """Takes the bar off the terminal, so that something else can be printed there.

        The next step draws the bar again.
        """
        if self._bar is not None:
            self._bar.clear()

    def close(self) -> None:
        """Leaves the bar as it is, with a newline; nothing happens if it is called again."""
        if self._bar is not None:
            self._bar.close()


def _numbers(values: Mapping[str, float]) -> list[str]:
    """Returns the loss, time and speed of a step and, where known, its share of the peak."""
    found = [
        f"loss {values['train/loss']:.4f}",
        f"{values['time/step_s'] * 1e3:.0f} ms/step",
        f"{tqdm.tqdm.format_sizeof(values['time/tokens_per_s'])} tokens/s",
    ]
    if "time/model_flops_share" in values:
        found.append(f"{values['time/model_flops_share']:.0%} of peak")
    return found

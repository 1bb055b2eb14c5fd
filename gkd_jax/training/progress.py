"""`Progress`: what a run prints to the terminal while it trains."""

from collections.abc import Mapping
import math
import sys
import time

import tqdm


class Progress:
    """Prints the progress of a run.

    In a terminal, a bar is redrawn after each step and never wider than the terminal. Elsewhere, a
    line is printed every `every` steps and at the end.
    """

    def __init__(self, total: int, *, start: int, every: int, name: str = "", silent: bool = False):
        """Starts the clock.

        Args:
            total: the number of steps of the whole run.
            start: the number of steps that are done already.
            every: the number of steps between lines where standard error is not a terminal.
            name: the name of the run within a study, or "".
            silent: True prints nothing, as all processes of a job but the first should.
        """
        self._silent = silent
        self._total, self._start, self._every = total, start, every
        self._name = f"{name}: " if name else ""
        self._began = time.monotonic()
        self._sums = dict.fromkeys(("time/sample_s", "time/update_s", "time/step_s"), 0.0)
        self._bar = None
        if sys.stderr.isatty() and not silent:
            self._bar = tqdm.tqdm(
                total=total,
                initial=start,
                desc=self._name.removesuffix(": ") or None,
                dynamic_ncols=True,
                file=sys.stderr,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def step(self, done: int, values: Mapping[str, float]) -> None:
        """Records one more step and prints where it is due.

        Args:
            done: the number of steps done so far.
            values: the numbers of the step.
        """
        for name in self._sums:
            self._sums[name] += values.get(name, 0.0)
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
        sampling, updating = self._sums["time/sample_s"], self._sums["time/update_s"]
        busy = max(sampling + updating, 1e-9)
        shares = f"sample {sampling / busy:.0%}, update {updating / busy:.0%}"
        loss, seconds, *speed = _numbers({**values, "time/step_s": per_step})
        parts = [f"step {done}/{self._total}", loss, f"{seconds} ({shares})", *speed]
        return self._name + "  ".join([*parts, f"eta {_clock(per_step * (self._total - done))}"])

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
    """What a line says of a step: its loss, its time and, where they are known, its speed."""
    found = [f"loss {values['train/loss']:.4f}"]
    if "time/step_s" in values:
        found.append(f"{values['time/step_s'] * 1e3:.0f} ms/step")
    if "time/tokens_per_s" in values:
        found.append(f"{_short(values['time/tokens_per_s'])} tokens/s")
    if "time/model_flops_share" in values:
        found.append(f"{values['time/model_flops_share']:.0%} of peak")
    return found


def _short(number: float) -> str:
    """1234 -> "1.23k"."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"

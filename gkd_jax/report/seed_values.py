"""The values of runs that differ only in the seed: their mean, its error, and differences."""

from collections.abc import Sequence
import math
import statistics
from typing import Any, NamedTuple

from scipy import stats


class Lead(NamedTuple):
    """The difference of two means; its standard error and verdict are unknown for one seed.

    `exceeds_noise` says whether a t-test at 5 % tells the difference from zero.
    """

    mean: float
    error: float
    exceeds_noise: bool | None


class SeedValues:
    """The values of `n` seeds, from pairs of a seed and its value; their `mean` and its `error`."""

    def __init__(self, pairs: Sequence[tuple[Any, float]]):
        self._pairs, self._values = pairs, [value for _, value in pairs]
        self.n = len(pairs)
        self.mean = statistics.fmean(self._values) if pairs else math.nan
        self.error = math.nan
        if self.n > 1:
            self.error = statistics.stdev(self._values) / math.sqrt(self.n)

    def over(self, other: "SeedValues") -> Lead:
        """Returns the lead over other values.

        Values whose seeds the other values have too are compared seed by seed (a paired t-test),
        because runs of one seed share their data and often their start and their teacher. Values of
        other seeds are compared by Welch's t-test.
        """
        mine, theirs = dict(self._pairs), dict(other._pairs)
        if len(mine) == self.n and len(theirs) == other.n and mine.keys() <= theirs.keys():
            differences = SeedValues([(seed, mine[seed] - theirs[seed]) for seed in mine])
            lead, error = differences.mean, differences.error
            test: Any = stats.ttest_1samp(differences._values, 0) if error > 0 else None
        else:
            lead, error = self.mean - other.mean, math.hypot(self.error, other.error)
            pair = (self._values, other._values)
            test = stats.ttest_ind(*pair, equal_var=False) if error > 0 else None
        if math.isnan(error):
            return Lead(lead, error, None)
        return Lead(lead, error, lead != 0 if test is None else bool(test.pvalue < 0.05))

    @property
    def text(self) -> str:
        """The mean and its error, such as "12.35 ± 0.50"."""
        digits = 4 if 0 < abs(self.mean) < 0.1 else 2 if abs(self.mean) < 100 else 1
        error = "" if math.isnan(self.error) else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"

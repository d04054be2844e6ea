"""What a few seeds say of others: intervals by Student's t, 95 % of which hold."""

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its confidence interval; NaN of one value."""
    count = len(values)
    return statistics.mean(values), _spread(values) * math.sqrt(1 / count)


def next_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of the interval in which one more value lies."""
    count = len(values)
    return statistics.mean(values), _spread(values) * math.sqrt(1 + 1 / count)


def _spread(values: Sequence[float]) -> float:
    """The standard deviation, times the quantile of Student's distribution."""
    if len(values) < 2:
        return math.nan
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return statistics.stdev(values) * float(quantile)

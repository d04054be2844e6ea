r"""What lags behind in a table, and which of its rows moved.

Updates are numbered 1, 2, ... A step touches the rows that it sampled and no others,
so the slots of the rest lag behind. Two numbers tell how far: `last_update` of a row,
the update that moved it last, and `caught_up` of the table, the update in which all
rows were made current. A row's slots are as after the later of the two; a slot that
decays by the factor \(r\) in a step without gradient is made current, in update t, by
\(r^{t - \max(last\_update, caught\_up)}\).

The same `last_update` tells a Lookahead which rows its cycle has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops

# Numbers of updates are int32. They go back by half as soon as they are so large.
LARGEST = 2**30


def decay(
    slots: Mapping[str, keras.Variable], log_rates: Mapping[str, float], missed: Any
) -> None:
    """Let slots decay by the steps that their rows missed.

    Args:
        slots: with an entry for each row.
        log_rates: logarithm of the decay of each in a step.
        missed: int tensor with the number of steps of each row.
    """
    missed = ops.maximum(missed, 0)
    for name, log_rate in log_rates.items():
        if log_rate and name in slots:
            slot = slots[name]
            slot.assign(_decayed(slot.value, log_rate, missed))


def _decayed(value: Any, log_rate: float, steps: Any) -> Any:
    """`value` after `steps` (one int a row) multiplications by `exp(log_rate)`.

    The exponent is built from the logarithm because `rate ** steps` would raise
    the rounding error of a float32 `rate` to the power, too.
    """
    dtype = value.dtype if "64" in str(value.dtype) else "float32"
    factor = ops.exp(ops.cast(steps, dtype) * log_rate)
    factor = ops.cast(factor, value.dtype)
    return value * _as_column(factor, len(value.shape))


def where(rows: Any, new: Any, old: Any) -> Any:
    """`new` in the rows that are `True` in the vector `rows`, else `old`."""
    return ops.where(_as_column(rows, len(new.shape)), new, old)


def _as_column(vector: Any, rank: int) -> Any:
    """`vector` of shape `(n,)` as `(n, 1, ..., 1)`, to broadcast over rows."""
    return ops.reshape(vector, (-1,) + (1,) * (rank - 1))


def renumbered(*numbers: Any) -> tuple:
    """Numbers of updates, after those have gone back by half of the largest."""
    return tuple(ops.maximum(number - LARGEST // 2, 0) for number in numbers)


@dataclass
class MovedRows:
    """Tells the Lookaheads around a table which of its rows they have to sync.

    One syncs the rows that were updated in its cycle. Several move rows behind each
    other's back, a row once updated in every sync from then on; so of several each
    syncs all rows that have been updated at all.

    Attributes:
        last_update: int32 variable of shape `(vocabulary,)`.
        updates: gives the number of updates so far.
        slow_copies: those that the Lookaheads keep of the table.
    """

    last_update: keras.Variable
    updates: Callable[[], Any]
    slow_copies: list[SlowCopy] = field(default_factory=list)

    @property
    def is_shared(self) -> bool:
        """Whether several Lookaheads sync the table."""
        return len(self.slow_copies) > 1

    def since(self, updates_in_cycle: Any) -> Any:
        """The number of the update after which rows to sync were updated."""
        if self.is_shared:
            return 0
        return self.updates() - updates_in_cycle

    def are_new(self, last_update: Any, copy: SlowCopy) -> Any:
        """Which rows a copy's cycle has not moved yet.

        Args:
            last_update: the update that moved each of them last.
        """
        return last_update <= self.since(copy.updates_in_cycle())


@dataclass(frozen=True)
class SlowCopy:
    """The slow copy of a table, of which a row is taken when a cycle first moves it.

    Until then it means nothing: the row has not left its slow weights.

    Attributes:
        variable: the slow weights, of the table's shape.
        updates_in_cycle: gives the number of updates since the cycle began.
    """

    variable: keras.Variable
    updates_in_cycle: Callable[[], Any]

r"""Track deferred slot decay and recently updated rows of an embedding table.

A lazy step updates only the rows that it sampled, so the slots of all other rows become
out of date. Two update numbers record how far. (Updates are numbered 1, 2, ..., for
each table by itself.)

- `last_update`, one per row: the last update that changed the row.
- `caught_up`, one per table: the last update after which all rows were up to date.

The slots of a row are up to date as of the end of update
\(\max(last\_update, caught\_up)\). A slot that decays by the factor \(r\) in a step
without gradient is brought up to date in one of two ways:

- A step that samples the row in update t first applies the decay up to the end of
  update t - 1, a factor of \(r^{t - 1 - \max(last\_update, caught\_up)}\).
- `LazyOptimizer.catch_up()`, called after update t, applies the decay up to the end of
  update t, a factor of \(r^{t - \max(last\_update, caught\_up)}\).

Lookahead uses the same `last_update` to find the rows that its cycle has changed.

Update numbers may be int32 and wrap around, so only their differences have a meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

# The age of an update whose number has wrapped around: at least this many updates.
LONGEST = 2**31 - 1
# `kept_old` keeps differences below this, so that they do not wrap around.
HALF = 2**30


def add(number: Any, more: Any) -> Any:
    """Add to an update number, which wraps around."""
    total = number + more
    return (total + 2**31) % 2**32 - 2**31 if isinstance(total, int) else total


def is_after(now: int, number: int) -> bool:
    """Return whether the update `now` comes after update `number`."""
    steps = add(now, -number)
    return steps > 0 or steps < -HALF


def age(now: Any, number: Any) -> Any:
    """Return how many updates `number` (int tensor) lies before the update `now`."""
    steps = now - number
    return ops.where(steps < -HALF, LONGEST, ops.maximum(steps, 0))


def kept_old(now: Any, last_update: Any) -> Any:
    """Move very old update numbers forward, before they wrap around to new ones."""
    return ops.where(age(now, last_update) > HALF, add(now, -HALF), last_update)


def steps_missed(now: Any, last_update: Any, caught_up: Any) -> Any:
    """Return how many steps of decay each row still has to apply after update `now`."""
    return ops.minimum(age(now, last_update), age(now, caught_up))


def decay(
    slots: Mapping[str, keras.Variable], log_rates: Mapping[str, float], missed: Any
) -> None:
    """Apply the decay of the steps that rows missed.

    Args:
        slots: Slots with one entry per row, by name.
        log_rates: The logarithm of each slot's decay factor per step.
        missed: Int tensor, the number of missed steps of each row.
    """
    for name, log_rate in log_rates.items():
        if log_rate and name in slots:
            slot = slots[name]
            slot.assign(_decayed(slot.value, log_rate, missed))


def _decayed(value: Any, log_rate: float, steps: Any) -> Any:
    """Multiply `value` by `exp(log_rate)` for `steps` times (one int per row).

    This uses the logarithm because `rate ** steps` would also raise the rounding error
    of a float32 `rate` to the power.
    """
    dtype = value.dtype if "64" in str(value.dtype) else "float32"
    factor = ops.exp(ops.cast(steps, dtype) * log_rate)
    factor = ops.cast(factor, value.dtype)
    return value * _as_column(factor, len(value.shape))


def where(rows: Any, new: Any, old: Any) -> Any:
    """Return `new` in the rows that are `True` in the vector `rows`, else `old`."""
    return ops.where(_as_column(rows, len(new.shape)), new, old)


def _as_column(vector: Any, rank: int) -> Any:
    """Reshape `vector` from `(n,)` to `(n, 1, ..., 1)`, to broadcast over rows."""
    return ops.reshape(vector, (-1,) + (1,) * (rank - 1))


@dataclass(frozen=True)
class RowClock:
    """Tells which rows of a table moved recently.

    Attributes:
        last_update: Int variable of shape `(vocabulary,)`.
        now: Function that returns the number of the table's last update.
    """

    last_update: keras.Variable
    now: Callable[[], Any]

    def moved_within(self, updates: int) -> Callable[[Any], Any]:
        """Return a function of `last_update`: which rows the last `updates` moved."""
        now = self.now()
        return lambda last_update: age(now, last_update) < updates


def have_moved(last_update: Any) -> Any:
    """Return which rows have ever moved."""
    return last_update != 0

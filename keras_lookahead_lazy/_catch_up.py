r"""Slots that rows still have to decay, and which rows moved lately.

A step touches the rows that it sampled and no others, so the slots of the other rows
fall behind. Updates are numbered 1, 2, ..., for each table by itself, and two numbers
tell how far a row is behind: its `last_update`, in which it moved last, and the table's
`caught_up`, in which all rows were made current. In update t a slot that decays by the
factor \(r\) in a step without gradient is first multiplied by
\(r^{t - 1 - \max(last\_update, caught\_up)}\).

Lookahead asks the same `last_update` which rows its cycle has moved.

The numbers wrap around where they are int32: only differences of them have a meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

# A difference that has wrapped around stands for at least as many updates as this.
LONGEST = 2**31 - 1
# Differences are kept below this, where somebody reads the numbers.
HALF = 2**30


def add(number: Any, more: Any) -> Any:
    """The number of the update that comes so many after another."""
    total = number + more
    return (total + 2**31) % 2**32 - 2**31 if isinstance(total, int) else total


def is_after(now: int, number: int) -> bool:
    """Whether the update `now` comes after another."""
    steps = add(now, -number)
    return steps > 0 or steps < -HALF


def age(now: Any, number: Any) -> Any:
    """How many updates `number` (int tensor) lies before the update `now`."""
    steps = now - number
    return ops.where(steps < -HALF, LONGEST, ops.maximum(steps, 0))


def kept_old(now: Any, last_update: Any) -> Any:
    """The same numbers, of which very old ones will not wrap around to be new ones."""
    return ops.where(age(now, last_update) > HALF, add(now, -HALF), last_update)


def steps_missed(now: Any, last_update: Any, caught_up: Any) -> Any:
    """How many steps the slots of each row are behind, after update `now`."""
    return ops.minimum(age(now, last_update), age(now, caught_up))


def decay(
    slots: Mapping[str, keras.Variable], log_rates: Mapping[str, float], missed: Any
) -> None:
    """Let slots decay by the steps that their rows missed.

    Args:
        slots: with an entry for each row.
        log_rates: logarithm of the decay of each in a step.
        missed: int tensor with the number of steps of each row.
    """
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


@dataclass(frozen=True)
class MovedRows:
    """Which rows of a table moved lately.

    Attributes:
        last_update: int variable of shape `(vocabulary,)`.
        now: gives the number of the table's last update.
    """

    last_update: keras.Variable
    now: Callable[[], Any]

    def within(self, updates: int) -> Callable[[Any], Any]:
        """Tells of `last_update` which rows moved in so many updates, up to now."""
        now = self.now()
        return lambda last_update: age(now, last_update) < updates


def have_moved(last_update: Any) -> Any:
    """Which rows have moved at all."""
    return last_update != 0

"""Rows of a table: which were sampled, and a weight or slot seen through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops


@dataclass(frozen=True)
class Rows:
    """The rows of a table that one step works on.

    Attributes:
        indices: int tensor of shape `(n,)`, the rows. They may repeat, with the
            same gradient each time. `None` stands for every row of the table.
        gradient: tensor of shape `(n, ...)`, the gradient of each of them,
            duplicates already summed.
        sampled: bool tensor of shape `(n,)`, whether the gradient row has an
            entry that is not zero. `None` if they all have.
    """

    indices: Any
    gradient: Any
    sampled: Any


def decayed(value: Any, log_rate: float, steps: Any) -> Any:
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


class RowView(keras.Variable):
    """Some rows of a variable, read once, that behave like a variable.

    An optimizer's `update_step` reads and assigns it as it would the whole; the
    variable itself does not change until its rows are written back.

    Args:
        rows: tensor of shape `(n, ...)`, the rows' values.
        variable: the Keras variable they are rows of, for name and dtype.
        sampled: bool tensor of shape `(n,)`, the rows that may change; the others
            keep their values, bit for bit. `None` if all may.
        at_once: whether they do so in every assignment, which lets XLA update a
            table in place, or only in `settle`: an optimizer whose step looks
            across rows has to see them as without a mask until then.
    """

    def __init__(
        self, rows: Any, variable: keras.Variable, sampled: Any, at_once: bool
    ) -> None:
        # No `super().__init__`: it would create storage. These are the
        # attributes that the base class's properties read.
        self._value = rows
        self._shape = tuple(rows.shape)
        self._ndim = len(self._shape)
        self._dtype = keras.backend.standardize_dtype(variable.dtype)
        self._name = variable.name
        self._path = variable.path
        self._layout = None
        self._regularizer = None
        self._constraint = None
        self._trainable = False
        self._autocast = False
        self._aggregation = "none"
        self._synchronization = "auto"
        self._overwrite_with_gradient = False
        self._unchanged = rows
        self._sampled = sampled
        self._at_once = at_once

    def assign(self, value: Any) -> Any:
        self._value = ops.cast(ops.convert_to_tensor(value), self._dtype)
        if self._at_once:
            self._keep_unsampled()
        return self._value

    def settle(self) -> Any:
        """The values to write back."""
        if not self._at_once:
            self._keep_unsampled()
        return self._value

    def _keep_unsampled(self) -> None:
        if self._sampled is not None:
            self._value = where(self._sampled, self._value, self._unchanged)

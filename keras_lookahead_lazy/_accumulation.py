"""Gradient accumulation whose cost depends on the sampled rows, not on the table.

Keras keeps an accumulator of the table's shape and works on all of it in every step.
Here a step adds to some rows of the accumulator and records their ids in a list of
fixed size. The update uses the rows in the list and clears them. If the list was too
short or a gradient was dense, the update works on the whole accumulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy._backend import RowGradient, engine

# The list has one entry per this many rows of the table. With more ids in a cycle,
# working on rows would not be faster.
ROWS_PER_ID = 8


@dataclass
class RowAccumulator:
    """What a table has accumulated in a cycle of gradient accumulation.

    Attributes:
        gradients: Keras's accumulator, of the table's shape.
        ids: Int variable of shape `(n,)`, the rows that may be nonzero.
        count: Int scalar variable, how many of the ids are in use. It exceeds the
            length of `ids` if the rows are not known.
        place: The placement of the table.
    """

    gradients: keras.Variable
    ids: keras.Variable
    count: keras.Variable
    place: Any

    def add_rows(self, gradient: RowGradient) -> None:
        """Accumulate the lookups of one step."""
        accumulated = engine.replica(self.gradients, self.gradients)
        engine.step_in_rounds(gradient, [accumulated], self.place, _add)
        count = engine.read_count(self.count)
        more = engine.write_list(self.ids, count, gradient.indices)
        engine.write_count(self.count, count + more)

    def add_whole(self, gradient: Any) -> None:
        """Accumulate a gradient of the table's shape."""
        self.gradients.assign(self.gradients.value + gradient)
        engine.write_count(self.count, self.ids.shape[0] + 1)

    def size(self, look_ups: int | None, steps: int) -> int:
        """Return an upper bound for the number of ids in a cycle of such steps."""
        capacity = self.ids.shape[0]
        return capacity if look_ups is None else min(capacity, steps * look_ups)

    def has_rows(self, size: int) -> Any:
        """Return whether all rows are among the first `size` ids."""
        return engine.read_count(self.count) <= size

    def rows(self, size: int) -> RowGradient:
        """Return the accumulated rows, from the first `size` ids."""
        count = engine.read_count(self.count)
        return engine.listed_rows(self.gradients, self.ids, count, size, self.place)

    def clear_rows(self, gradient: RowGradient) -> None:
        """Set the rows to zero."""
        engine.clear_rows(self.gradients, gradient, self.place)
        engine.write_count(self.count, 0)

    def clear(self) -> None:
        """Set all rows to zero."""
        self.gradients.assign(ops.zeros_like(self.gradients.value))
        engine.write_count(self.count, 0)


def _add(gradient: RowGradient, variables: Sequence[Any]) -> None:
    rows = engine.read_rows(variables[0], gradient.indices) + gradient.by_row()
    engine.write_rows(variables, gradient.indices, [rows])

"""Gradient accumulation whose steps cost the rows that they sampled.

Keras keeps an accumulator of the table's shape and passes over it in every step. Here a
step adds to the accumulator's rows and notes their ids in a list of fixed size; the
update takes the rows from the list, and clears those. Where the list was too short, or
a gradient was dense, the update works on the whole accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy._backend import RowGradient, engine

# The list has an entry for so many rows of the table: with more ids in a cycle, working
# on rows does not pay.
ROWS_PER_ID = 8


@dataclass
class RowAccumulator:
    """What a table has accumulated in a cycle of gradient accumulation.

    Attributes:
        gradients: Keras's accumulator, of the table's shape.
        ids: int variable of shape `(n,)`, the rows that may differ from zero.
        count: int scalar variable, how many of the ids are in use; more than there
            are if the rows are not known.
    """

    gradients: keras.Variable
    ids: keras.Variable
    count: keras.Variable

    def add_rows(self, gradient: RowGradient) -> None:
        """Accumulate the look-ups of one step."""
        accumulated = engine.replica(self.gradients, self.gradients)
        rows = engine.read_rows(accumulated, gradient.indices) + gradient.by_row()
        engine.write_rows([accumulated], gradient.indices, [rows])
        count = engine.read_count(self.count)
        more = engine.write_list(self.ids, count, gradient.indices)
        engine.write_count(self.count, count + more)

    def add_whole(self, gradient: Any) -> None:
        """Accumulate a gradient of the table's shape."""
        self.gradients.assign(self.gradients.value + gradient)
        engine.write_count(self.count, self.ids.shape[0] + 1)

    def size(self, look_ups: int | None, steps: int) -> int:
        """How many ids a cycle of steps like this one has at most, if that is known."""
        capacity = self.ids.shape[0]
        return capacity if look_ups is None else min(capacity, steps * look_ups)

    def has_rows(self, size: int) -> Any:
        """Whether the rows are among the first `size` ids."""
        return engine.read_count(self.count) <= size

    def rows(self, size: int) -> RowGradient:
        """The rows that were accumulated, and no others, from the first ids."""
        count = engine.read_count(self.count)
        return engine.listed_rows(self.gradients, self.ids, count, size)

    def clear_rows(self, gradient: RowGradient) -> None:
        """Make the rows zero again."""
        engine.clear_rows(self.gradients, gradient)
        engine.write_count(self.count, 0)

    def clear(self) -> None:
        """Make everything zero again."""
        self.gradients.assign(ops.zeros_like(self.gradients.value))
        engine.write_count(self.count, 0)

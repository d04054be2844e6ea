"""One step of the inner optimizer, on some rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _catch_up, _keras
from keras_lookahead_lazy._accumulation import RowAccumulator
from keras_lookahead_lazy._backend import RowGradient, Rows, engine
from keras_lookahead_lazy._catch_up import where


@dataclass
class Table:
    """An embedding table and what is kept for it.

    Attributes:
        variable: the table, of shape `(vocabulary, ...)`.
        slots: the inner optimizer's slots for it, by name.
        slots_by_row: the names of those that have an entry for each row.
        log_rates: logarithm of each slot's decay in a step without gradient; empty
            where that is not known, so that each step has to work on every row.
        last_update: int variable of shape `(vocabulary,)`, see `_catch_up`.
        caught_up: int scalar variable, likewise.
        left_out: int scalar variable, the number of updates without a gradient for
            this table, which are no updates of it.
        reason: why each step has to work on every row, or `None`.
        accumulator: for gradient accumulation by rows.
        form: how the last step was computed; empty before the first.
        has_warned: whether the user knows that steps pass over the whole table.
        constraint: the table's, which has none while a step runs.
    """

    variable: keras.Variable
    slots: dict[str, keras.Variable]
    slots_by_row: set[str]
    log_rates: Mapping[str, float]
    last_update: keras.Variable
    caught_up: keras.Variable
    left_out: keras.Variable
    reason: str | None
    accumulator: RowAccumulator | None = None
    form: str = ""
    has_warned: bool = False
    constraint: Any = None

    @property
    def variables(self) -> list[keras.Variable]:
        """The table and what has an entry for each of its rows."""
        return [self.variable, self.last_update, *self.slots.values()]

    @property
    def every_row(self) -> bool:
        """Whether each step has to work on every row."""
        return self.reason is not None


def step(
    table: Table,
    replica: Any,
    gradient: Any,
    learning_rate: Any,
    optimizer: keras.Optimizer,
    updates: Any,
    decays: bool,
) -> None:
    """The inner optimizer's own step, on the sampled rows of a table.

    Args:
        replica: the table, or the replica of it that is being updated.
        gradient: of the table; dense, sparse or a `RowGradient`.
        optimizer: the inner optimizer.
        updates: the number of the table's updates before this one.
        decays: whether slots of rows that were not sampled decay, or stay.
    """
    caught_up = engine.replica(table.caught_up, replica)
    now = _catch_up.add(updates, 1)

    def step_on(gradient: Any, stored: Sequence) -> None:
        rows = _SampledRows(table, stored, gradient, decays)
        if rows.is_empty:
            return  # Keras on TensorFlow cannot add where there are no rows
        if decays and table.log_rates:
            rows.catch_up(updates, caught_up)
        rows.last_update.assign(now + ops.zeros_like(rows.last_update.value))
        _keras.step_on_rows(
            optimizer,
            table.variable,
            rows.weight,
            rows.slots,
            rows.gradient,
            learning_rate,
        )
        if table.constraint is not None:
            rows.weight.assign(table.constraint(rows.weight.masked()))
        rows.write()

    stored = [engine.replica(variable, replica) for variable in table.variables]
    engine.step_in_rounds(gradient, stored, step_on)


class _SampledRows:
    """The rows that a step works on, read once: of the table and what is kept for it.

    Where a step works on the whole table, the rows that were not sampled keep their
    values all the same; only slots that decay do so in every row.
    """

    def __init__(
        self, table: Table, stored: Sequence, gradient: Any, decays: bool
    ) -> None:
        self._stored = stored
        self._log_rates = table.log_rates
        rows, values = _find_rows(gradient, stored, table.every_row)
        self._indices, self.gradient = rows.indices, rows.gradient

        def view(variable: keras.Variable, value: Any, may_all: bool) -> RowView:
            sampled = None if may_all else rows.sampled
            return RowView(value, variable, sampled, late=table.every_row)

        def all_change(name: str) -> bool:
            return name not in table.slots_by_row or (decays and rows.indices is None)

        self.weight = view(table.variable, values[0], may_all=False)
        self.last_update = view(table.last_update, values[1], may_all=False)
        self.slots = {
            name: view(slot, value, may_all=all_change(name))
            for (name, slot), value in zip(table.slots.items(), values[2:], strict=True)
        }

    @property
    def is_empty(self) -> bool:
        """Whether there are no rows, where that is known before the step runs."""
        return self._indices is not None and self._indices.shape[0] == 0

    def catch_up(self, updates: Any, caught_up: Any) -> None:
        """Let slots decay by the steps that their rows missed in so many updates."""
        before = engine.read_rows(caught_up, None)
        missed = _catch_up.steps_missed(updates, self.last_update.value, before)
        _catch_up.decay(self.slots, self._log_rates, missed)
        if self._indices is None:
            engine.write_count(caught_up, _catch_up.add(updates, 1))

    def write(self) -> None:
        """Write the rows back."""
        views = [self.weight, self.last_update, *self.slots.values()]
        values = [view.masked().value for view in views]
        engine.write_rows(self._stored, self._indices, values)


def _find_rows(
    gradient: Any, variables: Sequence, every_row: bool
) -> tuple[Rows, list[Any]]:
    if not isinstance(gradient, RowGradient):
        return engine.find_rows(gradient, variables, every_row)
    rows = engine.mark_idle(gradient.indices, gradient.by_row())
    return rows, [engine.read_rows(variable, rows.indices) for variable in variables]


class RowView(_keras.UnstoredVariable):
    """Some rows of a variable, read once, that behave like a variable.

    An optimizer's `update_step` reads and assigns it as it would the whole; the
    variable itself does not change until its rows are written back.

    Args:
        rows: tensor of shape `(n, ...)`, the rows' values.
        variable: the Keras variable they are rows of, for name and dtype.
        sampled: bool tensor of shape `(n,)`, the rows that may change; the others
            keep their values, bit for bit. `None` if all may.
        late: whether they do so in `masked` only, and not in every assignment, which
            lets XLA update a table in place: an optimizer whose step looks across
            rows has to see them as without a mask until then.
    """

    def __init__(
        self, rows: Any, variable: keras.Variable, sampled: Any, late: bool
    ) -> None:
        super().__init__(rows, variable)
        self._unchanged = None if sampled is None else rows
        self._sampled, self._late = sampled, late

    def assign(self, value: Any) -> Any:
        super().assign(value)
        if not self._late:
            self._keep_others()
        return self.value

    def masked(self) -> RowView:
        """This, with the rows that may not change as they were."""
        if self._late:
            self._keep_others()
        return self

    def _keep_others(self) -> None:
        if self._sampled is not None:
            super().assign(where(self._sampled, self.value, self._unchanged))

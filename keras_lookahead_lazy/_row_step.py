"""Make one step of the inner optimizer on some rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _catch_up, _keras
from keras_lookahead_lazy._accumulation import RowAccumulator
from keras_lookahead_lazy._backend import RowGradient, engine
from keras_lookahead_lazy._catch_up import where

# With fewer tables, each has its own step, because joining rows copies them.
TABLES_TO_JOIN = 4


@dataclass
class Table:
    """An embedding table and what is kept for it.

    Attributes:
        variable: The table, of shape `(vocabulary, ...)`.
        slots: The inner optimizer's slots for the table, by name.
        slots_by_row: The names of the slots that have one entry per row.
        kind: Equal for tables whose rows the inner optimizer updates in the same way,
            so that they can be joined. `None` if it may treat tables differently.
        place: The engine's `placement` of the table.
        log_rates: The logarithm of each slot's decay factor in a step without gradient.
            Empty if it is not known, so that each step has to work on every row.
        last_update: Int variable of shape `(vocabulary,)`, see `_catch_up`.
        caught_up: Int scalar variable, see `_catch_up`.
        left_out: Int scalar variable, the number of updates that had no gradient for
            this table. They do not count as updates of the table.
        reason: Why each step has to work on every row, or `None`.
        accumulator: For gradient accumulation by rows.
        form: How the last step was computed. Empty before the first step.
        has_warned: Whether the user has been warned about steps on the whole table.
        constraint: The table's constraint, saved here because it is removed from the
            variable during a step.
    """

    variable: keras.Variable
    slots: dict[str, keras.Variable]
    slots_by_row: set[str]
    kind: Any
    place: Any
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
        """The table, and the variables that have one entry per row of it."""
        return [self.variable, self.last_update, *self.slots.values()]

    @property
    def every_row(self) -> bool:
        """Whether each step has to work on every row."""
        return self.reason is not None

    def may_join(self) -> bool:
        """Return whether a step may join rows of this table with those of others."""
        return not (self.kind is None or self.every_row or self.constraint is not None)


@dataclass(frozen=True)
class Part:
    """The part of a step that concerns one table.

    Attributes:
        table: The table.
        replica: The variable of the table, or the replica of it that is being updated.
        gradient: The gradient of the table: dense, sparse or a `RowGradient`.
        updates: The number of updates of the table before this one.
    """

    table: Table
    replica: Any
    gradient: Any
    updates: Any

    @property
    def variables(self) -> list:
        """The table and its other variables, all of the same replica."""
        return [engine.replica(v, self.replica) for v in self.table.variables]


def step(
    parts: Sequence[Part], learning_rate: Any, optimizer: keras.Optimizer, decays: bool
) -> None:
    """Make the inner optimizer's own step on the sampled rows of some tables.

    Rows of tables that may be joined form one tensor. Otherwise the step would be
    compiled, or run operation by operation, 26 times for a model with 26 tables.

    Args:
        optimizer: The inner optimizer.
        decays: Whether the slots of rows that were not sampled decay.
    """
    groups: dict[Any, list[Part]] = {}
    for part in parts:
        may_join = part.table.may_join() and engine.may_join(
            part.gradient, part.table.variable
        )
        groups.setdefault(part.table.kind if may_join else id(part), []).append(part)
    for group in groups.values():
        joined = [group] if len(group) >= TABLES_TO_JOIN else [[part] for part in group]
        for members in joined:
            _step_on(members, learning_rate, optimizer, decays)


def _step_on(
    parts: Sequence[Part], learning_rate: Any, optimizer: keras.Optimizer, decays: bool
) -> None:
    table = parts[0].table

    def step_on(rows: _SampledRows) -> None:
        if rows.is_empty:
            return  # Keras on TensorFlow cannot add tensors without rows
        if decays and table.log_rates:
            rows.apply_missed_decay()
        rows.note_update()
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

    if len(parts) > 1:
        step_on(_SampledRows(parts, [part.variables for part in parts], decays))
        return

    def step_on_round(gradient: Any, variables: Sequence) -> None:
        part = replace(parts[0], gradient=gradient)
        step_on(_SampledRows([part], [variables], decays))

    engine.step_in_rounds(
        parts[0].gradient, parts[0].variables, table.place, step_on_round
    )


class _SampledRows:
    """The rows that a step works on, of tables and their variables, read once.

    If the step works on a whole table, rows that were not sampled still keep their
    values. Only decaying slots change in every row.
    """

    def __init__(
        self, parts: Sequence[Part], variables: Sequence[Sequence], decays: bool
    ) -> None:
        self._parts, self._row_variables, table = parts, variables, parts[0].table
        self._log_rates = table.log_rates
        find = self._find if len(parts) == 1 else self._find_joined
        values, sampled = find()
        self._last_updates = values[1]
        decaying = sampled
        if decays and sampled is not None:
            decaying = self._with_whole_tables(sampled)

        def view(variable: keras.Variable, place: int, mask: Any) -> RowView:
            return RowView(
                _joined(values[place]), variable, mask, mask_at_end=table.every_row
            )

        self.weight = view(table.variable, 0, sampled)
        self.last_update = view(table.last_update, 1, sampled)
        self.slots = {
            name: view(slot, place, decaying if name in table.slots_by_row else None)
            for place, (name, slot) in enumerate(table.slots.items(), 2)
        }

    def _with_whole_tables(self, sampled: Any) -> Any:
        """Add every row of the tables that are updated as a whole; `None` if all."""
        are_whole = [indices is None for indices in self._indices]
        if not any(are_whole):
            return sampled
        if all(are_whole):
            return None
        pairs = zip(are_whole, self._last_updates, strict=True)
        fills = [ops.full(ops.shape(rows), whole, "bool") for whole, rows in pairs]
        return sampled | _joined(fills)

    def _find(self) -> tuple[list, Any]:
        """Find the rows of one table.

        Returns:
            The values there of each variable, a list for each; and which of
            the rows were sampled, `None` if all.
        """
        (part,), (variables,) = self._parts, self._row_variables
        if isinstance(part.gradient, RowGradient):
            rows = engine.mark_idle(part.gradient.indices, part.gradient.by_row())
            values = [
                engine.read_rows(variable, rows.indices) for variable in variables
            ]
        else:
            every_row = part.table.every_row
            rows, values = engine.find_rows(part.gradient, variables, every_row)
        self._indices, self.gradient = [rows.indices], rows.gradient
        return [[value] for value in values], rows.sampled

    def _find_joined(self) -> tuple[list, Any]:
        """Find the rows of several tables, idle rows included."""
        found = [
            engine.rows_to_join(part.gradient, variables[0])
            for part, variables in zip(self._parts, self._row_variables, strict=True)
        ]
        self._indices = [indices for indices, _ in found]
        self.gradient = _joined([gradient for _, gradient in found])
        values = [
            [engine.read_rows(variable, indices) for variable in variables]
            for variables, indices in zip(
                self._row_variables, self._indices, strict=True
            )
        ]
        return list(map(list, zip(*values, strict=True))), engine.sampled(self.gradient)

    @property
    def is_empty(self) -> bool:
        """Whether there are no rows, if that is known before the step runs."""
        return all(i is not None and i.shape[0] == 0 for i in self._indices)

    def _of_each_table(self, numbers: Sequence[Any]) -> Any:
        """Repeat each table's number for its rows. With one table, return it."""
        if len(numbers) == 1:
            return numbers[0]
        pairs = zip(numbers, self._last_updates, strict=True)
        return _joined([number + ops.zeros_like(rows) for number, rows in pairs])

    def apply_missed_decay(self) -> None:
        """Apply the decay that rows missed before this update."""
        counters = [
            engine.replica(part.table.caught_up, part.replica) for part in self._parts
        ]
        before = self._of_each_table([engine.read_rows(c, None) for c in counters])
        updates = self._of_each_table([part.updates for part in self._parts])
        missed = _catch_up.steps_missed(updates, self.last_update.value, before)
        _catch_up.decay(self.slots, self._log_rates, missed)
        for part, indices, counter in zip(
            self._parts, self._indices, counters, strict=True
        ):
            if indices is None:
                engine.write_count(counter, _catch_up.add(part.updates, 1))

    def note_update(self) -> None:
        """Record this update as the last one that moved the rows."""
        now = [_catch_up.add(part.updates, 1) for part in self._parts]
        zeros = ops.zeros_like(self.last_update.value)
        self.last_update.assign(self._of_each_table(now) + zeros)

    def write(self) -> None:
        """Write the rows back."""
        views = [self.weight, self.last_update, *self.slots.values()]
        values = [view.masked().value for view in views]
        if len(self._parts) == 1:
            engine.write_rows(self._row_variables[0], self._indices[0], values)
            return
        split = [engine.split(value, self._last_updates) for value in values]
        for variables, indices, *new in zip(
            self._row_variables, self._indices, *split, strict=True
        ):
            engine.write_rows(variables, indices, new)


def _joined(tensors: Sequence[Any]) -> Any:
    return tensors[0] if len(tensors) == 1 else ops.concatenate(tensors)


class RowView(_keras.UnstoredVariable):
    """Some rows of a variable, read once, that behave like a variable.

    An optimizer's `update_step` reads and assigns this as it would the whole variable.
    The variable itself does not change until the rows are written back.

    Args:
        rows: Tensor of shape `(n, ...)`, the values of the rows.
        variable: The Keras variable that they are rows of, for name and dtype.
        sampled: Bool tensor of shape `(n,)`, the rows that may change. The others keep
            their values, bit for bit. `None` if all rows may change.
        mask_at_end: Whether to mask only in `masked()` rather than on every assignment.
            Masking on every assignment lets XLA update a table in place. But an
            optimizer whose step looks across rows must see unmasked values until the
            step is complete.
    """

    def __init__(
        self, rows: Any, variable: keras.Variable, sampled: Any, mask_at_end: bool
    ) -> None:
        super().__init__(rows, variable)
        self._unchanged = None if sampled is None else rows
        self._sampled, self._mask_at_end = sampled, mask_at_end

    def assign(self, value: Any) -> Any:
        super().assign(value)
        if not self._mask_at_end:
            self._keep_others()
        return self.value

    def masked(self) -> RowView:
        """Return this, with the rows that may not change restored."""
        if self._mask_at_end:
            self._keep_others()
        return self

    def _keep_others(self) -> None:
        if self._sampled is not None:
            super().assign(where(self._sampled, self.value, self._unchanged))

"""What a LazyOptimizer does in a step: take the rows, update them, defer decay."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _catch_up, _decay_rates, _keras, _tables
from keras_lookahead_lazy._accumulation import RowAccumulator
from keras_lookahead_lazy._backend import RowGradient, engine
from keras_lookahead_lazy._keras import chain
from keras_lookahead_lazy._row_step import Part, Table, step
from keras_lookahead_lazy._wrapper import OptimizerWrapper

# A step that works on all rows of a larger table causes a warning.
LARGE = 10**5
REGULARIZED = (
    "the table's embeddings_regularizer gives every row a gradient. The layer's "
    "activity_regularizer penalizes only the rows that are looked up"
)


class LazyStep(OptimizerWrapper):
    """The step of a `LazyOptimizer`, which adds arguments, tables and saved state."""

    _moments: str

    def __init__(
        self, optimizer: keras.Optimizer | str | dict, name: str | None
    ) -> None:
        super().__init__(optimizer, name)
        self._set_untracked(_tables={}, _taken={}, _waiting={})
        self._steps_running = 0  # one for each replica within a step

    def _set_untracked(self, **attributes: Any) -> None:
        """Set attributes that neither Keras nor TensorFlow should track and save."""
        self.__dict__.update(attributes)

    def _apply(self, grads: list, variables: list | None) -> None:
        """Let the inner optimizer update the weights, and tables by sampled rows."""
        self.refresh_rates()
        weights = variables or _keras.weights(self)
        given = {
            _keras.key(self, weight)
            for gradient, weight in zip(grads, weights, strict=True)
            if gradient is not None
        }
        self._set_untracked(_waiting={}, _expected=len(given & self._tables.keys()))
        update = self._accumulate if self._accumulates() else self._apply_inner
        with self.rows_taken(grads, variables) as sums, self._step():
            updated = update(sums, variables)
        for key, table in self._tables.items():
            if key not in given:  # no gradient is not the same as a zero gradient
                left_out = engine.read_count(table.left_out)
                engine.write_count(table.left_out, _catch_up.add(left_out, updated))
        updates = _catch_up.add(engine.read_count(self._counter), updated)
        engine.write_count(self._counter, updates)

    def refresh_rates(self) -> None:
        """Update the decay rates from the inner optimizer's current settings.

        Decay that is still outstanding is applied with the old rates first.
        """
        if not self.built:
            return
        log_rates = _decay_rates.log_rates(_keras.innermost(self._inner))
        changed = [t for t in self._tables.values() if not t.every_row]
        changed = [table for table in changed if table.log_rates != log_rates]
        if changed and not engine.is_recording():
            self.catch_up()
        for table in changed:
            table.log_rates = log_rates or {}

    def _updates(self, table: Table) -> Any:
        """Return the number of updates that a table has had so far."""
        updates = engine.read_count(self._counter)
        return _catch_up.add(updates, -engine.read_count(table.left_out))

    @contextlib.contextmanager
    def rows_taken(self, grads: list, variables: list | None) -> Iterator[list]:
        """Yield gradients in a form that Keras can compute with, for one step.

        If the gradient of a table consists only of lookups, Keras gets their sums over
        duplicates, of shape `(lookups, ...)`. Clipping and scaling have the same effect
        on these sums as on the whole gradient. The ids of the rows are kept here until
        `update_step` needs them.

        A LossScaleOptimizer around this one calls this before it checks gradients.
        """
        if self._taken:
            yield grads
            return
        weights = variables or _keras.weights(self)
        try:
            yield [self._take(g, w) for g, w in zip(grads, weights, strict=True)]
        finally:
            self._taken.clear()

    def has_taken_rows(self) -> bool:
        return bool(self._taken)

    def _take(self, gradient: Any, variable: Any) -> Any:
        table = self._tables.get(_keras.key(self, variable))
        if table is None or gradient is None:
            return gradient
        computes, reason = self._uses_whole_gradients(), None
        if self._may_take_rows(table):
            # Replicas add up `tf.IndexedSlices`, which Keras clips and scales before.
            if engine.takes_rows(gradient) and (
                not computes or engine.num_replicas() > 1
            ):
                self._note_form(table, None)
                return engine.sum_duplicates(gradient) if computes else gradient
            found = engine.row_gradient(
                gradient,
                table.variable,
                table.place,
                is_listed=bool(self.gradient_accumulation_steps),
            )
            if isinstance(found, RowGradient):
                self._note_form(table, None)
                self._taken[_keras.key(self, variable)] = found
                return found.sums
            reason = found
            if getattr(table.variable, "regularizer", None) is not None:
                reason = REGULARIZED
        self._note_form(table, reason)
        return (engine.sum_duplicates if computes else engine.for_keras)(gradient)

    def _may_take_rows(self, table: Table) -> bool:
        if self.gradient_accumulation_steps and not self._accumulates():
            return False
        return not table.every_row

    def _uses_whole_gradients(self) -> bool:
        """Return whether Keras changes gradients before it updates rows."""
        inner = _keras.innermost(self._inner)
        settings = ("clipnorm", "clipvalue", "global_clipnorm", "loss_scale_factor")
        return (
            any(getattr(inner, setting) is not None for setting in settings)
            or bool(self.gradient_accumulation_steps)
            or self._is_loss_scaled()
        )

    def _is_loss_scaled(self) -> bool:
        """Return whether there is a LossScaleOptimizer inside or around this one."""
        outermost = [self, *self.wrappers_around()][-1]
        around = chain(getattr(self._model(), "optimizer", None) or outermost)
        scaling = keras.optimizers.LossScaleOptimizer
        return any(isinstance(each, scaling) for each in around + chain(self._inner))

    # Gradient accumulation

    def _accumulates(self) -> bool:
        """Return whether this class accumulates gradients by rows, not Keras."""
        return (
            bool(self.gradient_accumulation_steps)
            and not self.use_ema  # Keras updates the averages in every step
            and not self._scales_the_loss()
            and engine.num_replicas() == 1
        )

    def _accumulate(self, grads: list, variables: list | None) -> Any:
        """Accumulate gradients, and in every n-th step update with their mean.

        Returns:
            The number of updates of the weights, 0 or 1.
        """
        inner, steps = _keras.innermost(self._inner), self.gradient_accumulation_steps
        weights = variables or _keras.weights(self)
        pairs = [p for p in zip(grads, weights, strict=True) if p[0] is not None]
        sizes: dict[Any, int] = {}  # of the lists of rows
        are_known: Any = True
        for gradient, weight in pairs:
            key = _keras.key(self, weight)
            accumulator = self._accumulator(key)
            if accumulator is None:
                sums = _keras.accumulator(inner, weight)
                sums.assign(sums.value + gradient)
            elif key in self._taken:
                look_ups = engine.fixed_length(self._taken[key].indices)
                accumulator.add_rows(self._taken[key]._replace(sums=gradient))
                sizes[key] = accumulator.size(look_ups, steps)
                are_known &= accumulator.has_rows(sizes[key])
            else:
                accumulator.add_whole(gradient)
        calls = engine.read_count(_keras.counter(inner))
        is_update = (calls + 1) % steps == 0
        given = [weight for _, weight in pairs]
        changed = _keras.unique([*given, *_keras.all_variables(self)])
        for by_rows, predicate in ((sizes, are_known), ({}, are_known ^ True)):
            if predicate is not False:
                update = functools.partial(self._update_with_mean, given, by_rows)
                engine.run_if(is_update & predicate, update, changed)
        engine.write_count(_keras.counter(inner), calls + 1)
        return (
            ops.cast(is_update, engine.INTEGERS)
            if not isinstance(is_update, bool)
            else int(is_update)
        )

    def _accumulator(self, key: Any) -> RowAccumulator | None:
        return self._tables[key].accumulator if key in self._tables else None

    def _update_with_mean(self, weights: list, sizes: dict) -> None:
        """Update with the mean of the accumulated gradients, then clear them.

        Args:
            sizes: The length of the list of ids, for tables to update by rows.
        """
        inner, steps = _keras.innermost(self._inner), self.gradient_accumulation_steps
        self._taken.clear()
        means = []
        for weight in weights:
            key = _keras.key(self, weight)
            accumulator = self._accumulator(key)
            if accumulator is not None and key in sizes:
                rows = accumulator.rows(sizes[key])
                self._taken[key] = rows
                means.append(rows.sums / steps)
            else:
                means.append(_keras.accumulator(inner, weight).value / steps)
        with _keras.without_accumulation(inner):
            engine.apply(self._inner, means, weights, _keras.own_variables(self))
        for weight in _keras.weights(self):
            key = _keras.key(self, weight)
            accumulator = self._accumulator(key)
            if accumulator is None:
                sums = _keras.accumulator(inner, weight)
                sums.assign(ops.zeros_like(sums.value))
            elif key in sizes:
                accumulator.clear_rows(self._taken[key])
            else:
                accumulator.clear()

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        """Take over the tables' updates and constraints for the length of a step.

        Keras would apply a constraint to every row. Outside of a step, the model and
        the inner optimizer are unchanged.
        """
        inner = _keras.innermost(self._inner)
        tables = self._tables.values()
        self._steps_running += 1
        if self._steps_running == 1:
            for table in tables:
                table.constraint = table.variable.constraint
                table.variable.constraint = None
            give_back = _keras.take_over(
                inner, self._is_lazy, self._update_table, engine.on_values
            )
            self._set_untracked(_give_back=give_back)
        try:
            yield
        finally:
            self._steps_running -= 1
            if not self._steps_running:
                self._give_back()
                for table in tables:
                    table.variable.constraint = table.constraint

    def _is_lazy(self, variable: Any) -> bool:
        return self._steps_running > 0 and _keras.key(self, variable) in self._tables

    def _update_table(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Make the inner optimizer's step on a table, or on the replica of one.

        The step waits until all tables of the replica are here, to join their rows.
        """
        key = _keras.key(self, variable)
        if key in self._taken:
            gradient = self._taken[key]._replace(sums=gradient)
        table = self._tables[key]
        part = Part(table, variable, gradient, self._updates(table))
        replica = variable.device if engine.num_replicas() > 1 else None
        parts = self._waiting.setdefault(replica, [])
        parts.append(part)
        if len(parts) == self._expected:
            del self._waiting[replica]
            optimizer, decays = _keras.innermost(self._inner), self._moments == "decay"
            step(parts, learning_rate, optimizer, decays)

    # Rows that are behind

    def catch_up(self) -> None:
        """Bring the slots of every row up to date.

        A step does this only for the rows that it samples. Call this method between two
        calls of `fit`: before you use the inner optimizer without its wrapper, and on
        JAX before you read slots. On TensorFlow and torch, reading `variables` or
        `inner_optimizer` calls it. It works on the whole of each table. Apart from
        rounding, it does not change the training.
        """
        for table in self._tables.values():
            updates = self._updates(table)
            caught_up = engine.read_count(table.caught_up)
            if engine.is_recording() or _catch_up.is_after(
                int(updates), int(caught_up)
            ):
                self._catch_up_table(table, updates, caught_up)

    def _catch_up_table(self, table: Table, updates: Any, caught_up: Any) -> None:
        log_rates = table.log_rates if self._moments == "decay" else {}
        slots = {n: slot for n, slot in table.slots.items() if log_rates.get(n)}

        def current(last_update: Any, *values: Any) -> tuple:
            missed = _catch_up.steps_missed(updates, last_update, caught_up)
            views = {
                name: _keras.UnstoredVariable(value, slots[name])
                for name, value in zip(slots, values, strict=True)
            }
            _catch_up.decay(views, log_rates, missed)
            last_update = _catch_up.kept_old(updates, last_update)
            return last_update, *(view.value for view in views.values())

        engine.update((table.last_update, *slots.values()), current)
        engine.write_count(table.caught_up, updates)

    def variables_that_catch_up(self) -> list[keras.Variable]:
        return [
            variable
            for table in self._tables.values()
            for variable in (table.caught_up, table.last_update, *table.slots.values())
        ]

    def _make_slots_current(self) -> None:
        # Not on JAX, where `fit` keeps slots elsewhere. And not for a file, which holds
        # slots as they are: saving must not change a run, not even by rounding.
        if (
            engine.VARIABLES_HOLD_STATE
            and self.built
            and not engine.is_recording()
            and not _keras.is_saving_or_loading()
        ):
            self.catch_up()

    # Step forms

    def _form(self, table: Table, seen: str | None) -> str:
        """Return how a step on a table is computed.

        Args:
            seen: Why the gradient of this step is dense, or `None` if it is not.
        """
        reason = table.reason or self._why_gradients_are_dense() or seen
        if reason is not None:
            return f"masked: {reason}"
        return "rows; use_ema averages every row" if self.use_ema else "rows"

    def _note_form(self, table: Table, seen: str | None) -> None:
        table.form = self._form(table, seen)
        rows = table.variable.shape[0]
        if table.form == "rows" or rows <= LARGE or table.has_warned:
            return
        table.has_warned = True
        warnings.warn(
            f"Each step works on all {rows} rows of {_keras.path(table.variable)} "
            f"({table.form}). See `step_forms` and the documentation page "
            "'Large embedding tables'.",
            stacklevel=2,
        )

    def _table_names(self) -> list[str]:
        tables = [table.variable for table in self._tables.values()]
        return _tables.unique_names(tables, _keras.weights(self))

    def _why_gradients_are_dense(self) -> str | None:
        if self.gradient_accumulation_steps and not self._accumulates():
            return "gradient accumulation works on whole gradients in this set-up"
        return None

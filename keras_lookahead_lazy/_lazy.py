"""LazyOptimizer: update embedding rows only in steps that sampled them."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lookahead_lazy import _catch_up, _decay_rates, _keras, _look_ups, _tables
from keras_lookahead_lazy._accumulation import ROWS_PER_ID, RowAccumulator
from keras_lookahead_lazy._arguments import (
    check_choice,
    check_rows_may_rest,
    check_slots_are_known,
    check_weights,
    explain_unknown_arguments,
)
from keras_lookahead_lazy._backend import RowGradient, engine
from keras_lookahead_lazy._catch_up import MovedRows
from keras_lookahead_lazy._keras import chain
from keras_lookahead_lazy._row_step import Part, Table, step
from keras_lookahead_lazy._wrapper import OptimizerWrapper

MOMENTS = ("decay", "freeze")
# A step that works on all rows of a larger table causes a warning.
LARGE = 10**5
REGULARIZED = (
    "the table's embeddings_regularizer gives every row a gradient. The layer's "
    "activity_regularizer penalizes only the rows that are looked up"
)


@keras.saving.register_keras_serializable(package="keras_lookahead_lazy")
class LazyOptimizer(OptimizerWrapper):
    r"""Updates the rows of embedding tables only in steps that sampled them.

    A row is sampled in a step if its row \(g_i\) of the gradient has a nonzero entry.
    Let \(u(\theta, s, g)\) be the inner optimizer's update of a weight \(\theta\) and
    its slots \(s\). Then

    $$(\theta_i, s_i) \leftarrow
      \begin{cases} u(\theta_i, s_i, g_i) & g_i \neq 0 \\
      (\theta_i, s'_i) & g_i = 0. \end{cases}$$

    So neither momentum nor weight decay nor a constraint moves a row whose token was
    not in the batch. `moments` chooses \(s'_i\). All other weights are updated exactly
    as by the inner optimizer.

    If a table is used only for lookups, a step reads and writes the rows that were
    looked up and no others. With `moments="decay"`, the decay of the other rows is
    deferred until they are sampled again, or until `catch_up()`.

    Example:

    >>> import keras
    >>> from keras_lookahead_lazy import LazyOptimizer
    >>> words = keras.layers.Embedding(20000, 128)
    >>> model = keras.Sequential([words, keras.layers.LSTM(128)])
    >>> optimizer = LazyOptimizer(keras.optimizers.Adam(1e-3), [words])
    >>> model.compile(optimizer=optimizer, loss="mse")

    If a table is frozen, this warns and trains the other weights.

    Args:
        optimizer: Keras optimizer instance, its name or its config. The inner
            optimizer.
        embedding_layers: List of `keras.layers.Embedding` layers (built or not), of
            variables, or of names or paths of either. If `None`, every `Embedding`
            layer of the model is used. Defaults to `None`.
        moments: `"decay"` or `"freeze"`. What happens to the slots of rows that were
            not sampled: `"decay"` lets them decay as under a zero gradient, and
            `"freeze"` leaves them unchanged. Defaults to `"decay"`.
        name: String. The name of the optimizer. Defaults to `None`, in which case
            Keras chooses one.

    Raises:
        TypeError: If an argument has the wrong type or belongs to the inner
            optimizer.
        ValueError: If `moments` is unknown, if wrappers are nested in a wrong order,
            or (possibly only in `build`) if `embedding_layers` names something that
            is not an embedding table of the model.

    Reference: Su Jianlin (bojone), keras_lazyoptimizer. Two of its faults were not
    carried over: it masked the learning rate, under which momentum still moved rows
    that were not sampled, and it counted additional steps.
    """

    @explain_unknown_arguments
    def __init__(
        self,
        optimizer: keras.Optimizer | str | dict,
        embedding_layers: list | None = None,
        moments: str = "decay",
        name: str | None = None,
    ) -> None:
        super().__init__(optimizer, name)
        _check_nesting(self._inner)
        sources = _tables.check_sources(embedding_layers)
        check_choice("moments", moments, MOMENTS, _MOMENTS_SAY)
        self._moments = moments
        self._remember(_sources=sources, _frozen=[], _tables={}, _taken={}, _waiting={})
        self._steps_running = 0  # one for each replica within a step

    def _remember(self, **attributes: Any) -> None:
        """Set attributes that neither Keras nor TensorFlow should track and save."""
        self.__dict__.update(attributes)

    @property
    def moments(self) -> str:
        """`"decay"` or `"freeze"`.

        You can set it between two calls of `fit`. Functions that were compiled before
        keep the old mode until the model is compiled again.
        """
        return self._moments

    @moments.setter
    def moments(self, moments: str) -> None:
        check_choice("moments", moments, MOMENTS, _MOMENTS_SAY)
        if self.built:
            self._check_slots(moments, [t.variable for t in self._tables.values()])
            self.catch_up()
        self._moments = moments

    @property
    def step_forms(self) -> dict[str, str]:
        """How the last step of each table was computed, by the table's name.

        - `"rows"`: the step worked on the looked-up rows.
        - `"masked: ..."`: the step worked on the whole table and kept the result only
          in sampled rows, for the reason given.

        For a compiled step, this is what tracing found. Before the first step, it is
        what is expected, with `" (expected)"` at the end. The name of a table is its
        path. If two tables share a path, their positions among the weights are added,
        as in `path:3`.
        """
        forms = [
            table.form or f"{self._form(table, None)} (expected)"
            for table in self._tables.values()
        ]
        return dict(zip(self._table_names(), forms, strict=True))

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

    def build(self, variables: list[keras.Variable]) -> None:
        """Find the tables, create variables, and take over the tables' updates.

        Args:
            variables: The trainable variables of the model.
        """
        if self.built:
            return
        variables = check_weights(variables)
        engine.check_distribution(variables)
        _check_nesting(self._inner)
        weights = getattr(self._model(), "weights", [])
        found, frozen = _tables.find_tables(self._sources, variables, weights)
        if frozen and variables:
            warnings.warn(
                "LazyOptimizer does not train embedding tables that are frozen: "
                f"{', '.join(frozen)}. All other weights are trained. After "
                "unfreezing, compile the model with a new LazyOptimizer.",
                stacklevel=2,
            )
        if not self._inner.built:
            self._inner.build(variables)
        self._check_slots(self._moments, found)
        super().build(variables)
        tables = {_keras.key(self, v): self._make_table(v) for v in found}
        self._remember(_frozen=frozen, _tables=tables)
        _keras.will_take_over(_keras.innermost(self._inner))
        _look_ups.look_up_by_rows(
            self, [t.variable for t in tables.values() if not t.every_row]
        )

    def _check_slots(self, moments: str, tables: list[keras.Variable]) -> None:
        """Raise if "freeze" cannot find the slots of the inner optimizer."""
        inner = _keras.innermost(self._inner)
        for table in tables if moments == "freeze" else []:
            # Slots are recognized by their number of rows: only such weights matter.
            rows = tuple(table.shape[:1])
            alike = [v for v in _keras.weights(inner) if tuple(v.shape[:1]) == rows]
            check_slots_are_known("moments='freeze'", inner, alike, "moments='decay'")

    def _make_table(self, variable: keras.Variable) -> Table:
        inner = _keras.innermost(self._inner)
        with engine.outside_graph():
            slots_by_row = _keras.slots_by_row(inner, variable)
        log_rates = _decay_rates.log_rates(inner)
        reason = None
        if log_rates is None:
            reason = f"{type(inner).__name__} is not known to treat each row by "
            reason += "itself, with slots that decay by constant factors"
        elif not _tables.acts_on_rows(variable.constraint):
            reason = f"the constraint {variable.constraint!r} looks across rows"
        name = variable.path.replace("/", "_")  # as slots are named
        last_update = self.add_variable(
            shape=variable.shape[:1],
            dtype=engine.INTEGERS,
            layout=engine.row_layout(variable),
            name=f"{name}_last_update",
        )
        return Table(
            variable,
            slots=_keras.slots(inner, variable),
            slots_by_row=slots_by_row,
            kind=self._kind(variable, slots_by_row),
            place=engine.placement(variable),
            log_rates=log_rates or {},
            last_update=last_update,
            caught_up=self._add_number(f"{name}_caught_up"),
            left_out=self._add_number(f"{name}_left_out"),
            reason=reason,
            accumulator=self._make_accumulator(variable, name) if not reason else None,
        )

    def _kind(self, table: keras.Variable, slots_by_row: set[str]) -> Any:
        """Return what tables must have in common for their rows to be joined."""
        inner = _keras.innermost(self._inner)
        if not _keras.updates_all_alike(inner):
            return None
        slots = _keras.slots(inner, table)
        if slots.keys() != slots_by_row:
            return None
        shapes = [(name, slot.shape[1:], slot.dtype) for name, slot in slots.items()]
        decays = _keras.decays_weight(inner, table)
        place = engine.placement(table)
        return table.shape[1:], table.dtype, tuple(shapes), decays, place

    def _make_accumulator(
        self, variable: keras.Variable, name: str
    ) -> RowAccumulator | None:
        if not self.gradient_accumulation_steps:
            return None
        length = max(1, variable.shape[0] // ROWS_PER_ID)
        return RowAccumulator(
            _keras.accumulator(_keras.innermost(self._inner), variable),
            ids=self.add_variable(
                shape=(length,), dtype=engine.INTEGERS, name=f"{name}_accumulated"
            ),
            count=self._add_number(f"{name}_accumulated_count"),
        )

    def _add_number(self, name: str) -> keras.Variable:
        return self.add_variable(shape=(), dtype=engine.INTEGERS, name=name)

    # A step

    def _apply(self, grads: list, variables: list | None) -> None:
        """Let the inner optimizer update the weights, and tables by sampled rows."""
        self.refresh_rates()
        weights = variables or _keras.weights(self)
        given = {
            _keras.key(self, weight)
            for gradient, weight in zip(grads, weights, strict=True)
            if gradient is not None
        }
        self._remember(_waiting={}, _expected=len(given & self._tables.keys()))
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
            if engine.takes_rows(gradient) and not computes:
                self._note_form(table, None)
                return gradient
            found = engine.row_gradient(gradient, table.variable)
            if isinstance(found, RowGradient):
                self._note_form(table, None)
                self._taken[_keras.key(self, variable)] = found
                return found.sums
            reason = found
            if getattr(table.variable, "regularizer", None) is not None:
                reason = REGULARIZED
        self._note_form(table, reason)
        return (engine.sum_duplicates if computes else engine.whole)(gradient)

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
            give_back = _keras.take_over(inner, self._is_lazy, self._update_table)
            self._remember(_give_back=give_back)
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
                self._catch_up(table, updates, caught_up)

    def _catch_up(self, table: Table, updates: Any, caught_up: Any) -> None:
        log_rates = table.log_rates if self._moments == "decay" else {}
        slots = {n: slot for n, slot in table.slots.items() if log_rates.get(n)}

        def catch_up(last_update: Any, *values: Any) -> tuple:
            missed = _catch_up.steps_missed(updates, last_update, caught_up)
            views = {
                name: _keras.UnstoredVariable(value, slots[name])
                for name, value in zip(slots, values, strict=True)
            }
            _catch_up.decay(views, log_rates, missed)
            last_update = _catch_up.kept_old(updates, last_update)
            return last_update, *(view.value for view in views.values())

        engine.update((table.last_update, *slots.values()), catch_up)
        engine.write_count(table.caught_up, updates)

    def variables_behind(self) -> list[keras.Variable]:
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

    # Which rows moved

    def update_counts(self) -> dict[str, int]:
        """Return how many updates each table has had, outside of a step."""
        counts = [int(self._updates(table)) for table in self._tables.values()]
        return dict(zip(self._table_names(), counts, strict=True))

    def sampled_shares(self, since: dict[str, int]) -> dict[str, float]:
        """Return the share of each table's rows sampled after update `since`."""
        shares = {}
        for name, table in zip(self._table_names(), self._tables.values(), strict=True):
            updates = self._updates(table)
            steps = _catch_up.add(int(updates), -since.get(name, 0))
            ages = _catch_up.age(updates, table.last_update.value)
            shares[name] = int(ops.count_nonzero(ages < steps)) / len(ages)
        return shares

    def moved_rows(self) -> dict[Any, MovedRows]:
        if self.ema_overwrite_frequency:  # averages replace every row
            return {}
        return {
            key: MovedRows(table.last_update, functools.partial(self._updates, table))
            for key, table in self._tables.items()
        }

    def _saved_facts(self) -> dict[str, np.ndarray]:
        facts, weights = super()._saved_facts(), _keras.weights(self)
        keys = [_keras.key(self, weight) for weight in weights]
        facts["tables"] = np.array([keys.index(key) for key in self._tables], "int32")
        return facts

    def _stores_differently(self, shapes: list[tuple]) -> bool:
        rows = [table.last_update.shape for table in self._tables.values()]
        return shapes == [(), *(shape for row in rows for shape in (tuple(row), ()))]

    def _own_numbers(self) -> dict[str, float]:
        return {"decays": float(self._moments == "decay")}

    def _compare(self, numbers: dict[str, float]) -> None:
        stored, own = numbers.get("decays"), self._own_numbers()["decays"]
        if stored is not None and stored != own:
            for table in self._tables.values():  # the new mode applies from here on
                table.caught_up.assign(self._updates(table))
            old, new = (MOMENTS[1 - int(decays)] for decays in (stored, own))
            warnings.warn(
                f"The file was saved with moments={old!r}; training continues with "
                f"moments={new!r}. To continue as before, create the LazyOptimizer "
                f"with moments={old!r}.",
                stacklevel=2,
            )

    def _own_settings(self) -> dict[str, Any]:
        tables = [table.variable for table in self._tables.values()]
        names = _tables.source_names(
            self._sources, tables, _keras.weights(self), self._frozen
        )
        return {"embedding_layers": names, "moments": self._moments}


_MOMENTS_SAY = "what happens to the slots of rows that were not sampled"


def _check_nesting(inner_optimizer: keras.Optimizer) -> None:
    for optimizer in chain(inner_optimizer):
        inside = type(optimizer).__name__
        if isinstance(optimizer, LazyOptimizer):
            raise ValueError(
                "A LazyOptimizer cannot be inside another LazyOptimizer. List all "
                "tables in one: LazyOptimizer(Adam(1e-3), embedding_layers=[...])."
            )
        if isinstance(optimizer, OptimizerWrapper):
            raise ValueError(
                f"LazyOptimizer goes inside {inside}, not around it: write "
                f"{inside}(LazyOptimizer(Adam(1e-3)), ...)."
            )
        if hasattr(optimizer, "optimizers"):
            raise ValueError(
                f"LazyOptimizer goes inside {inside}, not around it: wrap the "
                "optimizer in it that trains the embedding tables."
            )
        if _keras.is_taken_over(optimizer):
            raise ValueError(
                f"This {inside} is already inside another LazyOptimizer. "
                "Give each LazyOptimizer its own inner optimizer."
            )
    check_rows_may_rest(_keras.innermost(inner_optimizer))

"""LazyOptimizer: embedding rows move only when their token was sampled."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _decay, _look_ups, _private, _rows, _tables
from keras_lookahead_lazy._backend import engine
from keras_lookahead_lazy._wrapper import OptimizerWrapper, chain

MOMENTS = ("decay", "freeze")


@dataclass
class Table:
    """An embedding table and what is kept for it.

    Attributes:
        variable: the table, of shape `(vocabulary, ...)`.
        slots: the inner optimizer's slots for it, by name.
        slots_by_row: the names of those that have an entry for each row.
        log_rates: logarithm of each slot's decay in a step without gradient, where
            the step is computed on rows.
        last_update: int32 variable of shape `(vocabulary,)`, the update that moved
            a row last; `None` where the backend has no place to note it.
        caught_up: int32 scalar, the update up to which all slots are current. A
            row's slots are current up to this or to its last update.
        constraint: the constraint of the table, which has none while a step runs.
        reason: why the masked form is used, or `None`.
        slow: the slow copy that a Lookahead around this keeps of the table, if rows
            are copied there when a cycle first moves them.
        lookups: number of look-ups in the step traced last, where it is known and
            the step works on rows.
    """

    variable: keras.Variable
    slots: dict[str, keras.Variable]
    slots_by_row: set[str]
    log_rates: dict[str, float]
    last_update: keras.Variable | None
    caught_up: keras.Variable | None
    reason: str | None
    slow: keras.Variable | None = None
    lookups: int | None = None
    constraint: Any = None


@keras.saving.register_keras_serializable(package="keras_lookahead_lazy")
class LazyOptimizer(OptimizerWrapper):
    r"""Updates the rows of embedding tables only in steps that sampled them.

    A row is sampled in a step when its gradient row \(g_i\) is not all zero. With
    \(u(\theta, s, g)\) the update that the inner optimizer makes of a weight
    \(\theta\) and its slots \(s\),

    $$(\theta_i, s_i) \leftarrow
      \begin{cases} u(\theta_i, s_i, g_i) & g_i \neq 0 \\
      (\theta_i, s'_i) & g_i = 0, \end{cases}$$

    so that no momentum, weight decay or constraint moves a row whose token was not
    in the batch. `moments` chooses \(s'_i\). All other weights are updated exactly
    as by the inner optimizer.

    A table that is only looked up has a gradient that is known by rows. Its step
    reads and writes those rows and no others, in both modes: a row's slots catch up
    on the decay they missed when the row is next sampled, or in `catch_up()`.

    Example:

    >>> import keras
    >>> from keras_lookahead_lazy import LazyOptimizer
    >>> words = keras.layers.Embedding(20000, 128)
    >>> model = keras.Sequential([words, keras.layers.LSTM(128)])
    >>> optimizer = LazyOptimizer(keras.optimizers.Adam(1e-3), [words])
    >>> model.compile(optimizer=optimizer, loss="mse")

    Args:
        optimizer: the inner optimizer: a Keras optimizer, its name or its config.
        embedding_layers: the tables: a list of `keras.layers.Embedding` layers
            (built or not), variables, or names and paths of either. `None`, the
            default, takes the table of every Embedding layer.
        moments: what slots of rows that were not sampled do. `"decay"`: what the
            inner optimizer's slots do under a zero gradient. `"freeze"`: they stay.
        name: name of the optimizer.

    Raises:
        TypeError: an argument is of the wrong kind, or meant for the inner
            optimizer.
        ValueError: `moments` is unknown, the order of nesting has no meaning, or
            `embedding_layers` names something that is no table of the model (the
            last may be known in `build` only). A table that is frozen is a warning.

    Reference: Su Jianlin (bojone), keras_lazyoptimizer. Two of its faults are not
    taken over: it masked the learning rate, under which momentum still moved rows
    that were not sampled, and it counted every step twice.
    """

    def __init__(
        self,
        optimizer: keras.Optimizer | str | dict,
        embedding_layers: list | None = None,
        moments: str = "decay",
        name: str | None = None,
        **misplaced: Any,
    ) -> None:
        sources = _tables.check_sources(embedding_layers)
        _check_moments(moments)
        super().__init__(optimizer, name, misplaced)
        _check_nesting(self._inner)
        self._moments = moments
        self._remember(
            _sources=sources, _frozen=[], _tables=[], _by_key={}, _row_gradients={}
        )
        self._steps_running = 0  # one for each replica within a step

    @_private.no_automatic_dependency_tracking
    def _remember(self, **attributes: Any) -> None:
        """Set attributes without taking the variables in them for one's own."""
        for name, value in attributes.items():
            setattr(self, name, value)

    @property
    def moments(self) -> str:
        """`"decay"` or `"freeze"`.

        Set it between two calls of `fit`; functions that were compiled before keep
        the old mode until the model is compiled again.
        """
        return self._moments

    @moments.setter
    def moments(self, moments: str) -> None:
        _check_moments(moments)
        if self.built:
            self._check_slots(moments, [table.variable for table in self._tables])
            self.catch_up()
        self._moments = moments

    @property
    def step_forms(self) -> dict[str, str]:
        """How each table's step is computed, by the table's name.

        The name is the path, with the position among the weights (`path:3`) where
        two tables share it.

        `"rows"`: on the sampled rows, where the backend allows. `"masked: ..."`: on
        the whole table with the result masked, and why.
        """
        names = _tables.unique_names(
            [table.variable for table in self._tables], self._trainable_variables
        )
        forms = [f"masked: {t.reason}" if t.reason else "rows" for t in self._tables]
        return dict(zip(names, forms, strict=True))

    def build(self, variables: list[keras.Variable]) -> None:
        """Find the tables, create the variables, take over the tables' updates.

        Args:
            variables: the model's trainable variables.
        """
        if self.built:
            return
        variables = list(variables)
        _check_nesting(self._inner)
        weights = getattr(self._model(), "weights", [])
        rest = [w for w in weights if not any(w is v for v in variables)]
        found, frozen = _tables.find_tables(self._sources, variables, rest)
        if frozen:
            warnings.warn(
                f"Frozen, and so not trained by LazyOptimizer: {', '.join(frozen)}. "
                "All other weights are trained. After unfreezing, compile the model "
                "with a new LazyOptimizer.",
                stacklevel=2,
            )
        if not self._inner.built:
            self._inner.build(variables)
        self._check_slots(self._moments, found)
        super().build(variables)
        self._remember(_frozen=frozen)
        self._remember(_tables=[self._make_table(variable) for variable in found])
        self._remember(
            _by_key={
                self._var_key(v): table
                for table in self._tables
                for v in (table.variable, *table.slots.values())
            }
        )
        self._take_over()
        _look_ups.look_up_by_rows(
            self, [table.variable for table in self._tables if table.reason is None]
        )

    def _check_slots(self, moments: str, tables: list[keras.Variable]) -> None:
        """Refuse to freeze slots that are not where Keras's optimizers keep them."""
        inner = _private.innermost(self._inner)
        for table in tables if moments == "freeze" else []:
            unknown = _private.unknown_slots(inner, table)
            if unknown:
                raise ValueError(
                    "moments='freeze' has to know the inner optimizer's slots for "
                    f"{table.path}. {type(inner).__name__} made "
                    f"{', '.join(each.path for each in unknown)}, which may be some, "
                    "but keeps them in no list with one entry for each weight, in "
                    "the order of `build`. Keep them like this, or use "
                    "moments='decay'."
                )

    def _make_table(self, variable: keras.Variable) -> Table:
        inner = _private.innermost(self._inner)
        slots = _private.slots(inner, variable)
        with engine.outside_graph():
            slots_by_row = _private.slots_by_row(inner, variable)
        log_rates = _decay.log_rates(inner)
        reason = None
        if log_rates is None:
            reason = f"{type(inner).__name__} is not known to update rows "
            reason += "one by one and to decay in closed form"
        elif not _acts_on_rows(variable.constraint):
            reason = f"the constraint {variable.constraint!r} looks across rows"
        last_update = caught_up = None
        if engine.SELECTS_UPDATES and (
            inner.gradient_accumulation_steps or self._scales_the_loss()
        ):
            # The optimizer that decides whether to update knows its own variables
            # only, so nothing can be noted beside them.
            reason = reason or "gradient accumulation or loss scaling inside"
        else:
            last_update = self.add_variable(
                shape=variable.shape[:1],
                dtype="int32",
                layout=engine.row_layout(variable),
                name="last_update",
            )
            caught_up = self.add_variable(shape=(), dtype="int32", name="caught_up")
        return Table(
            variable,
            slots,
            slots_by_row,
            log_rates or {},
            last_update,
            caught_up,
            reason,
        )

    def _take_over(self) -> None:
        """Put this optimizer's step on tables in the inner optimizer's place.

        While no step runs, the inner optimizer is what it was.
        """
        inner = _private.innermost(self._inner)
        update_step = inner.update_step
        apply_weight_decay = inner._apply_weight_decay

        def is_lazy(variable: Any) -> bool:
            return self._steps_running > 0 and self._table(variable) is not None

        def update(gradient: Any, variable: Any, learning_rate: Any) -> None:
            if is_lazy(variable):
                self._update_table(gradient, variable, learning_rate)
            else:
                update_step(gradient, variable, learning_rate)

        def decay_weights(variables: list) -> None:
            rest = [v for v in variables if not is_lazy(v)]
            if rest:
                apply_weight_decay(rest)

        inner.update_step = update
        inner._apply_weight_decay = decay_weights
        engine.take_over_tables(inner, is_lazy)

    def _table(self, variable: Any) -> Table | None:
        return self._by_key.get(self._var_key(variable))

    def _apply(self, grads: list, variables: list | None) -> None:
        """Let the inner optimizer update the weights, the tables by sampled rows."""
        updates = engine.read_count(self._iterations)
        pairs = list(zip(grads, variables or self._trainable_variables, strict=True))
        left_out = self._tables_left_out(pairs)
        for table in left_out:
            self._catch_up_if(table.caught_up < updates, [table])
        grads = [self._prepare(gradient, variable) for gradient, variable in pairs]
        with self._step():
            updated = self._apply_inner(grads, variables)
        self._row_gradients.clear()
        for table in left_out:  # a step without a gradient is none of zeros
            assert table.caught_up is not None
            table.caught_up.assign(ops.cast(updates + updated, "int32"))
        engine.write_count(self._iterations, updates + updated)

    def _tables_left_out(self, pairs: list[tuple]) -> list[Table]:
        """Tables that get no gradient in this step, whose slots might decay."""
        given = {self._var_key(v) for g, v in pairs if g is not None}
        return [
            table
            for table in self._tables
            if table.caught_up is not None
            and any(table.log_rates.values())
            and self._var_key(table.variable) not in given
        ]

    def _prepare(self, gradient: Any, variable: Any) -> Any:
        """A table's gradient in the form in which Keras may compute with it.

        Where look-ups are all that the gradient of a table consists of, Keras gets
        their sums over duplicates, of shape `(look-ups, ...)`: clipping and scaling
        do to them what they would do to the whole. The rows' ids wait here.
        """
        table = self._table(variable)
        if table is None or gradient is None:
            return gradient
        if table.reason is None and not self.gradient_accumulation_steps:
            found = engine.row_gradient(gradient, variable)
            if found is not None:
                sums, *self._row_gradients[self._var_key(variable)] = found
                return sums
        if self._uses_whole_gradients():
            return engine.sum_duplicates(gradient)
        return engine.whole(gradient)

    def _uses_whole_gradients(self) -> bool:
        """Whether Keras computes with the gradients before it updates rows."""
        inner = _private.innermost(self._inner)
        return any(
            getattr(inner, setting) is not None
            for setting in (
                "clipnorm",
                "clipvalue",
                "global_clipnorm",
                "loss_scale_factor",
            )
        )

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        """Take tables over, and their constraints, which Keras applies to every row."""
        self._steps_running += 1
        if self._steps_running == 1:
            for table in self._tables:
                table.constraint = table.variable.constraint
                table.variable.constraint = None
        try:
            yield
        finally:
            self._steps_running -= 1
            if not self._steps_running:
                for table in self._tables:
                    table.variable.constraint = table.constraint

    def _update_table(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """The inner optimizer's own step, on the sampled rows of a table.

        Args:
            gradient: dense or sparse gradient of the table.
            variable: the table, or the replica of it that is being updated.
        """
        table = self._by_key[self._var_key(variable)]
        decays = self._moments == "decay"
        row_by_row = table.reason is None
        noted = table.last_update is not None
        kept = dict(table.slots)
        if noted:
            kept["last_update"] = table.last_update
        if table.slow is not None:
            kept["slow"] = table.slow
        rows, (weight_rows, *kept_rows) = engine.find_rows(
            gradient,
            [variable, *kept.values()],
            every_row=not row_by_row,
            lookups=self._row_gradients.get(self._var_key(table.variable)),
        )
        every_row = rows.indices is None
        if not every_row and engine.size(rows.indices) == 0:
            return  # Keras on TensorFlow cannot add where there are no rows
        table.lookups = None if every_row else engine.size(rows.indices)

        weight = _rows.RowView(weight_rows, table.variable, rows.sampled, row_by_row)
        views = {}
        for name, values in zip(kept, kept_rows, strict=True):
            # Of the whole table, slots decay in this step where no row was sampled.
            whole = kept[name]
            stays = not (decays and every_row) or name in ("last_update", "slow")
            by_row = name not in table.slots or name in table.slots_by_row
            sampled = rows.sampled if by_row and stays else None
            views[name] = _rows.RowView(values, whole, sampled, row_by_row)

        if noted:
            now = ops.cast(engine.read_count(self._iterations) + 1, "int32")
            last_update = views["last_update"]
            if decays and table.log_rates:
                caught_up = engine.read_rows(table.caught_up, variable, None)
                current = ops.maximum(last_update.value, caught_up)
                self._decay(table, views, now - 1 - current)
                if every_row:
                    engine.write_rows(table.caught_up, variable, None, now)
            if table.slow is not None:
                in_cycle = ops.cast(self._updates_in_cycle(), "int32")
                is_first = last_update.value <= now - 1 - in_cycle
                slow = views["slow"]
                slow.assign(_rows.where(is_first, weight.value, slow.value))
            last_update.assign(now + ops.zeros_like(last_update.value))

        inner = _private.innermost(self._inner)
        slots = {name: views[name] for name in table.slots}
        with _private.with_rows(inner, table.variable, slots) as optimizer:
            _private.apply_weight_decay(optimizer, weight)
            optimizer.update_step(rows.gradient, weight, learning_rate)
        if table.constraint is not None:
            weight.settle()
            weight.assign(table.constraint(weight))

        engine.write_rows(variable, variable, rows.indices, weight.settle())
        for name, view in views.items():
            engine.write_rows(kept[name], variable, rows.indices, view.settle())

    def _decay(self, table: Table, slots: dict, missed: Any) -> None:
        """Let slots catch up on the steps in which their rows were not sampled."""
        missed = ops.maximum(missed, 0)
        for name, log_rate in table.log_rates.items():
            if log_rate and name in slots:
                slot = slots[name]
                slot.assign(_rows.decayed(slot.value, log_rate, missed))

    def catch_up(self) -> None:
        """Make the slots of every row current, which a step does for its rows only.

        Reading `variables` or `inner_optimizer` does it, too, on TensorFlow and torch.
        Call it between two calls of `fit`, before the inner optimizer is used without
        this one, and on JAX before slots are read. Training goes on the same with and
        without it, but for rounding.
        """
        self._catch_up_if(ops.convert_to_tensor(True), self._tables)

    def catch_up_if(self, predicate: Any) -> None:
        """`catch_up()`, in a compiled step, if `predicate` (a scalar bool tensor)."""
        self._catch_up_if(predicate, self._tables)

    def _catch_up_if(self, predicate: Any, tables: list[Table]) -> None:
        for table in tables:
            if table.caught_up is None:
                continue

            def catch_up(caught_up: Any, *values: Any, table: Table = table) -> tuple:
                now = ops.cast(engine.read_count(self._iterations), "int32")
                last_update, *slot_values = values
                slots = {
                    name: _rows.RowView(value, slot, None, at_once=True)
                    for (name, slot), value in zip(
                        table.slots.items(), slot_values, strict=True
                    )
                }
                if self._moments == "decay":
                    current = ops.maximum(last_update, caught_up)
                    self._decay(table, slots, now - current)
                return (
                    now + ops.zeros_like(caught_up),
                    last_update,
                    *(slot.value for slot in slots.values()),
                )

            group = (table.caught_up, table.last_update, *table.slots.values())
            engine.update_if(predicate, [group], catch_up)

    # What a Lookahead around this needs: which rows moved

    def copy_moved_rows(
        self,
        updates_in_cycle: Callable[[], Any],
        copies: list[tuple[keras.Variable, keras.Variable]],
    ) -> list:
        """Take the slow copy of a table's row when a cycle first moves the row.

        Args:
            updates_in_cycle: says how many updates the cycle has had.
            copies: weights with their slow copies.

        Returns:
            The tables for which this will be done.
        """
        if self.ema_overwrite_frequency:  # that moves every row
            return []
        self._updates_in_cycle = updates_in_cycle
        for variable, slow in copies:
            table = self._table(variable)
            if table is not None and table.last_update is not None:
                table.slow = slow
        return [table.variable for table in self._tables if table.slow is not None]

    def copy_no_rows(self) -> None:
        """Leave slow copies to the Lookahead around this."""
        for table in self._tables:
            table.slow = None

    def last_update_of(self, variable: Any) -> tuple[keras.Variable, Any, int | None]:
        """When each row of a table moved last, the count of updates now, look-ups."""
        table = self._by_key[self._var_key(variable)]
        now = ops.cast(engine.read_count(self._iterations), "int32")
        assert table.last_update is not None
        return table.last_update, now, table.lookups

    def _make_slots_current(self) -> None:
        # Not on JAX, where `fit` keeps slots elsewhere. And a file holds them as they
        # are, so that a run that is saved does not differ, by the rounding of this,
        # from one that is not.
        if (
            engine.VARIABLES_HOLD_STATE
            and self.built
            and not engine.is_recording()
            and not _private.is_saving_or_loading()
        ):
            self.catch_up()

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, serialized."""
        tables = [table.variable for table in self._tables]
        names = _tables.source_names(
            self._sources, tables, self._trainable_variables, self._frozen
        )
        return {
            **super().get_config(),
            "embedding_layers": names,
            "moments": self._moments,
        }


def _acts_on_rows(constraint: Any) -> bool:
    """Whether a constraint's value for a row depends on that row alone."""
    if constraint is None or isinstance(constraint, keras.constraints.NonNeg):
        return True
    by_axis = (
        keras.constraints.MaxNorm,
        keras.constraints.MinMaxNorm,
        keras.constraints.UnitNorm,
    )
    return isinstance(constraint, by_axis) and constraint.axis in (1, -1, [1], [-1])


def _check_moments(moments: Any) -> None:
    if moments not in MOMENTS:
        raise ValueError(
            "`moments` says what the slots of rows that were not sampled do: "
            f"{' or '.join(map(repr, MOMENTS))}. Received: moments={moments!r}."
        )


def _check_nesting(inner_optimizer: keras.Optimizer) -> None:
    for optimizer in chain(inner_optimizer):
        inside = type(optimizer).__name__
        if isinstance(optimizer, LazyOptimizer):
            raise ValueError(
                "A LazyOptimizer inside a LazyOptimizer has no meaning. Name all "
                "tables in one: LazyOptimizer(Adam(1e-3), embedding_layers=[...])."
            )
        if isinstance(optimizer, OptimizerWrapper):
            raise ValueError(
                f"LazyOptimizer goes inside {inside}, not around it: write "
                f"{inside}(LazyOptimizer(Adam(1e-3)), ...)."
            )
        if hasattr(optimizer, "optimizers"):
            raise ValueError(
                f"LazyOptimizer goes inside {inside}, not around it: give it one "
                "of the optimizers there, wrapped, for the embedding tables."
            )
        if "update_step" in vars(optimizer):
            raise ValueError(
                f"This {inside} already works inside another LazyOptimizer. "
                "Give each its own inner optimizer."
            )

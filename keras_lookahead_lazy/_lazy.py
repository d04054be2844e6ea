"""LazyOptimizer: embedding rows move only when their token was sampled."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _catch_up, _decay_rates, _keras, _look_ups, _tables
from keras_lookahead_lazy._arguments import (
    check_choice,
    check_rows_may_rest,
    check_slots_are_known,
    check_weights,
)
from keras_lookahead_lazy._backend import engine
from keras_lookahead_lazy._catch_up import MovedRows, SlowCopy
from keras_lookahead_lazy._keras import chain
from keras_lookahead_lazy._row_step import Table, step
from keras_lookahead_lazy._wrapper import OptimizerWrapper

MOMENTS = ("decay", "freeze")


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
            Defaults to `"decay"`.
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
        super().__init__(optimizer, name, misplaced)
        _check_nesting(self._inner)
        sources = _tables.check_sources(embedding_layers)
        check_choice("moments", moments, MOMENTS, _MOMENTS_SAY)
        self._moments = moments
        self._remember(_sources=sources, _frozen=[], _tables={}, _row_gradients={})
        self._steps_running = 0  # one for each replica within a step

    @_keras.no_automatic_dependency_tracking
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
        check_choice("moments", moments, MOMENTS, _MOMENTS_SAY)
        if self.built:
            self._check_slots(moments, [t.variable for t in self._tables.values()])
            self.catch_up()
        self._moments = moments

    @property
    def step_forms(self) -> dict[str, str]:
        """How each table's step is computed, by the table's name.

        The name is the path, with the position among the weights (`path:3`) where
        two tables share it.

        `"rows"`: on the sampled rows, in steps whose gradient consists of look-ups.
        (With a tied projection it does not, and a step looks at every row.)
        `"masked: ..."`: on the whole table with the result masked, and why.
        """
        tables, dense = self._tables.values(), self._why_gradients_are_dense()
        reasons = [table.reason or dense for table in tables]
        forms = [f"masked: {reason}" if reason else "rows" for reason in reasons]
        return dict(zip(self._table_names(), forms, strict=True))

    def _table_names(self) -> list[str]:
        tables = [table.variable for table in self._tables.values()]
        return _tables.unique_names(tables, _keras.weights(self))

    def _why_gradients_are_dense(self) -> str | None:
        if self.gradient_accumulation_steps:
            return "gradient accumulation adds up whole gradients"
        around = chain(getattr(self._model(), "optimizer", self))
        scaling = keras.optimizers.LossScaleOptimizer
        if any(isinstance(each, scaling) for each in around + chain(self._inner)):
            return "LossScaleOptimizer looks at whole gradients"
        return None

    def build(self, variables: list[keras.Variable]) -> None:
        """Find the tables, create the variables, take over the tables' updates.

        Args:
            variables: the model's trainable variables.
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
                f"Frozen, and so not trained by LazyOptimizer: {', '.join(frozen)}. "
                "All other weights are trained. After unfreezing, compile the model "
                "with a new LazyOptimizer.",
                stacklevel=2,
            )
        if not self._inner.built:
            self._inner.build(variables)
        self._check_slots(self._moments, found)
        super().build(variables)
        tables = {_keras.key(self, v): self._make_table(v) for v in found}
        self._remember(_frozen=frozen, _tables=tables)
        inner = _keras.innermost(self._inner)
        _keras.take_over(inner, self._is_lazy, self._update_table)
        _look_ups.look_up_by_rows(
            self, [t.variable for t in tables.values() if not t.every_row]
        )

    def _check_slots(self, moments: str, tables: list[keras.Variable]) -> None:
        """Refuse to freeze slots that are not where Keras's optimizers keep them."""
        inner = _keras.innermost(self._inner)
        for table in tables if moments == "freeze" else []:
            # A weight with other rows would have its slots in the place of others.
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
            reason = f"{type(inner).__name__} is not known to update rows "
            reason += "one by one and to decay in closed form"
        elif not _tables.acts_on_rows(variable.constraint):
            reason = f"the constraint {variable.constraint!r} looks across rows"
        name = variable.path.replace("/", "_")  # as slots are named
        last_update = self.add_variable(
            shape=variable.shape[:1],
            dtype="int32",
            layout=engine.row_layout(variable),
            name=f"{name}_last_update",
        )
        return Table(
            variable,
            slots=_keras.slots(inner, variable),
            slots_by_row=slots_by_row,
            log_rates=log_rates or {},
            moved=MovedRows(last_update, self._updates),
            caught_up=self.add_variable(
                shape=(), dtype="int32", name=f"{name}_caught_up"
            ),
            reason=reason,
        )

    # A step

    def _apply(self, grads: list, variables: list | None) -> None:
        """Let the inner optimizer update the weights, the tables by sampled rows."""
        updates = self._updates()
        self._renumber_if(updates == _catch_up.LARGEST)
        updates = updates - updates // _catch_up.LARGEST * (_catch_up.LARGEST // 2)
        engine.write_count(self._counter, updates)
        pairs = list(zip(grads, variables or _keras.weights(self), strict=True))
        left_out = self._tables_left_out(pairs)
        for table in left_out:
            self._catch_up_if(True, [table])
        grads = [self._prepare(gradient, variable) for gradient, variable in pairs]
        with self._step():
            updated = self._apply_inner(grads, variables)
        self._row_gradients.clear()
        for table in left_out:  # a step without a gradient is none of zeros
            table.caught_up.assign(ops.cast(updates + updated, "int32"))
        engine.write_count(self._counter, updates + updated)

    def _updates(self) -> Any:
        """The number of updates so far."""
        return engine.read_count(self._counter)

    def _renumber_if(self, predicate: Any) -> None:
        groups = [(t.moved.last_update, t.caught_up) for t in self._tables.values()]
        engine.update_if(predicate, groups, _catch_up.renumbered)

    def _tables_left_out(self, pairs: list[tuple]) -> list[Table]:
        """Tables that get no gradient in this step, whose slots might decay."""
        given = {_keras.key(self, v) for g, v in pairs if g is not None}
        return [
            table
            for key, table in self._tables.items()
            if key not in given and any(table.log_rates.values())
        ]

    def _prepare(self, gradient: Any, variable: Any) -> Any:
        """A table's gradient in the form in which Keras may compute with it.

        Where look-ups are all that the gradient of a table consists of, Keras gets
        their sums over duplicates, of shape `(look-ups, ...)`: clipping and scaling
        do to them what they would do to the whole. The rows' ids wait here.
        """
        key = _keras.key(self, variable)
        if key not in self._tables or gradient is None:
            return gradient
        computes = self._uses_whole_gradients()
        if not (self._tables[key].every_row or self.gradient_accumulation_steps) and (
            computes or not engine.KERAS_TAKES_ROWS
        ):
            found = engine.row_gradient(gradient, variable)
            if found is not None:
                self._row_gradients[key] = found
                return found.sums
        return (engine.sum_duplicates if computes else engine.whole)(gradient)

    def _uses_whole_gradients(self) -> bool:
        """Whether Keras computes with the gradients before it updates rows."""
        inner = _keras.innermost(self._inner)
        settings = ("clipnorm", "clipvalue", "global_clipnorm", "loss_scale_factor")
        return any(getattr(inner, setting) is not None for setting in settings)

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        """Take tables over, and their constraints, which Keras applies to every row.

        While no step runs, model and inner optimizer are what they were.
        """
        tables = self._tables.values()
        self._steps_running += 1
        if self._steps_running == 1:
            for table in tables:
                table.constraint = table.variable.constraint
                table.variable.constraint = None
        try:
            yield
        finally:
            self._steps_running -= 1
            if not self._steps_running:
                for table in tables:
                    table.variable.constraint = table.constraint

    def _is_lazy(self, variable: Any) -> bool:
        return self._steps_running > 0 and _keras.key(self, variable) in self._tables

    def _update_table(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """The inner optimizer's step on a table, or on the replica of one."""
        key = _keras.key(self, variable)
        if key in self._row_gradients:
            gradient = self._row_gradients[key]._replace(sums=gradient)
        step(
            self._tables[key],
            variable,
            gradient,
            learning_rate,
            optimizer=_keras.innermost(self._inner),
            now=self._updates() + 1,
            decays=self._moments == "decay",
        )

    # What lags behind

    def catch_up(self) -> None:
        """Make the slots of every row current, which a step does for its rows only.

        Reading `variables` or `inner_optimizer` does it, too, on TensorFlow and torch.
        Call it between two calls of `fit`, before the inner optimizer is used without
        this one, and on JAX before slots are read. Training goes on the same with and
        without it, but for rounding.
        """
        self.catch_up_if(True)

    def catch_up_if(self, predicate: Any) -> None:
        """`catch_up()`, in a compiled step, if `predicate` (a scalar bool tensor)."""
        self._catch_up_if(predicate, list(self._tables.values()))

    def _catch_up_if(self, predicate: Any, tables: list[Table]) -> None:
        updates = ops.cast(self._updates(), "int32")
        for table in tables:
            log_rates = table.log_rates if self._moments == "decay" else {}
            slots = {n: slot for n, slot in table.slots.items() if log_rates.get(n)}

            def catch_up(
                caught_up: Any,
                last_update: Any,
                *values: Any,
                slots: dict = slots,
                log_rates: Mapping = log_rates,
            ) -> tuple:
                now = updates + ops.zeros_like(caught_up)
                views = {
                    name: _keras.UnstoredVariable(value, slots[name])
                    for name, value in zip(slots, values, strict=True)
                }
                missed = now - ops.maximum(last_update, caught_up)
                _catch_up.decay(views, log_rates, missed)
                return now, last_update, *(view.value for view in views.values())

            group = (table.caught_up, table.moved.last_update, *slots.values())
            is_behind = ops.less(table.caught_up.value, updates)
            engine.update_if(ops.logical_and(predicate, is_behind), [group], catch_up)

    def _make_slots_current(self) -> None:
        # Not on JAX, where `fit` keeps slots elsewhere. And a file holds them as they
        # are, so that a run that is saved does not differ, by the rounding of this,
        # from one that is not.
        if (
            engine.VARIABLES_HOLD_STATE
            and self.built
            and not engine.is_recording()
            and not _keras.is_saving_or_loading()
        ):
            self.catch_up()

    # Which rows moved

    def count_updates(self) -> int:
        """The number of updates so far, outside of a step."""
        return int(ops.convert_to_numpy(self._counter))

    def sampled_shares(self, since: int) -> dict[str, float]:
        """The share of each table's rows that was sampled after update `since`."""
        counts = [
            ops.count_nonzero(table.moved.last_update.value > since)
            for table in self._tables.values()
        ]
        rows = [table.variable.shape[0] for table in self._tables.values()]
        shares = [int(n) / size for n, size in zip(counts, rows, strict=True)]
        return dict(zip(self._table_names(), shares, strict=True))

    def keep_slow_rows(
        self, pairs: Sequence[tuple], updates_in_cycle: Callable[[], Any]
    ) -> dict[Any, MovedRows]:
        if self.ema_overwrite_frequency:  # that moves every row
            return {}
        copies = {_keras.key(self, weight): slow for weight, slow in pairs}
        found = {k: table.moved for k, table in self._tables.items() if k in copies}
        for key, moved in found.items():
            moved.slow_copies.append(SlowCopy(copies[key], updates_in_cycle))
        return found

    def begin_cycle(self) -> None:
        for moved in [table.moved for table in self._tables.values()]:
            if moved.is_shared:
                self.catch_up()
                moved.last_update.assign(ops.zeros_like(moved.last_update.value))

    def _own_settings(self) -> dict[str, Any]:
        tables = [table.variable for table in self._tables.values()]
        names = _tables.source_names(
            self._sources, tables, _keras.weights(self), self._frozen
        )
        return {"embedding_layers": names, "moments": self._moments}


_MOMENTS_SAY = "what the slots of rows that were not sampled do"


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
        if _keras.is_taken_over(optimizer):
            raise ValueError(
                f"This {inside} already works inside another LazyOptimizer. "
                "Give each its own inner optimizer."
            )
    check_rows_may_rest(_keras.innermost(inner_optimizer))

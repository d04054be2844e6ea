"""LazyOptimizer: update embedding rows only in steps that sampled them."""

from __future__ import annotations

import functools
import warnings
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
from keras_lookahead_lazy._backend import engine
from keras_lookahead_lazy._catch_up import RowClock
from keras_lookahead_lazy._keras import chain
from keras_lookahead_lazy._lazy_step import LazyStep
from keras_lookahead_lazy._row_step import Table
from keras_lookahead_lazy._wrapper import OptimizerWrapper

MOMENTS = ("decay", "freeze")


@keras.saving.register_keras_serializable(package="keras_lookahead_lazy")
class LazyOptimizer(LazyStep):
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
        self._set_untracked(_sources=sources, _frozen=[])

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
        self._set_untracked(_frozen=frozen, _tables=tables)
        _keras.will_take_over(_keras.innermost(self._inner))
        _look_ups.look_up_by_rows(self, self.tables_by_rows())

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
        place = engine.placement(variable)
        last_update = self.add_variable(
            shape=variable.shape[:1],
            dtype=engine.INTEGERS,
            layout=engine.layout_like(variable, axes=1),
            name=f"{name}_last_update",
        )
        return Table(
            variable,
            slots=_keras.slots(inner, variable),
            slots_by_row=slots_by_row,
            kind=self._kind(variable, slots_by_row, place),
            place=place,
            log_rates=log_rates or {},
            last_update=last_update,
            caught_up=self._add_number(variable, f"{name}_caught_up"),
            left_out=self._add_number(variable, f"{name}_left_out"),
            reason=reason,
            accumulator=None
            if reason
            else self._make_accumulator(variable, name, place),
        )

    def _kind(self, table: keras.Variable, slots_by_row: set[str], place: Any) -> Any:
        """Return what tables must have in common for their rows to be joined."""
        inner = _keras.innermost(self._inner)
        if not _keras.updates_all_alike(inner):
            return None
        slots = _keras.slots(inner, table)
        if slots.keys() != slots_by_row:
            return None
        shapes = [(name, slot.shape[1:], slot.dtype) for name, slot in slots.items()]
        decays = _keras.decays_weight(inner, table)
        return table.shape[1:], table.dtype, tuple(shapes), decays, place

    def _make_accumulator(
        self, variable: keras.Variable, name: str, place: Any
    ) -> RowAccumulator | None:
        if not self.gradient_accumulation_steps:
            return None
        length = max(1, variable.shape[0] // ROWS_PER_ID)
        return RowAccumulator(
            _keras.accumulator(_keras.innermost(self._inner), variable),
            ids=self.add_variable(
                shape=(length,),
                dtype=engine.INTEGERS,
                layout=engine.layout_like(variable, axes=0),
                name=f"{name}_accumulated",
            ),
            count=self._add_number(variable, f"{name}_accumulated_count"),
            place=place,
        )

    def _add_number(self, table: keras.Variable, name: str) -> keras.Variable:
        layout = engine.layout_like(table, axes=0)
        return self.add_variable(
            shape=(), dtype=engine.INTEGERS, layout=layout, name=name
        )

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

    def tables_by_rows(self) -> list[keras.Variable]:
        """Return the tables that a step can update by rows."""
        return [t.variable for t in self._tables.values() if not t.every_row]

    def row_clocks(self) -> dict[Any, RowClock]:
        if self.ema_overwrite_frequency:  # averages replace every row
            return {}
        return {
            key: RowClock(table.last_update, functools.partial(self._updates, table))
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

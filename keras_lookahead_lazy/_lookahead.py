"""Lookahead: k steps forward, 1 step back."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _private, _rows
from keras_lookahead_lazy._backend import engine
from keras_lookahead_lazy._slow_weights import SlowWeightsInModel
from keras_lookahead_lazy._wrapper import OptimizerWrapper, chain

INNER_STATES = ("maintain", "interpolate", "reset")


@keras.saving.register_keras_serializable(package="keras_lookahead_lazy")
class Lookahead(OptimizerWrapper):
    r"""Lets an optimizer run k steps ahead, then pulls the weights back.

    The model holds the fast weights \(\theta\), which the inner optimizer updates;
    this optimizer keeps the slow weights \(\phi\). Before the first update
    \(\phi \leftarrow \theta\), and after every k-th

    $$\phi \leftarrow \phi + \alpha (\theta - \phi), \qquad
      \theta \leftarrow \phi.$$

    An update is a step that changes the weights: one that gradient accumulation
    only stores, or that loss scaling skips, is none. Everything that can be set on
    a Keras optimizer is set on the inner one.

    Example:

    >>> import keras
    >>> from keras_lookahead_lazy import Lookahead
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> optimizer = Lookahead(keras.optimizers.Adam(1e-3), k=5, alpha=0.5)
    >>> model.compile(optimizer=optimizer, loss="mse")

    Args:
        optimizer: the inner optimizer: a Keras optimizer, its name or its config.
        k: int, updates between two pulls. Defaults to 5.
        alpha: float in (0, 1], the step of the slow weights. Defaults to 0.5.
        inner_state: what a pull does to the slots that the inner optimizer keeps
            for each weight (momenta, second moments): `"maintain"` leaves them,
            `"interpolate"` pulls them back to a slow copy of their own with the
            same `alpha`, `"reset"` gives them their initial value. Counters, and
            with them schedules and bias correction, go on in all three.
        name: name of the optimizer.

    Raises:
        TypeError: `optimizer` is no optimizer, or a setting of the inner optimizer
            was given to `Lookahead`.
        ValueError: `k`, `alpha` or `inner_state` is out of range.

    Reference: Zhang, Lucas, Hinton, Ba, "Lookahead Optimizer: k steps forward,
    1 step back", NeurIPS 2019, arXiv:1907.08610.
    """

    _slow_weights_in: SlowWeightsInModel | None = None

    def __init__(
        self,
        optimizer: keras.Optimizer | str | dict,
        k: int = 5,
        alpha: float = 0.5,
        inner_state: str = "maintain",
        name: str | None = None,
        **misplaced: Any,
    ) -> None:
        k, alpha = _check_arguments(k, alpha, inner_state)
        super().__init__(optimizer, name, misplaced)
        self.k = k
        self.alpha = alpha
        self.inner_state = inner_state

    _fixed = ("inner_optimizer", "k", "alpha", "inner_state")

    def build(self, variables: list[keras.Variable]) -> None:
        """Create the inner optimizer's variables and the slow copies.

        Args:
            variables: the model's trainable variables.
        """
        if self.built:
            return
        super().build(variables)
        self._make_slow_copies()
        self._copy_rows_where_they_move()

    @_private.no_automatic_dependency_tracking
    def _make_slow_copies(self) -> None:
        # Zeros until the first update runs: only then are the weights known.
        innermost = _private.innermost(self._inner)
        slots = [
            slot
            for variable in self._trainable_variables
            for slot in _private.slots(innermost, variable).values()
        ]
        self._pairs = self._with_slow_copies(self._trainable_variables)
        self._slot_pairs, self._initial_slots = [], []
        if self.inner_state == "interpolate":
            self._slot_pairs = self._with_slow_copies(slots)
        elif self.inner_state == "reset":
            values = _initial_values(innermost, self._trainable_variables)
            self._initial_slots = list(zip(slots, values, strict=True))

    def _with_slow_copies(self, variables: list) -> list[tuple]:
        return [
            (fast, self.add_variable_from_reference(fast, name="slow"))
            for fast in variables
        ]

    def _apply(self, grads: list, variables: list | None) -> None:
        """Let the inner optimizer update the weights; after every k-th, pull back."""
        self._end_interrupted_evaluation(is_training=True)
        updates = engine.read_count(self._iterations)
        is_first = updates == 0
        if self._slot_pairs:
            self.catch_up_if(is_first)
        by_row = {id(fast) for fast in self._by_row}
        pairs = [pair for pair in self._pairs if id(pair[0]) not in by_row]
        engine.back_up_if(is_first, pairs + self._slot_pairs)

        updated = self._apply_inner(grads, variables)

        # Of whole cycles the last is counted only, so that no counter overflows: from
        # the first update on the count is 1, ..., k, 1, ...
        updates = updates + updated - updates // self.k * self.k * updated
        is_sync = (updated == 1) & (updates % self.k == 0)
        given = {self._var_key(v) for v in variables or self._trainable_variables}
        present = [pair for pair in pairs if self._var_key(pair[0]) in given]
        left_out = [pair for pair in pairs if self._var_key(pair[0]) not in given]
        engine.sync_if(is_sync, present, self.alpha)
        engine.back_up_if(is_sync, left_out)
        for fast, slow in self._pairs:
            if id(fast) in by_row and self._var_key(fast) in given:
                self._sync_rows_if(is_sync, fast, slow)
        self._sync_slots_if(is_sync)
        engine.write_count(self._iterations, updates)

    def _sync_rows_if(self, is_sync: Any, fast: Any, slow: Any) -> None:
        """The sync of a table of which only some rows moved in this cycle."""
        last_update, now, lookups = self._inside().last_update_of(fast)
        most = lookups and self.k * lookups
        group = (fast, slow, last_update)
        engine.sync_rows_if(is_sync, group, now - self.k, self.alpha, most)

    def _sync_slots_if(self, is_sync: Any) -> None:
        if not self._slot_pairs and not self._initial_slots:
            return
        self.catch_up_if(is_sync)
        engine.sync_if(is_sync, self._slot_pairs, self.alpha)
        for slot, value in self._initial_slots:
            engine.update_if(
                is_sync,
                [(slot,)],
                lambda old, value=value: (ops.full_like(old, value),),
            )

    # Rows of lazy tables: their slow copy is taken when the cycle first moves them

    @_private.no_automatic_dependency_tracking
    def _copy_rows_where_they_move(self) -> None:
        self._by_row, inside = [], self._inside()
        # JAX's optimizer that may skip an update cannot write this one's variables.
        between = self._inner is not inside
        if inside is not None and not (between and engine.SELECTS_UPDATES):
            self._by_row = inside.copy_moved_rows(self.updates_in_cycle, self._pairs)

    def _inside(self) -> Any:
        """The next wrapper of this package inside, or `None`.

        (A method: Keras saves an attribute that holds an optimizer as one more child.)
        """
        inside = chain(self._inner)
        return next((o for o in inside if isinstance(o, OptimizerWrapper)), None)

    def copy_moved_rows(self, updates_in_cycle: Callable, copies: list) -> list:
        """Inside of another Lookahead: no rows.

        The two move rows behind each other's back, so both work on whole tables.
        """
        for fast, slow in self._pairs:
            if any(fast is table for table in self._by_row):
                slow.assign(self._slow_value(fast, slow))
        if self._by_row:
            self._inside().copy_no_rows()
            self._by_row.clear()
        return []

    def catch_up_if(self, predicate: Any) -> None:
        """Make slots that lag behind current, if `predicate`."""
        inside = self._inside()
        if inside is not None:
            inside.catch_up_if(predicate)

    def updates_in_cycle(self) -> Any:
        """Number of updates since the last sync, or since the first update."""
        return engine.read_count(self._iterations) % self.k

    def _slow_value(self, fast: keras.Variable, slow: keras.Variable) -> Any:
        """The slow weights; of a row that has not moved since, the weights."""
        if not any(fast is table for table in self._by_row):
            return ops.convert_to_tensor(slow)
        last_update, now, _ = self._inside().last_update_of(fast)
        moved = last_update.value > now - ops.cast(self.updates_in_cycle(), "int32")
        return _rows.where(moved, slow.value, fast.value)

    def restart(self) -> None:
        """Make the next update the first: phi := theta, and a new cycle.

        For weights that were replaced in the middle of a cycle (`set_weights`, a
        callback that restores): otherwise the next sync pulls them toward the slow
        weights from before.

        Example:

        >>> import keras
        >>> from keras_lookahead_lazy import Lookahead
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> lookahead = Lookahead("adam")
        >>> model.compile(optimizer=lookahead, loss="mse")
        >>> model.set_weights([weight + 1 for weight in model.get_weights()])
        >>> lookahead.restart()
        """
        engine.write_count(self._iterations, 0)

    def finalize_variable_values(self, var_list: list) -> None:
        """Let the inner optimizer set the weights that training ends on.

        With `use_ema` they are the averages; the next update is then the first.
        """
        self._end_interrupted_evaluation()
        super().finalize_variable_values(var_list)
        if self.use_ema:
            self.restart()

    def slow_weights(self, model: keras.Model) -> AbstractContextManager[None]:
        """Put the slow weights into the model for the length of a `with` block.

        The fast weights are set aside and come back bit for bit, also after an
        exception. Before the first update both are the same. Of a model that several
        optimizers train, the weights of this one are concerned.

        Example:

        >>> import keras, numpy as np
        >>> from keras_lookahead_lazy import Lookahead
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> lookahead = Lookahead("adam")
        >>> model.compile(optimizer=lookahead, loss="mse")
        >>> x, y = np.ones((8, 4)), np.ones((8, 1))
        >>> history = model.fit(x, y, verbose=0)
        >>> with lookahead.slow_weights(model):
        ...     loss = model.evaluate(x, y, verbose=0)

        Args:
            model: the model that this optimizer trains.

        Raises:
            ValueError: in the beginning of the block, if the optimizer has not been
                built for weights of this model.
            RuntimeError: the model is trained inside of the block.
        """
        return SlowWeightsInModel(self, model)

    def load_slow_weights(self, model: keras.Model) -> None:
        """Give the model the slow weights for good.

        Args:
            model: the model that this optimizer trains.

        Raises:
            ValueError: the optimizer has not been built for weights of this model.
        """
        self._check_trains(model)
        self._end_interrupted_evaluation()
        engine.sync_model(model)
        self._assign_slow_weights()

    def _assign_slow_weights(self) -> None:
        if int(ops.convert_to_numpy(self._iterations)) == 0:
            return
        for fast, slow in self._pairs:
            # Never one buffer for both: JAX donates it.
            fast.assign(ops.copy(self._slow_value(fast, slow)))

    def _end_interrupted_evaluation(self, is_training: bool = False) -> None:
        if self._slow_weights_in is not None:
            self._slow_weights_in.before_use(is_training)

    def _check_trains(self, model: keras.Model) -> None:
        weights = {self._var_key(weight) for weight in model.variables}
        if not self.built or weights.isdisjoint(
            self._var_key(fast) for fast, _ in self._pairs
        ):
            raise ValueError(
                f"This Lookahead does not train the model {model.name!r} (yet). "
                "Compile the model with it, and build or fit the model, first."
            )

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, serialized."""
        return {
            **super().get_config(),
            "k": self.k,
            "alpha": self.alpha,
            "inner_state": self.inner_state,
        }


def _check_arguments(k: Any, alpha: Any, inner_state: Any) -> tuple[int, float]:
    try:
        steps = operator.index(k)
    except TypeError:
        steps = 0
    if isinstance(k, bool) or steps < 1:
        raise ValueError(
            "`k` is the number of updates between two syncs, an int of at least 1, "
            f"such as k=5. Received: k={k!r}."
        )
    try:
        step = float(alpha)
    except (TypeError, ValueError):
        step = float("nan")
    if isinstance(alpha, (bool, str)) or not 0 < step <= 1:
        raise ValueError(
            "`alpha` is the step of the slow weights, a number in (0, 1], such as "
            f"alpha=0.5. Received: alpha={alpha!r}."
        )
    if inner_state not in INNER_STATES:
        raise ValueError(
            "`inner_state` says what a sync does to the inner optimizer's slots: "
            f"{', '.join(map(repr, INNER_STATES))}. Received: "
            f"inner_state={inner_state!r}."
        )
    return steps, step


def _initial_values(
    optimizer: keras.Optimizer, variables: list[keras.Variable]
) -> list[float]:
    """The constant that each slot of a new optimizer is filled with.

    The optimizer at hand may have been trained, so a copy of it is built, on
    stand-ins of the weights with one entry along all axes but the first.
    """
    with engine.outside_graph():
        fresh = _private.fresh_slots(optimizer, variables)
        slots = [slot for each in fresh for slot in each.values()]
        arrays = [ops.convert_to_numpy(slot) for slot in slots]
    for slot, array in zip(slots, arrays, strict=True):
        if array.min() != array.max():
            raise ValueError(
                "inner_state='reset' gives each slot of the inner optimizer the "
                f"constant that it starts from, but {slot.path} of "
                f"{type(optimizer).__name__} starts from the weights. Use "
                "inner_state='maintain' or 'interpolate'."
            )
    return [float(array.min()) for array in arrays]

"""Lookahead: k steps forward, 1 step back."""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _arguments, _keras, _outer
from keras_lookahead_lazy._backend import MovedTable, engine
from keras_lookahead_lazy._catch_up import have_moved
from keras_lookahead_lazy._inner_state import INNER_STATES, filled, initial_values
from keras_lookahead_lazy._keras import chain
from keras_lookahead_lazy._slow_weights import SlowWeightsInModel
from keras_lookahead_lazy._wrapper import OptimizerWrapper

DEFAULT_ALPHA = _arguments.Default(0.5)


@dataclass(frozen=True)
class Sync:
    """Compute the value that fast and slow weights get after k updates."""

    alpha: float

    def __call__(self, fast: Any, slow: Any) -> tuple[Any, Any]:
        """New fast and slow weights."""
        pulled = slow + self.alpha * (fast - slow)  # phi + alpha (theta - phi)
        return pulled, pulled


@keras.saving.register_keras_serializable(package="keras_lookahead_lazy")
class Lookahead(OptimizerWrapper):
    r"""Lets an optimizer run k steps ahead, then steps back to slow weights.

    The model holds the fast weights \(\theta\), which the inner optimizer updates.
    Lookahead keeps slow weights \(\phi\). Before the first update,
    \(\phi \leftarrow \theta\). After every k-th update, a sync follows:

    $$\phi \leftarrow \phi + \alpha (\theta - \phi), \qquad
      \theta \leftarrow \phi.$$

    An update is a step that changes the weights. Steps that only accumulate
    gradients, or that loss scaling skips, do not count. Set the learning rate,
    clipping, weight decay and other options on the inner optimizer.

    Example:

    >>> import keras
    >>> from keras_lookahead_lazy import Lookahead
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> optimizer = Lookahead(keras.optimizers.Adam(1e-3), k=5, alpha=0.5)
    >>> model.compile(optimizer=optimizer, loss="mse")
    >>> optimizer
    Lookahead(Adam(learning_rate=0.001), k=5, alpha=0.5, inner_state='maintain')

    Args:
        optimizer: Keras optimizer instance, its name or its config. The inner
            optimizer.
        k: Int. The number of updates between two syncs. Defaults to `5`.
        alpha: Float in (0, 1]. The step of the slow weights toward the fast ones.
            Defaults to `0.5`.
        inner_state: `"maintain"`, `"interpolate"` or `"reset"`. What a sync does to
            the slots that the inner optimizer keeps for each weight, such as Adam's
            moments. `"maintain"` leaves them unchanged, `"interpolate"` syncs them
            with slow copies of their own and the same `alpha`, and `"reset"` sets
            them to their initial value. Step counters continue in all three, and
            with them schedules and bias correction. Defaults to `"maintain"`.
        outer_optimizer: Keras optimizer instance, its name or its config. If given,
            each sync is a step of this optimizer on the slow weights, with the
            pseudo-gradient \(\phi - \theta\), and then \(\theta
            \leftarrow \phi\). `SGD(0.7, momentum=0.9, nesterov=True)` makes this
            SNOO, and `SGD(alpha)` is Lookahead itself. Its learning rate takes the
            place of `alpha`, and its schedule counts syncs. In the tables of a
            `LazyOptimizer` inside, the rows that the cycle has moved get the outer
            step; other rows and their outer slots stay as they are. Defaults to `None`.
        name: String. The name of the optimizer. Defaults to `None`, in which case
            Keras chooses one.

    Raises:
        TypeError: If `optimizer` is not a Keras optimizer, or if an argument of the
            inner optimizer is passed to `Lookahead`.
        ValueError: If `k`, `alpha` or `inner_state` is out of range, if `alpha` or
            `inner_state="interpolate"` stands beside `outer_optimizer`, or, in `build`,
            if `inner_state` cannot find the inner optimizer's slots.

    References: Zhang, Lucas, Hinton, Ba, "Lookahead Optimizer: k steps forward,
    1 step back", NeurIPS 2019, arXiv:1907.08610. The outer optimizer: Douillard et
    al., "DiLoCo", 2023, arXiv:2311.08105, and Kallusky et al., "SNOO", 2025,
    arXiv:2510.15830.
    """

    _slow_weights_in: SlowWeightsInModel | None = None
    _fixed = ("inner_optimizer", "k", "alpha", "inner_state", "outer_optimizer")

    @_arguments.explain_unknown_arguments
    def __init__(
        self,
        optimizer: keras.Optimizer | str | dict,
        k: int = 5,
        alpha: float = DEFAULT_ALPHA,
        inner_state: str = "maintain",
        outer_optimizer: keras.Optimizer | str | dict | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(optimizer, name)
        self.k = _arguments.check_k(k)
        _arguments.check_choice(
            "inner_state",
            inner_state,
            INNER_STATES,
            "what a sync does to the inner optimizer's slots",
        )
        _arguments.check_inner_state(inner_state, self._inner)
        self.inner_state = inner_state
        outer = _outer.get(outer_optimizer, alpha, inner_state, self._inner)
        self.outer_optimizer: Any = outer
        self.alpha: Any = _arguments.check_alpha(alpha) if outer is None else None

    def build(self, variables: list[keras.Variable]) -> None:
        """Create the inner optimizer's variables and the slow copies.

        Args:
            variables: The trainable variables of the model.
        """
        if self.built:
            return
        variables = _arguments.check_weights(variables)
        engine.check_distribution(variables)
        learned = [v for v in variables if not _is_set_by_its_layer(v)]
        innermost = _keras.innermost(self._inner)
        starts: list[float] = []
        if self.inner_state == "reset":  # raises for some optimizers
            starts = initial_values(innermost, learned)
        if not self._inner.built:
            self._inner.build(variables)
        _arguments.check_inner_state(self.inner_state, self._inner)
        if self.inner_state != "maintain":
            setting = f"inner_state={self.inner_state!r}"
            instead = "inner_state='maintain'"
            weights = _keras.weights(innermost)  # more than now, if some are frozen
            _arguments.check_slots_are_known(setting, innermost, weights, instead)
        if self.outer_optimizer is not None:
            tables = [v for v in learned if _keras.key(self, v) in self.row_clocks()]
            _outer.check_rows(self.outer_optimizer, tables)
        super().build(variables)
        self._make_slow_copies(learned, starts)
        if self.outer_optimizer is not None:
            self.outer_optimizer.build([slow for _, slow in self._pairs])

    @_keras.no_automatic_dependency_tracking
    def _make_slow_copies(self, weights: list, starts: list[float]) -> None:
        # These are zeros until the first update, which copies the weights.
        innermost = _keras.innermost(self._inner)
        slots = [s for w in weights for s in _keras.slots(innermost, w).values()]
        self._pairs = self._with_slow_copies(weights)
        tables, keyed = self.row_clocks(), [(_keras.key(self, w), w) for w in weights]
        self._places = {key: engine.placement(w) for key, w in keyed if key in tables}
        self._slot_pairs, self._reset_slots = [], []
        self._starts = starts
        if self.inner_state == "interpolate":
            self._slot_pairs = self._with_slow_copies(slots)
        elif self.inner_state == "reset":
            self._reset_slots = slots

    def _with_slow_copies(self, variables: list) -> list[tuple]:
        return [
            (fast, self.add_variable_from_reference(fast, name="slow"))
            for fast in variables
        ]

    # An update, and every k-th time a sync

    def _apply(self, grads: list, variables: list | None) -> None:
        """Let the inner optimizer update the weights; after every k-th, sync."""
        self._end_interrupted_evaluation(is_training=True)
        updates = engine.read_count(self._counter)
        state = self._synced_variables()
        is_first = engine.once_known(grads, updates == 0)
        engine.run_if(is_first, functools.partial(self._back_up, is_first), state)
        updated = self._apply_inner(grads, variables)
        # The counter goes 1, ..., k, 1, ..., so that it cannot overflow.
        updates = updates + updated - updates // self.k * self.k * updated
        is_sync = (updated == 1) & (updates % self.k == 0)
        given = {_keras.key(self, v) for v in variables or _keras.weights(self)}
        engine.run_if(is_sync, functools.partial(self._sync, is_sync, given), state)
        engine.write_count(self._counter, updates)

    def _synced_variables(self) -> list[keras.Variable]:
        """Return the variables that a backup or a sync may write."""
        synced = [v for pair in self._pairs + self._slot_pairs for v in pair]
        if self.outer_optimizer is not None:
            synced += _keras.own_variables(self.outer_optimizer)
        if self.inner_state == "maintain":
            return synced
        return synced + self._reset_slots + self.variables_that_catch_up()

    def _back_up(self, is_first: Any) -> None:
        """phi := theta."""
        if self._slot_pairs:
            self.catch_up()
        engine.back_up(self._pairs + self._slot_pairs, is_first)

    def _sync(self, is_sync: Any, given: set) -> None:
        """phi := phi + alpha (theta - phi), or an outer step; theta := phi.

        If a weight was left out of this update, such as a frozen one, its slow copy is
        set to its value. Rows of a lazy table that did not move need no sync, because
        their fast and slow weights are equal. (Nested Lookaheads move rows while the
        others are in mid-cycle, so each of them syncs every row that ever moved.)
        """
        clocks, is_nested = self.row_clocks(), self._is_nested()
        left_out: list[tuple] = []
        tables: dict[Any, list[MovedTable]] = {}
        in_place = self._slot_pairs.copy()
        for fast, slow in self._pairs:
            key = _keras.key(self, fast)
            variables, function = self._pull(fast, slow)
            if key not in given:
                left_out.append((fast, slow))
            elif key in clocks:
                is_moved = have_moved if is_nested else clocks[key].moved_within(self.k)
                last_update, place = clocks[key].last_update, self._places[key]
                table = MovedTable(variables, last_update, is_moved, function, place)
                tables.setdefault(place, []).append(table)
            elif isinstance(function, Sync):
                in_place.append((fast, slow))
            else:
                engine.update(variables, function)
        engine.back_up(left_out, is_sync)
        for together in tables.values():
            engine.update_rows(together)
        if self.inner_state != "maintain":
            self.catch_up()
        if in_place:  # with fewer passes over the weights than an update
            engine.sync(in_place, Sync(self.alpha))
        if self.outer_optimizer is not None:
            _outer.count(self.outer_optimizer)
        for slot, value in zip(self._reset_slots, self._starts, strict=True):
            engine.update((slot,), functools.partial(filled, value))

    def _pull(self, fast: keras.Variable, slow: keras.Variable) -> tuple[tuple, Any]:
        """What the sync of a weight changes, and the function that gives new values."""
        if self.outer_optimizer is None:
            return (fast, slow), Sync(self.alpha)
        step = _outer.OuterStep(self.outer_optimizer, fast, slow)
        return step.variables, step

    def updates_in_cycle(self) -> Any:
        """Return the number of updates since the last sync, or since the start."""
        return engine.read_count(self._counter) % self.k

    def _is_nested(self) -> bool:
        """Return whether there is a Lookahead around this one or inside it."""
        others = [*self.wrappers_around(), *chain(self._inner)]
        return any(isinstance(other, Lookahead) for other in others)

    def distance(self) -> float:
        """Return the L2 norm of the fast minus the slow weights, over all weights."""
        if int(ops.convert_to_numpy(self._counter)) == 0:
            return 0.0
        squares = [_squared_distance(fast, slow) for fast, slow in self._pairs]
        return math.sqrt(sum(squares))

    def begin_cycle(self) -> None:
        """Make the next update the first of a cycle, here and in wrappers inside."""
        engine.write_count(self._counter, 0)
        super().begin_cycle()

    def restart(self) -> None:
        """Start a new cycle: the next update takes the slow weights from the model.

        Call this after weights were replaced in the middle of a cycle, for example by
        `set_weights` or by a callback that restores weights. Otherwise the next sync
        pulls the new weights toward the old slow weights.

        Example:

        >>> import keras
        >>> from keras_lookahead_lazy import Lookahead
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> lookahead = Lookahead("adam")
        >>> model.compile(optimizer=lookahead, loss="mse")
        >>> model.set_weights([weight + 1 for weight in model.get_weights()])
        >>> lookahead.restart()
        """
        self.begin_cycle()

    def finalize_variable_values(self, var_list: list) -> None:
        """Let the inner optimizer set the weights that training ends on.

        With `use_ema` these are averages. Lookahead then starts a new cycle.
        """
        self._end_interrupted_evaluation()
        super().finalize_variable_values(var_list)
        if self.use_ema:
            self.restart()

    def slow_weights(self, model: keras.Model) -> AbstractContextManager[None]:
        """Put the slow weights into the model for the length of a `with` block.

        The fast weights are set aside and restored bit for bit, also after an
        exception. Before the first update, both are the same. If several optimizers
        train the model, only the weights of this one are swapped.

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
            model: The model that this optimizer trains.

        Raises:
            ValueError: At the start of the block, if the optimizer has not been built
                for weights of this model.
            RuntimeError: If the model is trained inside the block.
        """
        return SlowWeightsInModel(self, model)

    def load_slow_weights(self, model: keras.Model) -> None:
        """Assign the slow weights to the model permanently.

        Args:
            model: The model that this optimizer trains.

        Raises:
            ValueError: If the optimizer has not been built for weights of this model.
        """
        self._check_trains(model)
        self._end_interrupted_evaluation()
        engine.store_state(model)
        self._assign_slow_weights()

    def _assign_slow_weights(self) -> None:
        if int(ops.convert_to_numpy(self._counter)) == 0:
            return
        for fast, slow in self._pairs:
            # Copied, because JAX donates the buffer of each variable.
            fast.assign(ops.copy(slow))

    def _end_interrupted_evaluation(self, is_training: bool = False) -> None:
        if self._slow_weights_in is not None:
            self._slow_weights_in.before_use(is_training)

    def _check_trains(self, model: keras.Model) -> None:
        _arguments.check_type(
            "model", model, keras.Model, "the model that this Lookahead trains"
        )
        weights = {_keras.key(self, weight) for weight in model.variables}
        if not self.built or weights.isdisjoint(
            _keras.key(self, fast) for fast, _ in self._pairs
        ):
            raise ValueError(
                f"This Lookahead does not train the model {model.name!r}, or not yet. "
                "Compile the model with it, and build or fit the model first."
            )

    def _stored_variables(self) -> list[keras.Variable]:
        stored, outer = super()._stored_variables(), self.outer_optimizer
        return stored if outer is None else stored + outer.variables

    def _own_settings(self) -> dict[str, Any]:
        step = {"alpha": self.alpha}
        if self.outer_optimizer is not None:
            step = {"outer_optimizer": self.outer_optimizer}
        return {"k": self.k, **step, "inner_state": self.inner_state}


def _squared_distance(fast: keras.Variable, slow: keras.Variable) -> float:
    """Return the sum of squared differences, computed for some rows at a time."""
    size, total = max(1, 2**24 // math.prod(fast.shape[1:])), 0.0
    for start in range(0, fast.shape[0] if fast.shape else 1, size):
        part = slice(start, start + size) if fast.shape else ...
        difference = ops.cast(fast[part] - slow[part], "float32")
        total += float(ops.sum(ops.square(ops.stop_gradient(difference))))
    return total


def _is_set_by_its_layer(variable: Any) -> bool:
    """Return whether a layer passes the variable's next value as its gradient.

    Float8 scales are such variables. They are measured, not learned, so averaging
    them makes no sense.
    """
    return getattr(variable, "overwrite_with_gradient", False)

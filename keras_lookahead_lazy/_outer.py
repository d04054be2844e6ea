"""An outer optimizer: another step than alpha for Lookahead's slow weights."""

from __future__ import annotations

from typing import Any

import keras

from keras_lookahead_lazy import _arguments, _decay_rates, _keras, _tables
from keras_lookahead_lazy._backend import engine

# Settings that have no meaning once in k updates, or that look at all weights at once.
_REFUSED = {
    "clipnorm": "clip the gradients, on the inner optimizer",
    "clipvalue": "clip the gradients, on the inner optimizer",
    "global_clipnorm": "clip the gradients, on the inner optimizer",
    "use_ema": "use the slow weights, which are averages already",
    "gradient_accumulation_steps": "set a larger k",
    "loss_scale_factor": "scale the loss, on the inner optimizer",
}


def get(
    outer: Any, alpha: float, inner_state: str, inner: keras.Optimizer
) -> keras.Optimizer | None:
    """The outer optimizer that was given, or whose name or config was, or an error.

    Args:
        outer: the argument of the user; `None` for no outer optimizer.
        alpha: the argument beside it.
        inner_state: likewise.
        inner: the inner optimizer.
    """
    if outer is None:
        return None
    if isinstance(outer, (str, dict)):
        outer = keras.optimizers.get(outer)
    if not isinstance(outer, keras.Optimizer):
        raise TypeError(
            "`outer_optimizer` must be a Keras optimizer, its name or its config, such "
            "as keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True). Received: "
            f"{_arguments.shown(outer)} of type {type(outer).__name__}."
        )
    if not isinstance(alpha, _arguments.Default):
        raise ValueError(
            "`alpha` is the step of the slow weights, and with `outer_optimizer` the "
            "outer optimizer's learning rate takes its place. Received both: "
            f"alpha={alpha!r} and a {type(outer).__name__}. Leave alpha out, or write "
            "outer_optimizer=keras.optimizers.SGD(alpha)."
        )
    if inner_state == "interpolate":
        raise ValueError(
            "inner_state='interpolate' moves the inner optimizer's slots by alpha, "
            "which `outer_optimizer` has taken the place of. Use "
            "inner_state='maintain' or 'reset'."
        )
    _check(outer, inner)
    return outer


def _check(outer: keras.Optimizer, inner: keras.Optimizer) -> None:
    """Raise `ValueError` for an optimizer that cannot update the slow weights."""
    kind = type(outer).__name__
    if len(_keras.chain(outer)) > 1 or hasattr(outer, "optimizers"):
        raise ValueError(
            f"`outer_optimizer` must be a single Keras optimizer. Received {kind}, "
            "which has others inside. Write outer_optimizer=keras.optimizers.SGD(0.7, "
            "momentum=0.9, nesterov=True)."
        )
    if _keras.schedule_free(outer) is not None:
        raise ValueError(
            f"`outer_optimizer` cannot be {kind}: it trains weights that are not those "
            "it averages, and Lookahead gives the model the weights that it trains. "
            "Use SGD with momentum, or Adam."
        )
    if outer is _keras.innermost(inner):
        raise ValueError(
            f"`outer_optimizer` is the same {kind} as the inner optimizer. Give "
            "Lookahead two: each keeps slots of its own."
        )
    if outer.built:
        raise ValueError(
            f"`outer_optimizer` is built already, for {len(_keras.weights(outer))} "
            f"weights. Lookahead builds it for the slow weights: pass a new {kind}."
        )
    for setting, instead in _REFUSED.items():
        value = getattr(outer, setting, None)
        if value:
            raise ValueError(
                f"`outer_optimizer` cannot have `{setting}`. Received: {kind}("
                f"{setting}={value!r}). Instead, {instead}."
            )


def check_rows(outer: keras.Optimizer, tables: list[keras.Variable]) -> None:
    """Raise `ValueError` for one that does not update rows of a table by themselves."""
    if not tables:
        return
    if _decay_rates.log_rates(outer) is None:
        raise ValueError(
            "With a LazyOptimizer inside, a sync updates the rows that have moved, and "
            f"{type(outer).__name__} is not known to update each row by itself. Use "
            "SGD with momentum or Adam as `outer_optimizer`, or one of your own with "
            "slot_decay_rates()."
        )
    for table in tables:
        if not _tables.acts_on_rows(table.constraint):
            raise ValueError(
                f"The constraint {table.constraint!r} of {_keras.path(table)} looks "
                "across rows, and an outer optimizer updates the rows that have moved. "
                "Use a constraint with axis=1."
            )


class OuterStep:
    """A sync by an outer optimizer, of one weight or of some rows of it.

    The pseudo-gradient s = phi - theta is what the inner optimizer has moved the
    weights by, with the sign of a gradient. So SGD with learning rate alpha is
    Lookahead's own sync, phi - alpha (phi - theta).

    Args:
        optimizer: the outer optimizer, built for the slow weights.
        fast: the weight in the model.
        slow: its slow copy.
    """

    def __init__(
        self, optimizer: keras.Optimizer, fast: keras.Variable, slow: keras.Variable
    ) -> None:
        self._optimizer, self._fast, self._slow = optimizer, fast, slow
        self._slots = _keras.slots(optimizer, slow)

    @property
    def variables(self) -> tuple[keras.Variable, ...]:
        """What a sync reads and writes: fast weight, slow weight, outer slots."""
        return self._fast, self._slow, *self._slots.values()

    def __call__(self, fast: Any, slow: Any, *slots: Any) -> tuple:
        """New values of these, from the old ones."""
        phi = _keras.UnstoredVariable(slow, self._slow)
        views = {
            name: _keras.UnstoredVariable(value, slot)
            for (name, slot), value in zip(self._slots.items(), slots, strict=True)
        }
        rate = self._optimizer.learning_rate
        _keras.step_on_rows(self._optimizer, self._slow, phi, views, slow - fast, rate)
        if self._fast.constraint is not None:
            phi.assign(self._fast.constraint(phi.value))
        return phi.value, phi.value, *(view.value for view in views.values())


def count(optimizer: keras.Optimizer) -> None:
    """Note that the outer optimizer has made a step: its schedule counts syncs."""
    iterations = _keras.counter(optimizer)
    engine.write_count(iterations, engine.read_count(iterations) + 1)

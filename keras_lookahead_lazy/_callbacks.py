"""Validate and end training on the slow weights; Lookahead for a compiled model."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from keras_lookahead_lazy import _private
from keras_lookahead_lazy._lookahead import Lookahead
from keras_lookahead_lazy._wrapper import chain


class SlowWeights(keras.callbacks.Callback):
    """Evaluates and predicts on the slow weights of `Lookahead` during `fit`.

    The fast weights come back bit for bit before training goes on, so the
    trajectory is the one without the callback. Given to `evaluate` or `predict`,
    it works there, too.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lookahead_lazy import Lookahead, SlowWeights
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=Lookahead("adam"), loss="mse")
    >>> x, y = np.ones((8, 4)), np.ones((8, 1))
    >>> history = model.fit(
    ...     x, y, validation_data=(x, y), callbacks=[SlowWeights()], verbose=0
    ... )

    Args:
        end_on_slow_weights: whether the model keeps the slow weights when `fit`
            ends. Defaults to `False`.

    Raises:
        ValueError: in the beginning of `fit`, if the model's optimizer has no
            Lookahead in it.
    """

    def __init__(self, end_on_slow_weights: bool = False) -> None:
        super().__init__()
        self.end_on_slow_weights = end_on_slow_weights
        self._fast_weights_aside = contextlib.ExitStack()

    def on_train_begin(self, logs: dict | None = None) -> None:
        find_lookahead(self.model)
        self._fast_weights_aside.close()  # of a validation that was interrupted

    def on_train_end(self, logs: dict | None = None) -> None:
        if self.end_on_slow_weights:
            find_lookahead(self.model).load_slow_weights(self.model)

    def on_test_begin(self, logs: dict | None = None) -> None:
        self._set_aside()

    def on_test_end(self, logs: dict | None = None) -> None:
        self._fast_weights_aside.close()

    def on_predict_begin(self, logs: dict | None = None) -> None:
        self._set_aside()

    def on_predict_end(self, logs: dict | None = None) -> None:
        self._fast_weights_aside.close()

    def _set_aside(self) -> None:
        lookahead = find_lookahead(self.model)
        self._fast_weights_aside.close()
        self._fast_weights_aside.enter_context(lookahead.slow_weights(self.model))


def find_lookahead(model: keras.Model) -> Lookahead:
    """The (outermost) Lookahead that trains a model.

    Raises:
        ValueError: there is none.
    """
    optimizer = getattr(model, "optimizer", None)
    for each in chain(optimizer):
        if isinstance(each, Lookahead):
            return each
    raise ValueError(
        "The model's optimizer keeps no slow weights: it is "
        f"{type(optimizer).__name__}. Compile the model with Lookahead(...), or call "
        "keras_lookahead_lazy.inject(model)."
    )


def inject(model: keras.Model, k: int = 5, alpha: float = 0.5) -> Lookahead:
    """Give Lookahead to a model that is compiled already, bojone's way.

    The model is compiled again with the optimizer that it has, inside Lookahead.
    That optimizer keeps its state, so training goes on where it was; the first
    update from here on is Lookahead's first.

    Example:

    >>> import keras
    >>> from keras_lookahead_lazy import inject
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer="adam", loss="mse")
    >>> lookahead = inject(model, k=5, alpha=0.5)

    Args:
        model: a compiled model.
        k: int, updates between two syncs.
        alpha: float in (0, 1], the step of the slow weights.

    Returns:
        The new `Lookahead`, which is `model.optimizer` or, in float16, inside the
        `LossScaleOptimizer` there.

    Raises:
        ValueError: the model is not compiled, its optimizer has a Lookahead already,
            or `k` or `alpha` is out of range.
    """
    if getattr(model, "optimizer", None) is None:
        raise ValueError(
            f"The model {model.name!r} is not compiled. Call model.compile(...) "
            "first, or compile it with Lookahead(optimizer) at once."
        )
    arguments: dict[str, Any] = _private.compile_arguments(model)
    outer = model.optimizer
    for each in chain(outer):
        if isinstance(each, Lookahead):
            raise ValueError(
                f"The optimizer of the model {model.name!r} has a Lookahead already, "
                f"with k={each.k} and alpha={each.alpha}. For others, compile the "
                "model with a new Lookahead(...)."
            )
    if isinstance(outer, keras.optimizers.LossScaleOptimizer):
        lookahead = Lookahead(outer.inner_optimizer, k=k, alpha=alpha)
        outer.inner_optimizer = lookahead
        arguments["optimizer"] = outer
    else:
        lookahead = Lookahead(outer, k=k, alpha=alpha)
        arguments["optimizer"] = lookahead
    if outer.built:
        lookahead.build(_private.innermost(outer)._trainable_variables)
    model.compile(**arguments)
    return lookahead

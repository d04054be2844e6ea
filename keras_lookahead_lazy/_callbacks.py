"""Validate and end training on the slow weights; Lookahead for a compiled model."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _keras
from keras_lookahead_lazy._arguments import check_type
from keras_lookahead_lazy._backend import engine
from keras_lookahead_lazy._keras import chain
from keras_lookahead_lazy._lookahead import Lookahead
from keras_lookahead_lazy._slow_weights import SlowWeightsInModel


class SlowWeights(keras.callbacks.Callback):
    """Evaluates and predicts on the slow weights of `Lookahead` during `fit`.

    The fast weights come back bit for bit before training goes on, so the
    trajectory is the one without the callback. Given to `evaluate` or `predict`,
    it works there, too. After an interruption the fast weights come back with what
    is next done with the model, be it training, evaluating or saving it; until then a
    layer or variable that is read by itself, or in another model, shows the slow ones.

    `EarlyStopping(restore_best_weights=True)`, before or after it in the list, restores
    the slow weights of the best epoch; the next update is then Lookahead's first.
    `ModelCheckpoint` saves the fast weights, unless `save_best_slow_weights`, and
    `BackupAndRestore` always.

    With a `prefix`, `fit` validates on the fast weights as it does without the
    callback, and then once more on the slow ones, which takes as long again. Their
    metrics join the epoch's logs for the callbacks that come later in the list, and
    for the progress bar and `History`. `EarlyStopping` and `ModelCheckpoint` then keep
    slow weights where they monitor a metric with the prefix.

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
            ends. Those that `EarlyStopping` restores take precedence. Defaults to
            `False`.
        save_best_slow_weights: whether `ModelCheckpoint(save_best_only=True)` saves
            the model with its slow weights at the end of an epoch: the model to use,
            not one to train further. Defaults to `False`.
        prefix: what names of metrics on the slow weights begin with in `fit`:
            `"slow_"` gives `slow_val_loss` beside a `val_loss` of the fast weights.
            Defaults to `None`: `val_loss` is of the slow weights. What `evaluate` and
            `predict` do with the callback is the same in both.

    Raises:
        TypeError: `prefix` is not a string, or an empty one.
        ValueError: in the beginning of `fit`, `evaluate` or `predict`, if the model's
            optimizer has no Lookahead in it, or if
            `keras.callbacks.SwapEMAWeights` is in the same list.
        RuntimeError: another callback trains the model during an evaluation.
    """

    def __init__(
        self,
        end_on_slow_weights: bool = False,
        save_best_slow_weights: bool = False,
        prefix: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("end_on_slow_weights", end_on_slow_weights),
            ("save_best_slow_weights", save_best_slow_weights),
        ):
            check_type(name, value, bool, "True or False, as in SlowWeights(True)")
        if prefix is not None and not (isinstance(prefix, str) and prefix):
            raise TypeError(
                "`prefix` must be a non-empty string that the names of metrics on the "
                f"slow weights begin with, such as prefix='slow_'. Received: "
                f"prefix={prefix!r}."
            )
        self.end_on_slow_weights = end_on_slow_weights
        self.save_best_slow_weights = save_best_slow_weights
        self.prefix = prefix
        self._restoring: list[keras.callbacks.EarlyStopping] = []
        self._callbacks_of_fit: list | None = None
        self._is_validated = False

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        _, callbacks = _keras.caller_of_callbacks()
        if any(isinstance(c, keras.callbacks.SwapEMAWeights) for c in callbacks):
            raise ValueError(
                "SlowWeights and SwapEMAWeights would both evaluate on weights of "
                "their own. Remove one of them from the callbacks."
            )

    def on_train_begin(self, logs: dict | None = None) -> None:
        lookahead = find_lookahead(self.model)
        self._restoring, self._is_validated = [], False
        _, callbacks = _keras.caller_of_callbacks()
        self._callbacks_of_fit = callbacks
        for i, callback in enumerate(callbacks):
            if self._keeps_the_best(callback):
                callbacks[i] = _OnSlowWeights(callback, lookahead)
            if isinstance(callback, keras.callbacks.EarlyStopping):
                self._restoring.append(callback)

    def _keeps_the_best(self, callback: keras.callbacks.Callback) -> bool:
        """Whether a callback keeps slow weights, those of the best epoch."""
        monitored = getattr(callback, "monitor", "")
        if self.prefix and not monitored.startswith(self.prefix):
            return False
        if isinstance(callback, keras.callbacks.ModelCheckpoint):
            return self.save_best_slow_weights and callback.save_best_only
        return (
            isinstance(callback, keras.callbacks.EarlyStopping)
            and callback.restore_best_weights
        )

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if self._is_validated and logs is not None:
            with find_lookahead(self.model).slow_weights(self.model):
                metrics = _validate_again(self.model)
            logs.update({f"{self.prefix}val_{k}": v for k, v in metrics.items()})
        self._is_validated = False

    def on_train_end(self, logs: dict | None = None) -> None:
        self._callbacks_of_fit = None
        lookahead = find_lookahead(self.model)
        # Restored just before this, or right after it.
        if any(callback.best_weights is not None for callback in self._restoring):
            lookahead.restart()
        elif self.end_on_slow_weights:
            lookahead.load_slow_weights(self.model)

    def on_test_begin(self, logs: dict | None = None) -> None:
        frame, callbacks = _keras.caller_of_callbacks()
        if self.prefix and callbacks is self._callbacks_of_fit:
            self._is_validated = True
            return
        SlowWeightsInModel(
            find_lookahead(self.model), self.model, evaluation=frame
        ).__enter__()

    def on_test_end(self, logs: dict | None = None) -> None:
        frame, _ = _keras.caller_of_callbacks()
        active = find_lookahead(self.model)._slow_weights_in
        # Not those of a block, or of an evaluation that this one is part of.
        if active is not None and active.evaluation is frame:
            active.end()

    on_predict_begin, on_predict_end = on_test_begin, on_test_end


class _OnSlowWeights:
    """A callback whose `on_epoch_end` finds the slow weights in the model.

    It takes the callback's place in the list of one `fit`.
    """

    def __init__(
        self, callback: keras.callbacks.Callback, lookahead: Lookahead
    ) -> None:
        self._callback, self._lookahead = callback, lookahead

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        with self._lookahead.slow_weights(self._callback.model):
            self._callback.on_epoch_end(epoch, logs)


def _validate_again(model: keras.Model) -> dict[str, float]:
    """Metrics on `fit`'s validation data; training goes on as without them."""
    weights = {id(weight) for weight in model.weights}
    seeds = [v for v in model.variables if id(v) not in weights]
    state = [(v, ops.copy(v)) for v in [*seeds, *model.metrics_variables]]
    with engine.keeping_random_state():
        metrics = _keras.validate_again(model)
    for variable, value in state:
        variable.assign(value)
    return metrics


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
    check_type("model", model, keras.Model, "a compiled model: inject(model)")
    if getattr(model, "optimizer", None) is None:
        raise ValueError(
            f"The model {model.name!r} is not compiled. Call model.compile(...) "
            "first, or compile it with Lookahead(optimizer) directly."
        )
    arguments: dict[str, Any] = _keras.compile_arguments(model)
    outer = model.optimizer
    for each in chain(outer):
        if isinstance(each, Lookahead):
            raise ValueError(
                f"The optimizer of the model {model.name!r} has a Lookahead already, "
                f"with k={each.k} and alpha={each.alpha}. To use other values, compile "
                "the model with a new Lookahead(...)."
            )
    if isinstance(outer, keras.optimizers.LossScaleOptimizer):
        lookahead = Lookahead(outer.inner_optimizer, k=k, alpha=alpha)
        outer.inner_optimizer = lookahead
        arguments["optimizer"] = outer
    else:
        lookahead = Lookahead(outer, k=k, alpha=alpha)
        arguments["optimizer"] = lookahead
    if outer.built:
        lookahead.build(_keras.weights(_keras.innermost(outer)))
    model.compile(**arguments)
    return lookahead

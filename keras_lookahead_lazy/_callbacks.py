"""SlowWeights, a callback, and inject, which gives Lookahead to a compiled model."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _keras
from keras_lookahead_lazy._arguments import check_type
from keras_lookahead_lazy._backend import engine
from keras_lookahead_lazy._keras import chain
from keras_lookahead_lazy._lookahead import DEFAULT_ALPHA, Lookahead
from keras_lookahead_lazy._slow_weights import SlowWeightsInModel


class SlowWeights(keras.callbacks.Callback):
    """Evaluates and predicts on the slow weights of `Lookahead` during `fit`.

    The fast weights are restored bit for bit before training continues, so the
    callback does not change the training. You can also pass it to `evaluate` or
    `predict`. If a run is interrupted, the fast weights are restored the next time the
    model is used, for example trained, evaluated or saved. Until then, a layer or
    variable that is read on its own, or through another model, has the slow weights.

    `EarlyStopping(restore_best_weights=True)` restores the slow weights of the best
    epoch, whether it is before or after this callback in the list. Lookahead then
    starts a new cycle. `ModelCheckpoint` saves the fast weights unless
    `save_best_slow_weights=True`. `BackupAndRestore` always saves the fast weights.

    With a `prefix`, `fit` validates on the fast weights as usual, and then again on the
    slow weights, which takes as long as the first validation. The metrics of the slow
    weights appear in the logs of callbacks later in the list, in the progress bar and
    in `History`. `EarlyStopping` and `ModelCheckpoint` then keep slow weights only if
    they monitor a metric with the prefix.

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
        end_on_slow_weights: Boolean. Whether to leave the slow weights in the model
            when `fit` ends. Weights that `EarlyStopping` restores take precedence.
            Defaults to `False`.
        save_best_slow_weights: Boolean. Whether `ModelCheckpoint(save_best_only=True)`
            saves the model with its slow weights. Such a file is the model to use, not
            one to train further. Defaults to `False`.
        prefix: String. Prefix for the names of metrics on the slow weights in `fit`.
            With `"slow_"`, `slow_val_loss` is reported next to `val_loss`, which is
            then measured on the fast weights. Defaults to `None`, in which case
            `val_loss` is measured on the slow weights. It does not affect `evaluate`
            and `predict`.

    Raises:
        TypeError: If `prefix` is not a non-empty string.
        ValueError: At the start of `fit`, `evaluate` or `predict`, if the model's
            optimizer contains no Lookahead, or if `keras.callbacks.SwapEMAWeights` is
            in the same list.
        RuntimeError: If another callback trains the model during an evaluation.
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
        """Return whether a callback should keep the slow weights of the best epoch."""
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
        # EarlyStopping restores its weights just before this, or right after it.
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
        # A `with` block, or an evaluation around this one, ends its own.
        if active is not None and active.evaluation is frame:
            active.end()

    on_predict_begin, on_predict_end = on_test_begin, on_test_end


class _OnSlowWeights:
    """Runs a callback's `on_epoch_end` with the slow weights in the model.

    It replaces the callback in the list of one `fit`.
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
    """Return metrics on `fit`'s validation data, without affecting training."""
    weights = {id(weight) for weight in model.weights}
    seeds = [v for v in model.variables if id(v) not in weights]
    state = [(v, ops.copy(v)) for v in [*seeds, *model.metrics_variables]]
    with engine.keeping_random_state():
        metrics = _keras.validate_again(model)
    for variable, value in state:
        variable.assign(value)
    return metrics


def find_lookahead(model: keras.Model) -> Lookahead:
    """Return the (outermost) Lookahead that trains a model.

    Raises:
        ValueError: If there is none.
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


def inject(
    model: keras.Model,
    k: int = 5,
    alpha: float = DEFAULT_ALPHA,
    outer_optimizer: keras.Optimizer | str | dict | None = None,
) -> Lookahead:
    """Add Lookahead to a compiled model.

    The model is compiled again with its optimizer inside Lookahead. The optimizer keeps
    its state, so training continues where it was. The next update is Lookahead's
    first. (bojone's `keras_lookahead` has the same interface.)

    Example:

    >>> import keras
    >>> from keras_lookahead_lazy import inject
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer="adam", loss="mse")
    >>> lookahead = inject(model, k=5, alpha=0.5)

    Args:
        model: A compiled model.
        k: Int. The number of updates between two syncs. Defaults to `5`.
        alpha: Float in (0, 1]. The step of the slow weights toward the fast ones.
            Defaults to `0.5`.
        outer_optimizer: A Keras optimizer for the slow weights, instead of `alpha`. See
            `Lookahead`.

    Returns:
        The new `Lookahead`. It is `model.optimizer` or, with float16, inside the
        `LossScaleOptimizer` there.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model is not compiled, if its optimizer contains a Lookahead
            already, or if `k` or `alpha` is out of range.
    """
    check_type("model", model, keras.Model, "a compiled model: inject(model)")
    if getattr(model, "optimizer", None) is None:
        raise ValueError(
            f"The model {model.name!r} is not compiled. Call model.compile(...) "
            "first, or compile it with Lookahead(optimizer) directly."
        )
    arguments: dict[str, Any] = _keras.compile_arguments(model)
    outermost = model.optimizer
    for each in chain(outermost):
        if isinstance(each, Lookahead):
            raise ValueError(
                f"The optimizer of the model {model.name!r} has a Lookahead already, "
                f"with k={each.k} and alpha={each.alpha}. To use other values, compile "
                "the model with a new Lookahead(...)."
            )
    if isinstance(outermost, keras.optimizers.LossScaleOptimizer):
        lookahead = Lookahead(
            outermost.inner_optimizer, k, alpha, outer_optimizer=outer_optimizer
        )
        outermost.inner_optimizer = lookahead
        arguments["optimizer"] = outermost
    else:
        lookahead = Lookahead(outermost, k, alpha, outer_optimizer=outer_optimizer)
        arguments["optimizer"] = lookahead
    if outermost.built:
        lookahead.build(_keras.weights(_keras.innermost(outermost)))
    model.compile(**arguments)
    return lookahead

"""Put the slow weights into a model for a while, then restore the fast ones."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy._backend import engine

# A `with` block always ends, but Keras does not tell a callback that an `evaluate` was
# interrupted. So the fast weights are restored by the next use of the model: while a
# model holds slow weights, the methods below are replaced on this model, and they
# restore the fast weights first. Lookahead does the same in `apply`, `slow_weights` and
# at the end of `fit`. `call` covers `model(x)`, and `get_config` covers `save`. Two
# uses cannot be caught: variables that are read one by one, and a step that was
# compiled before, in a loop of the user's own.
TRAINING = ("fit", "train_on_batch")
OTHER_USES = (
    "call",
    "evaluate",
    "export",
    "get_config",
    "get_weights",
    "load_weights",
    "predict",
    "predict_on_batch",
    "reset_metrics",
    "save_weights",
    "set_weights",
    "test_on_batch",
)


class SlowWeightsInModel(AbstractContextManager):
    """Puts the slow weights into the model, and restores the fast weights.

    If the model holds the slow weights already, this changes nothing.

    Args:
        lookahead: The Lookahead that has the slow weights. Its `_slow_weights_in` is
            this object meanwhile.
        model: The model that it trains.
        evaluation: The frame of the `evaluate` or `predict` that needs the slow weights
            while it runs, or `None` for a `with` block.
    """

    def __init__(
        self, lookahead: Any, model: keras.Model, evaluation: FrameType | None = None
    ) -> None:
        self._lookahead, self._model = lookahead, model
        self.evaluation = evaluation
        self._is_open = False

    def __enter__(self) -> None:
        lookahead, model = self._lookahead, self._model
        lookahead._check_trains(model)
        lookahead._end_interrupted_evaluation()
        if lookahead._slow_weights_in is not None:
            return
        engine.store_state(model)
        self._fast = [ops.copy(variable) for variable, _ in lookahead._pairs]
        self._is_open, lookahead._slow_weights_in = True, self
        try:
            self._guard_methods()
            lookahead._assign_slow_weights()
        except BaseException:
            self.end()
            raise

    def __exit__(self, *exception: Any) -> None:
        if self._lookahead._slow_weights_in is self:
            self.end()

    def end(self) -> None:
        """Restore the fast weights. If this is interrupted, call it again."""
        self._is_open = False
        with engine.outside_graph():
            if engine.is_recording():
                raise RuntimeError(
                    "The model holds its slow weights: an evaluation with SlowWeights "
                    "was interrupted. Call model.get_weights() once, before the step "
                    "collects its weights. That restores the fast weights."
                )
            engine.store_state(self._model)
            pairs = self._lookahead._pairs
            for (variable, _), value in zip(pairs, self._fast, strict=True):
                variable.assign(value)
        self._lookahead._slow_weights_in = None
        for name in TRAINING + OTHER_USES:
            vars(self._model).pop(name, None)
        vars(self._model).update(self._hidden)

    def is_running(self) -> bool:
        """Return whether the block or the evaluation is still running."""
        frame = inspect.currentframe()
        while self.evaluation and frame and frame is not self.evaluation:
            frame = frame.f_back
        return self._is_open and frame is not None

    def before_use(self, is_training: bool = False) -> None:
        """Restore the fast weights if the block or evaluation was interrupted.

        Raises:
            RuntimeError: If it is still running and the model is to be trained.
        """
        if not self.is_running():
            self.end()
        elif is_training:
            raise RuntimeError(
                "The model holds its slow weights, in a block "
                "`with lookahead.slow_weights(model)` or an evaluation with "
                "SlowWeights. Training here would be lost when the fast weights are "
                "restored. Train before or after it."
            )

    def _guard_methods(self) -> None:
        own = vars(self._model)
        names = TRAINING + OTHER_USES
        self._hidden = {name: own[name] for name in names if name in own}
        for name in names:
            own[name] = self._guarded(getattr(self._model, name), name in TRAINING)

    def _guarded(self, method: Callable, is_training: bool) -> Callable:
        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._lookahead._slow_weights_in is self:
                self.before_use(is_training)
            return method(*args, **kwargs)

        return guarded

"""The slow weights in a model for a while, and the fast ones back."""

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

# A `with` block always ends; an `evaluate` that is interrupted tells no callback. So
# the fast weights come back with what is done next, through the model's methods below,
# whose names on this one model lead here while it holds slow weights, or through the
# Lookahead (`apply`, `slow_weights`, the end of `fit`). `call` stands for `model(x)`,
# `get_config` for `save`. Out of reach are variables that are read one by one and, in a
# loop of the user's own, a step that was compiled before.
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
    """Puts the slow weights into the model, and the fast weights back.

    Where they are in the model already, it changes nothing.

    Args:
        lookahead: has the slow weights; its `_slow_weights_in` is this, meanwhile.
        model: the model that it trains.
        evaluation: the frame of the `evaluate` or `predict` that wants the slow weights
            as long as it runs; `None` for a `with` block.
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
        """Put the fast weights back; once more, if that was interrupted."""
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
        """Whether the block, or the evaluation, has not ended yet."""
        frame = inspect.currentframe()
        while self.evaluation and frame and frame is not self.evaluation:
            frame = frame.f_back
        return self._is_open and frame is not None

    def before_use(self, is_training: bool = False) -> None:
        """End what was interrupted.

        Raises:
            RuntimeError: nothing was interrupted, and this is training.
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

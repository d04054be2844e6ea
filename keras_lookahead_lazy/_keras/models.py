"""Models of Keras: their methods, calls and callbacks."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import keras
from keras import ops
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import AutocastScope
from keras.src.trainers.trainer import Trainer

from keras_lookahead_lazy._keras.optimizers import note_weights


def stored_value(variable: keras.Variable) -> Any:
    """Return a variable's own value. With mixed precision, a layer sees a cast copy."""
    with AutocastScope(None):
        return variable.value


def looked_up_table(layer: keras.layers.Embedding) -> keras.Variable:
    """Return the variable whose rows an Embedding looks up; with LoRA, the factor."""
    return layer.lora_embeddings_a if layer.lora_enabled else layer._embeddings


def with_lora(layer: keras.layers.Embedding, ids: Any, rows: Any) -> Any:
    """Return the output of an Embedding for rows of its trained table.

    Args:
        rows: In the layer's compute dtype.
    """
    if not layer.lora_enabled:
        return rows
    # Keras has `lora_alpha` since 3.11.
    scale = getattr(layer, "lora_alpha", layer.lora_rank) / layer.lora_rank
    frozen = ops.take(stored_value(layer._embeddings), ids, axis=0)
    frozen = ops.cast(frozen, layer.compute_dtype)
    return frozen + scale * ops.matmul(rows, layer.lora_embeddings_b)


def training_model() -> keras.Model | None:
    """Return the model whose method, such as `train_step`, calls this, or `None`.

    On JAX, `train_step` passes only values to an optimizer, not variables.
    """
    for frame in _callers():
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
    return None


def called_model() -> Any:
    """Return the model or layer that the user (or `fit`) called, and that runs now."""
    context = global_state.get_global_attribute("current_call_ctx")
    return getattr(context, "entry_layer", None)


# Methods of Keras's classes that this package replaces: class, name, the class's own
# attribute before (`None` if it inherits the method), and the replacement.
_replaced: list[tuple[type, str, Any, Any]] = []


def replace_method(cls: type, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace a method of a class by `wrap(method)`, until `restore_keras`."""
    method = getattr(cls, name)
    # `functools.wraps` copies this attribute to another library's wrapper around it.
    if hasattr(method, "_is_by_keras_lookahead_lazy"):
        return
    ours: Any = functools.wraps(method)(wrap(method))
    ours._is_by_keras_lookahead_lazy = True
    _replaced.append((cls, name, vars(cls).get(name), ours))
    setattr(cls, name, ours)


def restore_keras() -> None:
    """Give Keras's classes back the methods that this package has replaced.

    The first `Lookahead` or `LazyOptimizer` replaces `keras.Model.compile` and the
    methods of `keras.optimizers.LossScaleOptimizer` that apply gradients; the first
    `LazyOptimizer` that is built replaces `keras.layers.Embedding.call`. For models
    without these optimizers, the replacements do what Keras does. This function undoes
    them. Optimizers that exist already keep working, but the steps of a
    `LazyOptimizer` may work on whole tables. Creating a new one replaces the methods
    again.

    Example:

    >>> import keras
    >>> from keras_lookahead_lazy import LazyOptimizer, restore_keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Embedding(9, 2)])
    >>> model.compile(optimizer=LazyOptimizer("adam"), loss="mse")
    >>> restore_keras()
    """
    for replaced in reversed(_replaced):
        cls, name, before, ours = replaced
        if vars(cls).get(name) is not ours:
            warnings.warn(
                f"{cls.__name__}.{name} is not restored, because something else has "
                "replaced it after keras_lookahead_lazy did. Undo that first.",
                stacklevel=2,
            )
            continue
        if before is None:
            delattr(cls, name)
        else:
            setattr(cls, name, before)
        _replaced.remove(replaced)


def note_compiled_models(note: Callable[[keras.Model], None]) -> None:
    """Call `note` with each model that is compiled from now on.

    Keras does not tell an optimizer about its model, and therefore not about frozen
    weights. This replaces the method of the base class, because Keras compares it with
    a model's own method when it loads a model.
    """

    def noting(compile_model: Any) -> Any:
        def compile_and_note(self: keras.Model, *args: Any, **kwargs: Any) -> None:
            compile_model(self, *args, **kwargs)
            note(self)

        return compile_and_note

    replace_method(Trainer, "compile", noting)


def replace_loss_scaling(
    is_by_rows: Callable[[Any], bool],
    apply_by_rows: Callable[..., None],
    check_entries: Callable[[Callable, Any, list], Any],
) -> None:
    """Let `apply_by_rows` make the steps of a LossScaleOptimizer if `is_by_rows`.

    `check_entries` gets Keras's own check for finite values, and calls it.

    In `compile`, Keras itself puts a LossScaleOptimizer around the user's optimizer.
    """

    def by_rows(apply: Any) -> Any:
        def apply_scaled(
            self: Any, grads: list, trainable_variables: list | None = None
        ) -> None:
            if not is_by_rows(self):
                apply(self, grads, trainable_variables)
                return
            if not self.built:
                with keras.name_scope(self.name):
                    self.build(trainable_variables)
            note_weights(self)
            apply_by_rows(self, grads, trainable_variables)

        return apply_scaled

    def stateless_by_rows(stateless_apply: Any) -> Any:
        def stateless_apply_scaled(self: Any, *values: list, **named: list) -> tuple:
            if not is_by_rows(self):
                return stateless_apply(self, *values, **named)
            note_weights(self)
            # The base class's calls `apply`.
            return keras.Optimizer.stateless_apply(self, *values, **named)

        return stateless_apply_scaled

    def checking(check_finite: Any) -> Any:
        def check(self: Any, grads: list) -> Any:
            return check_entries(check_finite, self, grads)

        return check

    scaling = keras.optimizers.LossScaleOptimizer
    replace_method(scaling, "apply", by_rows)
    replace_method(scaling, "check_finite", checking)
    replace_method(scaling, "stateless_apply", stateless_by_rows)


def caller_of_callbacks() -> tuple[FrameType | None, list]:
    """Return the frame of the `fit` or `evaluate` that calls a callback, and its list.

    Keras does not tell a callback about the other callbacks, nor that `evaluate` was
    interrupted. Both can be seen in the stack of calls.
    """
    frame, callbacks = inspect.currentframe(), []
    frame = frame and frame.f_back
    while frame:
        caller = frame.f_locals.get("self")
        if not isinstance(caller, keras.callbacks.Callback):
            break
        if isinstance(caller, keras.callbacks.CallbackList):
            callbacks = caller.callbacks
        frame = frame.f_back
    return frame, callbacks


def validate_again(model: keras.Model) -> dict[str, float]:
    """Return metrics on the validation data of the running `fit`.

    Keras does not pass these data to callbacks, but it keeps the iterator of its own
    validation until `fit` ends.
    """
    return model.evaluate(verbose=0, return_dict=True, _use_cached_eval_dataset=True)


def is_saving_or_loading() -> bool:
    """Return whether this is called while Keras reads or writes a file.

    Keras then reads all attributes, including those that compute something. A state
    tree is what `OrbaxCheckpoint` writes.
    """
    return any(
        frame.f_globals.get("__name__", "").startswith("keras.src.saving.")
        or frame.f_code.co_name in ("get_state_tree", "set_state_tree")
        for frame in _callers()
    )


def is_refusing_a_file() -> bool:
    """Return whether Keras reads a file that it is going to reject.

    If a layer does not fit, Keras first loads everything else and then raises an error.
    """
    for frame in _callers():
        if frame.f_code.co_name == "_load_state":
            has_failed = bool(frame.f_locals.get("failed_saveables"))
            return has_failed and not frame.f_locals.get("skip_mismatch")
    return False


def _callers() -> Iterator[FrameType]:
    """Iterate over the frames of the running functions, the innermost first."""
    frame = inspect.currentframe()
    while frame:
        yield frame
        frame = frame.f_back


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """Return the arguments that the user passed to `model.compile`."""
    return dict(model._compile_config.config)

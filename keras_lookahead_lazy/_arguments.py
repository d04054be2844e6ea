"""Check arguments, and raise errors that say what to write instead."""

from __future__ import annotations

import functools
import inspect
import operator
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec

import keras

from keras_lookahead_lazy import _keras

# Names of other packages for this package's arguments: of TensorFlow Addons and optax,
# then of ports to torch.
_OUR_NAMES = {
    "sync_period": "k",
    "slow_step_size": "alpha",
    "la_steps": "k",
    "la_alpha": "alpha",
    "pullback_momentum": "inner_state",
}
_OUR_VALUES = {"none": "maintain", "pullback": "interpolate"}

# Optimizers of these libraries may have the same names as Keras's.
_OTHER_LIBRARIES = ("optax", "tensorflow_addons", "tf_keras", "torch")

# The wrapper that has an argument, for arguments that were passed to the other one.
_OWNERS = {
    "k": "Lookahead",
    "alpha": "Lookahead",
    "inner_state": "Lookahead",
    "outer_optimizer": "Lookahead",
    "embedding_layers": "LazyOptimizer",
    "moments": "LazyOptimizer",
}


Parameters = ParamSpec("Parameters")


class Default(float):
    """A number that was not given."""


def explain_unknown_arguments(
    init: Callable[Parameters, None],
) -> Callable[Parameters, None]:
    """Let a wrapper's constructor say where keyword arguments that it lacks belong.

    Python's own error would only say that they are unexpected. With `**kwargs` in the
    constructor instead, its signature would promise that it takes them.
    """
    own = inspect.signature(init).parameters

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if unknown := {n: value for n, value in kwargs.items() if n not in own}:
            # Without an optimizer, they are most likely meant for one such as Adam.
            given = args[0] if args else kwargs.get("optimizer", "adam")
            inner = _keras.innermost(get_optimizer(given, type(self)))
            refuse(unknown, type(self), inner)
        init(self, *args, **kwargs)

    return __init__  # type: ignore[return-value]


def refuse(unknown: dict[str, Any], wrapper: type, inner: keras.Optimizer) -> None:
    """Raise `TypeError` for keyword arguments that a wrapper does not have.

    Args:
        unknown: The arguments.
        wrapper: The class that they were passed to.
        inner: The optimizer inside, which some of them may be meant for.
    """
    cls, inner_cls = wrapper.__name__, type(inner).__name__
    own = [name for name, p in _parameters(wrapper).items() if p.kind != p.VAR_KEYWORD]
    renamed = {
        _OUR_NAMES[name]: _OUR_VALUES.get(str(value), value)
        for name, value in unknown.items()
        if _OUR_NAMES.get(name) in own
    }
    settings = {name: v for name, v in unknown.items() if _accepts(type(inner), name)}
    others = [name for name in unknown if name in _OWNERS]
    names = ", ".join(f"`{name}`" for name in unknown)
    message = f"{cls} has no argument {names}."
    if renamed:
        message += f" The names here are different: {cls}(..., {_written(renamed)})."
    if settings:
        message += " Pass inner-optimizer arguments to the inner optimizer instead: "
        message += f"{cls}({inner_cls}({_written(settings)}), ...)."
    if others:
        message += f" {_OWNERS[others[0]]} has {', '.join(f'`{n}`' for n in others)}: "
        message += "Lookahead(LazyOptimizer(optimizer, embedding_layers, moments), k)."
    if len(renamed) + len(settings) + len(others) < len(unknown):
        message += f" The arguments of {cls} are {', '.join(own)}."
    raise TypeError(message)


def _written(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
    del parameters["self"]
    return parameters


def _accepts(cls: type, name: str) -> bool:
    """Return whether a constructor takes an argument, itself or in a base class."""
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = _parameters(base)
        if name in parameters:
            return parameters[name].kind != inspect.Parameter.VAR_KEYWORD
        if all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
            return False
    return False


def check_choice(name: str, value: Any, choices: Sequence[str], says: str) -> None:
    """Raise `ValueError` if an argument is not one of `choices`."""
    if value not in choices:
        words = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
        raise ValueError(
            f"`{name}` must be {words} ({says}). Received: {name}={value!r}."
        )


def check_k(k: Any) -> int:
    """Return `k` as an int, or raise `ValueError`."""
    try:
        steps = operator.index(k)
    except TypeError:
        steps = 0
    if isinstance(k, bool) or steps < 1:
        raise ValueError(
            "`k` (the number of updates between two syncs) must be an int of at least "
            f"1, such as k=5. Received: k={k!r}."
        )
    return steps


def check_alpha(alpha: Any) -> float:
    """Return `alpha` as a float, or raise `ValueError`."""
    try:
        step = float(alpha)
    except (TypeError, ValueError):
        step = float("nan")
    if isinstance(alpha, (bool, str)) or not 0 < step <= 1:
        raise ValueError(
            "`alpha` (the step of the slow weights) must be a number in (0, 1], such "
            f"as alpha=0.5. Received: alpha={alpha!r}."
        )
    return step


def get_optimizer(optimizer: Any, wrapper: type) -> keras.Optimizer:
    """Return the Keras optimizer for an instance, a name or a config."""
    cls = wrapper.__name__
    if isinstance(optimizer, dict) and "class_name" not in optimizer:
        raise ValueError(
            "The config of an optimizer must be the result of "
            "keras.optimizers.serialize(optimizer). Received a dict with the keys "
            f"{list(optimizer)}."
        )
    if isinstance(optimizer, (str, dict)):
        return keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.Optimizer):
        return optimizer
    raise TypeError(
        f"{cls} wraps a Keras optimizer, given as an instance, a name or a "
        f"config: {cls}(keras.optimizers.Adam(1e-3)). Received {_described(optimizer)}."
    )


def _described(given: Any) -> str:
    """Describe what was passed instead of an optimizer, with advice."""
    cls = given if isinstance(given, type) else type(given)
    library = cls.__module__.partition(".")[0]
    if library in _OTHER_LIBRARIES:
        return (
            f"{cls.__module__}.{cls.__name__}; an optimizer of {library} cannot train "
            "a Keras 3 model"
        )
    if isinstance(given, type) and issubclass(given, keras.Optimizer):
        return f"the class {cls.__name__}; write {cls.__name__}()"
    if isinstance(given, keras.Model):
        return f"the model {given.name!r}; pass the optimizer to model.compile(...)"
    if isinstance(given, keras.optimizers.schedules.LearningRateSchedule):
        return f"the schedule {cls.__name__}; write Adam(schedule)"
    return f"{shown(given)} of type {cls.__name__}"


def shown(value: Any) -> str:
    """Return a received value in one short line."""
    if hasattr(value, "shape") and not isinstance(value, keras.Variable):
        return f"an array of shape {tuple(value.shape)}"
    return _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def check_inner_state(inner_state: str, optimizer: keras.Optimizer) -> None:
    """Raise `ValueError` if a schedule-free optimizer cannot have an inner state.

    Its slot z holds weights, as the model's variable y does, and its average is
    x = (y - (1 - beta_1) z) / beta_1. A sync of y alone ("maintain") moves x by
    1 / beta_1 times as much and leaves z ahead, so x is no longer an average. A sync of
    both ("interpolate") is a sync of x, because x is linear in them.
    """
    inside = _keras.schedule_free(optimizer)
    if inside is None or inner_state == "interpolate":
        return
    kind, last = type(inside).__name__, _keras.innermost(optimizer)
    write = f"Lookahead({kind}(...), inner_state='interpolate')"
    if inside is not last:
        write += f" inside the {type(last).__name__}"
    raise ValueError(
        f"{kind} keeps weights in its slots, and computes their average from the slots "
        "and the model's weights. A sync must change both, or the average is lost. "
        f"Received: inner_state={inner_state!r}. Write {write}."
    )


def check_rows_may_rest(optimizer: keras.Optimizer) -> None:
    """Raise `ValueError` if an optimizer has to move all weights in every step.

    A schedule-free optimizer moves its average x by a t-th of the way to z in update t,
    even if the gradient is zero. A row that does not change between its samples misses
    these moves. If it is first sampled in update t, its weights
    y = (1 - beta_1) z + beta_1 x stay near where they were, whatever z does.
    """
    if _keras.schedule_free(optimizer) is not None:
        kind = type(optimizer).__name__
        raise ValueError(
            f"LazyOptimizer cannot go around {kind}. It averages over all steps, so "
            "every weight changes in every step, even without a gradient. Rows that "
            "do not change between their samples would hardly be trained. Use "
            "LazyOptimizer(AdamW(...)) with a learning rate schedule. To keep "
            f"{kind} for the other weights, combine the two in a MultiOptimizer."
        )


def check_type(name: str, value: Any, cls: type, says: str) -> None:
    """Raise `TypeError` if an argument is not an instance of a class."""
    if not isinstance(value, cls):
        raise TypeError(
            f"`{name}` must be {says}. Received: {shown(value)} of type "
            f"{type(value).__name__}."
        )


def check_weights(weights: Any) -> list:
    """Return the weights to train as a list, or raise an error."""
    if isinstance(weights, keras.layers.Layer):
        raise TypeError(
            f"Expected a list of weights, not the {type(weights).__name__} "
            f"{weights.name!r} that contains them: optimizer.build(model."
            "trainable_variables)."
        )
    # A single variable is iterable too, row by row.
    if _is_variable(weights) or not isinstance(weights, Iterable):
        raise TypeError(
            "Expected a list of weights: optimizer.build(model."
            f"trainable_variables). Received {shown(weights)} of type "
            f"{type(weights).__name__}."
        )
    weights = list(weights)
    for weight in weights:
        if not _is_variable(weight):
            raise TypeError(
                "Expected variables, such as model.trainable_variables. "
                f"Received in the list: {shown(weight)} of type "
                f"{type(weight).__name__}."
            )
    return weights


def check_slots_are_known(
    setting: str, inner: keras.Optimizer, weights: list, instead: str
) -> None:
    """Raise `ValueError` if `setting` would miss slots in an unknown place."""
    unknown = _keras.unknown_slots(inner, weights)
    if not unknown:
        return
    kind, names = type(inner).__name__, ", ".join(each.path for each in unknown)
    keeps = f"{setting} needs the slots of the inner optimizer, but {kind} keeps "
    keeps += f"{names}, which may be slots,"
    if hasattr(inner, "optimizers"):
        raise ValueError(
            f"{keeps} in optimizers of its own. Wrap each of those instead of all in "
            f"one, or use {instead}."
        )
    raise ValueError(
        f"{keeps} in another place than a list with one entry per weight, in the order "
        f"of `build`. Keep slots in such a list, or use {instead}."
    )


def _is_variable(value: Any) -> bool:
    """Return whether a value is a Keras variable or a `tf.Variable`."""
    return hasattr(value, "assign") and hasattr(value, "shape")


def check_gradients(gradients: Any, weights: list) -> None:
    """Raise an error if gradients do not fit the weights."""
    if not isinstance(gradients, (list, tuple)) or any(
        isinstance(gradient, tuple) for gradient in gradients
    ):
        raise TypeError(
            "Expected a list of gradients and a list of weights: "
            "optimizer.apply(gradients, weights). For pairs of both, use "
            f"optimizer.apply_gradients(pairs). Received {shown(gradients)} of type "
            f"{type(gradients).__name__}."
        )
    if len(gradients) != len(weights):
        raise ValueError(
            "Expected one gradient per weight, or None if a weight has none. "
            f"Received {len(gradients)} gradients for {len(weights)} weights."
        )
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            "No gradients provided for any variable. "  # the same text as Keras's
            f"Each of the {len(weights)} is None: does the loss depend on the weights?"
        )
    for gradient, weight in zip(gradients, weights, strict=True):
        shape = _static_shape(gradient)
        if shape is not None and not _fits(shape, tuple(weight.shape)):
            raise ValueError(
                "A gradient must have the shape of its weight. The gradient of "
                f"{_keras.path(weight)} has shape {shape}; the weight has "
                f"{tuple(weight.shape)}."
            )


def _static_shape(gradient: Any) -> tuple | None:
    """Return the shape of a gradient as far as it is known before a graph runs."""
    shape = getattr(gradient, "shape", None)
    if shape is None or getattr(shape, "rank", 0) is None:
        return None
    return tuple(shape)


def _fits(shape: tuple, expected: tuple) -> bool:
    return len(shape) == len(expected) and all(
        size is None or size == wanted
        for size, wanted in zip(shape, expected, strict=True)
    )

"""Errors about arguments, with what to write instead."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import keras

# What others call an argument of this package: TensorFlow Addons and optax; ports to
# torch.
_OUR_NAMES = {
    "sync_period": "k",
    "slow_step_size": "alpha",
    "la_steps": "k",
    "la_alpha": "alpha",
    "pullback_momentum": "inner_state",
}
_OUR_VALUES = {"none": "maintain", "pullback": "interpolate"}


def refuse(unknown: dict[str, Any], wrapper: type, inner: keras.Optimizer) -> None:
    """Raise `TypeError` about keyword arguments that a wrapper does not have.

    Args:
        unknown: the arguments.
        wrapper: the class that they were given to.
        inner: the optimizer in it, which some of them may be meant for.
    """
    if not unknown:
        return
    cls, inner_cls = wrapper.__name__, type(inner).__name__
    own = [name for name, p in _parameters(wrapper).items() if p.kind != p.VAR_KEYWORD]
    renamed = {
        _OUR_NAMES[name]: _OUR_VALUES.get(str(value), value)
        for name, value in unknown.items()
        if _OUR_NAMES.get(name) in own
    }
    settings = {name: v for name, v in unknown.items() if _accepts(type(inner), name)}
    names = ", ".join(f"`{name}`" for name in unknown)
    message = f"{cls} takes no argument {names}."
    if renamed:
        message += f" It has other names here: {cls}(..., {_written(renamed)})."
    if settings:
        message += " Give what is meant for the inner optimizer to that one: "
        message += f"{cls}({inner_cls}({_written(settings)}), ...)."
    if len(renamed) + len(settings) < len(unknown):
        message += f" The arguments of {cls} are {', '.join(own)}."
    raise TypeError(message)


def _written(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
    del parameters["self"]
    return parameters


def _accepts(cls: type, name: str) -> bool:
    """Whether a constructor has an argument, or hands it on to one that has."""
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
    """Raise `ValueError` for an argument that is none of some words."""
    if value not in choices:
        words = (" or " if len(choices) == 2 else ", ").join(map(repr, choices))
        raise ValueError(f"`{name}` says {says}: {words}. Received: {name}={value!r}.")


def check_k(k: Any) -> int:
    """The number of updates between two syncs, or `ValueError`."""
    try:
        steps = operator.index(k)
    except TypeError:
        steps = 0
    if isinstance(k, bool) or steps < 1:
        raise ValueError(
            "`k` is the number of updates between two syncs, an int of at least 1, "
            f"such as k=5. Received: k={k!r}."
        )
    return steps


def check_alpha(alpha: Any) -> float:
    """The step of the slow weights, or `ValueError`."""
    try:
        step = float(alpha)
    except (TypeError, ValueError):
        step = float("nan")
    if isinstance(alpha, (bool, str)) or not 0 < step <= 1:
        raise ValueError(
            "`alpha` is the step of the slow weights, a number in (0, 1], such as "
            f"alpha=0.5. Received: alpha={alpha!r}."
        )
    return step


def get_optimizer(optimizer: Any, wrapper: type) -> keras.Optimizer:
    """The Keras optimizer that was given, or whose name or config was."""
    cls = wrapper.__name__
    if isinstance(optimizer, (str, dict)):
        return keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.Optimizer):
        return optimizer
    what = (
        f"the class {optimizer.__name__}; write {optimizer.__name__}()"
        if isinstance(optimizer, type)
        else f"{optimizer!r} of type {type(optimizer).__name__}"
    )
    raise TypeError(
        f"{cls} wraps a Keras optimizer, given as an instance, a name or a "
        f"config: {cls}(keras.optimizers.Adam(1e-3)). Received {what}."
    )

"""Optimizers as one would write them. Reads no state but the learning rate."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import keras

from keras_lookahead_lazy import _keras

_UNREADABLE = "..."


def written(optimizer: keras.Optimizer) -> str:
    """An optimizer with its learning rate, and what else is not the default."""
    cls = type(optimizer)
    if cls.__repr__ is not object.__repr__:
        return repr(optimizer)
    inside = _keras.inner(optimizer)
    settings = _differing(cls, _config(optimizer))
    if inside is not None:
        settings.pop("inner_optimizer", None)
        settings.pop("learning_rate", None)
        return call(cls, settings, written(inside))
    rate = _value(_keras.learning_rate(optimizer))
    return call(cls, {**settings, "learning_rate": rate})


def call(cls: type, arguments: Mapping[str, Any], *first: str) -> str:
    """The call of a constructor; the learning rate first among what is named."""
    named = sorted(arguments.items(), key=lambda item: item[0] != "learning_rate")
    return f"{cls.__name__}({', '.join([*first, *(f'{k}={v}' for k, v in named)])})"


def _config(it: Any) -> dict[str, Any]:
    try:
        if isinstance(it, keras.Optimizer):
            return _keras.config_without_state(it)
        return it.get_config()
    except Exception:  # of a user's own class, or where no value can be read
        return {}


def _differing(cls: type, config: dict[str, Any]) -> dict[str, str]:
    """What is not the constructor's default, as text.

    But for the name: Keras makes one up where none was given.
    """
    defaults = _defaults(cls)
    return {
        name: _value(value)
        for name, value in config.items()
        if name != "name"
        and repr(value) != repr(defaults.get(name, inspect.Parameter.empty))
    }


def _defaults(cls: type) -> dict[str, Any]:
    """Of the constructor's arguments, and those that it hands on to a base class."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters  # type: ignore
            found.update((name, p.default) for name, p in parameters.items())
    return found


def _value(value: Any) -> str:
    """A setting in a few characters."""
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return call(type(value), _differing(type(value), _config(value)))
    if inspect.isroutine(value):
        return getattr(value, "__name__", _UNREADABLE)
    if not hasattr(value, "shape"):
        return repr(value)
    try:
        array = _keras.to_numpy(value)
    except Exception:  # a value that a trace has, or that a step has taken away
        return _UNREADABLE
    return str(array[()]) if array.ndim == 0 else f"<array of shape {array.shape}>"

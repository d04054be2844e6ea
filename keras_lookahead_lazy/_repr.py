"""Write optimizers as code. Reads no state except the learning rate."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import keras

from keras_lookahead_lazy import _keras

_UNREADABLE = "..."


def written(optimizer: keras.Optimizer) -> str:
    """Return an optimizer as code, with its learning rate and non-default values."""
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


def setting(value: Any) -> str:
    """A setting of a wrapper, which may be an optimizer."""
    return written(value) if isinstance(value, keras.Optimizer) else repr(value)


def call(cls: type, arguments: Mapping[str, Any], *first: str) -> str:
    """Return the call of a constructor, with the learning rate as first keyword."""
    named = sorted(arguments.items(), key=lambda item: item[0] != "learning_rate")
    return f"{cls.__name__}({', '.join([*first, *(f'{k}={v}' for k, v in named)])})"


def _config(it: Any) -> dict[str, Any]:
    try:
        if isinstance(it, keras.Optimizer):
            return _keras.config_without_state(it)
        return it.get_config()
    except Exception:  # from a user's own class, or because a value cannot be read
        return {}


def _differing(cls: type, config: dict[str, Any]) -> dict[str, str]:
    """Return the values that differ from the constructor's defaults, as text.

    The name is left out, because Keras invents one if none is given.
    """
    defaults = _defaults(cls)
    return {
        name: _value(value)
        for name, value in config.items()
        if name != "name"
        and repr(value) != repr(defaults.get(name, inspect.Parameter.empty))
    }


def _defaults(cls: type) -> dict[str, Any]:
    """Return defaults of the constructor's arguments, with those of base classes."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters  # type: ignore
            found.update((name, p.default) for name, p in parameters.items())
    return found


def _value(value: Any) -> str:
    """Return a setting as short text."""
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return call(type(value), _differing(type(value), _config(value)))
    if inspect.isroutine(value):
        return getattr(value, "__name__", _UNREADABLE)
    if not hasattr(value, "shape"):
        return repr(value)
    try:
        array = _keras.to_numpy(value)
    except Exception:  # a traced value, or one that a step has donated
        return _UNREADABLE
    return str(array[()]) if array.ndim == 0 else f"<array of shape {array.shape}>"

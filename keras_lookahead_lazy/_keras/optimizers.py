"""Optimizers of Keras: what is inside them, their weights, slots and settings."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.stateless_scope import (
    get_stateless_scope,
    in_stateless_scope,
)
from keras.src.utils.tracking import no_automatic_dependency_tracking

# The attribute of Lookahead that holds the optimizer of the slow weights.
OUTER = "outer_optimizer"
# Lists of the base class that may have one entry per weight but are not slots.
_NOT_SLOTS = {
    "_variables",
    "_accumulated_gradients",
    "_model_variables_moving_average",
}


def innermost(optimizer: keras.Optimizer) -> keras.Optimizer:
    """Return the optimizer at the end of a chain of `inner_optimizer`s."""
    return chain(optimizer)[-1]


def chain(optimizer: keras.Optimizer) -> list[keras.Optimizer]:
    """Return an optimizer, the one inside it, and so on."""
    optimizers = []
    # (AutoGraph may convert this, and does not support assignments in conditions.)
    inside: keras.Optimizer | None = optimizer
    while inside is not None:
        optimizers.append(inside)
        inside = inner(inside)
    return optimizers


def inner(optimizer: keras.Optimizer) -> keras.Optimizer | None:
    """Return the optimizer inside a wrapper, including Keras's own, or `None`.

    Unlike the attribute `inner_optimizer` of a `LazyOptimizer`, this does not bring
    slots up to date.
    """
    return vars(optimizer).get("inner_optimizer")


def schedule_free(optimizer: keras.Optimizer) -> keras.Optimizer | None:
    """Return the schedule-free optimizer at the end of a chain, or in a container.

    Keras has one since 3.15. (A `MultiOptimizer` that was created with a function knows
    its optimizers only when it is built.)
    """
    cls = getattr(keras.optimizers, "ScheduleFreeAdamW", ())
    last = innermost(optimizer)
    candidates = [last, *map(innermost, getattr(last, "optimizers", []))]
    return next((each for each in candidates if isinstance(each, cls)), None)


def register_weights(optimizer: keras.Optimizer, weights: list) -> None:
    """Tell an optimizer which weights it trains, without building anything.

    `Optimizer.build` would also make the averages and gradient accumulators that
    a wrapper's inner optimizer already has.
    """
    optimizer._trainable_variables = weights
    optimizer._trainable_variables_indices = {
        key(optimizer, weight): i for i, weight in enumerate(weights)
    }
    optimizer.built = True


@no_automatic_dependency_tracking
def note_weights(optimizer: keras.Optimizer) -> None:
    """Tell Keras's own wrapper its weights, which Keras does itself since 3.12."""
    inside = inner(optimizer)
    if inside is not None and not weights(optimizer):
        register_weights(optimizer, list(weights(inside)))


def weights(optimizer: keras.Optimizer) -> list:
    """Return the weights that an optimizer was built for."""
    return optimizer._trainable_variables


def counter(optimizer: keras.Optimizer) -> keras.Variable:
    """Return an optimizer's own counter of calls, whatever its `iterations` are."""
    return optimizer._iterations


def key(optimizer: keras.Optimizer, variable: Any) -> Any:
    """Return a key that a weight, its `tf.Variable` and its replicas have in common."""
    return optimizer._var_key(variable)


def is_known(optimizer: keras.Optimizer, variable: Any) -> bool:
    """Return whether an optimizer was built for a weight."""
    return key(optimizer, variable) in optimizer._trainable_variables_indices


@contextlib.contextmanager
def variables_added(optimizer: keras.Optimizer, variables: list) -> Iterator[None]:
    """Let the innermost optimizer also choose old or new values of `variables`.

    On JAX, gradient accumulation and `LossScaleOptimizer` compute every update and then
    choose between old and new values, for the variables that they know.
    """
    state = vars(innermost(optimizer))
    before = state["_variables"]
    state["_variables"] = [*before, *variables]
    try:
        yield
    finally:
        state["_variables"] = before


def path(variable: Any) -> str:
    """Return a weight's path, or the name of a `tf.Variable`, which has no path."""
    return getattr(variable, "path", variable.name)


def config_with_any_learning_rate(optimizer: keras.Optimizer) -> dict[str, Any]:
    """Return an optimizer's config with an arbitrary number as the learning rate.

    A learning rate that is a lambda could be serialized, with a warning, but not
    loaded.
    """
    return _stand_in(optimizer, _learning_rate=None).get_config()


def config_without_state(optimizer: keras.Optimizer) -> dict[str, Any]:
    """Return an optimizer's config without reading any variable."""
    state = {"_learning_rate": None}
    if inner(optimizer) is not None:  # its config would be part of this one
        state["inner_optimizer"] = None
    config = _stand_in(optimizer, **state).get_config()
    config.pop("learning_rate", None)
    return config


def _stand_in(optimizer: keras.Optimizer, **attributes: Any) -> keras.Optimizer:
    """Return an object that shares everything with an optimizer except `attributes`."""
    stand_in = object.__new__(type(optimizer))
    vars(stand_in).update(vars(optimizer), **attributes)
    return stand_in


def learning_rate(optimizer: keras.Optimizer) -> Any:
    """Return the variable, schedule or function that gives the learning rate.

    The public attribute would compute a schedule's value.
    """
    return optimizer._learning_rate


def to_numpy(value: Any) -> np.ndarray:
    """Return the value of a variable or tensor without recording an operation."""
    if isinstance(value, keras.Variable):
        return np.asarray(value.numpy())
    return np.asarray(ops.convert_to_numpy(value))


def serialize(optimizer: keras.Optimizer) -> dict[str, Any]:
    """Return the config of an optimizer in a form that every backend can load.

    On torch, Keras's optimizers are subclasses in modules of that backend. Keras stores
    the names of these modules, which cannot be loaded on another backend.
    """
    config = keras.saving.serialize_keras_object(optimizer)
    if config["module"].startswith("keras.src.backend."):
        config["module"], config["registered_name"] = "keras.optimizers", None
    return config


def slots(optimizer: keras.Optimizer, variable: Any) -> dict[str, keras.Variable]:
    """Return what a built optimizer keeps for one weight, by the name of its list.

    This relies on a convention that Keras's own optimizers and its guide for new ones
    follow: slots are in a list attribute with one entry per weight, in the order of
    `build`. (Up to Keras 3.12, Muon's are in dictionaries by the weights' paths.) The
    weights themselves, which an optimizer may keep in the same way, do not count.
    """
    index = optimizer._get_variable_index(variable)
    weight, count = weights(optimizer)[index], len(weights(optimizer))
    found = {}
    for name, entries in vars(optimizer).items():
        slot = None
        if isinstance(entries, dict):
            slot = entries.get(path(variable))
        elif isinstance(entries, list) and name not in _NOT_SLOTS:
            slot = entries[index] if len(entries) == count else None
        # Adafactor fills its lists with integers where a weight has no such slot.
        if slot is weight or not isinstance(slot, keras.Variable):
            continue
        if "float" in slot.dtype:
            found[name] = slot
    return found


def nested_scope(pairs: Iterable[tuple]) -> keras.StatelessScope:
    """Return a scope in which some variables have other values.

    The other variables keep their values of the scope around it. In Keras's own scope,
    they would have their values from outside of all scopes.
    """
    scope = keras.StatelessScope(state_mapping=pairs)
    if in_stateless_scope():
        scope.state_mapping = get_stateless_scope().state_mapping | scope.state_mapping
    return scope


# The methods that a gradient goes through on its way to a weight.
_STEP = {
    "apply",
    "apply_gradients",
    "stateless_apply",
    "_backend_apply_gradients",
    "_backend_update_step",
    "_clip_gradients",
    "_apply_weight_decay",
    "update_step",
}


def has_step_of_its_own(attributes: Mapping[str, Any], module: str = "") -> bool:
    """Return whether a class or an optimizer overrides a part of the step.

    Keras's own classes differ only in `update_step`.

    Args:
        attributes: The attributes of the class or of the optimizer itself.
        module: The module of the class.
    """
    own = {"update_step"} if module.startswith("keras.src.") else _STEP
    taken_over = {name for name in own if hasattr(attributes.get(name), "_is_ours")}
    return bool((own - taken_over) & attributes.keys())


def updates_all_alike(optimizer: keras.Optimizer) -> bool:
    """Whether the step is Keras's own, which looks at no name of a weight."""
    return not any(
        has_step_of_its_own(vars(cls)) and not cls.__module__.startswith("keras.src.")
        for cls in type(optimizer).__mro__
    ) and not has_step_of_its_own(vars(optimizer))


def decays_weight(optimizer: keras.Optimizer, variable: Any) -> bool:
    """Whether an optimizer's weight decay concerns a weight, if there is any."""
    stand_in = _stand_in(optimizer, _exclude_from_weight_decay_cache={})
    return stand_in._use_weight_decay(variable)


class UnstoredVariable(keras.Variable):
    """A value that behaves like a variable and has no storage.

    Args:
        value: a tensor.
        like: the Keras variable whose name and dtype it bears.
    """

    def __init__(self, value: Any, like: keras.Variable) -> None:
        # `super().__init__` would create storage. These are the attributes that the
        # base class's properties read.
        self._value = value
        self._shape = tuple(value.shape)
        self._ndim = len(self._shape)
        self._dtype = keras.backend.standardize_dtype(like.dtype)
        self._name = like.name
        self._path = like.path
        self._layout = None
        self._regularizer = None
        self._constraint = None
        self._trainable = False
        self._autocast = False
        self._aggregation = "none"
        self._synchronization = "auto"
        self._overwrite_with_gradient = False

    def assign(self, value: Any) -> Any:
        self._value = ops.cast(ops.convert_to_tensor(value), self._dtype)
        return self._value


def _small_weight(variable: keras.Variable) -> keras.Variable:
    """Return a small variable that an optimizer treats like `variable`."""
    shape = tuple(variable.shape)
    small = (2,) + (1,) * (len(shape) - 1) if shape else ()
    value = np.arange(1, 1 + math.prod(small), dtype="float32").reshape(small)
    dtype = keras.backend.standardize_dtype(variable.dtype)
    weight = keras.Variable(value, dtype=dtype, name=path(variable).split("/")[-1])
    weight._path = path(variable)
    return weight


def fresh_slots(
    optimizer: keras.Optimizer, variables: list
) -> list[dict[str, keras.Variable]]:
    """Return the slots of a new copy of `optimizer`, for each of `variables`.

    The copy is built for small stand-ins of the weights, with two entries along the
    first axis and one along every other axis.
    """
    config = config_with_any_learning_rate(optimizer)
    copy = type(optimizer).from_config(config)
    small = [_small_weight(variable) for variable in variables]
    copy.build(small)
    return [slots(copy, weight) for weight in small]


def slots_by_row(optimizer: keras.Optimizer, variable: Any) -> set[str]:
    """Return the names of a table's slots that have one entry per row.

    If a table has as many rows as columns, for example, Adafactor's averages over rows
    and over columns have the same length. A smaller table then shows which is which.
    """
    shape, found = tuple(variable.shape), slots(optimizer, variable)
    length = shape[0]
    if length in shape[1:] and any(tuple(s.shape) != shape for s in found.values()):
        (found,) = fresh_slots(optimizer, [variable])
        length = 2
    return {name for name, slot in found.items() if tuple(slot.shape[:1]) == (length,)}


def unknown_slots(optimizer: keras.Optimizer, variables: list) -> list[keras.Variable]:
    """Return variables that may be slots of weights but that `slots` does not find."""
    rows = {tuple(variable.shape[:1]) for variable in variables} - {()}
    known = [
        weights(optimizer),
        *(slots(optimizer, variable).values() for variable in variables),
        vars(optimizer).get("_accumulated_gradients", []),
        vars(optimizer).get("_model_variables_moving_average", []),
    ]
    ids = {id(each) for entries in known for each in entries}
    return [
        each
        for each in optimizer.variables
        if tuple(each.shape[:1]) in rows and id(each) not in ids
    ]

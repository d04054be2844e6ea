"""Every name that Keras does not publish and this package cannot do without.

A wrapper has to reach its inner optimizer's per-weight state, and a lazy step
has to run the inner optimizer's `update_step` on something smaller than the
weight. Keras has no public way to do either. Each use is here, with the reason;
the tests run it against the oldest and the newest Keras that `pyproject.toml`
admits.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.trainers.trainer import Trainer
from keras.src.utils.tracking import no_automatic_dependency_tracking

__all__ = [
    "apply_weight_decay",
    "called_model",
    "caller_of_callbacks",
    "compile_arguments",
    "config_with_any_learning_rate",
    "fresh_slots",
    "inner",
    "innermost",
    "is_known",
    "is_saving_or_loading",
    "no_automatic_dependency_tracking",
    "note_compiled_models",
    "path",
    "register_variables",
    "serialize",
    "slots",
    "slots_by_row",
    "unknown_slots",
    "with_rows",
]

# Lists with one entry per weight that are no slots: the weights themselves, and
# what the base class keeps for every optimizer.
_NOT_SLOTS = {
    "_trainable_variables",
    "_variables",
    "_accumulated_gradients",
    "_model_variables_moving_average",
}


def innermost(optimizer: keras.Optimizer) -> keras.Optimizer:
    """The optimizer at the end of a chain of `inner_optimizer`s."""
    while (inside := inner(optimizer)) is not None:
        optimizer = inside
    return optimizer


def inner(optimizer: keras.Optimizer) -> keras.Optimizer | None:
    """The optimizer inside of a wrapper, also Keras's own; `None` inside of others.

    The attribute `inner_optimizer` of a `LazyOptimizer` makes slots current, too.
    """
    return vars(optimizer).get("inner_optimizer")


def register_variables(optimizer: keras.Optimizer, variables: list) -> None:
    """Tell an optimizer which weights it trains, without building anything.

    `Optimizer.build` would also make the averages and gradient accumulators that
    a wrapper's inner optimizer already has.
    """
    optimizer._trainable_variables = variables
    optimizer._trainable_variables_indices = {
        optimizer._var_key(v): i for i, v in enumerate(variables)
    }
    optimizer.built = True


def is_known(optimizer: keras.Optimizer, variable: Any) -> bool:
    """Whether an optimizer was built for a weight."""
    return optimizer._var_key(variable) in optimizer._trainable_variables_indices


def path(variable: Any) -> str:
    """A weight's path; of a `tf.Variable`, which has none, the name."""
    return getattr(variable, "path", variable.name)


def config_with_any_learning_rate(optimizer: keras.Optimizer) -> dict[str, Any]:
    """An optimizer's config, with a number for the learning rate.

    A lambda there can be serialized, with a warning, but not loaded.
    """
    stand_in = object.__new__(type(optimizer))
    vars(stand_in).update(vars(optimizer), _learning_rate=None)
    return stand_in.get_config()


def serialize(optimizer: keras.Optimizer) -> dict[str, Any]:
    """The config of an optimizer, in terms that hold on every backend.

    On torch Keras's optimizers are subclasses in modules of that backend, and Keras
    stores their names, which cannot be loaded on another.
    """
    config = keras.saving.serialize_keras_object(optimizer)
    if config["module"].startswith("keras.src.backend."):
        config["module"], config["registered_name"] = "keras.optimizers", None
    return config


def slots(optimizer: keras.Optimizer, variable: Any) -> dict[str, keras.Variable]:
    """What a built optimizer keeps for one weight, by the name of its list.

    Keras's convention, which its own optimizers and its guide for new ones
    follow: a list attribute with one entry per weight, in the order of `build`.
    """
    index = optimizer._get_variable_index(variable)
    weights = len(optimizer._trainable_variables)
    found = {}
    for name, entries in vars(optimizer).items():
        if name in _NOT_SLOTS or not isinstance(entries, list):
            continue
        slot = entries[index] if len(entries) == weights else None
        # Adafactor fills its lists with integers where a weight has no such slot.
        if isinstance(slot, keras.Variable) and "float" in slot.dtype:
            found[name] = slot
    return found


def stand_in(variable: keras.Variable) -> keras.Variable:
    """A small variable that an optimizer treats as it would treat `variable`."""
    shape = tuple(variable.shape)
    small = (2,) + (1,) * (len(shape) - 1) if shape else ()
    value = np.arange(1, 1 + math.prod(small), dtype="float32").reshape(small)
    dtype = keras.backend.standardize_dtype(variable.dtype)
    stand_in = keras.Variable(value, dtype=dtype, name=path(variable).split("/")[-1])
    stand_in._path = path(variable)
    return stand_in


def fresh_slots(
    optimizer: keras.Optimizer, variables: list
) -> list[dict[str, keras.Variable]]:
    """The slots of a copy of `optimizer`, not trained yet, for each of `variables`.

    The copy is built on stand-ins of the weights, with two entries along the first
    axis and one along each other.
    """
    config = config_with_any_learning_rate(optimizer)
    copy = type(optimizer).from_config(config)
    stand_ins = [stand_in(variable) for variable in variables]
    copy.build(stand_ins)
    return [slots(copy, each) for each in stand_ins]


def slots_by_row(optimizer: keras.Optimizer, variable: Any) -> set[str]:
    """Names of a table's slots that have an entry for each row.

    Of a table with as many rows as columns, say, Adafactor's averages over both are
    as long; then a smaller table tells which is which.
    """
    shape, found = tuple(variable.shape), slots(optimizer, variable)
    length = shape[0]
    if length in shape[1:] and any(tuple(s.shape) != shape for s in found.values()):
        (found,) = fresh_slots(optimizer, [variable])
        length = 2
    return {name for name, slot in found.items() if tuple(slot.shape[:1]) == (length,)}


def unknown_slots(optimizer: keras.Optimizer, variable: Any) -> list[keras.Variable]:
    """Variables that may be slots of a table, but not where `slots` looks for them."""
    known = [
        *(slots(optimizer, v).values() for v in optimizer._trainable_variables),
        vars(optimizer).get("_accumulated_gradients", []),
        vars(optimizer).get("_model_variables_moving_average", []),
    ]
    ids = {id(each) for entries in known for each in entries}
    rows = tuple(variable.shape[:1])
    return [
        each
        for each in optimizer._variables
        if tuple(each.shape[:1]) == rows and id(each) not in ids
    ]


@contextlib.contextmanager
def with_rows(
    optimizer: keras.Optimizer, variable: Any, views: dict[str, keras.Variable]
) -> Iterator[keras.Optimizer]:
    """A stand-in for `optimizer` that finds `views` where one weight's slots were.

    It shares everything else (hyperparameters, counters, learning rate), so its
    `update_step` is the inner optimizer's own, run on other storage. It is made
    without `__init__` or `copy`, which would create variables.
    """
    index = optimizer._get_variable_index(variable)
    key = optimizer._var_key(variable)
    stand_in = object.__new__(type(optimizer))
    state = vars(stand_in)
    state.update(vars(optimizer))
    state.pop("update_step", None)
    state.pop("_apply_weight_decay", None)
    for name, view in views.items():
        entries = list(state[name])
        entries[index] = view
        state[name] = entries
    # TensorFlow's versions of these five insist on a `tf.Variable`.
    state["assign"] = lambda variable, value: variable.assign(value)
    state["assign_add"] = lambda variable, value: variable.assign_add(value)
    state["assign_sub"] = lambda variable, value: variable.assign_sub(value)
    state["_var_key"] = lambda variable: key
    if type(optimizer)._apply_weight_decay is keras.Optimizer._apply_weight_decay:
        state["_apply_weight_decay"] = BaseOptimizer._apply_weight_decay.__get__(
            stand_in
        )
    before = dict(state)
    yield stand_in
    for name, value in state.items():  # what the step noted in attributes of its own
        if value is not before.get(name):
            setattr(optimizer, name, value)


def apply_weight_decay(optimizer: keras.Optimizer, variable: Any) -> None:
    """The optimizer's own decoupled weight decay, on one weight."""
    optimizer._apply_weight_decay([variable])


def called_model() -> Any:
    """The model or layer that the user (or `fit`) called, in whose call this runs."""
    context = global_state.get_global_attribute("current_call_ctx")
    return getattr(context, "entry_layer", None)


@functools.cache
def note_compiled_models(note: Callable[[keras.Model], None]) -> None:
    """Call `note` with each model that is compiled from now on.

    Keras tells an optimizer nothing of its model. On JAX it hands over mere values,
    not even variables; frozen weights it hands over nowhere. It is the base class's
    method, for Keras compares that with a model's own when it loads one.
    """
    compile_model = Trainer.compile

    @functools.wraps(compile_model)
    def compile_and_note(self: keras.Model, *args: Any, **kwargs: Any) -> None:
        compile_model(self, *args, **kwargs)
        note(self)

    Trainer.compile = compile_and_note


def caller_of_callbacks() -> tuple[FrameType | None, list]:
    """What is calling a callback: `fit`'s or `evaluate`'s frame, and its callbacks.

    Keras tells a callback neither which others there are nor that `evaluate` was
    interrupted; both can be seen in the calls.
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


def is_saving_or_loading() -> bool:
    """Whether Keras reads or writes a file, and this is called from there.

    It goes through all attributes then, and reads those that compute something, too.
    """
    frame = inspect.currentframe()
    while frame:
        if frame.f_globals.get("__name__", "").startswith("keras.src.saving."):
            return True
        frame = frame.f_back
    return False


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """What the user gave to `model.compile`, to call it again with."""
    return dict(model._compile_config.config)

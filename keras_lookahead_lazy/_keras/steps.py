"""An optimizer's step: another update for some weights, and updates of rows."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
from keras.src.optimizers.base_optimizer import BaseOptimizer

from keras_lookahead_lazy._keras.optimizers import (
    OUTER,
    UnstoredVariable,
    chain,
    key,
    path,
)

# Inner optimizers that have to keep their slots for one `LazyOptimizer`.
_taken_over: weakref.WeakSet[keras.Optimizer] = weakref.WeakSet()


def will_take_over(optimizer: keras.Optimizer) -> None:
    """Note that `take_over` will be called for an optimizer, in each step."""
    _taken_over.add(optimizer)


def is_taken_over(optimizer: keras.Optimizer) -> bool:
    """Return whether `will_take_over` was called for an optimizer."""
    return optimizer in _taken_over


def take_over(
    optimizer: keras.Optimizer,
    is_taken: Callable[[Any], bool],
    update: Callable[[Any, Any, Any], None],
    on_values: Callable[[Callable, list], list],
) -> Callable[[], None]:
    """Replace an optimizer's `update_step` by `update` for some weights.

    `update` also has to apply their weight decay. Everything that Keras does around the
    step (clipping, accumulation, replicas, averages) stays.

    Args:
        is_taken: Returns whether a weight (on TensorFlow, its replica) is one of them.
        update: Function of gradient, weight and learning rate.
        on_values: Calls a function of gradients. Keras clips what it passes on, because
            it would itself make `tf.IndexedSlices` dense to compute a global norm.

    Returns:
        A function that gives the optimizer its own methods back.
    """
    update_step, decay_weights = optimizer.update_step, optimizer._apply_weight_decay
    clip_gradients = optimizer._clip_gradients

    def update_weight(gradient: Any, variable: Any, learning_rate: Any) -> None:
        step = update if is_taken(variable) else update_step
        step(gradient, variable, learning_rate)

    def decay_others(variables: list) -> None:
        others = [v for v in variables if not is_taken(v)]
        if others:
            decay_weights(others)

    def clip(grads: list) -> list:
        return on_values(clip_gradients, grads)

    methods: dict[str, Any] = {
        "update_step": update_weight,
        "_apply_weight_decay": decay_others,
        "_clip_gradients": clip,
    }
    if hasattr(optimizer, "_parallel_update_step"):
        methods["_backend_update_step"] = _partly_parallel_update(optimizer, is_taken)
    for method in methods.values():
        method._is_ours = True
    attributes = vars(optimizer)
    before = {name: attributes[name] for name in methods.keys() & attributes.keys()}
    attributes.update(methods)

    def give_back() -> None:
        for name in methods:
            del attributes[name]
        attributes.update(before)

    return give_back


def _partly_parallel_update(
    optimizer: keras.Optimizer, is_taken: Callable[[Any], bool]
) -> Callable[[list, list, Any], None]:
    """Return torch's `_foreach` update for those weights that are not taken.

    It calls no `update_step`, so the others have to be kept out of it.
    """
    from keras.src.backend.torch.optimizers.torch_parallel_optimizer import (
        TorchParallelOptimizer,
    )

    update_all = optimizer._backend_update_step
    # The update of the same optimizer on other backends.
    update_each = super(TorchParallelOptimizer, optimizer)._backend_update_step

    def update(grads: list, variables: list, learning_rate: Any) -> None:
        pairs = list(zip(grads, variables, strict=True))
        taken = [pair for pair in pairs if is_taken(pair[1])]
        others = [pair for pair in pairs if not is_taken(pair[1])]
        if not others:
            update_each(*map(list, zip(*taken, strict=True)), learning_rate)
            return
        update_all(*map(list, zip(*others, strict=True)), learning_rate)
        for gradient, variable in taken:
            optimizer.update_step(gradient, variable, learning_rate)

    return update


def accumulator(optimizer: keras.Optimizer, variable: Any) -> keras.Variable:
    """Return the variable that Keras accumulates a weight's gradients in."""
    index = optimizer._get_variable_index(variable)
    return optimizer._accumulated_gradients[index]


@contextlib.contextmanager
def without_accumulation(optimizer: keras.Optimizer) -> Iterator[None]:
    """Let `apply` update with its gradients at once, without accumulating them.

    The counters of calls and of updates stay as gradient accumulation sets them.
    """

    def update(grads: list, variables: list) -> None:
        grads = optimizer._clip_gradients(grads)
        optimizer._apply_weight_decay(variables)
        optimizer._backend_update_step(grads, variables, optimizer.learning_rate)

    update._is_ours = True  # type: ignore[attr-defined]
    vars(optimizer)["_backend_apply_gradients"] = update
    try:
        yield
    finally:
        del vars(optimizer)["_backend_apply_gradients"]


def own_variables(optimizer: keras.Optimizer) -> list:
    """Return the variables of an optimizer itself, without those of an inner one.

    Those of an outer optimizer, which works beside it, are included.
    """
    own, outer = list(vars(optimizer)["_variables"]), vars(optimizer).get(OUTER)
    return own if outer is None else own + own_variables(outer)


def all_variables(optimizer: keras.Optimizer) -> list:
    """Return the variables of an optimizer and of the optimizers inside."""
    return [v for each in chain(optimizer) for v in own_variables(each)]


def unique(variables: Iterable) -> list:
    """Return each variable once. Variables compare by value, so this uses their ids."""
    return list({id(variable): variable for variable in variables}.values())


def step_on_rows(
    optimizer: keras.Optimizer,
    variable: Any,
    weight: UnstoredVariable,
    slots: dict[str, UnstoredVariable],
    gradient: Any,
    learning_rate: Any,
) -> None:
    """Run an optimizer's own weight decay and `update_step` on rows of a weight.

    They run on a stand-in for the optimizer that shares everything with it
    (hyperparameters, counters, learning rate) except the slots of this weight. The
    stand-in is created without `__init__` or `copy`, which would create variables.

    Args:
        variable: The whole weight.
        weight: The rows.
        slots: The rows of the slots, by name.
    """
    index = optimizer._get_variable_index(variable)
    variable_key = key(optimizer, variable)
    stand_in = object.__new__(type(optimizer))
    state = vars(stand_in)
    state.update(vars(optimizer))
    state.pop("update_step", None)
    state.pop("_apply_weight_decay", None)
    for name, rows in slots.items():
        entries = state[name].copy()
        entries[path(variable) if isinstance(entries, dict) else index] = rows
        state[name] = entries
    # TensorFlow's versions of these five insist on a `tf.Variable`.
    state["assign"] = lambda variable, value: variable.assign(value)
    state["assign_add"] = lambda variable, value: variable.assign_add(value)
    state["assign_sub"] = lambda variable, value: variable.assign_sub(value)
    state["_var_key"] = lambda variable: variable_key
    if type(optimizer)._apply_weight_decay is keras.Optimizer._apply_weight_decay:
        state["_apply_weight_decay"] = BaseOptimizer._apply_weight_decay.__get__(
            stand_in
        )
    before = dict(state)
    stand_in._apply_weight_decay([weight])
    stand_in.update_step(gradient, weight, learning_rate)
    for name, value in state.items():  # attributes that the step itself has set
        if value is not before.get(name):
            setattr(optimizer, name, value)

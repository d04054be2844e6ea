"""Every name that Keras does not publish and this package cannot do without.

A wrapper has to reach its inner optimizer's per-weight state, and a lazy step
has to run the inner optimizer's `update_step` on something smaller than the
weight. Keras has no public way to do either. Each use is here, with the reason,
and nowhere else; a test looks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import (
    get_stateless_scope,
    in_stateless_scope,
)
from keras.src.backend.common.variables import AutocastScope
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.trainers.trainer import Trainer
from keras.src.utils.tracking import no_automatic_dependency_tracking

__all__ = ["in_stateless_scope", "no_automatic_dependency_tracking"]

# Lists of the base class that may have one entry per weight and are no slots.
_NOT_SLOTS = {
    "_variables",
    "_accumulated_gradients",
    "_model_variables_moving_average",
}


def innermost(optimizer: keras.Optimizer) -> keras.Optimizer:
    """The optimizer at the end of a chain of `inner_optimizer`s."""
    return chain(optimizer)[-1]


def chain(optimizer: keras.Optimizer) -> list[keras.Optimizer]:
    """An optimizer, the one inside it, and so on."""
    optimizers = []
    # (AutoGraph, which may come by here, knows no assignment in a condition.)
    inside: keras.Optimizer | None = optimizer
    while inside is not None:
        optimizers.append(inside)
        inside = inner(inside)
    return optimizers


def inner(optimizer: keras.Optimizer) -> keras.Optimizer | None:
    """The optimizer inside of a wrapper, also Keras's own; `None` inside of others.

    The attribute `inner_optimizer` of a `LazyOptimizer` makes slots current, too.
    """
    return vars(optimizer).get("inner_optimizer")


def schedule_free(optimizer: keras.Optimizer) -> keras.Optimizer | None:
    """The schedule-free optimizer at the end of a chain, or in a container there.

    Keras has one since 3.15. (A `MultiOptimizer` with a function knows its optimizers
    when it is built.)
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
    """Let Keras's own wrapper know its weights, which it does not before Keras 3.12."""
    inside = inner(optimizer)
    if inside is not None and not weights(optimizer):
        register_weights(optimizer, list(weights(inside)))


def weights(optimizer: keras.Optimizer) -> list:
    """The weights that an optimizer was built for."""
    return optimizer._trainable_variables


def counter(optimizer: keras.Optimizer) -> keras.Variable:
    """An optimizer's own counter of calls, whatever its `iterations` are."""
    return optimizer._iterations


def key(optimizer: keras.Optimizer, variable: Any) -> Any:
    """What a weight, its `tf.Variable` and the replicas of that have in common."""
    return optimizer._var_key(variable)


def is_known(optimizer: keras.Optimizer, variable: Any) -> bool:
    """Whether an optimizer was built for a weight."""
    return key(optimizer, variable) in optimizer._trainable_variables_indices


@contextlib.contextmanager
def variables_added(optimizer: keras.Optimizer, variables: list) -> Iterator[None]:
    """Variables for which the innermost optimizer chooses old or new values, too.

    JAX's gradient accumulation and `LossScaleOptimizer` compute every update and then
    choose, for the variables that they know.
    """
    state = vars(innermost(optimizer))
    before = state["_variables"]
    state["_variables"] = [*before, *variables]
    try:
        yield
    finally:
        state["_variables"] = before


def path(variable: Any) -> str:
    """A weight's path; of a `tf.Variable`, which has none, the name."""
    return getattr(variable, "path", variable.name)


def config_with_any_learning_rate(optimizer: keras.Optimizer) -> dict[str, Any]:
    """An optimizer's config, with a number for the learning rate.

    A lambda there can be serialized, with a warning, but not loaded.
    """
    return _stand_in(optimizer, _learning_rate=None).get_config()


def config_without_state(optimizer: keras.Optimizer) -> dict[str, Any]:
    """An optimizer's config, for which no variable is read."""
    state = {"_learning_rate": None}
    if inner(optimizer) is not None:  # whose config would be a part of this
        state["inner_optimizer"] = None
    config = _stand_in(optimizer, **state).get_config()
    config.pop("learning_rate", None)
    return config


def _stand_in(optimizer: keras.Optimizer, **attributes: Any) -> keras.Optimizer:
    """What shares everything with an optimizer but some attributes."""
    stand_in = object.__new__(type(optimizer))
    vars(stand_in).update(vars(optimizer), **attributes)
    return stand_in


def learning_rate(optimizer: keras.Optimizer) -> Any:
    """What an optimizer has its learning rate from: a variable, a schedule, a function.

    The public attribute would compute a schedule's value.
    """
    return optimizer._learning_rate


def to_numpy(value: Any) -> np.ndarray:
    """The value of a variable or tensor, without recording an operation."""
    if isinstance(value, keras.Variable):
        return np.asarray(value.numpy())
    return np.asarray(ops.convert_to_numpy(value))


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
    (Muon's, up to Keras 3.12, are dictionaries by the weights' paths.) The weights
    themselves, which an optimizer may keep likewise, are none.
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
    """A scope in which some variables have other values; the rest keep theirs.

    Keras's own scope would show the rest as they were before every scope.
    """
    scope = keras.StatelessScope(state_mapping=pairs)
    if in_stateless_scope():
        scope.state_mapping = get_stateless_scope().state_mapping | scope.state_mapping
    return scope


# Where a gradient goes on its way to a weight.
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
    """Whether a class, or an optimizer, changes what is done to a gradient.

    Of Keras's own classes only `update_step` differs from one to the other.

    Args:
        attributes: those of the class or of the optimizer itself.
        module: the class's.
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
        # No `super().__init__`: it would create storage. These are the
        # attributes that the base class's properties read.
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
    """A small variable that an optimizer treats as it would treat `variable`."""
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
    """The slots of a copy of `optimizer`, not trained yet, for each of `variables`.

    The copy is built on small stand-ins of the weights, with two entries along the
    first axis and one along each other.
    """
    config = config_with_any_learning_rate(optimizer)
    copy = type(optimizer).from_config(config)
    small = [_small_weight(variable) for variable in variables]
    copy.build(small)
    return [slots(copy, weight) for weight in small]


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


def unknown_slots(optimizer: keras.Optimizer, variables: list) -> list[keras.Variable]:
    """What may be slots of some weights, but not where `slots` looks for them."""
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


# Another update for some weights


def take_over(
    optimizer: keras.Optimizer,
    is_taken: Callable[[Any], bool],
    update: Callable[[Any, Any, Any], None],
) -> None:
    """Put `update` in the place of an optimizer's `update_step` for some weights.

    Their weight decay is left to `update`, too. All that Keras does around the step
    (clipping, accumulation, replicas, averages) stays.

    Args:
        is_taken: tells of a weight (on TensorFlow of its replica) whether it is one.
        update: gets gradient, weight and learning rate.
    """
    update_step, decay_weights = optimizer.update_step, optimizer._apply_weight_decay

    def update_weight(gradient: Any, variable: Any, learning_rate: Any) -> None:
        step = update if is_taken(variable) else update_step
        step(gradient, variable, learning_rate)

    def decay_others(variables: list) -> None:
        others = [v for v in variables if not is_taken(v)]
        if others:
            decay_weights(others)

    update_weight._is_ours = True  # type: ignore[attr-defined]
    decay_others._is_ours = True  # type: ignore[attr-defined]
    optimizer.update_step = update_weight
    optimizer._apply_weight_decay = decay_others
    if hasattr(optimizer, "_parallel_update_step"):
        _take_over_parallel_update(optimizer, is_taken)


def is_taken_over(optimizer: keras.Optimizer) -> bool:
    """Whether `take_over` was called for an optimizer."""
    return "update_step" in vars(optimizer)


def _take_over_parallel_update(
    optimizer: keras.Optimizer, is_taken: Callable[[Any], bool]
) -> None:
    """Keep weights out of torch's `_foreach` update, which calls no `update_step`."""
    from keras.src.backend.torch.optimizers.torch_parallel_optimizer import (
        TorchParallelOptimizer,
    )

    update_all = optimizer._backend_update_step
    # The update that the same optimizer has on other backends.
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

    update._is_ours = True  # type: ignore[attr-defined]
    optimizer._backend_update_step = update


def accumulator(optimizer: keras.Optimizer, variable: Any) -> keras.Variable:
    """What Keras's gradient accumulation adds a weight's gradients to."""
    index = optimizer._get_variable_index(variable)
    return optimizer._accumulated_gradients[index]


@contextlib.contextmanager
def without_accumulation(optimizer: keras.Optimizer) -> Iterator[None]:
    """Let `apply` update with the gradients that it gets, and accumulate none.

    The counters, of calls and of updates, stay what gradient accumulation makes them.
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
    """The variables that an optimizer has itself, as they are stored."""
    return list(vars(optimizer)["_variables"])


def all_variables(optimizer: keras.Optimizer) -> list:
    """The same, with those of the optimizers inside."""
    return [v for each in chain(optimizer) for v in own_variables(each)]


def unique(variables: Iterable) -> list:
    """Variables, each once; they compare by value, so it is their ids that differ."""
    return list({id(variable): variable for variable in variables}.values())


def step_on_rows(
    optimizer: keras.Optimizer,
    variable: Any,
    weight: UnstoredVariable,
    slots: dict[str, UnstoredVariable],
    gradient: Any,
    learning_rate: Any,
) -> None:
    """An optimizer's own weight decay and `update_step`, on rows of a weight.

    They run on a stand-in for the optimizer that shares everything with it
    (hyperparameters, counters, learning rate) but the one weight's slots. It is made
    without `__init__` or `copy`, which would create variables.

    Args:
        variable: the whole weight.
        weight: the rows.
        slots: the rows of its slots, by name.
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
    for name, value in state.items():  # what the step noted in attributes of its own
        if value is not before.get(name):
            setattr(optimizer, name, value)


# Models, their calls and callbacks


def stored_value(variable: keras.Variable) -> Any:
    """A variable's own value; a layer with mixed precision would see a copy, cast."""
    with AutocastScope(None):
        return variable.value


def looked_up_table(layer: keras.layers.Embedding) -> keras.Variable:
    """The variable of which an Embedding looks up rows; with LoRA, that it trains."""
    return layer.lora_embeddings_a if layer.lora_enabled else layer._embeddings


def with_lora(layer: keras.layers.Embedding, ids: Any, rows: Any) -> Any:
    """What an Embedding makes of the rows of its trained table."""
    if not layer.lora_enabled:
        return rows
    # Keras has `lora_alpha` since 3.11.
    scale = getattr(layer, "lora_alpha", layer.lora_rank) / layer.lora_rank
    dtype, frozen = layer.compute_dtype, stored_value(layer._embeddings)
    frozen_rows = ops.cast(ops.take(frozen, ids, axis=0), dtype)
    return frozen_rows + scale * ops.matmul(
        ops.cast(rows, dtype), layer.lora_embeddings_b
    )


def training_model() -> keras.Model | None:
    """The model in whose method this runs, such as `train_step`; `None` elsewhere.

    On JAX that gives an optimizer mere values, not variables.
    """
    for frame in _callers():
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
    return None


def called_model() -> Any:
    """The model or layer that the user (or `fit`) called, in whose call this runs."""
    context = global_state.get_global_attribute("current_call_ctx")
    return getattr(context, "entry_layer", None)


@functools.cache
def note_compiled_models(note: Callable[[keras.Model], None]) -> None:
    """Call `note` with each model that is compiled from now on.

    Keras tells an optimizer nothing of its model, and so nothing of frozen weights.
    It is the base class's method, for Keras compares that with a model's own when it
    loads one.
    """
    compile_model = Trainer.compile

    @functools.wraps(compile_model)
    def compile_and_note(self: keras.Model, *args: Any, **kwargs: Any) -> None:
        compile_model(self, *args, **kwargs)
        note(self)

    Trainer.compile = compile_and_note


@functools.cache
def replace_loss_scaling(
    is_by_rows: Callable[[Any], bool], apply_by_rows: Callable[..., None]
) -> None:
    """Let `apply_by_rows` make the steps of those LossScaleOptimizers it is for.

    Keras puts this optimizer around the user's by itself, in `compile`.
    """
    scaling = keras.optimizers.LossScaleOptimizer
    apply, stateless_apply = scaling.apply, scaling.stateless_apply

    @functools.wraps(apply)
    def apply_scaled(
        self: Any, grads: list, trainable_variables: list | None = None
    ) -> None:
        if not is_by_rows(self):
            apply(self, grads, trainable_variables)
            return
        if not self.built:
            with keras.name_scope(self.name):
                self.build(trainable_variables)
        apply_by_rows(self, grads, trainable_variables)

    @functools.wraps(stateless_apply)
    def stateless_apply_scaled(self: Any, *values: list, **named: list) -> tuple:
        # The base class's calls `apply`.
        base = keras.Optimizer.stateless_apply
        return (base if is_by_rows(self) else stateless_apply)(self, *values, **named)

    scaling.apply, scaling.stateless_apply = apply_scaled, stateless_apply_scaled


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


def validate_again(model: keras.Model) -> dict[str, float]:
    """Metrics on the validation data of the `fit` that is running.

    Keras tells callbacks nothing of those data, but keeps the iterator that its own
    validation went through until `fit` ends.
    """
    return model.evaluate(verbose=0, return_dict=True, _use_cached_eval_dataset=True)


def is_saving_or_loading() -> bool:
    """Whether Keras reads or writes a file, and this is called from there.

    It goes through all attributes then, and reads those that compute something, too.
    A state tree is what `OrbaxCheckpoint` writes.
    """
    return any(
        frame.f_globals.get("__name__", "").startswith("keras.src.saving.")
        or frame.f_code.co_name in ("get_state_tree", "set_state_tree")
        for frame in _callers()
    )


def is_refusing_a_file() -> bool:
    """Whether Keras reads a file, and will raise an error as a layer does not fit.

    It goes on with everything else first.
    """
    for frame in _callers():
        if frame.f_code.co_name == "_load_state":
            has_failed = bool(frame.f_locals.get("failed_saveables"))
            return has_failed and not frame.f_locals.get("skip_mismatch")
    return False


def _callers() -> Iterator[FrameType]:
    """The frames of what is running, the innermost first."""
    frame = inspect.currentframe()
    while frame:
        yield frame
        frame = frame.f_back


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """What the user gave to `model.compile`, to call it again with."""
    return dict(model._compile_config.config)

"""Every private name of Keras that this package needs.

A wrapper has to reach its inner optimizer's per-weight state, and a lazy step has to
run the inner optimizer's `update_step` on something smaller than the weight. Keras has
no public way to do either. All such uses are in this module, each with its reason.
`tests/test_house.py` checks that there are none elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
import weakref
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


# Another update for some weights

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
) -> Callable[[], None]:
    """Replace an optimizer's `update_step` by `update` for some weights.

    `update` also has to apply their weight decay. Everything that Keras does around the
    step (clipping, accumulation, replicas, averages) stays.

    Args:
        is_taken: Returns whether a weight (on TensorFlow, its replica) is one of them.
        update: Function of gradient, weight and learning rate.

    Returns:
        A function that gives the optimizer its own methods back.
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
    methods: dict[str, Any] = {
        "update_step": update_weight,
        "_apply_weight_decay": decay_others,
    }
    if hasattr(optimizer, "_parallel_update_step"):
        methods["_backend_update_step"] = _partly_parallel_update(optimizer, is_taken)
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

    update._is_ours = True  # type: ignore[attr-defined]
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


# Models, their calls and callbacks


def stored_value(variable: keras.Variable) -> Any:
    """Return a variable's own value. With mixed precision, a layer sees a cast copy."""
    with AutocastScope(None):
        return variable.value


def looked_up_table(layer: keras.layers.Embedding) -> keras.Variable:
    """Return the variable whose rows an Embedding looks up; with LoRA, the factor."""
    return layer.lora_embeddings_a if layer.lora_enabled else layer._embeddings


def with_lora(layer: keras.layers.Embedding, ids: Any, rows: Any) -> Any:
    """Return the output of an Embedding for rows of its trained table."""
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
    is_by_rows: Callable[[Any], bool], apply_by_rows: Callable[..., None]
) -> None:
    """Let `apply_by_rows` make the steps of a LossScaleOptimizer if `is_by_rows`.

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
            apply_by_rows(self, grads, trainable_variables)

        return apply_scaled

    def stateless_by_rows(stateless_apply: Any) -> Any:
        def stateless_apply_scaled(self: Any, *values: list, **named: list) -> tuple:
            # The base class's calls `apply`.
            base = keras.Optimizer.stateless_apply
            method = base if is_by_rows(self) else stateless_apply
            return method(self, *values, **named)

        return stateless_apply_scaled

    scaling = keras.optimizers.LossScaleOptimizer
    replace_method(scaling, "apply", by_rows)
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

"""Base class for a wrapper of an inner Keras optimizer; knows neither algorithm."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lookahead_lazy import _arguments, _keras, _loss_scaling
from keras_lookahead_lazy._backend import check_backend, engine
from keras_lookahead_lazy._catch_up import RowClock
from keras_lookahead_lazy._keras import chain
from keras_lookahead_lazy._saving import SavedOptimizer


def _setting(name: str) -> Any:
    """Return a property that reads and writes the inner optimizer's attribute."""

    def read(self: OptimizerWrapper) -> Any:
        return getattr(self._inner, name)

    def write(self: OptimizerWrapper, value: Any) -> None:
        # The base class's `__init__` sets its defaults before there is an inner
        # optimizer. They are not meant for the inner optimizer.
        if "inner_optimizer" in vars(self):
            setattr(self._inner, name, value)

    return property(read, write, doc=f"`{name}` of the inner optimizer.")


class OptimizerWrapper(SavedOptimizer):
    """An optimizer that lets another optimizer compute the updates.

    Args:
        optimizer: Keras optimizer instance, its name or its config: the inner one.
        name: The name of the wrapper.
    """

    def __init__(
        self,
        optimizer: keras.Optimizer | str | dict,
        name: str | None,
    ) -> None:
        check_backend()
        _keras.note_compiled_models(_note_compiled)
        _keras.replace_loss_scaling(_scales_by_rows, _scale_by_rows, _check_finite)
        inner_optimizer = _arguments.get_optimizer(optimizer, type(self))
        # With a callable, the base class creates no variable for a learning rate.
        super().__init__(learning_rate=lambda: self._inner.learning_rate, name=name)
        self.inner_optimizer = inner_optimizer
        scaling = keras.optimizers.LossScaleOptimizer
        _scaling_inside.update(o for o in chain(self._inner) if isinstance(o, scaling))
        if (inside := self._wrapper_inside()) is not None:
            inside.__dict__["_around"] = weakref.ref(self)

    @property
    def inner_optimizer(self) -> keras.Optimizer:
        """The optimizer inside."""
        self._make_slots_current()
        return self._inner

    @inner_optimizer.setter
    def inner_optimizer(self, optimizer: keras.Optimizer) -> None:
        self.__dict__["inner_optimizer"] = optimizer

    @property
    def _inner(self) -> keras.Optimizer:
        return vars(self).get("inner_optimizer")

    def _make_slots_current(self) -> None:
        """Bring slots up to date; called before they may be read."""

    # Attributes that only the constructor sets: variables and compiled steps depend on
    # them.
    _fixed: tuple[str, ...] = ("inner_optimizer",)
    # Returns the model that was last compiled with this optimizer, if it is alive.
    _model: Callable[[], keras.Model | None] = staticmethod(lambda: None)
    # Returns the wrapper that this one was last put into, if it is alive.
    _around: Callable[[], OptimizerWrapper | None] = staticmethod(lambda: None)

    weight_decay = _setting("weight_decay")
    clipnorm = _setting("clipnorm")
    clipvalue = _setting("clipvalue")
    global_clipnorm = _setting("global_clipnorm")
    use_ema = _setting("use_ema")
    ema_momentum = _setting("ema_momentum")
    ema_overwrite_frequency = _setting("ema_overwrite_frequency")
    gradient_accumulation_steps = _setting("gradient_accumulation_steps")
    # `keras.callbacks.SwapEMAWeights` reads this.
    _model_variables_moving_average = _setting("_model_variables_moving_average")

    @property
    def loss_scale_factor(self) -> float | None:
        """`loss_scale_factor` of the inner optimizer."""
        return self._inner.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: float | None) -> None:
        if "inner_optimizer" not in vars(self):
            return
        if self._scales_the_loss():
            # A `LossScaleOptimizer` sets this on the optimizer that it wraps.
            raise ValueError(
                f"The optimizer inside this {type(self).__name__} is a "
                "LossScaleOptimizer already, and a loss must not be scaled twice. "
                "With a float16 policy, compile the plain "
                f"{type(self).__name__}(Adam(...)): Keras then wraps it itself. "
                "Or pass auto_scale_loss=False to compile()."
            )
        self._inner.loss_scale_factor = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed and name in vars(self):
            raise AttributeError(
                f"`{name}` is fixed by the constructor. Create a new optimizer, "
                f"{type(self).__name__}(...), and compile the model with it."
            )
        # Keras on TensorFlow skips the assignment of an equal value, but the setter
        # above has to see it.
        if name == "loss_scale_factor":
            OptimizerWrapper.loss_scale_factor.fset(self, value)  # type: ignore
        else:
            super().__setattr__(name, value)

    def build(self, variables: list[keras.Variable]) -> None:
        """Create the inner optimizer's variables, then this wrapper's."""
        if self.built:
            return
        variables = _arguments.check_weights(variables)
        if not self._inner.built:
            self._inner.build(variables)
        _keras.note_weights(self._inner)
        self._check_known(variables, self._inner)
        self._register(variables)

    @_keras.no_automatic_dependency_tracking
    def _register(self, variables: list[keras.Variable]) -> None:
        _keras.register_weights(self, variables)

    def apply(self, grads: list, trainable_variables: list | None = None) -> None:
        """Update the weights with the inner optimizer, as this wrapper requires.

        Args:
            grads: List with one gradient per variable, or `None` for a variable without
                one. An empty list is ignored, as in Keras's own optimizers.
            trainable_variables: List of variables. Defaults to those of `build`.
        """
        engine.uncompiled(self._check_and_apply, grads, trainable_variables)

    def _check_and_apply(self, grads: list, trainable_variables: list | None) -> None:
        if isinstance(grads, (list, tuple)) and len(grads) == 0:
            return
        if trainable_variables is not None:
            trainable_variables = _arguments.check_weights(trainable_variables)
        elif not self.built:
            raise ValueError(
                "The optimizer is not built, and it received gradients without "
                "variables. Call optimizer.build(model.trainable_variables) first, or "
                "pass the variables together with the gradients."
            )
        weights = trainable_variables or _keras.weights(self)
        if not self.has_taken_rows():  # row gradients have other shapes
            _arguments.check_gradients(grads, weights)
        self.build(weights)
        self._check_known(weights, self)
        arrays = (
            ops.convert_to_tensor(g) if isinstance(g, np.ndarray) else g for g in grads
        )
        self._apply(list(arrays), trainable_variables)

    def _check_known(self, variables: list, optimizer: keras.Optimizer) -> None:
        unknown = [v for v in variables if not _keras.is_known(optimizer, v)]
        if unknown and not _keras.weights(optimizer):
            cls = type(self).__name__
            raise ValueError(
                f"{type(optimizer).__name__} {optimizer.name!r} was built for no "
                "weights. Keras does that when it loads a whole model from an old .h5 "
                f"file. Compile the model with a new {cls}(...), and save it with "
                "model.save('model.keras')."
            )
        if unknown:
            paths = ", ".join(_keras.path(variable) for variable in unknown)
            raise ValueError(
                f"{type(optimizer).__name__} {optimizer.name!r} was built for other "
                f"weights and does not know {paths}. One optimizer trains one model: "
                f"give each model its own {type(self).__name__}(...). A model with "
                "new weights, or newly unfrozen ones, needs a new one."
            )

    def stateless_apply(
        self, optimizer_variables: list, grads: list, trainable_variables: list
    ) -> tuple[list, list]:
        """Apply gradients to values instead of variables.

        Values do not show which weights they belong to, so this checks the model that
        is being trained.
        """
        weights = getattr(_keras.training_model(), "trainable_variables", [])
        if self.built and len(weights) == len(trainable_variables):
            self._check_known(weights, self)
        return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def _apply(self, grads: list, variables: list | None) -> None:
        """Make one step. The optimizer is built and there is at least one gradient."""
        raise NotImplementedError

    def _apply_inner(self, grads: list, variables: list | None) -> Any:
        """Let the inner optimizer make its step.

        Returns:
            The number of updates of the weights: 1, or 0 if gradient accumulation only
            stored the gradients or loss scaling skipped them.
        """
        optimizer, assigned = self._inner, super().variables
        if not self.gradient_accumulation_steps and not self._scales_the_loss():
            engine.apply(optimizer, grads, variables, assigned)
            return 1
        before = self._inner_updates()
        is_scaling = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if is_scaling and engine.num_replicas() == 1:
            _loss_scaling.apply(optimizer, grads, variables, assigned)
        else:
            engine.apply(optimizer, grads, variables, assigned)
        # On JAX and torch, Keras's counter wraps around at 2**31. Its parity is right.
        return (self._inner_updates() - before) % 2

    def _inner_updates(self) -> Any:
        """Return the inner optimizer's `iterations`; the host may keep a copy."""
        calls = engine.read_count(_keras.counter(_keras.innermost(self._inner)))
        return calls // (self.gradient_accumulation_steps or 1)

    # What a wrapper tells the wrapper around it about rows and slots. By default, these
    # methods ask the next wrapper inside.

    def _wrapper_inside(self) -> OptimizerWrapper | None:
        inside = chain(self._inner)
        return next((o for o in inside if isinstance(o, OptimizerWrapper)), None)

    def wrappers_around(self) -> list[OptimizerWrapper]:
        """Return the wrappers around this one, the nearest first."""
        around = self._around()
        return [] if around is None else [around, *around.wrappers_around()]

    def row_clocks(self) -> dict[Any, RowClock]:
        """Return which rows of lazy tables moved recently, by the tables' keys."""
        inside = self._wrapper_inside()
        return {} if inside is None else inside.row_clocks()

    def has_taken_rows(self) -> bool:
        """Return whether the running step has gradients that are sums over lookups."""
        inside = self._wrapper_inside()
        return inside is not None and inside.has_taken_rows()

    def refresh_rates(self) -> None:
        """Adapt to settings of the inner optimizer that may have changed."""

    def catch_up(self) -> None:
        """Bring the slots of every row up to date."""
        inside = self._wrapper_inside()
        if inside is not None:
            inside.catch_up()

    def variables_that_catch_up(self) -> list[keras.Variable]:
        """Return the variables that `catch_up` may write."""
        inside = self._wrapper_inside()
        return [] if inside is None else inside.variables_that_catch_up()

    def begin_cycle(self) -> None:
        """Make the next update the first of a cycle."""
        inside = self._wrapper_inside()
        if inside is not None:
            inside.begin_cycle()

    def _scales_the_loss(self) -> bool:
        return any(
            isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
            for optimizer in chain(self._inner)
        )

    @property
    def variables(self) -> list[keras.Variable]:
        """The wrapper's own variables, then those of the inner optimizer."""
        self._make_slots_current()
        return self._stored_variables()

    def _stored_variables(self) -> list[keras.Variable]:
        """The same, as they are stored."""
        return super().variables + self._inner.variables

    @property
    def _counter(self) -> keras.Variable:
        """This wrapper's own counter of updates."""
        return _keras.counter(self)

    @property
    def iterations(self) -> Any:
        """Number of updates that the inner optimizer has made."""
        return self._inner.iterations

    @property
    def learning_rate(self) -> Any:
        """Learning rate of the inner optimizer. You can assign to it."""
        return self._inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self._inner.learning_rate = learning_rate

    def exclude_from_weight_decay(
        self, var_list: list | None = None, var_names: list[str] | None = None
    ) -> None:
        """Exclude weights from the inner optimizer's weight decay."""
        self._inner.exclude_from_weight_decay(var_list, var_names)

    def scale_loss(self, loss: Any) -> Any:
        """Scale the loss as the inner optimizer requires."""
        return self._inner.scale_loss(loss)

    def finalize_variable_values(self, var_list: list) -> None:
        """Let the inner optimizer set the weights that training ends on."""
        self._inner.finalize_variable_values(var_list)
        if self.use_ema:
            for variable in var_list:
                # Copied, because JAX can donate the average's buffer only once.
                variable.assign(ops.copy(variable))

    def set_weights(self, weights: list) -> None:
        """Assign all of `variables`, from arrays in the same order."""
        if not self.built:
            raise ValueError(
                f"{type(self).__name__} is not built, so it has no variables to set "
                "yet. Call optimizer.build(model.trainable_variables) first."
            )
        variables = self._stored_variables()
        if len(weights) != len(variables):
            raise ValueError(
                f"{type(self).__name__} has {len(variables)} variables; received "
                f"{len(weights)} weights."
            )
        for variable, weight in zip(variables, weights, strict=True):
            if tuple(variable.shape) != tuple(weight.shape):
                raise ValueError(
                    f"Variable {variable.path} has shape {tuple(variable.shape)}; "
                    f"received a weight of shape {tuple(weight.shape)}."
                )
        for variable, weight in zip(variables, weights, strict=True):
            variable.assign(weight)


# LossScaleOptimizers inside of this package's optimizers.
_scaling_inside: weakref.WeakSet[keras.Optimizer] = weakref.WeakSet()


def _is_around_ours(optimizer: keras.optimizers.LossScaleOptimizer) -> bool:
    """Return whether one of this package's optimizers is inside."""
    return any(isinstance(each, OptimizerWrapper) for each in chain(optimizer))


def _scales_by_rows(optimizer: keras.optimizers.LossScaleOptimizer) -> bool:
    """Return whether this package makes the steps: with replicas, Keras does."""
    return _is_around_ours(optimizer) and engine.num_replicas() == 1


def _check_finite(
    check: Callable[[Any, list], Any],
    optimizer: keras.optimizers.LossScaleOptimizer,
    gradients: list,
) -> Any:
    """Return whether all gradients are finite, on every replica.

    Keras itself asks the first replica, and trains on if another one has overflowed.
    """
    if not _is_around_ours(optimizer) and optimizer not in _scaling_inside:
        return check(optimizer, gradients)
    entries = [_loss_scaling.entries(gradient) for gradient in gradients]
    return engine.on_every_replica(check(optimizer, entries))


def _scale_by_rows(
    optimizer: keras.optimizers.LossScaleOptimizer, grads: list, variables: list | None
) -> None:
    engine.uncompiled(_loss_scaling.apply, optimizer, grads, variables, [])


def _note_compiled(model: keras.Model) -> None:
    for optimizer in chain(model.optimizer):
        if isinstance(optimizer, OptimizerWrapper):
            optimizer.__dict__["_model"] = weakref.ref(model)
            optimizer.refresh_rates()

"""What any wrapper of an inner Keras optimizer needs. Knows neither algorithm."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lookahead_lazy import _arguments, _keras, _repr
from keras_lookahead_lazy._backend import check_backend, engine
from keras_lookahead_lazy._catch_up import MovedRows
from keras_lookahead_lazy._keras import chain


def _setting(name: str) -> Any:
    """A property that reads and writes the inner optimizer's attribute."""

    def read(self: OptimizerWrapper) -> Any:
        return getattr(self._inner, name)

    def write(self: OptimizerWrapper, value: Any) -> None:
        # The base class's `__init__` sets its defaults before there is an inner
        # optimizer; they are not meant for that one.
        if "inner_optimizer" in vars(self):
            setattr(self._inner, name, value)

    return property(read, write, doc=f"`{name}` of the inner optimizer.")


class OptimizerWrapper(keras.Optimizer):
    """An optimizer that lets another one compute the updates.

    Args:
        optimizer: a Keras optimizer, its name, or its config: the inner one.
        name: name of the wrapper.
        misplaced: keyword arguments that a user meant for the inner optimizer.
    """

    def __init__(
        self,
        optimizer: keras.Optimizer | str | dict,
        name: str | None,
        misplaced: dict[str, Any],
    ) -> None:
        check_backend()
        _keras.note_compiled_models(_note)
        inner_optimizer = _arguments.get_optimizer(optimizer, type(self))
        _arguments.refuse(misplaced, type(self), _keras.innermost(inner_optimizer))
        # A callable, so that the base class makes no learning rate of its own.
        super().__init__(learning_rate=lambda: self._inner.learning_rate, name=name)
        self.inner_optimizer = inner_optimizer

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
        """Called before somebody may read slots."""

    # What the constructor fixes: slots, slow copies and compiled steps depend on it.
    _fixed: tuple[str, ...] = ("inner_optimizer",)
    # Whether the optimizer around this has warned about the file being loaded.
    _is_told: bool = False
    # The model that was compiled with this optimizer last, if it is still there.
    _model: Callable[[], keras.Model | None] = staticmethod(lambda: None)

    weight_decay = _setting("weight_decay")
    clipnorm = _setting("clipnorm")
    clipvalue = _setting("clipvalue")
    global_clipnorm = _setting("global_clipnorm")
    use_ema = _setting("use_ema")
    ema_momentum = _setting("ema_momentum")
    ema_overwrite_frequency = _setting("ema_overwrite_frequency")
    gradient_accumulation_steps = _setting("gradient_accumulation_steps")
    # `keras.callbacks.SwapEMAWeights` looks for this.
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
            # keras.optimizers.LossScaleOptimizer sets it on what it wraps.
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
                f"`{name}` is fixed by the constructor. Build a new optimizer, "
                f"{type(self).__name__}(...), and compile the model with it."
            )
        # Keras on TensorFlow assigns nothing where the value is there already; the
        # setter above has to see that, too.
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
        """Let the inner optimizer update the weights, as this wrapper wants it.

        Args:
            grads: a gradient for each variable, or `None`. Without any gradient this
                is no update, as with Keras's own optimizers.
            trainable_variables: the variables; by default those of `build`.
        """
        if isinstance(grads, (list, tuple)) and len(grads) == 0:
            return
        if trainable_variables is not None:
            trainable_variables = _arguments.check_weights(trainable_variables)
        elif not self.built:
            raise ValueError(
                "The optimizer is not built and got gradients without variables. "
                "Call optimizer.build(model.trainable_variables) first, or pass "
                "the variables along with the gradients."
            )
        weights = trainable_variables or _keras.weights(self)
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
                "weights, as Keras does when it loads a whole model from an old .h5 "
                f"file. Compile the model with a new {cls}(...), and save it with "
                "model.save('model.keras')."
            )
        if unknown:
            paths = ", ".join(_keras.path(variable) for variable in unknown)
            raise ValueError(
                f"{type(optimizer).__name__} {optimizer.name!r} was built for other "
                f"weights; it does not know {paths}. One optimizer trains one model: "
                f"give each its own {type(self).__name__}(...), and a new one to a "
                "model that has got new weights, or unfrozen ones, since."
            )

    def stateless_apply(
        self, optimizer_variables: list, grads: list, trainable_variables: list
    ) -> tuple[list, list]:
        """`apply` on values. Whose they are only the model in training tells."""
        weights = getattr(_keras.training_model(), "trainable_variables", [])
        if self.built and len(weights) == len(trainable_variables):
            self._check_known(weights, self)
        return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def _apply(self, grads: list, variables: list | None) -> None:
        """One step. The optimizer is built, and there is a gradient at least."""
        raise NotImplementedError

    def _apply_inner(self, grads: list, variables: list | None) -> Any:
        """Let the inner optimizer work.

        Returns:
            The number of updates of the weights: 1, or 0 where gradient
            accumulation only stored the gradients or loss scaling skipped them.
        """
        optimizer, written = self._inner, super().variables
        if not self.gradient_accumulation_steps and not self._scales_the_loss():
            engine.apply(optimizer, grads, variables, written)
            return 1
        before = engine.read_count(optimizer.iterations)
        engine.apply(optimizer, grads, variables, written)
        # Keras's counter wraps around at 2 ** 31 on JAX and torch; the parity does not.
        return (engine.read_count(optimizer.iterations) - before) % 2

    # What a wrapper says of rows and slots to the one around it. This one leaves it to
    # the next wrapper inside.

    @property
    def _wrapper_inside(self) -> OptimizerWrapper | None:
        inside = chain(self._inner)
        return next((o for o in inside if isinstance(o, OptimizerWrapper)), None)

    def keep_slow_rows(
        self, pairs: Sequence[tuple], updates_in_cycle: Callable[[], Any]
    ) -> dict[Any, MovedRows]:
        """Take the slow copy of a table's row when a cycle first moves the row.

        Args:
            pairs: weights with their slow copies.
            updates_in_cycle: gives the number of updates that the cycle has had.

        Returns:
            For each weight of which this is done, by its key, which rows moved.
        """
        inside = self._wrapper_inside
        if inside is None:
            return {}
        return inside.keep_slow_rows(pairs, updates_in_cycle)

    def catch_up_if(self, predicate: Any) -> None:
        """Make slots that lag behind current, if `predicate`, in a compiled step."""
        inside = self._wrapper_inside
        if inside is not None:
            inside.catch_up_if(predicate)

    def begin_cycle(self) -> None:
        """Take the next update for the first of a cycle."""
        inside = self._wrapper_inside
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
        """Learning rate of the inner optimizer; assign to it to change that."""
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
        """Scale the loss as the inner optimizer asks for."""
        return self._inner.scale_loss(loss)

    def finalize_variable_values(self, var_list: list) -> None:
        """Let the inner optimizer set the weights that training ends on."""
        self._inner.finalize_variable_values(var_list)
        if self.use_ema:
            for variable in var_list:
                # Not in one buffer with the average: JAX donates each but once.
                variable.assign(ops.copy(variable))

    def set_weights(self, weights: list) -> None:
        """Assign all of `variables`, from arrays in the same order."""
        if not self.built:
            raise ValueError(
                f"{type(self).__name__} is not built, so it has no variables to set "
                "yet. Call optimizer.build(model.trainable_variables) first."
            )
        variables = super().variables + self._inner.variables
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

    # Keras saves the inner optimizer as a child of its own, so only what belongs
    # to the wrapper is stored with it: its variables, by number, and its numbers.

    def __dir__(self) -> list[str]:
        """All attributes but `_inner`, in which Keras would find `inner_optimizer`."""
        return [name for name in super().__dir__() if name != "_inner"]

    def save_own_variables(self, store: Any) -> None:
        for i, variable in enumerate(super().variables):
            store[str(i)] = self._value_to_save(variable)
        for name, number in self._own_numbers().items():
            store[name] = np.asarray(number)

    def _own_numbers(self) -> dict[str, float]:
        """The arguments of the constructor that are numbers."""
        settings = self._own_settings().items()
        return {n: value for n, value in settings if isinstance(value, int | float)}

    def _value_to_save(self, variable: keras.Variable) -> np.ndarray:
        return ops.convert_to_numpy(variable)

    def load_own_variables(self, store: Any) -> None:
        """Load what `save_own_variables` stored.

        What another optimizer or model stored is left alone, with a warning, as
        Keras's optimizers do. The weights may come from there all the same, so the
        wrapper then starts anew: with the next update as its first. So it does,
        without a warning, where the optimizer that was saved had not been built.
        Of a file that Keras refuses, which it says later, nothing is taken.
        """
        if not self.built or _keras.is_refusing_a_file():
            return
        variables = super().variables
        # All is read before any is assigned: reading may fail.
        names = set(store.keys())
        count = sum(name.isdecimal() for name in names)
        stored = [np.array(store[str(i)]) for i in range(count)]
        if [v.shape for v in stored] == [tuple(v.shape) for v in variables]:
            numbers = names & set(self._own_numbers())
            self._compare({name: np.array(store[name]).item() for name in numbers})
            for variable, value in zip(variables, stored, strict=True):
                variable.assign(value)
            return
        if [value.shape for value in stored] != [()] and not self._is_told:
            warnings.warn(
                f"The file holds no state for the optimizer {self.name!r} as it "
                f"is: {len(stored)} variables are stored and {len(variables)} "
                "expected. It was saved with another optimizer or model, or with "
                f"none; {type(self).__name__} starts anew.",
                stacklevel=2,
            )
            for optimizer in chain(self)[1:]:  # which Keras loads next
                optimizer.__dict__["_is_told"] = True
        self._is_told = False
        for variable in variables:
            if "int" in variable.dtype:
                variable.assign(ops.zeros_like(variable.value))

    def _compare(self, numbers: dict[str, float]) -> None:
        """Warn of a file of other arguments than this has."""
        own = self._own_numbers()
        for name, number in numbers.items():
            if number != own[name]:
                warnings.warn(
                    f"The file was saved with {name}={number}; training goes on with "
                    f"{name}={own[name]} of {type(self).__name__}. To go on as before, "
                    f"make the optimizer with {name}={number}.",
                    stacklevel=2,
                )

    def __repr__(self) -> str:
        """The nesting as one would write it."""
        try:
            settings = self._own_settings().items()
            given = {name: repr(value) for name, value in settings if value is not None}
            return _repr.call(type(self), given, _repr.written(self._inner))
        except Exception:  # such as in a constructor that has not finished
            return object.__repr__(self)

    def _own_settings(self) -> dict[str, Any]:
        """The arguments of the constructor, but for the optimizer and the name."""
        return {}

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, serialized."""
        return {
            "name": self.name,
            "optimizer": _keras.serialize(self._inner),
            **self._own_settings(),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict | None = None
    ) -> OptimizerWrapper:
        """An unbuilt optimizer with the arguments in `config`."""
        if "optimizer" not in config:
            raise ValueError(
                f"The config of a {cls.__name__} has that of the inner optimizer as "
                f"'optimizer'. Received a config with the keys {list(config)}."
            )
        config = dict(config)
        config["optimizer"] = keras.saving.deserialize_keras_object(
            config["optimizer"], custom_objects=custom_objects
        )
        return cls(**config)


def _note(model: keras.Model) -> None:
    for optimizer in chain(model.optimizer):
        if isinstance(optimizer, OptimizerWrapper):
            optimizer.__dict__["_model"] = weakref.ref(model)

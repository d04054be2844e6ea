"""Lookahead and LazyOptimizer, on the backend that Keras is set to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import keras
import numpy as np
import optax

from benchmarks._alive import COUNTERS
from benchmarks.reliability import _properties
from benchmarks.reliability._properties import (
    RATE,
    SCALE,
    WIDTH,
    Arrays,
    Gradients,
    Setup,
    Way,
)
from examples.common.record import environment
from keras_lookahead_lazy import LazyOptimizer, Lookahead

BACKEND = keras.backend.backend()
TITLE = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "torch"}[BACKEND]


class Training(_properties.Training):
    """A compiled model, updated with given gradients as in a loop of one's own."""

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.optimizer = model.optimizer
        self.optimizer.build(model.trainable_variables)
        self.update = {
            "tensorflow": tensorflow_update,
            "jax": jax_update,
            "torch": eager_update,
        }[BACKEND](self.optimizer, model.trainable_variables)

    def step(self, gradients: Gradients) -> None:
        weights = self.model.trainable_variables
        scale = np.float32(keras.ops.convert_to_numpy(self.optimizer.scale_loss(1.0)))
        pairs = zip(gradients, weights, strict=True)
        given = [(g * scale, w) for g, w in pairs if g is not None]
        update = self.update
        if len(given) < len(weights):
            update = eager_update(self.optimizer, [w for _, w in given])
        update([g for g, _ in given])

    def weights(self) -> Arrays:
        return [np.array(weight) for weight in self.model.get_weights()]

    def set_weights(self, weights: Arrays) -> None:
        self.model.set_weights(weights)

    def slow(self) -> Arrays:
        lookahead = self.wrapper(Lookahead)
        if lookahead is None:
            return self.weights()
        with lookahead.slow_weights(self.model):
            return self.weights()

    def kept(self) -> Arrays:
        of_scale = ("dynamic_scale", "step_counter")
        variables = [
            variable
            for variable in self.optimizer.variables
            if variable.path.split("/")[-1] not in of_scale
        ]
        return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]

    def wrapper(self, kind: type) -> Any:
        """The wrapper of that class, where there is one."""
        optimizer = self.optimizer
        while not isinstance(optimizer, kind):
            optimizer = getattr(optimizer, "inner_optimizer", None)
            if optimizer is None:
                return None
        return optimizer


Update = Callable[[Any], None]


def tensorflow_update(optimizer: Any, weights: list) -> Update:
    """In `tf.function`, with the table's gradient by rows."""
    import tensorflow as tf

    shape = tuple(weights[0].shape)

    @tf.function(autograph=False)
    def apply(ids: Any, rows: Any, dense: list) -> None:
        table = tf.IndexedSlices(rows, ids, tf.constant(shape, "int64"))
        optimizer.apply_gradients(zip([table, *dense], weights, strict=True))

    def update(gradients: Arrays) -> None:
        table, *dense = gradients
        ids = np.flatnonzero(np.any(table != 0, axis=1))
        apply(tf.constant(ids), tf.constant(table[ids]), list(map(tf.constant, dense)))

    return update


def jax_update(optimizer: Any, weights: list) -> Update:
    """Jitted; arrays go in, are donated, and come back."""
    import jax

    def stateless_apply(*arrays: Any) -> Any:
        return optimizer.stateless_apply(*arrays)

    compiled = jax.jit(stateless_apply, donate_argnums=(0, 2))

    def update(gradients: Arrays) -> None:
        state = optimizer.variables
        values = compiled(
            [v.value for v in state], gradients, [v.value for v in weights]
        )
        for variables, new in zip((weights, state), values, strict=True):
            for variable, value in zip(variables, new, strict=True):
                variable.assign(value)

    return update


def eager_update(optimizer: Any, weights: list) -> Update:
    """One operation after the other."""

    def update(gradients: Arrays) -> None:
        tensors = [keras.ops.convert_to_tensor(gradient) for gradient in gradients]
        optimizer.apply(tensors, weights)

    return update


# Ways to save


def save_whole(training: Training, folder: Path) -> None:
    training.model.save(folder / "run.keras")


def load_whole(training: Training, folder: Path) -> Training:
    return Training(keras.models.load_model(folder / "run.keras"))


def load_into(training: Training, folder: Path) -> Training:
    training.model.load_weights(folder / "run.keras")
    return training


def save_weights(training: Training, folder: Path) -> None:
    training.model.save_weights(folder / "run.weights.h5")


def load_weights(training: Training, folder: Path) -> Training:
    training.model.load_weights(folder / "run.weights.h5")
    return training


def save_checkpoint(training: Training, folder: Path) -> None:
    checkpoint(training).write(str(folder / "run"))


def load_checkpoint(training: Training, folder: Path) -> Training:
    checkpoint(training).read(str(folder / "run")).assert_existing_objects_matched()
    return training


def checkpoint(training: Training) -> Any:
    import tensorflow as tf

    return tf.train.Checkpoint(model=training.model, optimizer=training.optimizer)


WAYS = {
    "load_model": Way(save_whole, load_whole, into=False),
    "load_weights of .keras": Way(save_whole, load_into),
    "load_weights of .h5": Way(save_weights, load_weights),
}
if BACKEND == "tensorflow":
    WAYS["tf.train.Checkpoint"] = Way(save_checkpoint, load_checkpoint)


# The subjects


class Wrapper(_properties.Subject):
    """What both have in common."""

    place = TITLE
    ways = WAYS

    def __init__(self) -> None:
        self.name = f"{self.column.lower()}-{BACKEND}"
        about = environment()
        backend = f"{TITLE} {about['backend_version'].split('+')[0]}"
        self.runs_with = f"Keras {about['keras']}, {backend}"

    def wrapped(self, inner: keras.Optimizer, k: int) -> keras.Optimizer:
        """The inner optimizer in the wrapper."""
        raise NotImplementedError

    def build(self, setup: Setup) -> Training:
        optimizer: keras.Optimizer = keras.optimizers.Adam(setup.rate)
        if setup.inner == "sgd":
            optimizer = keras.optimizers.SGD(setup.rate, momentum=0.9)
        if setup.scaling == "LossScaleOptimizer inside":
            optimizer = scaled(optimizer)
        optimizer = self.wrapped(optimizer, setup.k)
        if setup.scaling == "LossScaleOptimizer around":
            optimizer = scaled(optimizer)
        model = keras.Sequential(
            [
                keras.Input((4,), dtype="int32"),
                keras.layers.Embedding(setup.rows, WIDTH, name="words"),
                keras.layers.GlobalAveragePooling1D(name="mean"),
                keras.layers.Dense(setup.units, name="head"),
            ],
            name="net",
        )
        shapes = [weight.shape for weight in model.weights]
        model.set_weights(_properties.initial(shapes, setup.seed))
        model.compile(optimizer, "mse")
        return Training(model)

    scalings = ("LossScaleOptimizer around", "LossScaleOptimizer inside")
    # What the control, below, shows.
    remarks: ClassVar = {"another-model": "as with Keras's own Adam"}

    def alive(self) -> dict[str, int]:
        return COUNTERS[BACKEND]()

    def versions(self) -> dict[str, str]:
        about = environment()
        names = ("keras_lookahead_lazy", "keras", "backend", "backend_version")
        return {name: about[name] for name in names}


def scaled(optimizer: keras.Optimizer) -> keras.Optimizer:
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=SCALE)


class OfLookahead(Wrapper):
    """`Lookahead(Adam())`."""

    column = "Lookahead"

    def wrapped(self, inner: keras.Optimizer, k: int) -> keras.Optimizer:
        return Lookahead(inner, k=k)

    def wrong_uses(self) -> Mapping[str, Callable[[], object]]:
        foreign: Any = optax.adam(RATE)
        half: Any = 2.5
        unknown: dict[str, Any] = {"cycle": 5}
        return {
            "k=0": lambda: Lookahead("adam", k=0),
            "k=2.5": lambda: Lookahead("adam", k=half),
            "alpha=2": lambda: Lookahead("adam", alpha=2),
            "another library's optimizer": lambda: Lookahead(foreign),
            "an unknown argument": lambda: Lookahead("adam", **unknown),
        }

    def restart(self, training: Training) -> None:
        training.optimizer.restart()


class OfLazyOptimizer(Wrapper):
    """`LazyOptimizer(Adam())`."""

    column = "LazyOptimizer"
    has_slow_weights = False

    def wrapped(self, inner: keras.Optimizer, k: int) -> keras.Optimizer:
        return LazyOptimizer(inner)

    def wrong_uses(self) -> Mapping[str, Callable[[], object]]:
        foreign: Any = optax.adam(RATE)
        unknown: dict[str, Any] = {"tables": []}
        return {
            "another library's optimizer": lambda: LazyOptimizer(foreign),
            "an unknown argument": lambda: LazyOptimizer("adam", **unknown),
        }


class OfAdam(Wrapper):
    """The control: what Keras does with its own."""

    column = ""
    has_slow_weights = False
    remarks: ClassVar = {}

    def __init__(self) -> None:
        super().__init__()
        self.name = f"keras-adam-{BACKEND}"

    def wrapped(self, inner: keras.Optimizer, k: int) -> keras.Optimizer:
        return inner

    def wrong_uses(self) -> Mapping[str, Callable[[], object]]:
        unknown: Any = {"tables": []}
        return {"an unknown argument": lambda: keras.optimizers.Adam(**unknown)}


SUBJECTS = [OfLookahead(), OfLazyOptimizer(), OfAdam()]

if __name__ == "__main__":
    _properties.main(SUBJECTS)

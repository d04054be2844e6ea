"""TensorFlow Addons' Lookahead and LazyAdam, on Keras 2."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf
import tensorflow_addons as tfa

from benchmarks import _alive
from benchmarks.reliability import _properties
from benchmarks.reliability._properties import (
    SCALE,
    WIDTH,
    Arrays,
    Gradients,
    Setup,
    Way,
)

legacy = tf.keras.optimizers.legacy


class Training(_properties.Training):
    """A compiled model, updated with given gradients within `tf.function`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer = model.optimizer
        is_scaled = isinstance(
            self.optimizer, tf.keras.mixed_precision.LossScaleOptimizer
        )
        self.innermost = self.optimizer.inner_optimizer if is_scaled else self.optimizer
        self.inner: Any = getattr(self.innermost, "_optimizer", None)

        @tf.function(autograph=False)
        def apply(ids: Any, rows: Any, dense: list) -> None:
            weights = model.trainable_variables
            gradients = [tf.IndexedSlices(rows, ids, weights[0].shape), *dense]
            if is_scaled:
                scale = self.optimizer.loss_scale
                gradients = [each * scale for each in gradients]
                gradients = self.optimizer.get_unscaled_gradients(gradients)
            # Those that have none are left out.
            pairs = zip(gradients, weights)  # noqa: B905
            self.optimizer.apply_gradients(pairs)

        self.apply = apply

    def step(self, gradients: Gradients) -> None:
        table, *dense = gradients
        assert table is not None
        ids = np.flatnonzero(np.any(table != 0, axis=1))
        given = [tf.constant(each) for each in dense if each is not None]
        self.apply(tf.constant(ids), tf.constant(table[ids]), given)

    def weights(self) -> Arrays:
        return [np.array(weight) for weight in self.model.get_weights()]

    def set_weights(self, weights: Arrays) -> None:
        self.model.set_weights(weights)

    def slow(self) -> Arrays:
        if not isinstance(self.innermost, tfa.optimizers.Lookahead):
            return self.weights()
        variables = self.model.trainable_variables
        return [self.innermost.get_slot(each, "slow").numpy() for each in variables]

    def kept(self) -> Arrays:
        """By slot, for a loaded optimizer lists its variables in another order."""
        variables = self.model.trainable_variables
        kept = [self.innermost.iterations.numpy()]
        for optimizer in filter(None, (self.innermost, self.inner)):
            for slot in sorted(optimizer.get_slot_names()):
                kept += [optimizer.get_slot(each, slot).numpy() for each in variables]
        return kept


# Ways to save


def checkpoint(training: Training) -> Any:
    return tf.train.Checkpoint(model=training.model, optimizer=training.optimizer)


def save_checkpoint(training: Training, folder: Path) -> None:
    checkpoint(training).write(str(folder / "run"))


def load_checkpoint(training: Training, folder: Path) -> Training:
    checkpoint(training).read(str(folder / "run")).assert_existing_objects_matched()
    return training


def save_weights(training: Training, folder: Path) -> None:
    training.model.save_weights(str(folder / "run"))


def load_weights(training: Training, folder: Path) -> Training:
    training.model.load_weights(str(folder / "run"))
    return training


def save_whole(name: str) -> Way:
    """Model and optimizer in a file of that name, and from there a new model."""

    def save(training: Training, folder: Path) -> None:
        training.model.save(str(folder / name))

    def load(training: Training, folder: Path) -> Training:
        return Training(tf.keras.models.load_model(str(folder / name)))

    return Way(save, load, into=False)


# The subjects


class OfAddons(_properties.Subject):
    """What both have in common."""

    ways: ClassVar = {
        "tf.train.Checkpoint": Way(save_checkpoint, load_checkpoint),
        "save_weights": Way(save_weights, load_weights),
        "model.save of .h5": save_whole("run.h5"),
        "model.save of .keras": save_whole("run.keras"),
    }
    scalings = ("LossScaleOptimizer",)
    # What the control, below, shows.
    remarks: ClassVar = {
        "resumed": "as with Adam of Keras 2",
        "skipped": "its count of updates, as with Adam of Keras 2",
        "another-model": "as with Adam of Keras 2",
    }
    runs_with = (
        f"tensorflow_addons {tfa.__version__}, Keras {metadata.version('keras')}, "
        f"TensorFlow {tf.__version__}"
    )

    def optimizer(self, inner: str, k: int, rate: float) -> Any:
        """The optimizer to train with."""
        raise NotImplementedError

    def build(self, setup: Setup) -> Training:
        optimizer = self.optimizer(setup.inner, setup.k, setup.rate)
        if setup.scaling:
            optimizer = tf.keras.mixed_precision.LossScaleOptimizer(
                optimizer, initial_scale=SCALE
            )
        layers = tf.keras.layers
        model = tf.keras.Sequential(
            [
                layers.Embedding(setup.rows, WIDTH, input_length=4, name="words"),
                layers.GlobalAveragePooling1D(name="mean"),
                layers.Dense(setup.units, name="head"),
            ],
            name="net",
        )
        model.build((None, 4))
        shapes = [weight.shape for weight in model.weights]
        model.set_weights(_properties.initial(shapes, setup.seed))
        model.compile(optimizer, "mse")
        return Training(model)

    def alive(self) -> dict[str, int]:
        return _alive.of_tensorflow()

    def not_with(self) -> str:
        """Import it beside what runs the benchmarks, whose Python `NEWEST` names."""
        newest = os.environ.get("NEWEST")
        if newest is None:
            return ""
        program = (
            "import tensorflow as t; print(t.__version__); import tensorflow_addons"
        )
        done = subprocess.run(
            [newest, "-c", program],
            env={**os.environ, "PYTHONPATH": os.environ["ADDONS_PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return ""
        error = done.stderr.strip().splitlines()[-1]
        return f"not with TensorFlow {done.stdout.strip()}: {error}"

    def versions(self) -> dict[str, str]:
        return {
            "tensorflow_addons": tfa.__version__,
            "tensorflow": tf.__version__,
            "keras": metadata.version("keras"),
        }


class Adam(OfAddons):
    """The control: what Keras 2 does with its own."""

    name, column = "keras-2-adam", ""
    has_slow_weights = False
    remarks: ClassVar = {}

    def optimizer(self, inner: str, k: int, rate: float) -> Any:
        return INNER[inner](rate)

    def wrong_uses(self) -> Mapping[str, Callable[[], object]]:
        return {"an unknown argument": lambda: legacy.Adam(cycle=5)}


INNER: dict[str, Callable[[float], Any]] = {
    "adam": legacy.Adam,
    "sgd": lambda rate: legacy.SGD(rate, momentum=0.9),
}


def of_torch() -> Any:
    """Looks like an optimizer of torch, which this environment has not."""
    return type("Adam", (), {"__module__": "torch.optim.adam"})()


class Lookahead(OfAddons):
    """`tfa.optimizers.Lookahead(Adam())`."""

    name, column = "tfa-lookahead", "tfa Lookahead"

    def optimizer(self, inner: str, k: int, rate: float) -> Any:
        optimizer = INNER[inner](rate)
        return tfa.optimizers.Lookahead(optimizer, sync_period=k, slow_step_size=0.5)

    def wrong_uses(self) -> Mapping[str, Callable[[], object]]:
        def use(inner: Any = "adam", **how: Any) -> object:
            return tfa.optimizers.Lookahead(inner, **how)

        return {
            "k=0": lambda: use(sync_period=0),
            "k=2.5": lambda: use(sync_period=2.5),
            "alpha=2": lambda: use(slow_step_size=2.0),
            "another library's optimizer": lambda: use(of_torch()),
            "an unknown argument": lambda: use(cycle=5),
        }


class LazyAdam(OfAddons):
    """`tfa.optimizers.LazyAdam()`."""

    name, column = "tfa-lazyadam", "tfa LazyAdam"
    has_slow_weights = False

    def optimizer(self, inner: str, k: int, rate: float) -> Any:
        if inner != "adam":
            raise _properties.NotAsked
        return tfa.optimizers.LazyAdam(rate)

    def wrong_uses(self) -> Mapping[str, Callable[[], object]]:
        return {"an unknown argument": lambda: tfa.optimizers.LazyAdam(cycle=5)}


SUBJECTS = [Lookahead(), LazyAdam(), Adam()]

if __name__ == "__main__":
    _properties.main(SUBJECTS)

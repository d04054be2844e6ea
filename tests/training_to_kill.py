"""Trainings that are killed and go on from their files: what `kill_and_resume` starts.

`python -m tests.training_to_kill FOLDER STEPS SAVES DELAY CASE:METHOD...` runs one
after the other, each in a folder of its own and from where its files are. It prints
what it begins: "training CASE:METHOD", "saving" and "saved", and which file is
"unreadable". It ends at once, as by SIGKILL, after STEPS steps, or DELAY seconds after
it has begun to save for the SAVES-th time; 0 lets it live. `result.npz` has the state
in the end.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from harness import BACKEND, make_data, make_model, state

from keras_lookahead_lazy import LazyOptimizer, Lookahead

# Epochs of four steps and cycles of five: files come from the middle of a cycle.
EPOCHS, STEPS, BATCH = 6, 4, 4


def adam() -> keras.Optimizer:
    return keras.optimizers.Adam(0.05)


OPTIMIZERS: dict[str, Callable[[], keras.Optimizer]] = {
    "Adam": adam,
    "maintain": lambda: Lookahead(adam()),
    "interpolate": lambda: Lookahead(adam(), inner_state="interpolate"),
    "reset": lambda: Lookahead(adam(), inner_state="reset"),
    "decay": lambda: LazyOptimizer(adam()),
    "freeze": lambda: LazyOptimizer(adam(), moments="freeze"),
    "both": lambda: Lookahead(LazyOptimizer(adam())),
    "both-interpolate": lambda: Lookahead(
        LazyOptimizer(adam()), inner_state="interpolate"
    ),
}


def new_model(case: str) -> keras.Model:
    """Compiled with an optimizer; every second one runs without a recorded graph."""
    eager = BACKEND != "jax" and list(OPTIMIZERS).index(case) % 2 == 1
    return make_model(OPTIMIZERS[case](), run_eagerly=eager)


def fit(model: keras.Model, callbacks: list, **arguments: Any) -> keras.Model:
    model.fit(
        *make_data(STEPS * BATCH),
        **{"batch_size": BATCH, "shuffle": False, "verbose": 0} | arguments,
        callbacks=callbacks,
    )
    return model


# Ways to go on


Fit = Callable[[keras.Model, int, Any], keras.Model]


def backup(case: str, folder: Path, fit: Fit) -> keras.Model:
    """Keras's own callback for this."""
    return fit(new_model(case), 0, keras.callbacks.BackupAndRestore(folder / "backup"))


def replace(case: str, folder: Path, fit: Fit) -> keras.Model:
    """One file, which a complete one takes the place of."""
    path = folder / "run.keras"
    model, done = new_model(case), 0
    if path.exists():
        model = keras.models.load_model(path)
        done = int(model.optimizer.iterations) // STEPS
    return fit(model, done, SaveWhole(path))


class SaveWhole(keras.callbacks.Callback):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        unfinished = self.path.with_stem("unfinished")
        self.model.save(unfinished)
        os.replace(unfinished, self.path)


def files(case: str, folder: Path, fit: Fit) -> keras.Model:
    """A file an epoch; the newest that is whole."""
    new = partial(new_model, case)
    model, done = newest(folder, "*.keras", keras.models.load_model, new)
    callback = keras.callbacks.ModelCheckpoint(folder / "{epoch:03d}.keras")
    return fit(model, done, callback)


def weights(case: str, folder: Path, fit: Fit) -> keras.Model:
    """The same with files of weights, in which Keras puts the optimizer's, too."""

    def load(path: Path) -> keras.Model:
        model = new_model(case)
        model.optimizer.build(model.trainable_variables)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Keras warns of an optimizer left out.
            model.load_weights(path)
        return model

    model, done = newest(folder, "*.weights.h5", load, partial(new_model, case))
    path = folder / "{epoch:03d}.weights.h5"
    return fit(
        model, done, keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    )


def newest(
    folder: Path, pattern: str, load: Callable, new: Callable
) -> tuple[keras.Model, int]:
    paths = sorted(folder.glob(pattern))
    while paths:
        path = paths.pop()
        try:
            return load(path), int(path.name[:3])
        except Exception as error:
            print("unreadable", path.name, repr(error), flush=True)
    return new(), 0


def checkpoint(case: str, folder: Path, fit: Fit) -> keras.Model:
    """TensorFlow's own files."""
    import tensorflow as tf

    model, done = new_model(case), tf.Variable(0)
    model.optimizer.build(model.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer, done=done)
    manager = tf.train.CheckpointManager(checkpoint, str(folder / "files"), 2)
    manager.restore_or_initialize()

    def save(epoch: int, logs: dict | None = None) -> None:
        done.assign(epoch + 1)
        manager.save()

    callback = keras.callbacks.LambdaCallback(on_epoch_end=save)
    return fit(model, int(done), callback)


METHODS = {m.__name__: m for m in (backup, replace, files, weights)}
if BACKEND == "tensorflow":
    METHODS["checkpoint"] = checkpoint


# The program


class Narrator(keras.callbacks.Callback):
    """Says what happens; one before, and one after the callback that saves."""

    def __init__(self, says: str) -> None:
        super().__init__()
        self.says = says

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        print(self.says, flush=True)


class Killer(keras.callbacks.Callback):
    """Ends the process. No handler sees the signals; a timer needs no turn of ours."""

    def __init__(self, steps: int, saves: int, delay: float) -> None:
        super().__init__()
        self.steps_left, self.saves_left, self.delay = steps, saves, delay

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.steps_left -= 1
        if self.steps_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.saves_left -= 1
        if self.saves_left == 0:
            signal.setitimer(signal.ITIMER_REAL, self.delay)


def run(folder: Path, training: str, killer: Killer) -> None:
    case, method = training.split(":")

    def fit_with(model: keras.Model, done: int, callback: Any) -> keras.Model:
        saving, saved = Narrator("saving"), Narrator("saved")
        callbacks = [saving, killer, callback, saved]
        return fit(model, callbacks, initial_epoch=done, epochs=EPOCHS)

    print("training", training, flush=True)
    model = METHODS[method](case, folder, fit_with)
    unfinished = folder / "unfinished.npz"
    np.savez(unfinished, *state(model))
    os.replace(unfinished, folder / "result.npz")


def main(folder: str, steps: str, saves: str, delay: str, *trainings: str) -> None:
    killer = Killer(int(steps), int(saves), float(delay))
    for training in trainings:
        of_training = Path(folder) / training.replace(":", "-")
        of_training.mkdir(parents=True, exist_ok=True)
        run(of_training, training, killer)


if __name__ == "__main__":
    main(*sys.argv[1:])

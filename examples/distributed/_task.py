"""What the examples share: the model, the batches, the options, the report."""

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import keras
import numpy as np

from examples.common import imdb
from keras_lookahead_lazy import LazyOptimizer, Lookahead

Options = argparse.Namespace

WIDTH = 16
CHOICES = {
    "adam": lambda: keras.optimizers.Adam(1e-3),
    "adamw": lambda: keras.optimizers.AdamW(1e-3, weight_decay=1e-2),
    "rmsprop": lambda: keras.optimizers.RMSprop(1e-3, momentum=0.5),
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
}


def parser(description: str | None, replicas: int) -> argparse.ArgumentParser:
    """The options of every example."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--replicas", type=int, default=replicas, metavar="N")
    add("--steps", type=int, default=100, metavar="N", help="steps to make now")
    add("--batch-size", type=int, default=48, metavar="N", help="of all replicas")
    add("--optimizer", choices=CHOICES, default="adam", help="the inner optimizer")
    add("--moments", choices=("decay", "freeze"), default="decay")
    add("--k", type=int, default=5)
    add("--alpha", type=float, default=0.5)
    text = "an outer SGD with this Nesterov momentum, instead of alpha"
    add("--outer-momentum", type=float, metavar="MU", help=text)
    add("--inner-state", default="maintain", metavar="STATE")
    add("--save", type=Path, metavar="FILE.keras", help="save the model at the end")
    add("--resume", type=Path, metavar="FILE.keras", help="go on with a saved model")
    return parser


def model(options: Options) -> keras.Model:
    """The compiled model, new or from `--resume`."""
    if options.resume:
        return keras.saving.load_model(options.resume)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((18,), dtype="int32"),
            keras.layers.Embedding(imdb.NUM_WORDS, WIDTH, name="words"),
            keras.layers.Flatten(),
            keras.layers.Dense(WIDTH, activation="tanh", use_bias=False),
            keras.layers.Dense(1, activation="sigmoid", use_bias=False),
        ]
    )
    lazy = LazyOptimizer(CHOICES[options.optimizer](), moments=options.moments)
    step = {"alpha": options.alpha}
    if options.outer_momentum is not None:
        step = {
            "outer_optimizer": keras.optimizers.SGD(
                0.7, momentum=options.outer_momentum, nesterov=True
            )
        }
    lookahead = Lookahead(lazy, options.k, inner_state=options.inner_state, **step)
    model.compile(lookahead, "binary_crossentropy")
    return model


def samples(
    options: Options, model: keras.Model, replica: int = 0, replicas: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """One replica's share of the batches of the steps to make.

    Returns:
        Reviews of shape `(steps, share, 18)` and labels of shape `(steps, share, 1)`.
    """
    first = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
    data = imdb.synthetic()
    numbers = np.arange(first, first + options.steps) * options.batch_size
    numbers = numbers[:, None] + np.arange(options.batch_size)
    share = np.split(numbers, replicas, axis=1)[replica] % len(data.x_train)
    return data.x_train[share], data.y_train[share, None].astype("float32")


def fit(
    model: keras.Model,
    samples: tuple[np.ndarray, np.ndarray],
) -> list[float]:
    """Train with `fit`; the loss of each step."""
    x, y = samples
    losses = Losses()
    model.fit(
        x.reshape(-1, x.shape[-1]),
        y.reshape(-1, 1),
        batch_size=x.shape[1],
        shuffle=False,
        verbose=0,
        callbacks=[losses],
    )
    return losses.values


class Losses(keras.callbacks.Callback):
    """The loss of each step of a `fit`."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []
        self._sum = 0.0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        mean = (logs or {})["loss"]  # of the steps so far
        total = (batch + 1) * mean
        self.values.append(total - self._sum)
        self._sum = total


def digest(arrays: Iterable[np.ndarray]) -> str:
    """A text that two replicas share only if they are equal, bit for bit."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def report(losses: Sequence[float], digests: Sequence[str]) -> None:
    """Print how the training went."""
    print(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} in the end")
    equal = "identical" if len(set(digests)) == 1 else "DIFFERENT"
    print(f"{len(digests)} replicas, {equal}")


# Programs that start a process for each replica


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_workers(module: str, variables: Sequence[dict[str, str]]) -> None:
    """Run a program once for each set of environment variables, and report.

    Raises:
        SystemExit: one of the processes failed.
    """
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, *sys.argv[1:]],
            env={**os.environ, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for more in variables
    ]
    told = [worker.communicate() for worker in workers]
    if any(worker.returncode for worker in workers):
        sys.exit("\n".join(errors for _, errors in told))
    found = [json.loads(output.splitlines()[-1]) for output, _ in told]
    digests = [digest for worker in found for digest in worker["digests"]]
    report(found[0]["losses"], digests)


def tell(losses: Sequence[float], digests: Sequence[str]) -> None:
    """The last line of a worker, for `run_workers`."""
    print(json.dumps({"losses": [losses[0], losses[-1]], "digests": digests}))

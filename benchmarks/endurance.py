"""Many steps of `fit` in one process: what grows, and whether a step stays as fast.

`KERAS_BACKEND=jax python -m benchmarks.endurance --help`, once a backend. It fails if
memory grows by more than is allowed, or the number of programs, or of arrays, at all.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from benchmarks._alive import COUNTERS
from benchmarks.workers._serve import resident
from examples.common.options import add_output, positive_int
from examples.common.record import environment, write_json
from keras_lookahead_lazy import LazyOptimizer, Lookahead

BACKEND = keras.backend.backend()
OPTIMIZER = "Lookahead(LazyOptimizer(Adam))"
VOCABULARY, WIDTH, LENGTH, BATCH = 50, 4, 4, 4
EPOCH = 1000  # steps


def new_model() -> keras.Model:
    """A model of which a step is nearly all overhead."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            keras.layers.Embedding(VOCABULARY, WIDTH),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(Lookahead(LazyOptimizer(keras.optimizers.Adam(1e-4))), "mse")
    return model


class Watch(keras.callbacks.Callback):
    """Notes the time of each step, and after each epoch what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.epochs: list[dict[str, int]] = []
        self.start = 0.0

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Begin to time the first."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Time from end to end; keep no more than the first and the last steps."""
        now = time.perf_counter()
        self.times.append(1e3 * (now - self.start))
        self.start = now
        del self.times[EPOCH:-EPOCH]

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Look."""
        self.epochs.append({"memory": resident(), **COUNTERS[BACKEND]()})


def measure(steps: int) -> dict[str, Any]:
    """Train; what there was after a tenth of the steps, and what in the end."""
    random = np.random.default_rng(0)
    ids = random.integers(VOCABULARY, size=(EPOCH * BATCH, LENGTH))
    watch, epochs = Watch(), steps // EPOCH
    new_model().fit(
        ids,
        random.normal(size=(EPOCH * BATCH, 1)),
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        callbacks=[watch],
        verbose=0,
    )
    # Not the first, after which Keras keeps its logs.
    early, late = watch.epochs[max(1, epochs // 10)], watch.epochs[-1]
    return {
        "steps": epochs * EPOCH,
        "early": early,
        "late": late,
        "memory_growth_mb": (late["memory"] - early["memory"]) / 1e6,
        "first_steps_ms": statistics.median(watch.times[:EPOCH]),
        "last_steps_ms": statistics.median(watch.times[-EPOCH:]),
    }


def grown(measured: dict[str, Any], most_growth: float) -> list[str]:
    """What grows, and should not."""
    early, late = measured["early"], measured["late"]
    counted = [name for name in early if name != "memory" and late[name] > early[name]]
    is_larger = measured["memory_growth_mb"] > most_growth
    return counted + ["memory"] * is_larger


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure on Keras's backend, print and write it; the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.endurance", description=__doc__
    )
    add = parser.add_argument
    text = "in thousands, three at least (default: %(default)s)"
    add("--steps", type=positive_int, default=200_000, metavar="N", help=text)
    text = "what the process may grow by (default: %(default)s)"
    add("--most-growth", type=float, default=20.0, metavar="MB", help=text)
    add_output(parser, "results", "folder for endurance-BACKEND.json")
    options = parser.parse_args(arguments)
    if options.steps < 3 * EPOCH:
        parser.error(f"--steps must be at least {3 * EPOCH}")
    measured = measure(options.steps)
    growing = grown(measured, options.most_growth)
    print(
        f"{BACKEND}, {measured['steps']:,} steps: memory grew by "
        f"{measured['memory_growth_mb']:.1f} MB; a step took "
        f"{measured['first_steps_ms']:.2f} ms among the first {EPOCH:,} and "
        f"{measured['last_steps_ms']:.2f} ms among the last; "
        f"{measured['early']} became {measured['late']}"
    )
    write(options.output, {**measured, "most_growth_mb": options.most_growth})
    if growing:
        print(f"failed, for it grows: {', '.join(growing)}", file=sys.stderr)
    return int(bool(growing))


def write(folder: Path, measured: dict[str, Any]) -> None:
    """Write what was measured into a file of the backend's name."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "what": "steps of fit in one process; counts after a tenth, and in the end",
        "optimizer": OPTIMIZER,
        "environment": environment(),
        **measured,
    }
    write_json(folder / f"endurance-{BACKEND}.json", report)


if __name__ == "__main__":
    sys.exit(main())

"""What the callback `Insight` costs: the end of an epoch, against a training step.

`KERAS_BACKEND=jax python -m benchmarks.insight --help`, once a backend.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import keras

from benchmarks.workers import _fit
from benchmarks.workers._optimizers import build_model
from benchmarks.workers._problem import Problem
from examples.common.options import add_output, positive_int
from examples.common.record import environment, write_json
from keras_lookahead_lazy import Insight

OPTIMIZER = "Lookahead(Lazy decay)"


class TimedInsight(Insight):
    """Notes how long the end of each epoch takes, in milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Time it."""
        start = time.perf_counter()
        super().on_epoch_end(epoch, logs)
        self.times.append(1e3 * (time.perf_counter() - start))


def measure(vocabulary: int, width: int, epochs: int = 8) -> dict[str, float]:
    """The least of several, in milliseconds, so that other programs count little."""
    problem = Problem(vocabulary, width)
    mode = "jit" if keras.backend.backend() == "jax" else "graph"
    model = build_model(OPTIMIZER, mode, problem)
    fit = _fit.Fit(keras, model, problem)
    steps = [1e3 * seconds for _ in range(epochs) for seconds in fit.run(10)]
    ids, labels = _fit.data(problem)
    batch = problem.samples
    size, insight = 4 * batch, TimedInsight()
    model.fit(
        ids[:size],
        labels[:size],
        batch_size=batch,
        epochs=epochs,
        callbacks=[insight],
        verbose=0,
    )
    step, end = min(steps), min(insight.times)
    return {"step_ms": step, "epoch_end_ms": end, "steps": end / step}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on Keras's backend, print and write it."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.insight", description=__doc__
    )
    for option, default in (("--vocabulary", 10**6), ("--width", 64)):
        parser.add_argument(option, type=positive_int, default=default, metavar="N")
    add_output(parser, "results", "folder for insight-BACKEND.json")
    options = parser.parse_args(arguments)
    measured = measure(options.vocabulary, options.width)
    backend = keras.backend.backend()
    print(
        f"{backend}, a table of {options.vocabulary:,} x {options.width}: the end of "
        f"an epoch takes {measured['epoch_end_ms']:.1f} ms, as long as "
        f"{measured['steps']:.1f} steps of {measured['step_ms']:.1f} ms"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    report = {
        "what": "Insight's work at the end of an epoch, the least of several",
        "optimizer": OPTIMIZER,
        "vocabulary": options.vocabulary,
        "width": options.width,
        "environment": environment(),
        **measured,
    }
    write_json(options.output / f"insight-{backend}.json", report)


if __name__ == "__main__":
    main()

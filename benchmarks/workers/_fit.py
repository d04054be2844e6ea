"""Whole steps of `model.fit`: the same in Keras 3 and in Keras 2."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from benchmarks.workers import _serve
from benchmarks.workers._problem import LENGTH, Problem

# The first steps of a `fit` fill the caches, and compile. They do not count.
WARM_UP = 5


def build(
    keras: Any, optimizer_of: Callable, mode: str, problem: Problem, **layer: Any
) -> Any:
    """A compiled model that looks up `problem.rows` rows a step.

    Args:
        keras: Keras 3 or `tf.keras`.
        optimizer_of: makes the optimizer for a list of embedding layers.
        mode: "jit" to compile with XLA.
        problem: the size of the table.
        layer: further arguments of the Embedding.
    """
    words = keras.layers.Embedding(
        problem.vocabulary,
        problem.width,
        embeddings_initializer=keras.initializers.Constant(0.01),
        **layer,
    )
    inputs = keras.Input((LENGTH,), dtype="int32")
    mean = keras.layers.GlobalAveragePooling1D()(words(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1)(mean))
    model.compile(optimizer_of([words]), loss="mse", jit_compile=mode == "jit")
    return model


def data(problem: Problem) -> tuple[Any, np.ndarray]:
    """Fresh rows in every step, and something to learn."""
    if problem.tables:
        # Imported where it is needed: Keras 2 does without.
        from benchmarks.workers import _dlrm

        return _dlrm.data(problem)
    ids = np.stack(problem.row_ids()).reshape(-1, LENGTH)
    labels = np.random.default_rng(3).standard_normal((len(ids), 1), np.float32)
    return ids, labels


class Fit(_serve.Case):
    """A model in training.

    Args:
        keras: Keras 3 or `tf.keras`.
        model: what trains, from `build`, with its optimizer built.
        problem: what it looks up.
        temporary: as for any case.
        scope: gives the context to train in.
    """

    def __init__(
        self,
        keras: Any,
        model: Any,
        problem: Problem,
        temporary: Callable[[], int | None] | None = None,
        scope: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.temporary = temporary
        self._scope = scope
        self._model = model
        self._callback = keras.callbacks.LambdaCallback
        self._data = data(problem)
        self._batch = problem.samples
        self._start = 0
        self._held = _serve.resident()

    def run(self, steps: int) -> list[float]:
        """Seconds a step, the mean of some."""
        times = []

        def note_time(batch: int, logs: Any) -> None:
            if batch in (WARM_UP - 1, WARM_UP + steps - 1):
                float(logs["loss"])  # The step has ended when it is known.
                times.append(time.perf_counter())

        # Unless it is safe, Keras waits for each step's loss.
        clock = self._callback(on_train_batch_end=note_time, async_safe=True)
        self.fit(steps, clock)
        return [(max(times) - min(times)) / steps]

    def first(self) -> float:
        """Seconds of a `fit` of one step, in which the step is compiled."""
        return _serve.timed(lambda: self.fit(1 - WARM_UP, self._callback()))

    def peak(self) -> int:
        """The most bytes held during steps, beyond those before the first one.

        Not beyond those between steps: TensorFlow keeps what a step has used.
        """
        steps, peaks = 5, []

        def note_peak(batch: int, logs: Any) -> None:
            if batch == WARM_UP - 1:
                _serve.forget_peak()
            elif batch == WARM_UP + steps - 1:
                peaks.append(_serve.latest_peak())

        self.fit(steps, self._callback(on_train_batch_end=note_peak))
        return peaks[0] - self._held

    def fit(self, steps: int, callback: Any) -> None:
        """Train for so many steps after those of the warm-up."""
        inputs, labels = self._data
        size = (WARM_UP + steps) * self._batch
        if self._start + size > len(labels):
            self._start = 0
        part = slice(self._start, self._start + size)
        self._start += size
        batches: Any
        if isinstance(inputs, dict):
            batches = {name: values[part] for name, values in inputs.items()}
        else:
            batches = inputs[part]
        with self._scope():
            self._model.fit(
                batches,
                labels[part],
                batch_size=self._batch,
                shuffle=False,
                verbose=0,
                callbacks=[callback],
            )

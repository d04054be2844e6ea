"""Keras's optimizers on TensorFlow, in graph mode ("graph") and under XLA ("jit")."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

from benchmarks.workers import _serve

channel = _serve.take_stdout()
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from benchmarks.workers import _fit  # noqa: E402
from benchmarks.workers._optimizers import build, build_model  # noqa: E402
from benchmarks.workers._problem import Problem  # noqa: E402
from benchmarks.workers._setups import distribution  # noqa: E402

if devices := int(os.environ.get("LOGICAL_CPUS", 0)):
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration() for _ in range(devices)],
    )


def make(name: str, mode: str, problem: Problem) -> _serve.Case:
    dense = [tf.constant(g) for g in problem.matrix_gradients()]
    if not problem.vocabulary:
        batches = [(None, None)]
    elif problem.sparse:
        rows = [tf.constant(g) for g in problem.row_gradients()]
        ids = [tf.constant(i) for i in problem.row_ids()]
        batches = list(zip(ids, itertools.cycle(rows)))
    else:
        batches = [(None, tf.constant(g)) for g in problem.table_gradients()]
    if name == "bare LazyAdam":
        update = bare_lazy_adam(problem.shapes[0])
    else:
        optimizer, variables = build(name, problem)

        def update(gradients: list) -> None:
            optimizer.apply(gradients, variables)

    @tf.function(jit_compile=mode == "jit", autograph=False)
    def apply(ids: tf.Tensor, gradient: tf.Tensor, dense: list[tf.Tensor]) -> None:
        if ids is not None:
            gradient = tf.IndexedSlices(gradient, ids, problem.shapes[0])
        table = [] if gradient is None else [gradient]
        update([*table, *dense])

    turn = itertools.cycle(batches)
    return _serve.Case(lambda: apply(*next(turn), dense))


def make_fit(name: str, mode: str, problem: Problem) -> _serve.Case:
    if name == "bare LazyAdam":
        model = _fit.build(keras, BareLazyAdam, mode, problem)
        model.optimizer.build(model.trainable_variables)
        return _fit.Fit(keras, model, problem)
    model = build_model(name, mode, problem)
    return _fit.Fit(keras, model, problem, scope=distribution(problem.setup).scope)


def bare_lazy_adam(shape: tuple[int, int]) -> Callable[[list], None]:
    """A step with those operations, without Keras."""
    table = tf.Variable(tf.fill(shape, 0.01))
    m, v = tf.Variable(tf.zeros(shape)), tf.Variable(tf.zeros(shape))
    step = tf.Variable(0.0)

    def update(gradients: list) -> None:
        (slices,) = gradients
        lazy_adam_step(slices, table, m, v, step.assign_add(1.0))

    return update


class BareLazyAdam(keras.optimizers.Adam):
    """An Adam that does those operations on what was looked up, and in such a table.

    Args:
        tables: an embedding layer, which looks up in the variable itself from now on.
    """

    def __init__(self, tables: list) -> None:
        super().__init__()
        (words,) = tables
        words.call = lambda ids: tf.gather(words.embeddings.value, ids)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if not isinstance(gradient, tf.IndexedSlices):
            super().update_step(gradient, variable, learning_rate)
            return
        index = self._get_variable_index(variable)
        slots = self._momentums[index].value, self._velocities[index].value
        step = tf.cast(self.iterations.value + 1, "float32")
        lazy_adam_step(gradient, variable, *slots, step)


def lazy_adam_step(
    slices: tf.IndexedSlices,
    table: tf.Variable,
    m: tf.Variable,
    v: tf.Variable,
    step: tf.Tensor,
) -> None:
    """The fewest operations for a lazy Adam step, those of tensorflow-addons.

    Without settings, or rows that turn out to have no gradient: how much of a
    difference between two versions of TensorFlow is TensorFlow's own.
    """
    rate = 1e-3 * tf.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    rows, position = tf.unique(slices.indices)
    gradient = tf.math.unsorted_segment_sum(slices.values, position, tf.size(rows))
    new_m = 0.9 * m.sparse_read(rows) + 0.1 * gradient
    new_v = 0.999 * v.sparse_read(rows) + 0.001 * gradient**2
    m.scatter_update(tf.IndexedSlices(new_m, rows))
    v.scatter_update(tf.IndexedSlices(new_v, rows))
    change = rate * new_m / (tf.sqrt(new_v) + 1e-7)
    table.scatter_sub(tf.IndexedSlices(change, rows))


about = {"keras": keras.__version__, "tensorflow": tf.__version__}
_serve.serve(_serve.Server(make, make_fit, about), channel)

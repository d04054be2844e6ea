"""Keras's optimizers on TensorFlow, in graph mode ("graph") and under XLA ("jit")."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

from benchmarks.workers import _serve

channel = _serve.take_stdout()
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from benchmarks.workers import _fit  # noqa: E402
from benchmarks.workers._optimizers import build, build_model  # noqa: E402
from benchmarks.workers._problem import Problem  # noqa: E402


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
    model = build_model(name, mode, problem)
    model.optimizer.build(model.trainable_variables)
    return _fit.Fit(keras, model, problem)


def bare_lazy_adam(shape: tuple[int, int]) -> Callable[[list], None]:
    """The fewest operations for a lazy Adam step, those of tensorflow-addons.

    Without Keras, settings, or rows that turn out to have no gradient: how much of a
    difference between two versions of TensorFlow is TensorFlow's own.
    """
    table = tf.Variable(tf.fill(shape, 0.01))
    m, v = tf.Variable(tf.zeros(shape)), tf.Variable(tf.zeros(shape))
    step = tf.Variable(0.0)

    def update(gradients: list) -> None:
        (slices,) = gradients
        t = step.assign_add(1.0)
        rate = 1e-3 * tf.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        rows, position = tf.unique(slices.indices)
        gradient = tf.math.unsorted_segment_sum(slices.values, position, tf.size(rows))
        new_m = 0.9 * m.sparse_read(rows) + 0.1 * gradient
        new_v = 0.999 * v.sparse_read(rows) + 0.001 * gradient**2
        m.scatter_update(tf.IndexedSlices(new_m, rows))
        v.scatter_update(tf.IndexedSlices(new_v, rows))
        change = rate * new_m / (tf.sqrt(new_v) + 1e-7)
        table.scatter_sub(tf.IndexedSlices(change, rows))

    return update


about = {"keras": keras.__version__, "tensorflow": tf.__version__}
_serve.serve(_serve.Server(make, make_fit, about), channel)

"""Keras's optimizers on TensorFlow, in graph mode ("graph") and under XLA ("jit")."""

from __future__ import annotations

import itertools
import os

from benchmarks.workers import _serve

channel = _serve.take_stdout()
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from benchmarks.workers._optimizers import build  # noqa: E402
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
    optimizer, variables = build(name, problem)

    @tf.function(jit_compile=mode == "jit", autograph=False)
    def apply(ids: tf.Tensor, gradient: tf.Tensor, dense: list[tf.Tensor]) -> None:
        if ids is not None:
            gradient = tf.IndexedSlices(gradient, ids, problem.shapes[0])
        table = [] if gradient is None else [gradient]
        optimizer.apply([*table, *dense], variables)

    turn = itertools.cycle(batches)
    return _serve.Case(lambda: apply(*next(turn), dense))


about = {"keras": keras.__version__, "tensorflow": tf.__version__}
_serve.serve(_serve.Server(make, about), channel)

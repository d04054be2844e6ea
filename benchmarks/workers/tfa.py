"""TensorFlow Addons and the Keras 2 optimizers that it builds on, in graph mode."""

from __future__ import annotations

import itertools

from benchmarks.workers import _serve

channel = _serve.take_stdout()

import tensorflow as tf  # noqa: E402
import tensorflow_addons as tfa  # noqa: E402

from benchmarks.workers import _fit  # noqa: E402
from benchmarks.workers._problem import Problem  # noqa: E402

Adam = tf.keras.optimizers.legacy.Adam
SGD = tf.keras.optimizers.legacy.SGD
LazyAdam = tfa.optimizers.LazyAdam

OPTIMIZERS = {
    "Adam": lambda: Adam(),
    "SGD": lambda: SGD(1e-2, momentum=0.9),
    "LazyAdam": lambda: LazyAdam(),
    "Lookahead(Adam)": lambda: tfa.optimizers.Lookahead(Adam(), sync_period=5),
    "Lookahead(SGD)": lambda: tfa.optimizers.Lookahead(
        SGD(1e-2, momentum=0.9), sync_period=5
    ),
    "Lookahead(LazyAdam)": lambda: tfa.optimizers.Lookahead(LazyAdam(), sync_period=5),
}


def make(name: str, mode: str, problem: Problem) -> _serve.Case:
    dense = [tf.constant(g) for g in problem.matrix_gradients()]
    batches = [(None, None)]
    if problem.vocabulary:
        rows = [tf.constant(g) for g in problem.row_gradients()]
        ids = [tf.constant(i) for i in problem.row_ids()]
        batches = list(zip(ids, itertools.cycle(rows)))
    optimizer = OPTIMIZERS[name]()
    variables = [tf.Variable(tf.fill(shape, 0.01)) for shape in problem.shapes]

    @tf.function(jit_compile=mode == "jit", autograph=False)
    def apply(ids: tf.Tensor, gradient: tf.Tensor, dense: list[tf.Tensor]) -> None:
        table = []
        if ids is not None:
            table = [tf.IndexedSlices(gradient, ids, problem.shapes[0])]
        gradients = [*table, *dense]
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    turn = itertools.cycle(batches)
    return _serve.Case(lambda: apply(*next(turn), dense))


def make_fit(name: str, mode: str, problem: Problem) -> _serve.Case:
    keras = tf.keras
    model = _fit.build(keras, lambda tables: OPTIMIZERS[name](), mode, problem)
    return _fit.Fit(keras, model, problem)


about = {"tensorflow": tf.__version__, "tensorflow_addons": tfa.__version__}
_serve.serve(_serve.Server(make, make_fit, about), channel)

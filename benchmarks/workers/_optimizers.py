"""The Keras optimizers that are compared, by name."""

from __future__ import annotations

import keras
from keras.optimizers import SGD, Adam

from benchmarks.workers._problem import Problem
from keras_lookahead_lazy import LazyOptimizer, Lookahead

K = 5

OPTIMIZERS = {
    "Adam": lambda tables: Adam(),
    "SGD": lambda tables: SGD(1e-2, momentum=0.9),
    "Lookahead(Adam)": lambda tables: Lookahead(Adam(), k=K),
    "Lookahead(SGD)": lambda tables: Lookahead(SGD(1e-2, momentum=0.9), k=K),
    "Lazy freeze": lambda tables: LazyOptimizer(Adam(), tables, moments="freeze"),
    "Lazy decay": lambda tables: LazyOptimizer(Adam(), tables),
    "Lookahead(Lazy decay)": lambda tables: Lookahead(
        LazyOptimizer(Adam(), tables), k=K
    ),
}


def build(name: str, problem: Problem) -> tuple[keras.Optimizer, list[keras.Variable]]:
    """An optimizer and the weights it has been built for."""
    variables = [
        keras.Variable(keras.initializers.Constant(0.01), shape, name=f"weight_{i}")
        for i, shape in enumerate(problem.shapes)
    ]
    optimizer = OPTIMIZERS[name](variables[:1])
    optimizer.build(variables)
    return optimizer, variables

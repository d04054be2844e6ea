"""The Keras optimizers that are compared, by name."""

from __future__ import annotations

import functools
import sys
from typing import Any

import keras
from keras.optimizers import SGD, Adam

from benchmarks.workers import _dlrm, _fit
from benchmarks.workers._problem import Problem
from benchmarks.workers._setups import SETUPS, distribution

K = 5


def lookahead(inner: keras.Optimizer, **settings: Any) -> keras.Optimizer:
    # Imported where it is needed: one of the processes does without.
    from keras_lookahead_lazy import Lookahead

    return Lookahead(inner, k=K, **settings)


def lazy(tables: list, moments: str = "decay", **settings: Any) -> keras.Optimizer:
    from keras_lookahead_lazy import LazyOptimizer

    return LazyOptimizer(Adam(**settings), tables, moments=moments)


def adam_alone() -> keras.Optimizer:
    assert "keras_lookahead_lazy" not in sys.modules
    return Adam()


def adam_beside_lazy() -> keras.Optimizer:
    """Adam, after a LazyOptimizer has trained another model."""
    problem = Problem(vocabulary=1000, rows=_fit.LENGTH)
    other = _fit.build(keras, lazy, "eager", problem)
    _fit.Fit(keras, other, problem).run(1)
    others.append(other)
    return Adam()


others: list[keras.Model] = []

OPTIMIZERS = {
    "Adam": lambda tables, **settings: Adam(**settings),
    "SGD": lambda tables: SGD(1e-2, momentum=0.9),
    "Lookahead(Adam)": lambda tables: lookahead(Adam()),
    "Lookahead(SGD)": lambda tables: lookahead(SGD(1e-2, momentum=0.9)),
    "Lookahead(Adam, outer SGD)": lambda tables: lookahead(
        Adam(), outer_optimizer=SGD(0.7, momentum=0.9, nesterov=True)
    ),
    "Lazy freeze": lambda tables: lazy(tables, "freeze"),
    "Lazy decay": lazy,
    "Lookahead(Lazy decay)": lambda tables, **settings: lookahead(
        lazy(tables, **settings)
    ),
    "Adam, package not imported": lambda tables: adam_alone(),
    "Adam, package in use": lambda tables: adam_beside_lazy(),
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


def build_model(name: str, mode: str, problem: Problem) -> keras.Model:
    """A model that trains with an optimizer, which is built."""
    keras.config.set_dtype_policy(problem.policy)
    setup = SETUPS[problem.setup]
    optimizer_of = functools.partial(OPTIMIZERS[name], **setup.optimizer)
    with distribution(problem.setup).scope():
        if problem.tables:
            model = _dlrm.build(optimizer_of, mode, problem)
        else:
            model = _fit.build(keras, optimizer_of, mode, problem, **setup.layer)
        model.optimizer.build(model.trainable_variables)
    return model


def states(optimizer: keras.Optimizer) -> list[Any]:
    """The arrays of an optimizer, and of those that it wraps."""
    values = []
    inner = optimizer
    while inner is not None:
        # Neither `variables` nor the property `inner_optimizer`: LazyOptimizer would
        # work through all rows for that.
        values += [variable.value for variable in inner._variables]
        inner = vars(inner).get("inner_optimizer")
    return values

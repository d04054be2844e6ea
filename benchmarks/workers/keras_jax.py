"""Keras's optimizers on JAX, and optax's, compiled ("jit") with donated buffers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

from benchmarks.workers import _serve

channel = _serve.take_stdout()
os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import keras  # noqa: E402
import optax  # noqa: E402

from benchmarks.workers import _fit, _optimizers  # noqa: E402
from benchmarks.workers._problem import Problem  # noqa: E402
from benchmarks.workers._setups import distribution  # noqa: E402

OPTAX = {
    "optax adam": lambda: optax.adam(1e-3),
    "optax sgd": lambda: optax.sgd(1e-2, momentum=0.9),
}

# Weights and optimizer state, both as JAX sees them.
State = tuple[Any, Any]
Update = Callable[[Any, Any, list], State]


def make(name: str, mode: str, problem: Problem) -> _serve.Case:
    assert mode == "jit"
    dense = [jnp.asarray(g) for g in problem.matrix_gradients()]
    batches = [dense]
    if problem.vocabulary:
        batches = [[jnp.asarray(g), *dense] for g in problem.table_gradients()]
    build = build_optax if name.startswith("optax") else build_keras
    update, state = build(name, problem)
    update = jax.jit(update, donate_argnums=(0, 1))
    turn = itertools.cycle(batches)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(update(*state, next(turn)))

    return _serve.Case(step, lambda: temporary(update.lower(*state, batches[0])))


def make_fit(name: str, mode: str, problem: Problem) -> _serve.Case:
    assert mode == "jit"
    model = _optimizers.build_model(name, mode, problem)
    parts = ("trainable_variables", "non_trainable_variables")

    def train_step_temporary() -> int | None:
        variables = [getattr(model, part) for part in parts]
        variables += [model.optimizer.variables, model.metrics_variables]
        state = tuple([variable.value for variable in part] for part in variables)
        ids, labels = _fit.data(problem)
        batch = slice(problem.samples)
        # As in `fit`, which keeps its compiled step to itself.
        step = jax.jit(model.train_step, donate_argnums=0)
        return temporary(step.lower(state, (ids[batch], labels[batch])))

    scope = distribution(problem.setup).scope
    return _fit.Fit(keras, model, problem, train_step_temporary, scope)


def temporary(lowered: jax.stages.Lowered) -> int | None:
    analysis = lowered.compile().memory_analysis()
    return getattr(analysis, "temp_size_in_bytes", None)


def build_keras(name: str, problem: Problem) -> tuple[Update, State]:
    optimizer, variables = _optimizers.build(name, problem)

    def update(weights: list, state: list, gradients: list) -> State:
        return optimizer.stateless_apply(state, gradients, weights)

    weights = [variable.value for variable in variables]
    return update, (weights, [variable.value for variable in optimizer.variables])


def build_optax(name: str, problem: Problem) -> tuple[Update, State]:
    weights = [jnp.full(shape, 0.01) for shape in problem.shapes]
    inner, is_lookahead = name.removesuffix(" lookahead"), name.endswith("lookahead")
    optimizer = OPTAX[inner]()
    if is_lookahead:
        optimizer = optax.lookahead(optimizer, sync_period=5, slow_step_size=0.5)
        slow = [jnp.copy(weight) for weight in weights]
        weights = optax.LookaheadParams(weights, slow)

    def update(weights: Any, state: Any, gradients: list) -> State:
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    return update, (weights, optimizer.init(weights))


def bandwidth() -> float:
    source = jnp.zeros(2**28)
    copy = jax.jit(jnp.negative)
    seconds = [
        _serve.timed(lambda: jax.block_until_ready(copy(source))) for _ in range(20)
    ]
    return 2 * source.nbytes / min(seconds)


about = {
    "keras": keras.__version__,
    "jax": jax.__version__,
    "optax": optax.__version__,
    "device": jax.devices()[0].device_kind,
}
_serve.serve(_serve.Server(make, make_fit, about, bandwidth), channel)

"""Loss scaling whose cost depends on the sampled rows, not on the table.

Keras's `LossScaleOptimizer` checks whole gradients and divides them, and on JAX it
chooses between old and new tables. If one of this package's optimizers is inside or
around it, this module does the same with the sums over lookups, in one decision.
"""

from __future__ import annotations

import contextlib
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _keras
from keras_lookahead_lazy._backend import engine


def apply(
    optimizer: keras.optimizers.LossScaleOptimizer,
    grads: list,
    variables: list | None,
    assigned: list,
) -> None:
    """Update if all gradients are finite, and compute the next scale.

    Args:
        assigned: Variables of the wrappers around it that the update writes.
    """
    weights = variables or _keras.weights(optimizer)
    with _rows_taken(optimizer, grads, variables) as sums:
        is_finite = optimizer.check_finite(sums)
        scale = ops.convert_to_tensor(optimizer.dynamic_scale)
        unscaled = [
            gradient
            if gradient is None or getattr(weight, "overwrite_with_gradient", False)
            else ops.divide(gradient, scale)
            for gradient, weight in zip(sums, weights, strict=True)
        ]
        changed = [
            *weights,
            *_keras.all_variables(optimizer.inner_optimizer),
            *assigned,
        ]
        engine.run_if(
            is_finite,
            lambda: optimizer.inner_optimizer.apply(unscaled, variables),
            _keras.unique(changed),
        )
    steps = ops.convert_to_tensor(optimizer.step_counter)
    grows = ops.equal(steps, optimizer.dynamic_growth_steps - 1)
    goes_on = ops.logical_and(is_finite, ops.logical_not(grows))
    factor = ops.where(is_finite, ops.where(grows, 2.0, 1.0), 0.5)
    optimizer.step_counter.assign(ops.where(goes_on, steps + 1, 0))
    optimizer.dynamic_scale.assign(scale * factor)


def entries(gradient: Any) -> Any:
    """Return all entries of a gradient: for `tf.IndexedSlices`, those of every slice.

    Keras would make a table of them, and check only one of several slices of a row.
    """
    values = getattr(gradient, "values", None)
    return gradient if values is None or callable(values) else values


def _rows_taken(
    optimizer: keras.Optimizer, grads: list, variables: list | None
) -> contextlib.AbstractContextManager[list]:
    for inside in _keras.chain(optimizer):
        if hasattr(inside, "rows_taken"):
            return inside.rows_taken(grads, variables)
    return contextlib.nullcontext(grads)

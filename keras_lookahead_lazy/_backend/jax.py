"""JAX: dense gradients, fixed shapes, and state that flows through functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_lookahead_lazy._rows import Rows

Groups = list[tuple[Any, ...]]

# Whether slots of rows that were not sampled may be behind (see `LazyOptimizer`).
SLOTS_MAY_LAG = False


def all_rows(variable: Any) -> None:
    return None


# Which rows were sampled


def find_rows(
    gradient: jax.Array, variables: list, every_row: bool
) -> tuple[Rows, list]:
    """The rows of a table that the dense `gradient` touches: all, and a mask.

    A compiled program cannot have as many rows as happen to be sampled. XLA fuses
    the masked update into the one pass that the inner optimizer makes anyway.

    Args:
        variables: the table and what is kept for it.
        every_row: whether the step needs the whole table.

    Returns:
        The rows, and the values of each of the variables there.
    """
    axes = tuple(range(1, gradient.ndim))
    # XLA fuses a maximum into one pass over the gradient, but not `any(... != 0)`.
    rows = Rows(None, gradient, jnp.max(jnp.abs(gradient), axis=axes) != 0)
    return rows, [variable.value for variable in variables]


def sum_duplicates(gradient: jax.Array) -> jax.Array:
    """Dense gradients are sums already."""
    return gradient


# Reading and writing rows


def write_rows(
    variable: keras.Variable, like: Any, indices: None, values: jax.Array
) -> None:
    variable.assign(values)


def row_layout(variable: keras.Variable) -> jax.sharding.Sharding | None:
    """Where a vector with one entry for each row of a table belongs."""
    sharding = variable.value.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    by_row = jax.sharding.PartitionSpec(*sharding.spec[:1])
    return jax.sharding.NamedSharding(sharding.mesh, by_row)


def rows_since(last_update: Any, like: Any, step: Any) -> None:
    """All rows: those that did not move are where a sync puts them."""
    return None


# Counting and branching inside the compiled function


def read_count(variable: Any) -> jax.Array:
    return variable.value if isinstance(variable, keras.Variable) else variable


def write_count(variable: keras.Variable, count: jax.Array) -> None:
    variable.assign(count)


def update_if(
    predicate: Any, groups: Groups, function: Callable, moved: Callable = all_rows
) -> None:
    """For each group of variables, assign `function` of their values, if `predicate`.

    Values go through the condition and are assigned behind it: assigning in a
    branch would leak its tracers.
    """
    if not groups:
        return
    values = [tuple(variable.value for variable in group) for group in groups]

    def update(values: list[tuple]) -> list[tuple]:
        return [tuple(function(*group)) for group in values]

    if isinstance(predicate, jax.core.Tracer):
        updated = jax.lax.cond(predicate, update, lambda values: values, values)
    elif predicate:  # not compiled: no branches, but no shared buffers either
        updated = jax.tree.map(jnp.copy, update(values))
    else:
        return
    for group, new in zip(groups, updated, strict=True):
        for variable, value in zip(group, new, strict=True):
            variable.assign(value)


def back_up_first(updates: Any, pairs: Groups) -> None:
    """slow := fast, before the first update.

    Both take one value that XLA cannot see to be `fast`. Were `fast` only read
    here, XLA would copy it in every step, to be safe from the update that
    overwrites it in place.
    """

    def back_up(fast: jax.Array, slow: jax.Array) -> tuple[jax.Array, jax.Array]:
        same = jnp.where(updates < 0, slow, fast)
        return same, same

    update_if(updates == 0, pairs, back_up)


def pull_back_if(
    predicate: Any, pairs: Groups, alpha: float, moved: Callable = all_rows
) -> None:
    """slow := slow + alpha (fast - slow); fast := slow, if `predicate`."""

    def pull_back(fast: jax.Array, slow: jax.Array) -> tuple[jax.Array, jax.Array]:
        point = slow + jnp.asarray(alpha, slow.dtype) * (fast - slow)
        return point, point

    update_if(predicate, pairs, pull_back)


# What else differs


def take_over_tables(optimizer: keras.Optimizer, is_table: Callable) -> None:
    """JAX's optimizers call `update_step` for each weight: nothing to do."""


def is_recording() -> bool:
    """Whether values are being traced, or belong to a stateless call."""
    is_tracing = isinstance(jnp.zeros(()), jax.core.Tracer)
    return is_tracing or _in_stateless_scope()


def apply(optimizer: keras.Optimizer, grads: list, variables: list | None) -> None:
    """`optimizer.apply`, by way of `stateless_apply`.

    `LossScaleOptimizer.apply` assigns variables in a branch, which JAX forbids;
    its `stateless_apply` does not.
    """
    if not hasattr(optimizer, "inner_optimizer"):
        optimizer.apply(grads, variables)
        return
    weights = optimizer._trainable_variables
    if variables is not None:
        by_id = {id(v): g for v, g in zip(variables, grads, strict=True)}
        grads = [by_id.get(id(v)) for v in weights]
    state = optimizer.variables
    new_weights, new_state = optimizer.stateless_apply(
        [v.value for v in state], grads, [v.value for v in weights]
    )
    for variable, value in zip(weights + state, new_weights + new_state, strict=True):
        variable.assign(value)


def sync_model(model: keras.Model) -> None:
    """Give the variables the weights that training keeps in arrays."""
    model.jax_state_sync()


def _in_stateless_scope() -> bool:
    from keras.src.backend.common.stateless_scope import in_stateless_scope

    return in_stateless_scope()


def outside_graph() -> contextlib.AbstractContextManager:
    """A context in which operations run at once: any, where optimizers are built."""
    return contextlib.nullcontext()

"""JAX: dense gradients, fixed shapes, and state that flows through functions."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.experimental.sparse import JAXSparse

from keras_lookahead_lazy._rows import Rows

Groups = list[tuple[Any, ...]]

# Whether variables hold the state while `fit` runs, which keeps it in arrays here.
VARIABLES_HOLD_STATE = False
# Whether an inner optimizer computes every update and then chooses old or new values.
SELECTS_UPDATES = True
# Rows pay when a table has so many times more rows than a step has look-ups
# (measured): XLA fuses a masked update into the pass that the dense step makes.
ROWS_PER_LOOK_UP = 8
# A sync works on so many rows at a time, which bounds what it needs beside the weights.
ROWS_PER_ROUND = 4096


# Which rows were sampled
#
# JAX's gradient of a table is an array of the table's shape. All look-ups of a table
# read one private copy of it, the gateway's (which costs nothing: it is an identity).
# In the backward pass each notes ids and gradients of its rows, and the gateway notes
# the sum. So a gradient that *is* that sum, the same object, consists of those rows
# and nothing else, and where the optimizer takes the rows nobody computes the sum.


class _Gateway:
    """The private copy of one table in one trace, and what its look-ups noted."""

    def __init__(self, table: jax.Array) -> None:
        self.table = weakref.ref(table)
        self.noted: list[tuple[jax.Array, jax.Array]] = []
        identity = jax.custom_vjp(lambda table: table)
        identity.defvjp(lambda table: (table, None), self._note_sum)
        self.private = identity(table)

    def _note_sum(self, _: None, gradient: jax.Array) -> tuple[jax.Array]:
        noted, self.noted[:] = list(self.noted), []
        key = id(gradient)
        forget = functools.partial(_forget, _sums, key)
        _sums[key] = weakref.ref(gradient, forget), noted
        return (gradient,)

    def look_up(self, ids: jax.Array) -> jax.Array:
        shape, dtype = self.private.shape, self.private.dtype

        def backward(ids: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
            self.noted.append((ids, gradient))
            return jnp.zeros(shape, dtype).at[ids].add(gradient), None

        take = jax.custom_vjp(lambda table, ids: jnp.take(table, ids, axis=0))
        take.defvjp(lambda table, ids: (jnp.take(table, ids, axis=0), ids), backward)
        return take(self.private, ids)


# By the id of the table's value, and of the sum: tracers compare by value.
_gateways: dict[int, _Gateway] = {}
_sums: dict[int, tuple[weakref.ref, list]] = {}


def _forget(entries: dict, key: int, _: weakref.ref) -> None:
    entries.pop(key, None)


def is_dense(ids: Any) -> bool:
    return not isinstance(ids, JAXSparse)


def look_up(table: keras.Variable, ids: Any) -> jax.Array:
    """Rows of a table, noted in the backward pass."""
    value = table.value
    if not isinstance(value, jax.core.Tracer):
        return jnp.take(value, ids, axis=0)
    gateway = _gateways.get(id(value))
    if gateway is None or gateway.table() is not value:
        gateway = _gateways[id(value)] = _Gateway(value)
        weakref.finalize(value, _gateways.pop, id(value), None)
    return gateway.look_up(jnp.asarray(ids))


def row_gradient(gradient: Any, variable: keras.Variable) -> tuple | None:
    """A gradient that consists of look-ups alone, in arrays of fixed shapes.

    Returns:
        Sums over duplicates in as many rows as there are look-ups, of which the
        first are used; the rows' ids, sorted; for each of them the position of its
        sum. `None` for a gradient that has other parts, and for a small table.
    """
    whole, noted = _sums.get(id(gradient), (None, []))
    if whole is None or whole() is not gradient or not noted:
        return None
    # Inside of a scan or a checkpoint, look-ups belong to another trace.
    if any(_trace(array) is not _trace(gradient) for pair in noted for array in pair):
        return None
    rows, *row_shape = variable.shape
    ids = jnp.concatenate([ids.ravel() for ids, _ in noted])
    if rows < ROWS_PER_LOOK_UP * len(ids):
        return None
    values = [values.reshape(-1, *row_shape) for _, values in noted]
    ids = jnp.where(ids < 0, ids + rows, ids)
    indices, order = jax.lax.sort((ids, jnp.arange(len(ids))), num_keys=1)
    is_new = jnp.concatenate([jnp.zeros(1, bool), indices[1:] != indices[:-1]])
    position = jnp.cumsum(is_new)
    sums = jax.ops.segment_sum(
        jnp.concatenate(values)[order], position, len(ids), indices_are_sorted=True
    )
    return sums, indices, position


def _trace(array: Any) -> Any:
    return getattr(array, "_trace", None)


def whole(gradient: Any) -> jax.Array:
    return gradient.todense() if isinstance(gradient, JAXSparse) else gradient


def size(indices: jax.Array) -> int | None:
    return indices.shape[0]


def find_rows(
    gradient: jax.Array, variables: list, every_row: bool, lookups: Any = None
) -> tuple[Rows, list]:
    """The rows of a table that `gradient` touches; of a dense one all, and a mask.

    A compiled program cannot have as many rows as happen to be sampled. XLA fuses
    the masked update into the one pass that the inner optimizer makes anyway.

    Args:
        variables: the table and what is kept for it.
        every_row: whether the step needs the whole table.
        lookups: ids and positions, if `gradient` holds the sums of `row_gradient`.

    Returns:
        The rows, and the values of each of the variables there.
    """
    indices = None
    if lookups is not None:
        indices, position = lookups
        gradient = gradient[position]
    axes = tuple(range(1, gradient.ndim))
    # XLA fuses a maximum into one pass over the gradient, but not `any(... != 0)`.
    sampled = jnp.max(jnp.abs(gradient), axis=axes) != 0
    values = [read_rows(variable, None, indices) for variable in variables]
    return Rows(indices, gradient, sampled), values


def sum_duplicates(gradient: jax.Array) -> jax.Array:
    """Dense gradients are sums already."""
    return whole(gradient)


# Reading and writing rows


def read_rows(variable: keras.Variable, like: Any, indices: Any) -> jax.Array:
    value = variable.value
    return value if indices is None else value.at[indices].get(mode="clip")


def write_rows(
    variable: keras.Variable, like: Any, indices: Any, values: jax.Array
) -> None:
    if indices is not None:
        values = variable.value.at[indices].set(
            values, mode="drop", indices_are_sorted=True
        )
    variable.assign(values)


def row_layout(variable: keras.Variable) -> jax.sharding.Sharding | None:
    """Where a vector with one entry for each row of a table belongs."""
    sharding = variable.value.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    by_row = jax.sharding.PartitionSpec(*sharding.spec[:1])
    return jax.sharding.NamedSharding(sharding.mesh, by_row)


# Counting and branching inside the compiled function


def read_count(variable: Any) -> jax.Array:
    return variable.value if isinstance(variable, keras.Variable) else variable


def write_count(variable: keras.Variable, count: jax.Array) -> None:
    variable.assign(count)


def update_if(predicate: Any, groups: Groups, function: Callable) -> None:
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


def back_up_if(predicate: Any, pairs: Groups) -> None:
    """slow := fast, if `predicate`.

    Both take one value that XLA cannot see to be `fast`. Were `fast` only read
    here, XLA would copy it in every step, to be safe from the update that
    overwrites it in place.
    """

    def back_up(fast: jax.Array, slow: jax.Array) -> tuple[jax.Array, jax.Array]:
        same = jnp.where(predicate, fast, slow)
        return same, same

    update_if(predicate, pairs, back_up)


def sync_if(predicate: Any, pairs: Groups, alpha: float) -> None:
    """slow := slow + alpha (fast - slow); fast := slow, if `predicate`."""

    def sync(fast: jax.Array, slow: jax.Array) -> tuple[jax.Array, jax.Array]:
        point = slow + jnp.asarray(alpha, slow.dtype) * (fast - slow)
        return point, point

    update_if(predicate, pairs, sync)


def sync_rows_if(
    predicate: Any,
    group: tuple[Any, Any, Any],
    since: Any,
    alpha: float,
    most: int | None,
) -> None:
    """fast := slow + alpha (fast - slow) in rows moved after `since`, if `predicate`.

    It is a loop of at most one round: XLA updates in place what a loop carries, but
    copies what a condition leaves alone.

    Args:
        group: fast weights, slow weights, the update that moved each row last.
        most: how many rows are expected to have moved at most; `None` for all.
    """
    fast, slow, last_update = (variable.value for variable in group)
    step = jnp.asarray(alpha, fast.dtype)

    def sync_all(fast: jax.Array) -> jax.Array:
        moved = (last_update > since).reshape(-1, *[1] * (fast.ndim - 1))
        return jnp.where(moved, slow + step * (fast - slow), fast)

    def sync_some(fast: jax.Array) -> jax.Array:
        rank = jnp.cumsum(last_update > since, dtype="int32")
        size = min(most or 1, ROWS_PER_ROUND)

        def sync_next(carry: tuple) -> tuple:
            start, fast = carry
            wanted = start + jnp.arange(1, size + 1, dtype="int32")
            rows = jnp.searchsorted(rank, wanted)  # past the end: there is no more
            old = slow.at[rows].get(mode="clip")
            point = old + step * (fast.at[rows].get(mode="clip") - old)
            return start + size, fast.at[rows].set(point, mode="drop")

        return jax.lax.while_loop(
            lambda carry: carry[0] < rank[-1], sync_next, (jnp.int32(0), fast)
        )[1]

    sync = sync_some if most and most < len(fast) else sync_all
    group[0].assign(
        jax.lax.while_loop(
            lambda carry: carry[0],
            lambda carry: (jnp.zeros_like(carry[0]), sync(carry[1])),
            (jnp.asarray(predicate), fast),
        )[1]
    )


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
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
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

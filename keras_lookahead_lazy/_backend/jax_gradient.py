"""JAX: which look-ups the gradient of a table consists of.

JAX's gradient of a table is an array of the table's shape. All look-ups of a table
read one private copy of it, the gateway's (which costs nothing: it is an identity).
In the backward pass each notes ids and gradients of its rows, and the gateway notes
the sum. So a gradient that *is* that sum, the same object, consists of those rows
and nothing else, and where the optimizer takes the rows nobody computes the sum.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp


class _Gateway:
    """The private copy of one table in one trace, and what its look-ups noted.

    The backward passes refer to what was noted and not to the copy: JAX keeps them with
    the trace, and would take the copy for one that has leaked.
    """

    def __init__(self, table: jax.Array) -> None:
        self.table = weakref.ref(table)
        self.noted: list[tuple[jax.Array, jax.Array]] = []
        identity = jax.custom_vjp(lambda table: table)
        note_sum = functools.partial(_note_sum, self.noted)
        identity.defvjp(lambda table: (table, None), note_sum)
        self.private = identity(table)

    def look_up(self, ids: jax.Array) -> jax.Array:
        shape, dtype, noted = self.private.shape, self.private.dtype, self.noted

        def backward(ids: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
            noted.append((ids, gradient))
            return jnp.zeros(shape, dtype).at[ids].add(gradient), None

        take = jax.custom_vjp(lambda table, ids: jnp.take(table, ids, axis=0))
        take.defvjp(lambda table, ids: (jnp.take(table, ids, axis=0), ids), backward)
        return take(self.private, ids)


# By the id of the table's value, and of the sum: tracers compare by value.
_gateways: dict[int, _Gateway] = {}
_sums: dict[int, tuple[weakref.ref, list]] = {}


def _note_sum(noted: list, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    pairs, noted[:] = list(noted), []
    key = id(gradient)
    _sums[key] = weakref.ref(gradient, functools.partial(_forget, _sums, key)), pairs
    return (gradient,)


def _forget(entries: dict, key: int, _: weakref.ref) -> None:
    entries.pop(key, None)


def look_up(table: jax.Array, ids: Any) -> jax.Array:
    """Rows of a table, noted in the backward pass."""
    if not isinstance(table, jax.core.Tracer):
        return jnp.take(table, ids, axis=0)
    gateway = _gateways.get(id(table))
    if gateway is None or gateway.table() is not table:
        gateway = _Gateway(table)
        if _trace(gateway.private) is not _trace(table):
            return jnp.take(
                table, ids, axis=0
            )  # in a scan, say, which nobody may leave
        _gateways[id(table)] = gateway
        weakref.finalize(table, _gateways.pop, id(table), None)
    return gateway.look_up(jnp.asarray(ids))


def look_ups(gradient: Any) -> list[tuple[jax.Array, jax.Array]]:
    """Ids and gradients of the look-ups that a gradient consists of.

    Empty if it has other parts, or none that are known. (Inside of a scan or a
    checkpoint, look-ups belong to another trace.)
    """
    whole, noted = _sums.get(id(gradient), (None, []))
    if whole is None or whole() is not gradient:
        return []
    here = _trace(gradient)
    is_here = all(_trace(array) is here for pair in noted for array in pair)
    return noted if is_here else []


def _trace(array: Any) -> Any:
    return getattr(array, "_trace", None)

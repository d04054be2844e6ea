"""JAX: find out which lookups the gradient of a table consists of.

JAX's gradient of a table is an array of the table's shape. All lookups of a table read
one private copy of it, the gateway's (which costs nothing, because it is an identity).
When JAX transposes a lookup, the lookup records its ids and the gradients of its rows.
Then the gateway records the sum. If the gradient of the table *is* that sum, the same
object, it consists of those rows and nothing else. The optimizer then uses the rows,
and the sum is never computed.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from keras_lookahead_lazy._backend.jax_placement import (
    Placement,
    everywhere,
    read_from_owners,
)


class _Gateway:
    """The private copy of one table in one trace, and what its lookups recorded.

    Lookups refer to the records and not to the copy, because JAX keeps them with the
    trace and would report the copy as a leak.
    """

    def __init__(self, table: jax.Array) -> None:
        self.table = weakref.ref(table)
        self.noted = _Noted()
        self.private = _gateway.bind(table, noted=self.noted)

    def look_up(self, ids: jax.Array, dtype: str, place: Placement) -> jax.Array:
        how = {"dtype": dtype, "place": place, "noted": self.noted}
        return _look_up.bind(self.private, ids, **how)


class _Noted(list):
    """Pairs of ids and gradients, compared by identity because JAX hashes this."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


def _take(
    table: jax.Array, ids: jax.Array, *, dtype: str, place: Placement, **_: Any
) -> jax.Array:
    if place.row_axes is not None and isinstance(table, jax.core.Tracer):
        return read_from_owners(table, ids, dtype, place)
    return jnp.take(table, ids, axis=0).astype(dtype)


# Both primitives are linear in the table. What JAX does with them follows from what
# they compute, except for the records of their transposes.

_look_up = Primitive("look_up_rows")
_look_up.def_impl(_take)
_look_up.def_abstract_eval(
    lambda table, ids, dtype, **_: jax.core.ShapedArray(
        ids.shape + table.shape[1:], jnp.dtype(dtype)
    )
)
mlir.register_lowering(_look_up, mlir.lower_fun(_take, multiple_results=False))


def _look_up_jvp(primals: tuple, tangents: tuple, **how: Any) -> tuple:
    (table, ids), (tangent, _) = primals, tangents
    rows = _look_up.bind(table, ids, **how)
    if isinstance(tangent, ad.Zero):
        return rows, ad.Zero.from_primal_value(rows)  # type: ignore[attr-defined]
    return rows, _look_up.bind(tangent, ids, **how)


def _look_up_transpose(
    gradient: Any,
    table: Any,
    ids: jax.Array,
    *,
    noted: _Noted,
    place: Placement,
    **_: Any,
) -> tuple:
    if isinstance(gradient, ad.Zero):
        return ad.Zero(table.aval), None
    gradient = everywhere(gradient, ids, place)
    noted.append((ids, gradient))
    zeros = jnp.zeros(table.aval.shape, table.aval.dtype)
    return zeros.at[ids].add(gradient.astype(zeros.dtype)), None


def _look_up_batch(values: tuple, axes: tuple, **how: Any) -> tuple:
    (table, ids), (table_axis, ids_axis) = values, axes
    if table_axis is None:
        ids = jnp.moveaxis(ids, ids_axis, 0)
        return _look_up.bind(table, ids, **how), 0
    take = functools.partial(jnp.take, axis=0)
    rows = jax.vmap(take, in_axes=axes)(table, ids)
    return rows.astype(how["dtype"]), 0


ad.primitive_jvps[_look_up] = _look_up_jvp
ad.primitive_transposes[_look_up] = _look_up_transpose
batching.primitive_batchers[_look_up] = _look_up_batch


def _same(table: jax.Array, **_: Any) -> jax.Array:
    return table


_gateway = Primitive("look_up_gateway")
_gateway.def_impl(_same)
_gateway.def_abstract_eval(lambda table, **_: table)
mlir.register_lowering(_gateway, mlir.lower_fun(_same, multiple_results=False))


def _gateway_jvp(primals: tuple, tangents: tuple, noted: _Noted) -> tuple:
    ((table,), (tangent,)) = primals, tangents
    if not isinstance(tangent, ad.Zero):
        tangent = _gateway.bind(tangent, noted=noted)
    return _gateway.bind(table, noted=noted), tangent


def _gateway_transpose(gradient: Any, table: Any, noted: _Noted) -> tuple:
    if not isinstance(gradient, ad.Zero):
        pairs, noted[:] = list(noted), []
        key = id(gradient)
        forget = functools.partial(_forget, _sums, key)
        _sums[key] = weakref.ref(gradient, forget), pairs
    return (gradient,)


ad.primitive_jvps[_gateway] = _gateway_jvp
ad.primitive_transposes[_gateway] = _gateway_transpose
batching.primitive_batchers[_gateway] = lambda values, axes, noted: (values[0], axes[0])


# Keys are the ids of the table's value and of the sum, because tracers compare by
# value.
_gateways: dict[int, _Gateway] = {}
_sums: dict[int, tuple[weakref.ref, list]] = {}


def _forget(entries: dict, key: int, _: weakref.ref) -> None:
    entries.pop(key, None)


def look_up(table: jax.Array, ids: Any, dtype: str, place: Placement) -> jax.Array:
    """Read rows of a table, and record them in the backward pass."""
    if not isinstance(table, jax.core.Tracer) or _in_shard_map():
        return jnp.take(table, ids, axis=0).astype(dtype)
    gateway = _gateways.get(id(table))
    if gateway is None or gateway.table() is not table:
        gateway = _Gateway(table)
        if _trace(gateway.private) is not _trace(table):
            # In a scan, for example, whose values stay inside.
            return jnp.take(table, ids, axis=0).astype(dtype)
        _gateways[id(table)] = gateway
        weakref.finalize(table, _gateways.pop, id(table), None)
    return gateway.look_up(jnp.asarray(ids), dtype, place)


def look_ups(gradient: Any) -> list[tuple[jax.Array, jax.Array]]:
    """Return ids and gradients of the lookups that a gradient consists of.

    The list is empty if the gradient has other parts or if its parts are not known.
    (Inside a scan or a checkpoint, lookups belong to another trace.)
    """
    whole, noted = _sums.get(id(gradient), (None, []))
    if whole is None or whole() is not gradient:
        return []
    here = _trace(gradient)
    is_here = all(_trace(array) is here for pair in noted for array in pair)
    return noted if is_here else []


def _in_shard_map() -> bool:
    """Return whether devices run this separately, so that JAX adds their gradients."""
    return AxisType.Manual in (jax.sharding.get_abstract_mesh().axis_types or ())


def _trace(array: Any) -> Any:
    return getattr(array, "_trace", None)

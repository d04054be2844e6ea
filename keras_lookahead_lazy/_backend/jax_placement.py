"""JAX: tables whose rows are divided between devices.

Each device updates its own rows. Only ids and the gradients of lookups travel. A few
devices send them to all others, which is simple, and each finds those of its rows.
Many devices send each one to the owner of its row only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from keras_lookahead_lazy._backend import RowGradient, jax_exchange

# Each device holds the rows that all devices look up, of so many lookups at a time.
LOOK_UPS_AT_ONCE = 2**17
# From so many devices on, lookups are sent to the owners of their rows only.
DEVICES_TO_EXCHANGE = 16


class OwnRows(RowGradient):
    """A gradient of which each device has the part for its rows, numbered from 0."""


@dataclass(frozen=True)
class Placement:
    """Where a table is stored.

    Attributes:
        sharding: The sharding of its array.
        owner: Differs between tables that are divided between devices, whose rows
            cannot be joined. `None` if the table is not divided.
        batch_axis: The mesh axis that divides batches, if there is one.
    """

    sharding: Any
    owner: int | None
    batch_axis: str | None

    @property
    def is_shared(self) -> bool:
        """Whether several devices store the table, or parts of it."""
        return len(self.sharding.device_set) > 1

    @functools.cached_property
    def row_axes(self) -> Any:
        """The mesh axes that divide the rows. `None` if columns are divided, too."""
        spec = getattr(self.sharding, "spec", ())
        return spec[0] if spec and not any(spec[1:]) else None

    def exchanges(self, ids: Any) -> bool:
        """Return whether lookups are sent to the owners of their rows only.

        For this, many devices have to divide the rows and the batch.
        """
        if None in (self.row_axes, self.batch_axis) or not ids.ndim or not ids.size:
            return False
        shape, axes = self.sharding.mesh.shape, self.axes
        devices = math.prod(shape[axis] for axis in {*axes.rows, axes.batch})
        parts = shape[axes.batch]
        return devices >= DEVICES_TO_EXCHANGE and parts > 1 and not ids.shape[0] % parts

    @property
    def axes(self) -> jax_exchange.Axes:
        """The axes of the mesh, if it divides rows and batches."""
        rows = np.atleast_1d(self.row_axes).tolist()
        return jax_exchange.Axes(tuple(rows), cast(str, self.batch_axis))


def placement(variable: keras.Variable) -> Placement:
    sharding = variable.value.sharding
    owner = None if sharding.is_fully_replicated else id(variable)
    distribution = keras.distribution.distribution()
    return Placement(sharding, owner, getattr(distribution, "batch_dim_name", None))


def layout_like(variable: keras.Variable, axes: int) -> NamedSharding | None:
    sharding = variable.value.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:axes]))


def on_owners(
    function: Callable,
    place: Placement,
    divided: tuple,
    *others: Any,
) -> Any:
    """Call `function(*divided, *others)`, on each device with its own rows.

    Without division of the rows, it is called once, with all rows.

    Args:
        function: Returns arrays with one entry for each row of the table.
        place: The placement of the table.
        divided: Arrays with one entry for each row of the table.
        others: Arrays that every device needs whole.
    """
    if place.row_axes is None:
        return function(*divided, *others)
    by_row, whole = PartitionSpec(place.row_axes), PartitionSpec()
    return jax.shard_map(
        function,
        # Not the devices themselves, so that a step can be compiled for others.
        mesh=place.sharding.mesh.abstract_mesh,
        in_specs=(*[by_row] * len(divided), *[whole] * len(others)),
        out_specs=by_row,
        # Devices with the same rows compute the same, which JAX cannot prove.
        check_vma=False,
    )(*divided, *others)


def read_from_owners(
    table: jax.Array, ids: jax.Array, dtype: str, place: Placement
) -> jax.Array:
    """Read rows of a table whose rows are divided, and send them in `dtype`.

    JAX itself would send them in the dtype of the table. A device gets the rows of its
    own part of the batch, if batches are divided.
    """
    axes, mesh, batch_axis = place.row_axes, place.sharding.mesh, place.batch_axis
    exchanges = place.exchanges(ids) and batch_axis in place.axes.rows
    ids_spec = rows_spec = PartitionSpec()
    if ids.ndim and ids.shape[0] % mesh.shape.get(batch_axis, 1) == 0:
        if exchanges or batch_axis not in np.atleast_1d(axes):
            ids_spec = rows_spec = PartitionSpec(batch_axis)
        elif batch_axis == axes:  # every device reads for all parts of the batch
            rows_spec = PartitionSpec(batch_axis)
    scatters = ids_spec != rows_spec

    def read(part: jax.Array, ids: jax.Array) -> jax.Array:
        own = ids - jax.lax.axis_index(axes) * len(part)
        is_own = ((own >= 0) & (own < len(part)))[..., None]
        rows = jnp.where(is_own, part.at[own].get(mode="clip").astype(dtype), 0)
        if scatters:
            return jax.lax.psum_scatter(rows, axes, tiled=True)
        return jax.lax.psum(rows, axes)

    def exchange(part: jax.Array, ids: jax.Array) -> jax.Array:
        rows = jax_exchange.read(part, ids.ravel(), dtype, place.axes)
        return rows.reshape(*ids.shape, *part.shape[1:])

    def read_in_turn(part: jax.Array, ids: jax.Array) -> jax.Array:
        of_parts = ids.reshape(mesh.shape[axes] if scatters else 1, -1)
        turns = math.ceil(max(1, ids.size) / LOOK_UPS_AT_ONCE)
        rows = [read(part, some) for some in jnp.array_split(of_parts, turns, axis=1)]
        shape = (-1, *ids.shape[1:]) if ids.ndim else ()
        return jnp.concatenate(rows, axis=1).reshape(*shape, *part.shape[1:])

    ids = jnp.where(ids < 0, ids + len(table), ids)
    rows = jax.shard_map(
        exchange if exchanges else read_in_turn,
        mesh=mesh.abstract_mesh,
        in_specs=(PartitionSpec(axes), ids_spec),
        out_specs=rows_spec,
        check_vma=False,
    )(table, ids)
    is_row = ((ids >= 0) & (ids < len(table)))[..., None]
    return jnp.where(is_row, rows, jnp.nan)  # as in `jnp.take`


def everywhere(gradients: jax.Array, ids: jax.Array, place: Placement) -> jax.Array:
    """Send the gradients of lookups to all owners of rows, unless they are many.

    Otherwise JAX converts them first and sends them in the dtype of the table.
    """
    if place.row_axes is None or place.exchanges(ids) or ids.size > LOOK_UPS_AT_ONCE:
        return gradients
    return jax.shard_map(
        lambda gradients: gradients,
        mesh=place.sharding.mesh.abstract_mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(gradients)


def sum_on_owners(
    look_ups: Sequence[tuple[jax.Array, jax.Array]],
    shape: Sequence[int],
    dtype: Any,
    place: Placement,
) -> OwnRows:
    """Send the gradients of lookups to the owners of their rows, and sum them there.

    Args:
        look_ups: Ids and gradients.
        shape: That of the table.
        dtype: That of the sums.
    """
    total, *row_shape = shape
    axes, mesh = place.axes, place.sharding.mesh
    rows = total // math.prod(mesh.shape[axis] for axis in axes.rows)

    def sum_on_owner(look_ups: Sequence) -> RowGradient:
        ids = jnp.concatenate([ids.ravel() for ids, _ in look_ups])
        values = [values.reshape(-1, *row_shape) for _, values in look_ups]
        ids = jnp.where(ids < 0, ids + total, ids)
        return jax_exchange.sum_on_owner(
            ids, jnp.concatenate(values), rows, dtype, axes
        )

    return OwnRows(
        *jax.shard_map(
            sum_on_owner,
            mesh=mesh.abstract_mesh,
            in_specs=PartitionSpec(axes.batch),
            out_specs=PartitionSpec(axes.rows),
            check_vma=False,
        )(look_ups)
    )


def own_rows(gradient: RowGradient, place: Placement, rows: int) -> RowGradient:
    """Return the gradient with its own rows first, numbered as on this device.

    Args:
        rows: How many rows each device has.
    """
    if place.row_axes is None or isinstance(gradient, OwnRows):
        return gradient
    sums, indices, _ = gradient
    # The indices are in ascending order, and so are these, with its own rows in front.
    first = jax.lax.axis_index(place.row_axes) * rows
    position = jnp.arange(len(indices)) + jnp.sum(indices < first)
    position %= len(indices)
    return RowGradient(sums, own_numbers(indices[position], place, rows), position)


def own_numbers(indices: jax.Array, place: Placement, rows: int) -> jax.Array:
    """Number the rows as on this device, those of others with one past the end.

    Args:
        rows: How many rows each device has.
    """
    if place.row_axes is None:
        return indices
    own = indices - jax.lax.axis_index(place.row_axes) * rows
    return jnp.where((own < 0) | (own > rows), rows, own)

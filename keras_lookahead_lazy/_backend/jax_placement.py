"""JAX: tables whose rows are divided between devices.

Each device updates its own rows. Only ids and the gradients of lookups travel, which
every device needs to find those of its rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.sharding import NamedSharding, PartitionSpec

from keras_lookahead_lazy._backend import RowGradient


@dataclass(frozen=True)
class Placement:
    """Where a table is stored.

    Attributes:
        sharding: The sharding of its array.
        owner: Differs between tables that are divided between devices, whose rows
            cannot be joined. `None` if the table is not divided.
    """

    sharding: Any
    owner: int | None

    @property
    def is_shared(self) -> bool:
        """Whether several devices store the table, or parts of it."""
        return len(self.sharding.device_set) > 1

    @functools.cached_property
    def row_axes(self) -> Any:
        """The mesh axes that divide the rows. `None` if columns are divided, too."""
        spec = getattr(self.sharding, "spec", ())
        return spec[0] if spec and not any(spec[1:]) else None


def placement(variable: keras.Variable) -> Placement:
    sharding = variable.value.sharding
    return Placement(sharding, None if sharding.is_fully_replicated else id(variable))


def layout_like(variable: keras.Variable, axes: int) -> NamedSharding | None:
    sharding = variable.value.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:axes]))


def on_owners(
    function: Callable[..., tuple],
    place: Placement,
    divided: tuple,
    *others: Any,
) -> tuple:
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


def own_rows(gradient: RowGradient, place: Placement, rows: int) -> RowGradient:
    """Return the gradient with its own rows first, numbered as on this device.

    Args:
        rows: How many rows each device has.
    """
    if place.row_axes is None:
        return gradient
    sums, indices, _ = gradient
    first = jax.lax.axis_index(place.row_axes) * rows
    # The indices are in ascending order, and so are these, with its own rows in front.
    position = jnp.arange(len(indices)) + jnp.sum(indices < first)
    position %= len(indices)
    own = indices[position] - first
    own = jnp.where((own < 0) | (own > rows), rows, own)
    return RowGradient(sums, own, position)

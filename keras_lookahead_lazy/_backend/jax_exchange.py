"""JAX: lookups that travel only to the owners of their rows, and back.

A mesh divides the rows of a table along one or several of its axes, and the batch along
one axis. The functions here run in `jax.shard_map`, on each device with its own rows
and with the lookups of its part of the batch. Devices with the same part of the batch
share its lookups between them: each takes those for rows along its own axis.

In a round, each device sends to each other one as many lookups as a fixed shape has
room for. If ids are spread evenly, the first round takes all. Otherwise there are more,
until nothing is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from keras_lookahead_lazy._backend import RowGradient


class Axes(NamedTuple):
    """Axes of a mesh.

    Attributes:
        rows: Those that divide the rows of a table.
        batch: The one that divides batches.
    """

    rows: tuple[str, ...]
    batch: str

    @property
    def beside(self) -> tuple[str, ...]:
        """Those that divide rows, but not batches."""
        return tuple(axis for axis in self.rows if axis != self.batch)


class _Rounds:
    """The lookups of a device's part of the batch, in rounds.

    Args:
        ids: Int array of shape `(lookups,)`. Ids that no row has are left out.
        rows: How many rows each device has.
        axes: Those of the mesh.
    """

    def __init__(self, ids: jax.Array, rows: int, axes: Axes) -> None:
        self._axes = axes
        sizes = [jax.lax.axis_size(axis) for axis in axes.rows]
        parts = math.prod(sizes)
        mean = len(ids) / parts
        # Of 65,536 pairs of devices, hardly one has more if ids are spread evenly.
        self.size = min(len(ids), math.ceil(mean + 8 * math.sqrt(mean)))
        self.most = math.ceil(len(ids) / self.size)
        place = dict(zip(axes.rows, jnp.unravel_index(ids // rows, sizes), strict=True))
        is_sent = (ids >= 0) & (ids < parts * rows)
        for axis in axes.beside:
            is_sent &= place[axis] == jax.lax.axis_index(axis)
        # All devices along the batch's axis have the same rows if it divides none.
        receivers = jax.lax.axis_size(axes.batch) if axes.batch in axes.rows else 1
        receiver = jnp.where(is_sent, place.get(axes.batch, 0), receivers)
        self._order = jnp.argsort(receiver)
        self._counts = jnp.zeros(receivers, "int32").at[receiver].add(1, mode="drop")
        self._starts = jnp.cumsum(self._counts) - self._counts
        needed = (jnp.max(self._counts) + self.size - 1) // self.size
        self._needed = jax.lax.pmax(needed, (*axes.beside, axes.batch))

    def lookups(self, number: Any) -> jax.Array:
        """Return the lookups of a round for each receiver, shape `(receivers, size)`.

        Where there is none, the number is past the end.
        """
        place = number * self.size + jnp.arange(self.size)
        lookup = self._order.at[self._starts[:, None] + place].get(mode="clip")
        return jnp.where(place < self._counts[:, None], lookup, len(self._order))

    def swap(self, values: jax.Array) -> jax.Array:
        """Send the i-th part to device i, and return what that device sent.

        A single part goes to all devices along the batch's axis.
        """
        if self._axes.batch in self._axes.rows:
            return jax.lax.all_to_all(values, self._axes.batch, 0, 0)
        return jax.lax.all_gather(values[0], self._axes.batch)

    def send(self, values: jax.Array, number: Any, fill: int) -> jax.Array:
        """Send the values of a round's lookups, and `fill` where there is none."""
        chosen = values.at[self.lookups(number)].get(mode="fill", fill_value=fill)
        return self.swap(chosen)

    def run(self, function: Callable, value: jax.Array) -> jax.Array:
        """Call `value = function(number, value)` for each round, and return the last.

        The first is not part of the loop, whose length depends on data.
        """

        def has_more(carry: tuple) -> jax.Array:
            return carry[0] < self._needed

        def step(carry: tuple) -> tuple:
            number, value = carry
            return number + 1, function(number, value)

        return jax.lax.while_loop(has_more, step, (1, function(0, value)))[1]


def read(part: jax.Array, ids: jax.Array, dtype: str, axes: Axes) -> jax.Array:
    """Return the rows of this device's lookups in `dtype`; zeros for unknown ids.

    The batch's axis has to be one of those that divide rows.
    """
    rounds = _Rounds(ids, len(part), axes)

    def ask(number: Any, rows: jax.Array) -> jax.Array:
        asked = rounds.send(ids % len(part), number, fill=0)
        answers = rounds.swap(part.at[asked].get(mode="clip").astype(dtype))
        return rows.at[rounds.lookups(number)].set(answers, mode="drop")

    rows = rounds.run(ask, jnp.zeros((len(ids), *part.shape[1:]), dtype))
    return jax.lax.psum(rows, axes.beside) if axes.beside else rows


def sum_on_owner(
    ids: jax.Array, values: jax.Array, rows: int, dtype: Any, axes: Axes
) -> RowGradient:
    """Sum the gradients of lookups for this device's rows, which it numbers from 0.

    The rows are distinct and in ascending order, padded with a row past the end.
    """
    rounds = _Rounds(ids, rows, axes)
    places = jax.lax.axis_size(axes.batch) * rounds.size

    def ask(number: Any, asked: jax.Array) -> jax.Array:
        return asked.at[number].set(rounds.send(ids % rows, number, rows).ravel())

    asked = rounds.run(ask, jnp.full((rounds.most, places), rows, "int32"))
    order, number, indices = numbered(asked.ravel(), rows)
    position = number.at[order].set(number).reshape(asked.shape)

    def add(number: Any, sums: jax.Array) -> jax.Array:
        more = rounds.send(values, number, 0).reshape(places, *values.shape[1:])
        return sums.at[position[number]].add(more.astype(dtype))

    sums = jnp.zeros((asked.size, *values.shape[1:]), dtype)
    return RowGradient(rounds.run(add, sums), indices, None)


def numbered(ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Number distinct ids in ascending order.

    Returns:
        The order that sorts the ids; the number of each sorted id; and the id of each
        number, padded to the length of `ids` with `rows`.
    """
    ids, order = jax.lax.sort((ids, jnp.arange(len(ids))), num_keys=1)
    is_new = jnp.concatenate([jnp.zeros(1, bool), ids[1:] != ids[:-1]])
    number = jnp.cumsum(is_new)
    indices = jnp.full(len(ids), rows, ids.dtype)
    return order, number, indices.at[number].set(ids, indices_are_sorted=True)

"""JAX: a step on the rows that were looked up, whose number is fixed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_lookahead_lazy import _keras
from keras_lookahead_lazy._backend import RowGradient
from keras_lookahead_lazy._backend.jax_exchange import numbered
from keras_lookahead_lazy._backend.jax_placement import (
    OwnRows,
    Placement,
    on_owners,
    own_rows,
)

# Each of several devices needs the rows that all of them look up. They are summed, and
# processed by a step, in chunks of this size.
LOOK_UPS_PER_ROUND = 2**15
# The same for a step on one device. A GPU has to wait for the host after each chunk, so
# most steps should be one.
ON_ONE_DEVICE = 2**20


def sum_duplicates(
    ids: jax.Array, values: jax.Array, rows: int, dtype: Any
) -> RowGradient:
    """Sum the gradients of repeated ids.

    The ids are distinct and in ascending order, padded to a fixed length with an id
    past the end of the table. The sums have `dtype`.
    """
    count = len(ids)
    order, position, indices = numbered(ids, rows)
    size = min(count, LOOK_UPS_PER_ROUND)
    rounds = math.ceil(count / size)
    parts = [
        jnp.pad(whole, (0, -count % size), constant_values=count).reshape(-1, size)
        for whole in (order, position)
    ]

    def add(number: Any, sums: jax.Array) -> jax.Array:
        sources, targets = (part[number] for part in parts)
        more = values.at[sources].get(mode="clip").astype(dtype)
        return sums.at[targets].add(more, mode="drop", indices_are_sorted=True)

    sums = jax.lax.fori_loop(0, rounds, add, jnp.zeros(values.shape, dtype))
    return RowGradient(sums, indices, None)


def step_in_rounds(
    gradient: Any, variables: Sequence[keras.Variable], place: Placement, step: Callable
) -> None:
    """Let each device update its own rows, in chunks if there are many."""
    if not isinstance(gradient, RowGradient):
        step(gradient, variables)
        return

    def step_on_own(values: tuple, gradient: RowGradient) -> tuple:
        views = _views(values, variables)
        own = own_rows(gradient, place, len(values[0]))
        size = LOOK_UPS_PER_ROUND if place.is_shared else ON_ONE_DEVICE
        _step_in_rounds(own, views, size, step)
        return tuple(view.value for view in views)

    values = tuple(variable.value for variable in variables)
    if isinstance(gradient, OwnRows):
        values = on_owners(step_on_own, place, (values, gradient))
    else:
        values = on_owners(step_on_own, place, (values,), gradient)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _views(values: Sequence, variables: Sequence[keras.Variable]) -> list:
    pairs = zip(values, variables, strict=True)
    return [_keras.UnstoredVariable(value, variable) for value, variable in pairs]


def _step_in_rounds(
    gradient: RowGradient, variables: Sequence, size: int, step: Callable
) -> None:
    """Run the step in a loop that carries the values of the variables."""
    sums, indices, position = gradient
    count, rows = len(indices), variables[0].shape[0]
    if count <= size:
        step(gradient, variables)
        return
    if position is None:
        position = jnp.arange(count)
    indices = jnp.pad(indices, (0, -count % size), constant_values=rows)
    position = jnp.pad(position, (0, -count % size))

    def step_on_next(carry: tuple) -> tuple:
        start, *values = carry
        views = _views(values, variables)
        part_of = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size
        )
        step(RowGradient(sums, part_of(indices), part_of(position)), views)
        return start + size, *(view.value for view in views)

    def has_rows(carry: tuple) -> jax.Array:
        return indices.at[carry[0]].get(mode="fill", fill_value=rows) < rows

    start = (0, *(variable.value for variable in variables))
    _, *values = jax.lax.while_loop(has_rows, step_on_next, start)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)

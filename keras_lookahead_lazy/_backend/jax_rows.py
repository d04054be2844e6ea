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
from keras_lookahead_lazy._backend.jax_placement import Placement, on_owners, own_rows

# If a table is divided between devices, each device gets the rows that all devices
# look up. A step processes them in chunks of this size.
LOOK_UPS_PER_ROUND = 2**16


def sum_duplicates(ids: jax.Array, values: jax.Array, rows: int) -> RowGradient:
    """Sum the gradients of repeated ids.

    The ids are distinct and in ascending order, padded to a fixed length with an id
    past the end of the table.
    """
    count = len(ids)
    ids, order = jax.lax.sort((ids, jnp.arange(count)), num_keys=1)
    is_new = jnp.concatenate([jnp.zeros(1, bool), ids[1:] != ids[:-1]])
    position = jnp.cumsum(is_new)
    size, length = min(count, LOOK_UPS_PER_ROUND), whole_rounds(count)
    rounds = length // size
    parts = [
        jnp.pad(whole, (0, length - count), constant_values=length).reshape(-1, size)
        for whole in (order, position)
    ]

    def add(number: Any, sums: jax.Array) -> jax.Array:
        sources, targets = (part[number] for part in parts)
        more = values.at[sources].get(mode="clip")
        return sums.at[targets].add(more, mode="drop", indices_are_sorted=True)

    sums = jnp.zeros((length, *values.shape[1:]), values.dtype)
    sums = jax.lax.fori_loop(0, rounds, add, sums)
    indices = jnp.full(length, rows, ids.dtype)
    indices = indices.at[position].set(ids, indices_are_sorted=True)
    return RowGradient(sums, indices, None)


def whole_rounds(count: int) -> int:
    """Round a count up to a whole number of rounds, if there is more than one."""
    size = min(count, LOOK_UPS_PER_ROUND)
    return size * math.ceil(count / size)


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
        _step_in_rounds(own, views, step)
        return tuple(view.value for view in views)

    values = tuple(variable.value for variable in variables)
    values = on_owners(step_on_own, place, (values,), gradient)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _views(values: Sequence, variables: Sequence[keras.Variable]) -> list:
    pairs = zip(values, variables, strict=True)
    return [_keras.UnstoredVariable(value, variable) for value, variable in pairs]


def _step_in_rounds(gradient: RowGradient, variables: Sequence, step: Callable) -> None:
    """Run the step in a loop that carries the values of the variables."""
    size, rows = LOOK_UPS_PER_ROUND, variables[0].shape[0]
    sums, indices, position = gradient
    if len(indices) <= size:
        step(gradient, variables)
        return

    def step_on_next(carry: tuple) -> tuple:
        start, *values = carry
        views = _views(values, variables)
        part_of = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size
        )
        if position is None:
            part = RowGradient(part_of(sums), part_of(indices), None)
        else:
            part = RowGradient(sums, part_of(indices), part_of(position))
        step(part, views)
        return start + size, *(view.value for view in views)

    def has_rows(carry: tuple) -> jax.Array:
        return indices.at[carry[0]].get(mode="fill", fill_value=rows) < rows

    start = (0, *(variable.value for variable in variables))
    _, *values = jax.lax.while_loop(has_rows, step_on_next, start)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)

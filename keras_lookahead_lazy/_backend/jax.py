"""JAX: dense gradients, fixed shapes, and state that flows through functions."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.experimental.sparse import JAXSparse

from keras_lookahead_lazy import _keras
from keras_lookahead_lazy._backend import RowGradient, Rows, jax_gradient

VARIABLES_HOLD_STATE = False
KERAS_TAKES_ROWS = False
# Rows pay when a table has so many times more rows than a step has look-ups
# (measured): XLA fuses a masked update into the pass that the dense step makes.
ROWS_PER_LOOK_UP = 8
# Where a table is divided between devices, each needs the rows that all look up. So
# many are read at a time, and a step works on so many at a time.
LOOK_UPS_PER_READ = 2**19
LOOK_UPS_PER_ROUND = 2**16
# A sync works on so many rows at a time, which bounds what it needs beside the weights.
ROWS_PER_ROUND = 2048
# It takes the whole table where one in so many rows has moved, or it is small.
PART_OF_TABLE = 8


# Look-ups and their gradients


def is_dense(ids: Any) -> bool:
    return not isinstance(ids, JAXSparse)


def look_up(table: keras.Variable, ids: Any) -> jax.Array:
    ids = jnp.asarray(ids)
    reads = min(math.ceil(ids.size / LOOK_UPS_PER_READ), *ids.shape[:1])
    if reads <= 1:
        return jax_gradient.look_up(table.value, ids)
    parts = jnp.array_split(ids, reads)
    return jnp.concatenate([jax_gradient.look_up(table.value, part) for part in parts])


def row_gradient(gradient: Any, table: keras.Variable) -> RowGradient | None:
    look_ups = jax_gradient.look_ups(gradient)
    count = sum(ids.size for ids, _ in look_ups)
    rows, *row_shape = table.shape
    if not count or rows < ROWS_PER_LOOK_UP * count:
        return None
    ids = jnp.concatenate([ids.ravel() for ids, _ in look_ups])
    ids = jnp.where(ids < 0, ids + rows, ids)
    values = [values.reshape(-1, *row_shape) for _, values in look_ups]
    return _sum_duplicates(ids, jnp.concatenate(values), rows)


def _sum_duplicates(ids: jax.Array, values: jax.Array, rows: int) -> RowGradient:
    """Different rows, in order; what is past the table's end takes the other places."""
    count = len(ids)
    ids, order = jax.lax.sort((ids, jnp.arange(count)), num_keys=1)
    is_new = jnp.concatenate([jnp.zeros(1, bool), ids[1:] != ids[:-1]])
    position = jnp.cumsum(is_new)
    size = min(count, LOOK_UPS_PER_ROUND)
    rounds = math.ceil(count / size)
    length = size * rounds
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


def step_in_rounds(
    gradient: Any, variables: Sequence[keras.Variable], step: Callable
) -> None:
    """A loop, through which the variables' values go."""
    size, rows = LOOK_UPS_PER_ROUND, variables[0].shape[0]
    if not isinstance(gradient, RowGradient) or len(gradient.indices) <= size:
        step(gradient, variables)
        return
    sums, indices, _ = gradient

    def step_on_next(carry: tuple) -> tuple:
        start, *values = carry
        views = [
            _keras.UnstoredVariable(value, variable)
            for value, variable in zip(values, variables, strict=True)
        ]
        part_of = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size
        )
        step(RowGradient(part_of(sums), part_of(indices), None), views)
        return start + size, *(view.value for view in views)

    def has_rows(carry: tuple) -> jax.Array:
        return indices.at[carry[0]].get(mode="fill", fill_value=rows) < rows

    start = (0, *(variable.value for variable in variables))
    _, *values = jax.lax.while_loop(has_rows, step_on_next, start)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def whole(gradient: Any) -> jax.Array:
    return gradient.todense() if isinstance(gradient, JAXSparse) else gradient


# A dense gradient is a sum already.
sum_duplicates = whole


# Rows of a table


def replica(variable: keras.Variable, like: Any) -> keras.Variable:
    """The variable itself: JAX divides or copies arrays, not variables."""
    return variable


def find_rows(
    gradient: jax.Array, variables: Sequence[keras.Variable], every_row: bool
) -> tuple[Rows, list]:
    """All rows, and which were sampled.

    A compiled program cannot have as many rows as happen to be sampled. XLA fuses
    the masked update into the one pass that the inner optimizer makes anyway.
    """
    axes = tuple(range(1, gradient.ndim))
    # XLA fuses a maximum into one pass over the gradient, but not `any(... != 0)`.
    sampled = jnp.max(jnp.abs(gradient), axis=axes) != 0
    return Rows(None, gradient, sampled), [v.value for v in variables]


def mark_idle(indices: jax.Array, gradient: jax.Array) -> Rows:
    return Rows(indices, gradient, (gradient != 0).any(tuple(range(1, gradient.ndim))))


def read_rows(variable: keras.Variable, indices: Any) -> jax.Array:
    value = variable.value
    return value if indices is None else value.at[indices].get(mode="clip")


def write_rows(
    variables: Sequence[keras.Variable], indices: Any, values: Sequence[jax.Array]
) -> None:
    """All before anything else is done with one of them.

    TPUs' compiler would put a sync between two, and keep the rows of the second.
    """
    if indices is not None:
        values = [
            variable.value.at[indices].set(value, mode="drop", indices_are_sorted=True)
            for variable, value in zip(variables, values, strict=True)
        ]
        if isinstance(indices, jax.core.Tracer):
            values = jax.lax.optimization_barrier(values)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def write_chosen_rows(
    variable: keras.Variable, indices: jax.Array, value: jax.Array, chosen: jax.Array
) -> None:
    indices = jnp.where(chosen, indices, len(variable.value))
    variable.assign(variable.value.at[indices].set(value, mode="drop"))


def row_layout(variable: keras.Variable) -> jax.sharding.Sharding | None:
    sharding = variable.value.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    by_row = jax.sharding.PartitionSpec(*sharding.spec[:1])
    return jax.sharding.NamedSharding(sharding.mesh, by_row)


# Counting and branching


def read_count(variable: Any) -> jax.Array:
    return variable.value if isinstance(variable, keras.Variable) else variable


def write_count(variable: keras.Variable, count: jax.Array) -> None:
    variable.assign(count)


def update_if(
    predicate: Any, groups: Sequence[tuple], function: Callable[..., tuple]
) -> None:
    """Values go through the condition and are assigned behind it.

    Assigning in a branch would leak its tracers.
    """
    if not groups:
        return
    values = [tuple(variable.value for variable in group) for group in groups]

    def update(*values: tuple) -> tuple:
        return tuple(tuple(function(*group)) for group in values)

    if isinstance(predicate, jax.core.Tracer):
        updated = _once_if(predicate, update, tuple(values))
    elif predicate:  # not compiled: no loops, but no shared buffers either
        updated = jax.tree.map(jnp.copy, update(*values))
    else:
        return
    for group, new in zip(groups, updated, strict=True):
        for variable, value in zip(group, new, strict=True):
            variable.assign(value)


def back_up_if(predicate: Any, pairs: Sequence[tuple]) -> None:
    """Both take one value that XLA cannot see to be `fast`.

    Were `fast` only read here, XLA would copy it in every step, to be safe from the
    update that overwrites it in place.
    """

    def back_up(fast: jax.Array, slow: jax.Array) -> tuple[jax.Array, jax.Array]:
        same = jnp.where(predicate, fast, slow)
        return same, same

    update_if(predicate, pairs, back_up)


# As it is written: XLA makes one pass of it.
sync_if = update_if


def sync_rows_if(
    predicate: Any, group: tuple[Any, Any, Any], since: Any, sync: Callable
) -> None:
    fast, slow, last_update = (variable.value for variable in group)

    def sync_all(fast: jax.Array) -> tuple[jax.Array]:
        moved = (last_update > since).reshape(-1, *[1] * (fast.ndim - 1))
        return (jnp.where(moved, sync(fast, slow)[0], fast),)

    def sync_few(fast: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        """None, and `True`, if many have moved."""
        total, moved_rows = _numbered(last_update > since)
        is_many = total > len(fast) // PART_OF_TABLE

        def sync_next(carry: tuple) -> tuple:
            start, fast = carry
            rows = moved_rows(start, ROWS_PER_ROUND)
            point, _ = sync(*(v.at[rows].get(mode="clip") for v in (fast, slow)))
            return start + ROWS_PER_ROUND, fast.at[rows].set(point, mode="drop")

        start = jnp.where(is_many, total, 0), fast
        _, fast = jax.lax.while_loop(lambda carry: carry[0] < total, sync_next, start)
        return fast, is_many

    if len(fast) >= PART_OF_TABLE * ROWS_PER_ROUND:
        fast, predicate = _once_if(predicate, sync_few, (fast, jnp.zeros((), bool)))
    (fast,) = _once_if(predicate, sync_all, (fast,))
    group[0].assign(fast)


def _numbered(chosen: jax.Array) -> tuple[jax.Array, Callable]:
    """How many entries of a vector are `True`, and where those of given numbers are.

    It counts in blocks, as many as a power of two allows, so that no device needs the
    vector where its entries are divided between devices, and packs short pieces of
    them into a word each, so that no memory of the vector's size is needed.
    """
    count = len(chosen)
    blocks = math.gcd(count, 2**12)
    length = next(n for n in range(32, 0, -1) if count // blocks % n == 0)
    pieces = chosen.reshape(blocks, -1, length)
    bits = jnp.uint32(1) << jnp.arange(length, dtype="uint32")
    words = jnp.sum(jnp.where(pieces, bits, 0), axis=2, dtype="uint32")
    rank = jnp.cumsum(_count_bits(words), axis=1)
    ends = jnp.cumsum(rank[:, -1])

    def positions(start: jax.Array, size: int) -> jax.Array:
        """Of `size` numbers from `start`; past the end where there are not so many."""
        numbers = start + jnp.arange(size, dtype="int32")
        ended = jnp.zeros(size, "int32").at[jnp.maximum(ends - start, 0)]
        block = jnp.cumsum(ended.add(1, mode="drop"))
        block = jnp.minimum(block, blocks - 1)
        number = numbers - (ends[block] - rank[block, -1])  # in the block

        def go_on(bit: jax.Array, piece: jax.Array) -> jax.Array:
            further = piece + (1 << (bits - 1 - bit))
            before = rank[block, jnp.minimum(further, rank.shape[1]) - 1]
            is_before = (further <= rank.shape[1]) & (before <= number)
            return jnp.where(is_before, further, piece)

        # What a loop carries XLA computes once; written out, it would compute the
        # beginning anew for all that comes of it.
        bits = rank.shape[1].bit_length()
        piece = jax.lax.fori_loop(0, bits, go_on, jnp.zeros_like(number))
        piece = jnp.minimum(piece, rank.shape[1] - 1)
        word = words[block, piece]
        number -= rank[block, piece] - _count_bits(word)  # in the piece
        found = (block * rank.shape[1] + piece) * length + _bit(word, number)
        return jnp.where(numbers < ends[-1], found, count)

    return ends[-1], positions


def _bit(word: jax.Array, number: jax.Array) -> jax.Array:
    """The place of a word's bit that is its `number`-th of those set, from 0."""

    def go_on(step: jax.Array, carry: tuple) -> tuple[jax.Array, jax.Array]:
        place, number = carry
        width = jnp.uint32(16) >> step.astype("uint32")
        low = (word >> place) & ((jnp.uint32(1) << width) - 1)
        before = _count_bits(low)
        is_further = before <= number
        number = jnp.where(is_further, number - before, number)
        return jnp.where(is_further, place + width, place), number

    place, _ = jax.lax.fori_loop(0, 5, go_on, (jnp.zeros_like(word), number))
    return place.astype("int32")


def _count_bits(words: jax.Array) -> jax.Array:
    return jax.lax.population_count(words).astype("int32")


def _once_if(predicate: Any, function: Callable[..., tuple], values: tuple) -> tuple:
    """`function` of the values, or the values, as a loop of at most one round.

    XLA updates in place what a loop carries, but copies what a condition leaves alone.
    """
    return jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(carry[0]), *function(*carry[1:])),
        (jnp.asarray(predicate), *values),
    )[1:]


# The rest


def check_distribution(variables: Sequence[Any]) -> None:
    """Keras distributes programs that run in step."""


def apply(
    optimizer: keras.Optimizer,
    grads: list,
    variables: list | None,
    written: list[keras.Variable],
) -> None:
    """`optimizer.apply`, or by way of `stateless_apply`.

    `LossScaleOptimizer.apply` assigns variables in a branch, which JAX forbids;
    its `stateless_apply` does not.
    """
    with _keras.variables_added(optimizer, written):
        if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer.apply(grads, variables)
            return
        weights = _keras.weights(optimizer)
        if variables is not None:
            by_id = {id(v): g for v, g in zip(variables, grads, strict=True)}
            grads = [by_id.get(id(v)) for v in weights]
        state = optimizer.variables
        new_weights, new_state = optimizer.stateless_apply(
            [v.value for v in state], grads, [v.value for v in weights]
        )
        pairs = zip(weights + state, new_weights + new_state, strict=True)
    for variable, value in pairs:
        variable.assign(value)


def is_recording() -> bool:
    is_tracing = isinstance(jnp.zeros(()), jax.core.Tracer)
    return is_tracing or _keras.in_stateless_scope()


def store_state(model: keras.Model) -> None:
    model.jax_state_sync()


def outside_graph() -> contextlib.AbstractContextManager:
    """Any: optimizers are built where nothing is traced."""
    return contextlib.nullcontext()


def keeping_random_state() -> contextlib.AbstractContextManager:
    """Any: Keras draws from NumPy's generator, and only to shuffle."""
    return contextlib.nullcontext()

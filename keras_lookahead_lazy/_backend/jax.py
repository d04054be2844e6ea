"""JAX: dense gradients, fixed shapes, and state that flows through functions."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.experimental.sparse import JAXSparse
from keras import ops

from keras_lookahead_lazy import _keras
from keras_lookahead_lazy._backend import (
    FEW_ROWS,
    OTHER_PARTS,
    MovedTable,
    RowGradient,
    Rows,
    jax_gradient,
)

VARIABLES_HOLD_STATE = False
INTEGERS = "int32"
# A step works on rows if the table has at least this many times as many rows as the
# step has lookups. Below that, XLA's fused masked update is faster (measured).
ROWS_PER_LOOK_UP = 8
# If a table is divided between devices, each device needs the rows that all devices
# look up. They are read, and processed by a step, in chunks of these sizes.
LOOK_UPS_PER_READ = 2**19
LOOK_UPS_PER_ROUND = 2**16
# A sync works on chunks of this many rows, which bounds its temporary memory.
ROWS_PER_ROUND = 2048
# If more than one in this many rows has moved, or if the table is small, a sync works
# on the whole table.
PART_OF_TABLE = 8
# The search for rows that moved counts in so many blocks, and packs so many bits.
BLOCKS, WORD = 2**12, 32


# Lookups and their gradients


def look_up(table: keras.Variable, ids: Any) -> jax.Array:
    ids, value = ops.convert_to_tensor(ids, sparse=False), _keras.stored_value(table)
    reads = min([math.ceil(ids.size / LOOK_UPS_PER_READ), *ids.shape[:1]])
    if reads <= 1:
        return jax_gradient.look_up(value, ids)
    parts = jnp.array_split(ids, reads)
    return jnp.concatenate([jax_gradient.look_up(value, part) for part in parts])


def takes_rows(gradient: Any) -> bool:
    return False


def row_gradient(gradient: Any, table: keras.Variable) -> RowGradient | str:
    look_ups = jax_gradient.look_ups(gradient)
    count = sum(ids.size for ids, _ in look_ups)
    rows, *row_shape = table.shape
    if not look_ups:
        return OTHER_PARTS
    if not count or rows < ROWS_PER_LOOK_UP * count:
        return FEW_ROWS
    ids = jnp.concatenate([ids.ravel() for ids, _ in look_ups])
    ids = jnp.where(ids < 0, ids + rows, ids)
    ids = jnp.where(ids < 0, rows, ids)  # too negative: not a row
    values = [values.reshape(-1, *row_shape) for _, values in look_ups]
    return _sum_duplicates(ids, jnp.concatenate(values), rows)


def _sum_duplicates(ids: jax.Array, values: jax.Array, rows: int) -> RowGradient:
    """Sum the gradients of repeated ids.

    The ids are distinct and in ascending order, padded to a fixed length with an id
    past the end of the table.
    """
    count = len(ids)
    ids, order = jax.lax.sort((ids, jnp.arange(count)), num_keys=1)
    is_new = jnp.concatenate([jnp.zeros(1, bool), ids[1:] != ids[:-1]])
    position = jnp.cumsum(is_new)
    size, length = min(count, LOOK_UPS_PER_ROUND), _whole_rounds(count)
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


def fixed_length(indices: jax.Array) -> int:
    return len(indices)


def may_join(gradient: Any, table: keras.Variable) -> bool:
    is_by_rows = isinstance(gradient, RowGradient)
    return len(gradient.indices if is_by_rows else gradient) <= LOOK_UPS_PER_ROUND


def rows_to_join(gradient: Any, table: keras.Variable) -> tuple[Any, jax.Array]:
    if isinstance(gradient, RowGradient):
        return gradient.indices, gradient.by_row()
    return None, gradient


def sampled(gradient: jax.Array) -> jax.Array:
    # XLA fuses a maximum into one pass over the gradient, but not `any(... != 0)`.
    return jnp.max(jnp.abs(gradient), axis=tuple(range(1, gradient.ndim))) != 0


def step_in_rounds(
    gradient: Any, variables: Sequence[keras.Variable], step: Callable
) -> None:
    """Run the step in a loop that carries the values of the variables."""
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
    """Return all rows, and which of them were sampled.

    In a compiled program, the number of rows cannot depend on how many were sampled.
    XLA fuses the masked update into the pass that the inner optimizer makes anyway.
    """
    return Rows(None, gradient, sampled(gradient)), [v.value for v in variables]


def mark_idle(indices: jax.Array, gradient: jax.Array) -> Rows:
    return Rows(indices, gradient, sampled(gradient))


def read_rows(variable: keras.Variable, indices: Any) -> jax.Array:
    value = variable.value
    return value if indices is None else value.at[indices].get(mode="clip")


def write_rows(
    variables: Sequence[keras.Variable], indices: Any, values: Sequence[jax.Array]
) -> None:
    """Write the rows of all variables before any of them is used again.

    Otherwise, the TPU compiler could schedule a sync between two of the writes, and
    keep the rows for the second one in memory.
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


def write_list(variable: keras.Variable, count: Any, values: jax.Array) -> int:
    ids = values[: len(variable.value)].astype(variable.dtype)
    variable.assign(jax.lax.dynamic_update_slice(variable.value, ids, (count,)))
    return len(values)


def listed_rows(
    variable: keras.Variable, ids: keras.Variable, count: Any, size: int
) -> RowGradient:
    rows = len(variable.value)
    listed = jnp.where(jnp.arange(size) < count, ids.value[:size], rows)
    listed = jnp.sort(listed)
    is_new = jnp.concatenate([jnp.zeros(1, bool), listed[1:] != listed[:-1]])
    length = _whole_rounds(size)
    indices = jnp.full(length, rows, listed.dtype)
    indices = indices.at[jnp.cumsum(is_new)].set(listed, indices_are_sorted=True)
    values = variable.value.at[indices].get(mode="fill", fill_value=0)
    return RowGradient(values, indices, None)


def clear_rows(variable: keras.Variable, rows: RowGradient) -> None:
    """Clear rows after they were read. Otherwise XLA would copy the whole first."""
    indices = jnp.where(_is_known(rows.sums), rows.indices, len(variable.value))
    write_rows([variable], indices, [jnp.zeros_like(rows.sums)])


def _is_known(values: jax.Array) -> jax.Array:
    """Return true in a way that XLA cannot simplify, and that depends on `values`."""
    # Not `ravel`, which would gather what is divided between devices by columns.
    first = values[(slice(1),) * values.ndim].astype("float32").sum()
    return (first > 0) | (first <= 0) | (first != first)


def _whole_rounds(count: int) -> int:
    """Round a count up to a whole number of rounds, if there is more than one."""
    size = min(count, LOOK_UPS_PER_ROUND)
    return size * math.ceil(count / size)


def split(joined: jax.Array, parts: Sequence[jax.Array]) -> list[jax.Array]:
    ends = itertools.accumulate(len(part) for part in parts)
    return jnp.split(joined, list(ends)[:-1])


def placement(variable: keras.Variable) -> Any:
    layout = variable.value.sharding
    is_divided = not layout.is_fully_replicated
    return id(variable) if is_divided else layout


def row_layout(variable: keras.Variable) -> jax.sharding.Sharding | None:
    sharding = variable.value.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    by_row = jax.sharding.PartitionSpec(*sharding.spec[:1])
    return jax.sharding.NamedSharding(sharding.mesh, by_row)


# Counting and branching


def num_replicas() -> int:
    """Return one, because JAX divides arrays, not the program."""
    return 1


def read_count(variable: Any) -> jax.Array:
    return variable.value if isinstance(variable, keras.Variable) else variable


def write_count(variable: keras.Variable, count: jax.Array) -> None:
    variable.assign(count)


def once_known(gradients: Sequence[Any], predicate: Any) -> Any:
    if not isinstance(predicate, jax.core.Tracer):
        return predicate
    for gradient in gradients:
        # The dense gradient of a table that is updated by rows is never computed.
        noted = [values for _, values in jax_gradient.look_ups(gradient)]
        for part in noted or jax.tree.leaves(gradient):
            predicate &= _is_known(part)
    return predicate


def run_if(
    predicate: Any, function: Callable[[], None], variables: Sequence[keras.Variable]
) -> None:
    """Run `function` in a loop of at most one round that carries the variables.

    XLA updates values that a loop carries in place, but copies values that a
    conditional leaves unchanged.
    """
    if not isinstance(predicate, jax.core.Tracer):
        if predicate:
            function()
        return

    def run(*values: jax.Array) -> tuple:
        with _keras.nested_scope(zip(variables, values, strict=True)) as scope:
            function()
        return tuple(scope.get_current_value(variable) for variable in variables)

    values = _once_if(predicate, run, tuple(variable.value for variable in variables))
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def update(group: tuple, function: Callable[..., tuple]) -> None:
    values = function(*(variable.value for variable in group))
    for i, (variable, value) in enumerate(zip(group, values, strict=True)):
        is_used = any(value is other for other in values[:i])
        variable.assign(_apart(value) if is_used else value)


def back_up(pairs: Sequence[tuple], predicate: Any) -> None:
    """Assign both variables a value that XLA cannot identify as `fast`.

    If `fast` were only read here, XLA would copy it in every step, to protect it from
    the update that overwrites it in place.
    """
    for pair in pairs:
        update(pair, lambda fast, slow: (jnp.where(predicate, fast, slow),) * 2)


def sync(pairs: Sequence[tuple], sync: Callable) -> None:
    for pair in pairs:
        update(pair, sync)


def _apart(value: jax.Array) -> jax.Array:
    """Copy what a variable has already, because JAX donates each buffer once."""
    return value if isinstance(value, jax.core.Tracer) else jnp.copy(value)


def update_rows(tables: Sequence[MovedTable]) -> None:
    """Update small tables as a whole, and search the rows of large ones together.

    One search for many tables is compiled faster than a search for each.
    """
    large = []
    for table in tables:
        if len(table.last_update.value) >= PART_OF_TABLE * ROWS_PER_ROUND:
            large.append(table)
            continue
        moved = table.is_moved(table.last_update.value)
        old = [variable.value for variable in table.variables]
        _assign([table], [_updated(table, moved, old)])
    if large:
        _update_large(large)


def _updated(table: MovedTable, moved: jax.Array, old: Sequence[jax.Array]) -> tuple:
    """Return the values of a table's variables, with new ones in rows that moved."""
    column = moved.reshape(-1, *[1] * (old[0].ndim - 1))
    pairs = zip(table.function(*old), old, strict=True)
    return tuple(jnp.where(column, *pair) for pair in pairs)


def _update_large(tables: Sequence[MovedTable]) -> None:
    moved = [table.is_moved(table.last_update.value) for table in tables]
    lengths = [len(part) for part in moved]
    total, moved_rows = _numbered(_end_to_end(moved))
    is_many = total > sum(lengths) // PART_OF_TABLE

    def update_all(*values: tuple) -> tuple:
        return tuple(map(_updated, tables, moved, values))

    def update_next(carry: tuple) -> tuple:
        start, values = carry
        rows = moved_rows(start, ROWS_PER_ROUND)
        if len(tables) == 1:
            new = [_update_those(tables[0], rows, *values[0])]
            return start + ROWS_PER_ROUND, tuple(new)
        ends = itertools.accumulate(lengths)
        new = []
        for table, end, length, old in zip(tables, ends, lengths, values, strict=True):
            is_here = (rows >= end - length) & (rows < end)
            own = jnp.where(is_here, rows - (end - length), length)
            update_own = functools.partial(_update_those, table, own)
            new.append(_once_if(jnp.any(is_here), update_own, old))
        return start + ROWS_PER_ROUND, tuple(new)

    values = tuple(tuple(v.value for v in table.variables) for table in tables)
    start = jnp.where(is_many, total, 0), values
    _, values = jax.lax.while_loop(lambda carry: carry[0] < total, update_next, start)
    _assign(tables, _once_if(is_many, update_all, values))


def _update_those(table: MovedTable, rows: jax.Array, *values: jax.Array) -> tuple:
    """Return the values of a table's variables, with new ones in some rows."""
    new = table.function(*(value.at[rows].get(mode="clip") for value in values))
    pairs = zip(values, new, strict=True)
    return tuple(value.at[rows].set(those, mode="drop") for value, those in pairs)


def _assign(tables: Sequence[MovedTable], values: Sequence[Sequence]) -> None:
    for table, those in zip(tables, values, strict=True):
        for variable, value in zip(table.variables, those, strict=True):
            variable.assign(value)


def _end_to_end(vectors: Sequence[jax.Array]) -> jax.Array:
    """Join vectors of bools, padded so that `_numbered` can divide them."""
    if len(vectors) == 1:
        return vectors[0]
    padding = -sum(map(len, vectors)) % (BLOCKS * WORD)
    return jnp.concatenate([*vectors, jnp.zeros(padding, bool)])


def _numbered(chosen: jax.Array) -> tuple[jax.Array, Callable]:
    """Return how many entries are `True`, and a function that finds them by number.

    This counts in blocks (a power of two of them), so that no device needs the whole
    vector if its entries are divided between devices. It packs short pieces into one
    word each, so that it needs no memory of the vector's size.
    """
    count = len(chosen)
    blocks = math.gcd(count, BLOCKS)
    length = next(n for n in range(WORD, 0, -1) if count // blocks % n == 0)
    pieces = chosen.reshape(blocks, -1, length)
    bits = jnp.uint32(1) << jnp.arange(length, dtype="uint32")
    words = jnp.sum(jnp.where(pieces, bits, 0), axis=2, dtype="uint32")
    rank = jnp.cumsum(_count_bits(words), axis=1)
    ends = jnp.cumsum(rank[:, -1])

    def positions(start: jax.Array, size: int) -> jax.Array:
        """Return the positions of `size` entries from number `start` on.

        If there are fewer, the other positions are past the end.
        """
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

        # XLA computes a value that a loop carries once. Unrolled, it would compute the
        # first steps again for every use.
        bits = rank.shape[1].bit_length()
        piece = jax.lax.fori_loop(0, bits, go_on, jnp.zeros_like(number))
        piece = jnp.minimum(piece, rank.shape[1] - 1)
        word = words[block, piece]
        number -= rank[block, piece] - _count_bits(word)  # in the piece
        found = (block * rank.shape[1] + piece) * length + _bit(word, number)
        return jnp.where(numbers < ends[-1], found, count)

    return ends[-1], positions


def _bit(word: jax.Array, number: jax.Array) -> jax.Array:
    """Return the position of a word's `number`-th set bit, counted from 0."""

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
    """Return `function` of the values if `predicate` is true, else the values.

    This is a loop of at most one round. XLA updates values that a loop carries in
    place, but copies values that a conditional leaves unchanged.
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
    with _keras.variables_added(optimizer, written):
        optimizer.apply(grads, variables)


def is_recording() -> bool:
    is_tracing = isinstance(jnp.zeros(()), jax.core.Tracer)
    return is_tracing or _keras.in_stateless_scope()


def store_state(model: keras.Model) -> None:
    model.jax_state_sync()


def outside_graph() -> contextlib.AbstractContextManager:
    """Do nothing on JAX, where optimizers are built outside of tracing."""
    return contextlib.nullcontext()


def keeping_random_state() -> contextlib.AbstractContextManager:
    """Do nothing on JAX, where Keras uses NumPy's generator, and only to shuffle."""
    return contextlib.nullcontext()

"""JAX: dense gradients, fixed shapes, and state that flows through functions."""

from __future__ import annotations

import contextlib
import itertools
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
    ONLY_ON_TORCH,
    OTHER_PARTS,
    RowGradient,
    Rows,
    jax_gradient,
    jax_rows,
)
from keras_lookahead_lazy._backend.jax_exchange import numbered
from keras_lookahead_lazy._backend.jax_placement import (
    OwnRows,
    Placement,
    on_owners,
    own_numbers,
    sum_on_owners,
)
from keras_lookahead_lazy._backend.jax_placement import layout_like as layout_like
from keras_lookahead_lazy._backend.jax_placement import placement as placement
from keras_lookahead_lazy._backend.jax_rows import step_in_rounds as step_in_rounds
from keras_lookahead_lazy._backend.jax_sync import once_if
from keras_lookahead_lazy._backend.jax_sync import update_rows as update_rows

VARIABLES_HOLD_STATE = False
INTEGERS = "int32"
# A step works on rows if the table has at least this many times as many rows as the
# step has lookups. Below that, XLA's fused masked update is faster (measured).
ROWS_PER_LOOK_UP = 8
# Tables of which a step works on more rows than this are not joined, because joining
# copies rows. (Measured: a DLRM with 26 tables trains in half the time.)
ROWS_TO_JOIN = 128


# Lookups and their gradients


def look_up(table: keras.Variable, ids: Any, dtype: str, place: Placement) -> jax.Array:
    ids, value = ops.convert_to_tensor(ids, sparse=False), _keras.stored_value(table)
    return jax_gradient.look_up(value, ids, dtype, place)


def takes_rows(gradient: Any) -> bool:
    return False


def row_gradient(
    gradient: Any, table: keras.Variable, place: Placement, is_listed: bool
) -> RowGradient | str:
    look_ups = jax_gradient.look_ups(gradient)
    count = sum(ids.size for ids, _ in look_ups)
    rows, *row_shape = table.shape
    if not look_ups:
        return OTHER_PARTS
    if not count or rows < ROWS_PER_LOOK_UP * count:
        return FEW_ROWS
    if not is_listed and all(place.exchanges(ids) for ids, _ in look_ups):
        return sum_on_owners(look_ups, table.shape, table.dtype, place)
    ids = jnp.concatenate([ids.ravel() for ids, _ in look_ups])
    ids = jnp.where(ids < 0, ids + rows, ids)
    ids = jnp.where(ids < 0, rows, ids)  # too negative: not a row
    values = [values.reshape(-1, *row_shape) for _, values in look_ups]
    return jax_rows.sum_duplicates(ids, jnp.concatenate(values), rows, table.dtype)


def fixed_length(indices: jax.Array) -> int:
    return len(indices)


def may_join(gradient: Any, table: keras.Variable) -> bool:
    is_by_rows = isinstance(gradient, RowGradient)
    return len(gradient.indices if is_by_rows else gradient) <= ROWS_TO_JOIN


def rows_to_join(gradient: Any, table: keras.Variable) -> tuple[Any, jax.Array]:
    if isinstance(gradient, RowGradient):
        return gradient.indices, gradient.by_row()
    return None, gradient


def sampled(gradient: jax.Array) -> jax.Array:
    # XLA fuses a maximum into one pass over the gradient, but not `any(... != 0)`.
    return jnp.max(jnp.abs(gradient), axis=tuple(range(1, gradient.ndim))) != 0


def for_keras(gradient: Any) -> jax.Array:
    return gradient.todense() if isinstance(gradient, JAXSparse) else gradient


# A dense gradient is a sum already.
sum_duplicates = for_keras


def on_values(function: Callable, gradients: list) -> list:
    return function(gradients)


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
    variable: keras.Variable,
    ids: keras.Variable,
    count: Any,
    size: int,
    place: Placement,
) -> RowGradient:
    def read_own(part: jax.Array, listed: jax.Array) -> RowGradient:
        rows = len(part)
        _, _, indices = numbered(own_numbers(listed, place, rows), rows)
        values = part.at[indices].get(mode="fill", fill_value=0)
        return RowGradient(values, indices, None)

    past_end = len(variable.value)
    listed = jnp.where(jnp.arange(size) < count, ids.value[:size], past_end)
    found = on_owners(read_own, place, (variable.value,), listed)
    return found if place.row_axes is None else OwnRows(*found)


def clear_rows(variable: keras.Variable, rows: RowGradient, place: Placement) -> None:
    """Clear rows after they were read. Otherwise XLA would copy the whole first."""
    indices = jnp.where(_is_known(rows.sums), rows.indices, len(variable.value))

    def clear_own(part: jax.Array, own: jax.Array) -> jax.Array:
        return part.at[own].set(0, mode="drop", indices_are_sorted=True)

    variable.assign(on_owners(clear_own, place, (variable.value, indices)))


def _is_known(values: jax.Array) -> jax.Array:
    """Return true in a way that XLA cannot simplify, and that depends on `values`."""
    # Not `ravel`, which would gather what is divided between devices by columns.
    first = values[(slice(1),) * values.ndim].astype("float32").sum()
    return (first > 0) | (first <= 0) | (first != first)


def split(joined: jax.Array, parts: Sequence[jax.Array]) -> list[jax.Array]:
    ends = itertools.accumulate(len(part) for part in parts)
    return jnp.split(joined, list(ends)[:-1])


# Counting and branching


def num_replicas() -> int:
    """Return one, because JAX divides arrays, not the program."""
    return 1


def on_every_replica(predicate: Any) -> Any:
    return predicate


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

    values = once_if(predicate, run, tuple(variable.value for variable in variables))
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


# The rest


def check_processes() -> None:
    raise ValueError(ONLY_ON_TORCH.format("JAX"))


def replicate(*_: Any) -> None:
    check_processes()


def check_distribution(variables: Sequence[Any]) -> None:
    """Keras distributes programs that run in step."""


def apply(
    optimizer: keras.Optimizer,
    grads: list,
    variables: list | None,
    assigned: list[keras.Variable],
) -> None:
    with _keras.variables_added(optimizer, assigned):
        optimizer.apply(grads, variables)


def uncompiled(function: Callable, *arguments: Any) -> Any:
    return function(*arguments)


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

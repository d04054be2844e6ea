"""torch: tensors changed in place, and counters on the host."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import keras
import torch

from keras_lookahead_lazy import _backend, _keras
from keras_lookahead_lazy._backend import Rows
from keras_lookahead_lazy._backend.torch_ddp import check_processes as check_processes
from keras_lookahead_lazy._backend.torch_ddp import replicate as replicate
from keras_lookahead_lazy._backend.torch_gradient import LookUp, RowGradient

VARIABLES_HOLD_STATE = True
INTEGERS = "int32"
# Before torch 2.7, `torch.compile` and `torch.export` look the same from inside.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
# A sync on the host works on chunks of this many rows, which fit into the cache.
ROWS_PER_ROUND = 4096


# Lookups and their gradients


def look_up(table: keras.Variable, ids: Any, dtype: str, place: None) -> torch.Tensor:
    ids = (ids if torch.is_tensor(ids) else keras.ops.convert_to_tensor(ids)).long()
    ids = torch.where(ids < 0, ids + table.shape[0], ids)
    value = _keras.stored_value(table)
    has_gradient = torch.is_grad_enabled() and value.requires_grad
    if (
        not has_gradient
        or _is_exporting()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    ):  # these transforms support dense gradients only
        rows = torch.nn.functional.embedding(ids, value)
    else:
        rows = uncompiled(LookUp.apply, value, ids)
    return keras.ops.cast(rows, dtype)


def takes_rows(gradient: Any) -> bool:
    return False


def row_gradient(
    gradient: torch.Tensor, table: keras.Variable, place: Any, is_listed: bool
) -> _backend.RowGradient | str:
    """Return row gradients, on an accelerator with fixed shapes.

    An accelerator would have to stop so that the host could learn the number of
    distinct rows.
    """
    if isinstance(gradient, RowGradient) and gradient.rows is not None:
        ids, values = gradient.rows
    elif gradient.is_sparse and gradient.sparse_dim() == 1:
        ids, values = gradient._indices()[0], gradient._values()
    else:
        return _backend.OTHER_PARTS
    if _is_on_host(ids):
        look_ups = torch.sparse_coo_tensor(
            ids[None], values, gradient.shape, check_invariants=False
        )
        rows = look_ups.coalesce()
        return _backend.RowGradient(rows.values(), rows.indices()[0], None)
    indices, order = torch.sort(ids, stable=True)
    position = _positions(indices)
    sums = torch.zeros_like(values).index_add_(0, position, values[order])
    return _backend.RowGradient(sums, indices, position)


def fixed_length(indices: torch.Tensor) -> None:
    """Return `None`: on a CPU there are as many rows as differ."""


def may_join(gradient: Any, table: keras.Variable) -> bool:
    return isinstance(gradient, _backend.RowGradient)


def rows_to_join(
    gradient: _backend.RowGradient, table: keras.Variable
) -> tuple[torch.Tensor, torch.Tensor]:
    return gradient.indices, gradient.by_row()


def sampled(gradient: torch.Tensor) -> torch.Tensor | None:
    # Idle rows are rare. If no row even begins with a zero, there is none.
    if _is_on_host(gradient) and gradient.flatten(1)[:, 0].all():
        return None
    return _has_entries(gradient)


def step_in_rounds(
    gradient: Any, variables: Sequence, place: Any, step: Callable
) -> None:
    step(gradient, variables)


def for_keras(gradient: torch.Tensor) -> torch.Tensor:
    if isinstance(gradient, RowGradient):
        return gradient.whole()
    return gradient.to_dense() if gradient.is_sparse else gradient


# A dense gradient is a sum already.
sum_duplicates = for_keras


def on_values(function: Callable, gradients: list) -> list:
    return function(gradients)


# Rows of a table


def replica(variable: keras.Variable, like: Any) -> keras.Variable:
    """Return the variable itself, because each process has one replica."""
    return variable


def find_rows(
    gradient: torch.Tensor, variables: Sequence[keras.Variable], every_row: bool
) -> tuple[Rows, list]:
    """Return the sampled rows or, on an accelerator, all rows and a mask.

    The host would have to know the number of sampled rows, which stalls an accelerator.
    """
    has_entry = _has_entries(gradient)
    if every_row or not _is_on_host(gradient):
        rows = Rows(None, gradient, has_entry)
    else:
        indices = has_entry.nonzero()[:, 0]
        rows = Rows(indices, gradient.index_select(0, indices), None)
    return rows, [read_rows(variable, rows.indices) for variable in variables]


def mark_idle(indices: torch.Tensor, gradient: torch.Tensor) -> Rows:
    if not _is_on_host(gradient):
        return Rows(indices, gradient, _has_entries(gradient))
    has_entry = sampled(gradient)
    if has_entry is not None:
        indices, gradient = indices[has_entry], gradient[has_entry]
    return Rows(indices, gradient, None)


def _has_entries(gradient: torch.Tensor) -> torch.Tensor:
    """Return which rows are not all zero, without a temporary tensor of their size."""
    rows = gradient.flatten(1)
    return (rows.amax(1) != 0) | (rows.amin(1) != 0)


def _is_on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def read_rows(variable: keras.Variable, indices: Any) -> torch.Tensor:
    value = variable.value.detach()
    return value.clone() if indices is None else value.index_select(0, indices)


@torch.no_grad()
def write_rows(
    variables: Sequence[keras.Variable], indices: Any, values: Sequence[torch.Tensor]
) -> None:
    for variable, value in zip(variables, values, strict=True):
        if indices is None:
            variable.assign(value)
        else:
            variable.value.index_copy_(0, indices, value)


@torch.no_grad()
def write_list(variable: keras.Variable, count: int, values: torch.Tensor) -> int:
    room = variable.value[count : count + len(values)]
    room.copy_(values[: len(room)])
    return len(values)


def listed_rows(
    variable: keras.Variable,
    ids: keras.Variable,
    count: int,
    size: int,
    place: Any,
) -> _backend.RowGradient:
    listed = ids.value[:count].long()
    if _is_on_host(listed):
        listed = listed.unique()
        return _backend.RowGradient(read_rows(variable, listed), listed, None)
    indices = listed.sort().values
    position = _positions(indices)
    values = read_rows(variable, indices)
    sums = torch.zeros_like(values).index_copy_(0, position, values)
    return _backend.RowGradient(sums, indices, position)


def clear_rows(
    variable: keras.Variable, rows: _backend.RowGradient, place: Any
) -> None:
    write_rows([variable], rows.indices, [torch.zeros_like(rows.by_row())])


def _positions(indices: torch.Tensor) -> torch.Tensor:
    """Return the position of each of some sorted numbers among the distinct ones."""
    position = torch.zeros_like(indices)
    torch.cumsum(indices[1:] != indices[:-1], 0, out=position[1:])
    return position


def split(joined: torch.Tensor, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list(joined.split([len(part) for part in parts]))


def placement(variable: keras.Variable) -> Any:
    return variable.value.device


def layout_like(variable: keras.Variable, axes: int) -> None:
    """Return `None`: Keras uses layouts only on JAX."""


# Counting on the host and branching in Python


def num_replicas() -> int:
    """Return one, because each process has its own replica."""
    return 1


def on_every_replica(predicate: Any) -> Any:
    return predicate


def read_count(variable: Any) -> int:
    """Return the value of a counter without reading it from the device in every step.

    torch counts the changes of a tensor. While this count stays the same, the last
    value that was read is valid.
    """
    if not isinstance(variable, keras.Variable):
        return int(variable)
    tensor = variable.value
    version, count = getattr(variable, "host_count", (None, 0))
    if version != (id(tensor), tensor._version):
        count = (int(tensor) + 2**31) % 2**32 - 2**31
        variable.host_count = ((id(tensor), tensor._version), count)
    return count


def write_count(variable: keras.Variable, count: int) -> None:
    variable.assign(count)
    tensor = variable.value
    variable.host_count = ((id(tensor), tensor._version), count)


def once_known(gradients: Sequence, predicate: bool) -> bool:
    return predicate


def run_if(predicate: Any, function: Callable[[], None], variables: Sequence) -> None:
    if predicate:
        function()


def update(group: tuple, function: Callable[..., tuple]) -> None:
    # No copies of the old values: all new ones are there before the first is written.
    values = function(*(variable.value.detach() for variable in group))
    write_rows(group, None, values)


@torch.no_grad()
def back_up(pairs: Sequence[tuple], predicate: Any) -> None:
    if pairs:
        fast, slow = zip(*pairs, strict=True)
        torch._foreach_copy_([v.value for v in slow], [v.value for v in fast])


@torch.no_grad()
def sync(pairs: Sequence[tuple], sync: Any) -> None:
    """Sync in place, with all weights in one call."""
    if pairs:
        fast, slow = zip(*[(f.value, s.value) for f, s in pairs], strict=True)
        torch._foreach_lerp_(slow, fast, sync.alpha)
        torch._foreach_copy_(fast, slow)


@torch.no_grad()
def update_rows(tables: Sequence[_backend.MovedTable]) -> None:
    for variables, last_update, is_moved, function, _ in tables:
        moved = is_moved(last_update.value)
        if _is_on_host(moved):
            for rows in moved.nonzero()[:, 0].split(ROWS_PER_ROUND):
                values = function(*(read_rows(v, rows) for v in variables))
                write_rows(variables, rows, values)
            continue
        column = moved.reshape(-1, *[1] * (variables[0].value.ndim - 1))
        old = [variable.value for variable in variables]
        new = [torch.where(column, *p) for p in zip(function(*old), old, strict=True)]
        write_rows(variables, None, new)


# The rest


@torch.no_grad()
def check_distribution(variables: Sequence[Any]) -> None:
    """Accept everything: gradients are summed before an optimizer gets them."""


def apply(
    optimizer: keras.Optimizer,
    grads: list,
    variables: list | None,
    assigned: list[keras.Variable],
) -> None:
    """Apply. If torch's optimizers skip an update, they write no variable."""
    is_own = type(optimizer).apply is keras.Optimizer.apply
    if _compiles.get() and is_own and not _keras.is_taken_over(optimizer):
        _compiled_apply()(optimizer, grads, variables)
    else:
        optimizer.apply(grads, variables)


# Whether `uncompiled` was called in a function that torch.compile traces.
_compiles: ContextVar[bool] = ContextVar("compiles", default=False)


@functools.cache
def _compiled_apply() -> Callable[..., None]:
    """Return a function that lets torch.compile trace the step of an optimizer."""
    return torch.compile(lambda optimizer, *arguments: optimizer.apply(*arguments))


def uncompiled(function: Callable, *arguments: Any) -> Any:
    return _uncompiled(torch.compiler.is_compiling(), function, *arguments)


@torch.compiler.disable
def _uncompiled(compiles: bool, function: Callable, *arguments: Any) -> Any:
    token = _compiles.set(compiles or _compiles.get())
    try:
        return function(*arguments)
    finally:
        _compiles.reset(token)


def is_recording() -> bool:
    return torch.compiler.is_compiling()


def store_state(model: keras.Model) -> None:
    """Do nothing, because variables hold the weights during training."""


def outside_graph() -> contextlib.AbstractContextManager:
    """Do nothing on torch, where optimizers are built outside of tracing."""
    return contextlib.nullcontext()


def keeping_random_state() -> contextlib.AbstractContextManager:
    """Fork the generator: each pass of a `DataLoader` draws from the global one."""
    return torch.random.fork_rng(devices=[])

"""torch: tensors changed in place, Keras's `_foreach` updates, counters on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import torch
from keras.src.backend.torch.optimizers.torch_parallel_optimizer import (
    TorchParallelOptimizer,
)

from keras_lookahead_lazy._backend.torch_row_gradient import LookUp, RowGradient
from keras_lookahead_lazy._rows import Rows

Groups = list[tuple[Any, ...]]

# Whether variables hold the state while `fit` runs.
VARIABLES_HOLD_STATE = True
# Whether an inner optimizer computes every update and then chooses old or new values.
SELECTS_UPDATES = False


# Which rows were sampled


def is_dense(ids: Any) -> bool:
    return True


def look_up(table: keras.Variable, ids: Any) -> torch.Tensor:
    """Rows of a table, whose gradient is known by rows."""
    ids = keras.ops.convert_to_tensor(ids).long()
    ids = torch.where(ids < 0, ids + table.shape[0], ids)
    if torch.compiler.is_compiling():  # which knows dense gradients only
        return torch.nn.functional.embedding(ids, table.value)
    return LookUp.apply(table.value, ids)


def row_gradient(gradient: torch.Tensor, variable: Any) -> tuple | None:
    """A gradient that consists of look-ups, in tensors of fixed shapes.

    Their number is known to the host, the number of different rows is not: an
    accelerator would have to stop for it.

    Returns:
        Sums over duplicates in as many rows as there are look-ups, of which the
        first are used; the rows' ids, sorted; for each of them the position of its
        sum. `None` for a dense gradient.
    """
    if isinstance(gradient, RowGradient) and gradient.rows is not None:
        ids, values = gradient.rows
    elif gradient.is_sparse and gradient.sparse_dim() == 1:
        ids, values = gradient._indices()[0], gradient._values()
    else:
        return None
    indices, order = torch.sort(ids, stable=True)
    position = torch.zeros_like(indices)
    torch.cumsum(indices[1:] != indices[:-1], 0, out=position[1:])
    sums = torch.zeros_like(values).index_add_(0, position, values[order])
    return sums, indices, position


def whole(gradient: torch.Tensor) -> torch.Tensor:
    if isinstance(gradient, RowGradient):
        return gradient.whole()
    return gradient.to_dense() if gradient.is_sparse else gradient


def size(indices: torch.Tensor) -> int | None:
    return indices.shape[0]


def find_rows(
    gradient: torch.Tensor, variables: list, every_row: bool, lookups: Any = None
) -> tuple[Rows, list]:
    """The rows of a table that `gradient` touches.

    Of a dense gradient their number would have to come to the host, which stalls an
    accelerator; there, and where a compiler wants fixed shapes, the masked form is
    used.

    Args:
        variables: the table and what is kept for it.
        every_row: whether the step needs the whole table.
        lookups: ids and positions, if `gradient` holds the sums of `row_gradient`.

    Returns:
        The rows, and the values of each of the variables there.
    """
    if lookups is not None:
        indices, position = lookups
        sums = gradient.index_select(0, position)
        rows = Rows(indices, sums, (sums != 0).flatten(1).any(1))
    else:
        sampled = (gradient != 0).flatten(1).any(1)
        on_host = gradient.device.type == "cpu" and not torch.compiler.is_compiling()
        if every_row or not on_host:
            rows = Rows(None, gradient, sampled)
        else:
            indices = sampled.nonzero()[:, 0]
            rows = Rows(indices, gradient.index_select(0, indices), None)
    return rows, [read_rows(variable, None, rows.indices) for variable in variables]


def sum_duplicates(gradient: torch.Tensor) -> torch.Tensor:
    """Dense gradients are sums already."""
    return whole(gradient)


# Reading and writing rows


def read_rows(variable: keras.Variable, like: Any, indices: Any) -> torch.Tensor:
    value = variable.value.detach()
    return value.clone() if indices is None else value.index_select(0, indices)


@torch.no_grad()
def write_rows(
    variable: keras.Variable, like: Any, indices: Any, values: torch.Tensor
) -> None:
    if indices is None:
        variable.assign(values)
    else:
        variable.value.index_copy_(0, indices, values)


def row_layout(variable: keras.Variable) -> None:
    """Keras lays variables out on JAX alone."""


# Counting on the host and branching in Python


def read_count(variable: Any) -> int:
    """The value of a counter, without asking the device for it in every step.

    torch numbers the changes of a tensor, so the last value seen holds as long as
    the number does; it is read again after somebody else has written it.
    """
    if not isinstance(variable, keras.Variable):
        return int(variable)
    tensor = variable.value
    version, count = getattr(variable, "host_count", (None, 0))
    if version != (id(tensor), tensor._version):
        count = int(tensor)
        variable.host_count = ((id(tensor), tensor._version), count)
    return count


def write_count(variable: keras.Variable, count: int) -> None:
    variable.assign(count)
    tensor = variable.value
    variable.host_count = ((id(tensor), tensor._version), count)


def update_if(predicate: bool, groups: Groups, function: Callable) -> None:
    """Assign `function` of its values to each group of variables, if `predicate`."""
    if not predicate:
        return
    for group in groups:
        values = [read_rows(variable, None, None) for variable in group]
        for variable, value in zip(group, function(*values), strict=True):
            write_rows(variable, None, None, value)


@torch.no_grad()
def back_up_if(predicate: bool, pairs: Groups) -> None:
    """slow := fast, if `predicate`."""
    if predicate and pairs:
        fast, slow = zip(*pairs, strict=True)
        torch._foreach_copy_([v.value for v in slow], [v.value for v in fast])


@torch.no_grad()
def sync_if(predicate: bool, pairs: Groups, alpha: float) -> None:
    """slow := slow + alpha (fast - slow); fast := slow, if `predicate`."""
    if predicate and pairs:
        fast, slow = zip(*[(f.value, s.value) for f, s in pairs], strict=True)
        torch._foreach_lerp_(slow, fast, alpha)
        torch._foreach_copy_(fast, slow)


@torch.no_grad()
def sync_rows_if(
    predicate: bool,
    group: tuple[Any, Any, Any],
    since: Any,
    alpha: float,
    most: int | None,
) -> None:
    """fast := slow + alpha (fast - slow) in rows moved after `since`, if `predicate`.

    Args:
        group: fast weights, slow weights, the update that moved each row last.
        most: how many rows are expected to have moved at most; `None` for all.
    """
    if not predicate:
        return
    fast, slow, last_update = (variable.value for variable in group)
    moved = last_update > since
    if fast.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = moved.nonzero()[:, 0]
        old, new = slow.index_select(0, rows), fast.index_select(0, rows)
        fast.index_copy_(0, rows, torch.lerp(old, new, alpha))
    else:
        moved = moved.reshape(-1, *[1] * (fast.ndim - 1))
        fast.copy_(torch.where(moved, torch.lerp(slow, fast, alpha), fast))


# What else differs


def take_over_tables(optimizer: keras.Optimizer, is_table: Callable) -> None:
    """Keep tables out of the `_foreach` update, which does not call `update_step`."""
    if not isinstance(optimizer, TorchParallelOptimizer):
        return
    update_all = optimizer._backend_update_step
    # The update that the same optimizer has on other backends.
    update_each = super(TorchParallelOptimizer, optimizer)._backend_update_step

    @torch.no_grad()
    def update(grads: list, variables: list, learning_rate: Any) -> None:
        pairs = list(zip(grads, variables, strict=True))
        tables = [(g, v) for g, v in pairs if is_table(v)]
        rest = [(g, v) for g, v in pairs if not is_table(v)]
        if rest:
            update_all(*map(list, zip(*rest, strict=True)), learning_rate)
            for gradient, variable in tables:
                optimizer.update_step(gradient, variable, learning_rate)
        else:
            update_each(*map(list, zip(*tables, strict=True)), learning_rate)

    optimizer._backend_update_step = update


def is_recording() -> bool:
    """Whether operations are being recorded rather than run."""
    return torch.compiler.is_compiling()


def apply(optimizer: keras.Optimizer, grads: list, variables: list | None) -> None:
    optimizer.apply(grads, variables)


def sync_model(model: keras.Model) -> None:
    """The variables of a model in training hold its weights: nothing to do."""


def outside_graph() -> contextlib.AbstractContextManager:
    """A context in which operations run at once: any, where optimizers are built."""
    return contextlib.nullcontext()

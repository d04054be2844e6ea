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

from keras_lookahead_lazy._rows import Rows

Groups = list[tuple[Any, ...]]

# Whether slots of rows that were not sampled may be behind (see `LazyOptimizer`).
SLOTS_MAY_LAG = True


def all_rows(variable: Any) -> None:
    return None


# Which rows were sampled


def find_rows(
    gradient: torch.Tensor, variables: list, every_row: bool
) -> tuple[Rows, list]:
    """The rows of a table that the dense `gradient` touches.

    On an accelerator their number would have to come to the host, which stalls
    it; there, and where a compiler wants fixed shapes, the masked form is used.

    Args:
        variables: the table and what is kept for it.
        every_row: whether the step needs the whole table.

    Returns:
        The rows, and the values of each of the variables there.
    """
    sampled = (gradient != 0).flatten(1).any(1)
    if every_row or gradient.device.type != "cpu" or torch.compiler.is_compiling():
        rows = Rows(None, gradient, sampled)
    else:
        indices = sampled.nonzero()[:, 0]
        rows = Rows(indices, gradient.index_select(0, indices), None)
    return rows, [read_rows(variable, None, rows.indices) for variable in variables]


def sum_duplicates(gradient: torch.Tensor) -> torch.Tensor:
    """Dense gradients are sums already."""
    return gradient


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


def rows_since(last_update: Any, like: Any, step: int) -> torch.Tensor | None:
    """The rows updated after `step`; `None`, for all, where shapes are fixed."""
    value = last_update.value
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return (value > step).nonzero()[:, 0]


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


def update_if(
    predicate: bool, groups: Groups, function: Callable, moved: Callable = all_rows
) -> None:
    """For each group of variables, assign `function` of their values, if `predicate`.

    `moved` names the rows to read and write, by the group's first variable.
    """
    if not predicate:
        return
    for group in groups:
        indices = moved(group[0])
        values = [read_rows(variable, None, indices) for variable in group]
        for variable, value in zip(group, function(*values), strict=True):
            write_rows(variable, None, indices, value)


@torch.no_grad()
def back_up_first(updates: int, pairs: Groups) -> None:
    """slow := fast, before the first update."""
    if updates == 0 and pairs:
        fast, slow = zip(*pairs, strict=True)
        torch._foreach_copy_([v.value for v in slow], [v.value for v in fast])


@torch.no_grad()
def pull_back_if(
    predicate: bool, pairs: Groups, alpha: float, moved: Callable = all_rows
) -> None:
    """slow := slow + alpha (fast - slow); fast := slow, if `predicate`."""
    if not predicate:
        return
    whole = [(f.value, s.value) for f, s in pairs if moved(f) is None]
    if whole:
        fast, slow = zip(*whole, strict=True)
        torch._foreach_lerp_(slow, fast, alpha)
        torch._foreach_copy_(fast, slow)
    by_rows = [pair for pair in pairs if moved(pair[0]) is not None]

    def pull_back(fast: torch.Tensor, slow: torch.Tensor) -> tuple:
        point = torch.lerp(slow, fast, alpha)
        return point, point

    update_if(True, by_rows, pull_back, moved)


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

"""torch: DistributedDataParallel that exchanges rows of tables, not whole tables.

By itself it sums gradients in buffers that have room for every weight. So all rows of a
table would cross the network in every step.
"""

from __future__ import annotations

from typing import Any

import keras
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


def check_processes() -> None:
    if not distributed.is_initialized():
        raise ValueError(
            "There is no process group. Call torch.distributed.init_process_group(...) "
            "in every process first."
        )


def replicate(
    model: keras.Model, tables: list[keras.Variable], settings: dict[str, Any]
) -> DistributedDataParallel:
    """Return a replica of `model` that leaves the gradients of `tables` to hooks."""
    weights = [table.value for table in tables]
    names = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, weight in module.named_parameters(recurse=False)
        if any(weight is table for table in weights)
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    replica = DistributedDataParallel(model, **settings)
    for weight in weights:
        # As DistributedDataParallel does with the weights that it knows.
        distributed.broadcast(weight.detach(), 0)
        weight.register_hook(_average)
    return replica


def _average(gradient: torch.Tensor) -> torch.Tensor:
    """Return the mean of all ranks' gradients, of which only rows are exchanged."""
    rows = gradient.to_sparse(1).coalesce()
    ids, values = rows.indices()[0], rows.values()
    ranks = distributed.get_world_size()
    size = torch.tensor([len(ids)], device=ids.device)
    sizes = _gather(size, [1] * ranks).tolist()
    ids, values = _gather(ids, sizes), _gather(values, sizes)
    total = torch.sparse_coo_tensor(
        ids[None], values, rows.shape, check_invariants=False
    )
    # Every rank sums in the same order, also on a GPU.
    return gradient.clone().zero_() + total.coalesce() / ranks


def _gather(tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Return the tensors of all ranks, of lengths `sizes`, one after another."""
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

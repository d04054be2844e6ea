"""DistributedDataParallel that exchanges rows of embedding tables, not the tables.

By itself it adds gradients up in buffers that have room for every weight, so all rows
of a table cross the network in every step, and every rank holds a gradient of them.
"""

import keras
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


def replicate(
    model: keras.Model, layers: list[keras.layers.Embedding]
) -> DistributedDataParallel:
    """A replica of `model` for this rank.

    Args:
        model: the model, compiled with a LazyOptimizer.
        layers: those whose tables are looked up and used for nothing else.
    """
    # From here on the gradient of a table that is looked up consists of rows.
    model.optimizer.build(model.trainable_variables)
    tables = [layer.embeddings.value for layer in layers]
    names = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, weight in module.named_parameters(recurse=False)
        if any(weight is table for table in tables)
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    for table in tables:
        # What DistributedDataParallel does with the weights that are left to it.
        distributed.broadcast(table.detach(), 0)
        table.register_hook(average)
    return DistributedDataParallel(model)


def average(gradient: torch.Tensor) -> torch.Tensor:
    """The mean of the ranks' gradients, of which only rows cross the network."""
    rows = gradient.to_sparse(1).coalesce()
    ids, values = rows.indices()[0], rows.values()
    size = torch.tensor([len(ids)], device=ids.device)
    sizes = gather(size, [1] * ranks()).tolist()
    ids, values = gather(ids, sizes), gather(values, sizes)
    total = torch.sparse_coo_tensor(
        ids[None], values, rows.shape, check_invariants=False
    )
    # Every rank adds up in the same order, also on a GPU.
    return gradient.clone().zero_() + total.coalesce() / ranks()


def gather(tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The ranks' tensors, of lengths `sizes`, one after another."""
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def ranks() -> int:
    """How many replicas there are."""
    return distributed.get_world_size()

"""torch: the gradient of a table that was looked up, kept by rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

aten = torch.ops.aten

# Operations that multiply all entries of a gradient by one number.
_SCALES: dict[Any, Any] = {aten.mul.Tensor: torch.mul, aten.div.Tensor: torch.div}


@dataclass
class _Contents:
    """What a gradient and its aliases hold.

    Attributes:
        ids: int64 tensor of shape `(n,)`, rows of the table. They may repeat.
        values: Tensor of shape `(n, ...)`, what each lookup adds to its row.
        dense: The gradient as a tensor of the table's shape, once something has been
            written into it. Then `ids` and `values` are no longer used.
    """

    ids: torch.Tensor
    values: torch.Tensor
    dense: torch.Tensor | None = None


class RowGradient(torch.Tensor):
    """A gradient that consists of lookups: their ids, and one gradient per lookup.

    For everything except the optimizer, this behaves like the dense gradient that it
    stands for: an operation that it does not know works on the dense gradient. An
    operation that writes into it, or returns a view of it, makes it dense permanently.

    Args:
        contents: The lookups.
        shape: The shape of the table.
    """

    @staticmethod
    def __new__(cls, contents: _Contents, shape: torch.Size) -> RowGradient:
        values = contents.values
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=values.dtype, device=values.device
        )

    def __init__(self, contents: _Contents, shape: torch.Size) -> None:
        self.contents = contents

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore

    # torch.compile cannot trace what makes a `RowGradient`.
    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not kwargs and (result := _by_rows(function, *args)) is not None:
            return result
        writes = function._schema.is_mutable or any(
            result.alias_info is not None for result in function._schema.returns
        )
        given: list[RowGradient] = []

        def whole(argument: Any) -> Any:
            if not isinstance(argument, RowGradient):
                return argument
            given.append(argument)
            return argument.make_dense() if writes else argument.whole()

        args, kwargs = _pytree.tree_map(whole, (args, kwargs or {}))
        result = function(*args, **kwargs)
        # If an operation returns what it wrote into, return the original object.
        return next((g for g in given if result is g.contents.dense), result)

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Ids and values, or `None` if the gradient has become dense."""
        contents = self.contents
        return (contents.ids, contents.values) if contents.dense is None else None

    def whole(self) -> torch.Tensor:
        """Return the dense gradient."""
        contents = self.contents
        if contents.dense is not None:
            return contents.dense
        zeros = contents.values.new_zeros(self.shape)
        return zeros.index_add_(0, contents.ids, contents.values)

    def make_dense(self) -> torch.Tensor:
        """Return the dense gradient, and hold it from now on."""
        self.contents.dense = self.whole()
        return self.contents.dense

    def numpy(self, *, force: bool = False) -> Any:
        """Return the dense gradient as an array."""
        return self.whole().numpy(force=force)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.whole())


def _rows(gradient: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return ids and values of a gradient, if it is known by rows."""
    if isinstance(gradient, RowGradient):
        return gradient.rows
    is_sparse = isinstance(gradient, torch.Tensor) and gradient.is_sparse
    if is_sparse and gradient.sparse_dim() == 1:
        return gradient._indices()[0], gradient._values()
    return None


def _by_rows(function: Any, gradient: Any, *others: Any) -> torch.Tensor | None:
    """Return the result of `function` by rows, or `None` if that is not possible."""
    rows = gradient.rows if isinstance(gradient, RowGradient) else None
    if rows is None or len(others) > 1:
        return None
    other = others[0] if others else None
    ids, values = rows
    if function is aten.detach.default:
        return RowGradient(gradient.contents, gradient.shape)
    if function is aten.clone.default:
        return RowGradient(_Contents(ids.clone(), values.clone()), gradient.shape)
    if function is aten.zero_.default:
        gradient.contents.ids, gradient.contents.values = ids[:0], values[:0]
        return gradient
    if function in _SCALES and not getattr(other, "ndim", 0):
        values = _SCALES[function](values, other)
        return RowGradient(_Contents(ids, values), gradient.shape)
    if function is aten._to_sparse.sparse_dim and other == 1:
        return torch.sparse_coo_tensor(
            ids.clone()[None], values.clone(), gradient.shape, check_invariants=False
        )
    more = _rows(other)
    if function not in (aten.add.Tensor, aten.add_.Tensor) or more is None:
        return None
    if more[1].dtype != values.dtype:
        return None
    ids, values = torch.cat([ids, more[0]]), torch.cat([values, more[1]])
    if function is aten.add.Tensor:
        return RowGradient(_Contents(ids, values), gradient.shape)
    gradient.contents.ids, gradient.contents.values = ids, values
    return gradient


class LookUp(torch.autograd.Function):
    """A lookup of rows of a table, whose gradient is a `RowGradient`."""

    # In one method: with a `setup_context`, torch looks up the signature in each call.
    @staticmethod
    def forward(context: Any, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(ids)
        context.save_for_forward(ids)
        context.shape = table.shape
        return torch.nn.functional.embedding(ids, table)

    @staticmethod
    @torch.compiler.disable
    def backward(context: Any, gradient: torch.Tensor) -> tuple:
        (ids,) = context.saved_tensors
        ids, values = ids.flatten(), gradient.reshape(-1, *context.shape[1:])
        if torch.is_grad_enabled():  # the gradient itself will be differentiated
            zeros = gradient.new_zeros(context.shape)
            return zeros.index_add(0, ids, values), None
        return RowGradient(_Contents(ids, values), context.shape), None

    @staticmethod
    def jvp(context: Any, table: torch.Tensor, _: Any) -> torch.Tensor:
        (ids,) = context.saved_tensors
        return torch.nn.functional.embedding(ids, table)

"""The model of `_fit` in plain torch, with sparse gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from benchmarks.workers import _fit, _serve
from benchmarks.workers._problem import Problem
from examples.recommender.criteo import NUMBERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _batches(problem: Problem) -> Callable[[Any], Sequence[torch.Tensor]]:
    return lambda a: torch.as_tensor(a, device=DEVICE).split(problem.samples)


class Dlrm(torch.nn.Module):
    """The model of `examples/recommender`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        width, count = problem.width, 1 + len(problem.shapes)
        self.tables = torch.nn.ModuleList(
            torch.nn.Embedding(*shape, sparse=True) for shape in problem.shapes
        )
        self.bottom = _dense(NUMBERS, 64, width)
        self.top = _dense(width + count * (count - 1) // 2, 64)
        self.click = torch.nn.Linear(64, 1)
        self.pairs = torch.tril_indices(count, count, -1)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self.bottom(inputs["numbers"])
        ids = inputs["ids"]
        vectors = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        stacked = torch.stack([hidden, *vectors], 1)
        products = stacked @ stacked.mT
        hidden = torch.cat([hidden, products[:, self.pairs[0], self.pairs[1]]], 1)
        return self.click(self.top(hidden))[:, 0]


def _dense(*sizes: int) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for ins, outs in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(ins, outs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers)


class MeanOfWords(torch.nn.Module):
    """The model of `_fit`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.tables = torch.nn.ModuleList(
            [torch.nn.Embedding(problem.vocabulary, problem.width, sparse=True)]
        )
        self.dense = torch.nn.Linear(problem.width, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.dense(self.tables[0](ids).mean(1))


def torch_loop(problem: Problem) -> _serve.Step:
    """A step with SparseAdam for the tables, and Adam for the rest."""
    model: Any
    loss_of: Callable[..., torch.Tensor]
    inputs: Any
    if problem.tables:
        model, loss_of = Dlrm(problem), functional.binary_cross_entropy_with_logits
    else:
        model, loss_of = MeanOfWords(problem), functional.mse_loss
    model.to(DEVICE)
    x, labels = _fit.data(problem)
    if isinstance(x, dict):
        parts = zip(*map(_batches(problem), x.values()), strict=True)
        inputs = [dict(zip(x, part, strict=True)) for part in parts]
    else:
        inputs = _batches(problem)(x)
    turn = itertools.cycle(list(zip(inputs, _batches(problem)(labels), strict=True)))
    sparse = list(model.tables.parameters())
    known = {*map(id, sparse)}
    optimizers = [
        torch.optim.SparseAdam(sparse),
        torch.optim.Adam([p for p in model.parameters() if id(p) not in known]),
    ]

    def step() -> None:
        x, y = next(turn)
        loss = loss_of(model(x), y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        loss.item()

    return step

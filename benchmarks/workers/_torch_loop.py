"""The model of `_fit` in plain torch, with sparse gradients."""

from __future__ import annotations

import itertools

import torch

from benchmarks.workers import _fit, _serve
from benchmarks.workers._problem import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def torch_loop(problem: Problem) -> _serve.Step:
    """A step with SparseAdam for the table, and Adam for the rest."""
    shape = (problem.vocabulary, problem.width)
    table = torch.nn.Embedding(*shape, sparse=True, device=DEVICE)
    dense = torch.nn.Linear(problem.width, 1, device=DEVICE)
    optimizers = [
        torch.optim.SparseAdam(table.parameters()),
        torch.optim.Adam(dense.parameters()),
    ]
    ids, labels = (torch.as_tensor(a, device=DEVICE) for a in _fit.data(problem))
    batch = problem.rows // _fit.LENGTH
    turn = itertools.cycle(
        list(zip(ids.split(batch), labels.split(batch), strict=True))
    )

    def step() -> None:
        words, y = next(turn)
        loss = torch.nn.functional.mse_loss(dense(table(words).mean(1)), y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        loss.item()

    return step

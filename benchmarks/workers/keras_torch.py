"""Keras's optimizers on torch, torch's own, and pytorch_optimizer's ("eager")."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

from benchmarks.workers import _serve

channel = _serve.take_stdout()
os.environ["KERAS_BACKEND"] = "torch"

import keras  # noqa: E402
import torch  # noqa: E402

from benchmarks.workers import _fit, _optimizers  # noqa: E402
from benchmarks.workers._problem import Problem  # noqa: E402
from benchmarks.workers._torch_loop import DEVICE, torch_loop  # noqa: E402

TORCH = {
    "torch Adam": lambda weights: torch.optim.Adam(weights),
    "torch SGD": lambda weights: torch.optim.SGD(weights, 1e-2, momentum=0.9),
    "torch SparseAdam": lambda weights: torch.optim.SparseAdam(weights),
}
LOOKAHEAD = " pytorch_optimizer.Lookahead"

Update = Callable[[list[torch.Tensor]], None]


def make(name: str, mode: str, problem: Problem) -> _serve.Case:
    assert mode == "eager"
    dense = [tensor(g) for g in problem.matrix_gradients()]
    batches = [dense]
    if problem.vocabulary and problem.sparse:
        rows = zip(problem.row_ids(), itertools.cycle(problem.row_gradients()))
        batches = [[sparse(i, g, problem.shapes[0]), *dense] for i, g in rows]
    elif problem.vocabulary:
        batches = [[tensor(g), *dense] for g in problem.table_gradients()]
    build = build_torch if name.startswith("torch") else build_keras
    update = build(name, problem)
    turn = itertools.cycle(batches)

    @torch.no_grad()
    def step() -> None:
        update(next(turn))
        synchronize()

    return _serve.Case(step)


def make_fit(name: str, mode: str, problem: Problem) -> _serve.Case:
    assert mode in ("eager", "jit")
    if name == "torch SparseAdam":
        return _serve.Case(torch_loop(problem), warm_up=_fit.WARM_UP)
    model = _optimizers.build_model(name, mode, problem)
    touch(_optimizers.states(model.optimizer))
    return _fit.Fit(keras, model, problem)


def tensor(array: object) -> torch.Tensor:
    return torch.as_tensor(array, device=DEVICE)


def sparse(ids: object, rows: object, shape: tuple[int, int]) -> torch.Tensor:
    indices = tensor(ids).long()[None]
    return torch.sparse_coo_tensor(indices, tensor(rows), shape)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def build_keras(name: str, problem: Problem) -> Update:
    optimizer, variables = _optimizers.build(name, problem)
    touch(_optimizers.states(optimizer))
    return lambda gradients: optimizer.apply(gradients, variables)


def build_torch(name: str, problem: Problem) -> Update:
    weights = [
        torch.nn.Parameter(torch.full(shape, 0.01, device=DEVICE))
        for shape in problem.shapes
    ]
    optimizer = TORCH[name.removesuffix(LOOKAHEAD)](weights)
    if name.endswith(LOOKAHEAD):
        import pytorch_optimizer

        optimizer = pytorch_optimizer.Lookahead(optimizer, k=5, alpha=0.5)
    is_touched = False

    def update(gradients: list[torch.Tensor]) -> None:
        nonlocal is_touched
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        if not is_touched:
            states = [state.values() for state in optimizer.state.values()]
            touch([s for s in itertools.chain(*states) if torch.is_tensor(s)])
            is_touched = True

    return update


def touch(tensors: list[torch.Tensor]) -> None:
    """Write to all of new tensors: memory is only given out when it is written."""
    for tensor in tensors:
        tensor.data.add_(0)


def bandwidth() -> float:
    source = torch.zeros(2**28, device=DEVICE)
    target = torch.ones_like(source)

    def copy() -> None:
        target.copy_(source)
        synchronize()

    return 2 * source.nbytes / min(_serve.timed(copy) for _ in range(20))


about = {
    "keras": keras.__version__,
    "torch": torch.__version__,
    "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
}
_serve.serve(_serve.Server(make, make_fit, about, bandwidth), channel)

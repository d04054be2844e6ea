"""What Lookahead of timm and of pytorch_optimizer have in common on torch."""

from __future__ import annotations

import abc
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optax
import torch

from benchmarks import _alive
from benchmarks.reliability import _properties
from benchmarks.reliability._properties import (
    RATE,
    SCALE,
    WIDTH,
    Arrays,
    Gradients,
    Setup,
    Way,
)

Wrap = Callable[..., Any]


class Training(_properties.Training):
    """A module and its optimizer."""

    def __init__(
        self, model: torch.nn.Module, optimizer: Any, slow: Callable, is_scaled: bool
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.slow_of = slow
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=is_scaled)
        self.scaler.scale(torch.zeros(()))  # as of a loss: makes the scale

    def step(self, gradients: Gradients) -> None:
        scale = self.scaler.get_scale()
        for weight, gradient in zip(self.model.parameters(), gradients, strict=True):
            weight.grad = None
            if gradient is not None:
                weight.grad = scale * torch.tensor(gradient)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def weights(self) -> Arrays:
        return [weight.detach().numpy().copy() for weight in self.model.parameters()]

    def set_weights(self, weights: Arrays) -> None:
        with torch.no_grad():
            for weight, value in zip(self.model.parameters(), weights, strict=True):
                weight.copy_(torch.tensor(value))

    def slow(self) -> Arrays:
        pairs = [(self.slow_of(self.optimizer, w), w) for w in self.model.parameters()]
        return [(w if s is None else s).detach().numpy().copy() for s, w in pairs]

    def kept(self) -> Arrays:
        return [np.array(each) for each in leaves(self.optimizer.state_dict())]


def leaves(state: Any) -> list[Any]:
    """Numbers and tensors of a `state_dict`, in its order."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list | tuple):
        return [leaf for each in state for leaf in leaves(each)]
    return [] if state is None else [state]


def save(training: Training, folder: Path) -> None:
    content = {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
    }
    torch.save(content, folder / "run.pt")


def load(training: Training, folder: Path) -> Training:
    content = torch.load(folder / "run.pt")
    training.model.load_state_dict(content["model"])
    training.optimizer.load_state_dict(content["optimizer"])
    return training


class TorchLookahead(_properties.Subject):
    """A Lookahead around `torch.optim.Adam`."""

    ways: ClassVar = {"torch.save": Way(save, load)}
    scalings = ("GradScaler",)
    remarks: ClassVar = {"another-model": "the module's load_state_dict does"}
    wrap: Wrap

    def __init__(self) -> None:
        torch_version = torch.__version__.split("+")[0]
        version = importlib.metadata.version(self.name)
        self.runs_with = f"{self.name} {version}, torch {torch_version}"

    @staticmethod
    @abc.abstractmethod
    def slow_of(optimizer: Any, weight: torch.nn.Parameter) -> torch.Tensor | None:
        """The slow weights of one of the parameters, once there are any."""

    def build(self, setup: Setup) -> Training:
        model = torch.nn.Sequential(
            torch.nn.Embedding(setup.rows, WIDTH), torch.nn.Linear(WIDTH, setup.units)
        )
        shapes = [tuple(weight.shape) for weight in model.parameters()]
        values = _properties.initial(shapes, setup.seed)
        for weight, value in zip(model.parameters(), values, strict=True):
            weight.data = torch.tensor(value)
        base: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), setup.rate)
        if setup.inner == "sgd":
            base = torch.optim.SGD(model.parameters(), setup.rate, momentum=0.9)
        optimizer = self.wrap(base, k=setup.k, alpha=0.5)
        return Training(model, optimizer, self.slow_of, setup.scaling is not None)

    def wrong_uses(self) -> Mapping[str, Callable[[], object]]:
        def use(base: Any = None, **how: Any) -> object:
            weights = [torch.nn.Parameter(torch.ones(3))]
            return self.wrap(base or torch.optim.Adam(weights), **how)

        return {
            "k=0": lambda: use(k=0),
            "k=2.5": lambda: use(k=2.5),
            "alpha=2": lambda: use(alpha=2),
            "another library's optimizer": lambda: use(optax.adam(RATE)),
            "an unknown argument": lambda: use(cycle=5),
        }

    def versions(self) -> dict[str, str]:
        version = importlib.metadata.version(self.name)
        return {self.name: version, "torch": torch.__version__}

    def alive(self) -> dict[str, int]:
        return _alive.of_torch()

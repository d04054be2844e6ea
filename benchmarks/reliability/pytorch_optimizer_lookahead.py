"""pytorch_optimizer's Lookahead."""

from __future__ import annotations

from typing import Any

import pytorch_optimizer
import torch

from benchmarks.reliability import _properties
from benchmarks.reliability._torch import TorchLookahead


class Lookahead(TorchLookahead):
    """`pytorch_optimizer.Lookahead(torch.optim.Adam(...))`."""

    name, column = "pytorch_optimizer", "pytorch_optimizer"
    wrap = staticmethod(pytorch_optimizer.Lookahead)

    @staticmethod
    def slow_of(optimizer: Any, weight: torch.nn.Parameter) -> torch.Tensor | None:
        return optimizer.state[weight]["slow_params"]


SUBJECTS = [Lookahead()]

if __name__ == "__main__":
    _properties.main(SUBJECTS)

"""timm's Lookahead.

Its module is imported from its file, as `import timm` needs torchvision, which nothing
here does. The module itself imports torch alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch

from benchmarks.reliability import _properties
from benchmarks.reliability._torch import TorchLookahead


def module() -> Any:
    """`timm.optim.lookahead`."""
    files = importlib.metadata.distribution("timm")
    path = files.locate_file("timm/optim/lookahead.py")
    spec = importlib.util.spec_from_file_location("lookahead_of_timm", str(path))
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Lookahead(TorchLookahead):
    """`timm.optim.Lookahead(torch.optim.Adam(...))`."""

    name, column = "timm", "timm"
    wrap = staticmethod(module().Lookahead)

    @staticmethod
    def slow_of(optimizer: Any, weight: torch.nn.Parameter) -> torch.Tensor | None:
        return optimizer._base_optimizer.state[weight].get("lookahead_slow_buff")


SUBJECTS = [Lookahead()]

if __name__ == "__main__":
    _properties.main(SUBJECTS)

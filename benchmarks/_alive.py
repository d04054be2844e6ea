"""How many programs and arrays a framework holds, where it can be asked."""

from __future__ import annotations

import gc
from collections.abc import Callable


def of_jax() -> dict[str, int]:
    """Count compiled programs and arrays."""
    import jax

    gc.collect()
    programs = jax.devices()[0].client.live_executables()
    return {"programs": len(programs), "arrays": len(jax.live_arrays())}


def of_torch() -> dict[str, int]:
    """Count tensors."""
    import torch

    gc.collect()
    kinds = [type(each) for each in gc.get_objects()]
    return {"arrays": sum(issubclass(kind, torch.Tensor) for kind in kinds)}


def of_tensorflow() -> dict[str, int]:
    """Count recorded functions, and the nodes of their graphs."""
    gc.collect()
    name = "ConcreteFunction"  # which TensorFlow does not publish
    found = [each for each in gc.get_objects() if type(each).__name__ == name]
    nodes = sum(len(function.graph.get_operations()) for function in found)
    return {"programs": len(found), "nodes": nodes}


COUNTERS: dict[str, Callable[[], dict[str, int]]] = {
    "jax": of_jax,
    "torch": of_torch,
    "tensorflow": of_tensorflow,
}

"""The few operations that differ by backend: the same functions in each module.

Only the module of the backend that Keras runs on is imported, as `engine`.
"""

from __future__ import annotations

import importlib
from typing import Any

import keras

SUPPORTED = ("tensorflow", "jax", "torch")

engine: Any = None
if keras.backend.backend() in SUPPORTED:
    engine = importlib.import_module(f"{__name__}.{keras.backend.backend()}")


def check_backend() -> None:
    """Raise `ValueError` on a Keras backend that cannot train."""
    if engine is None:
        raise ValueError(
            "keras_lookahead_lazy trains on the backends "
            f"{', '.join(SUPPORTED)}. Keras runs on "
            f"{keras.backend.backend()!r}; set the environment variable "
            "KERAS_BACKEND to one of those before Keras is imported."
        )

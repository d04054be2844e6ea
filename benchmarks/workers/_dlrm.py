"""DLRM on clicks of Criteo's shape, as `examples/recommender` has it."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np

from benchmarks.workers._problem import Problem
from examples.recommender.model import draw_clicks, make_model

BATCHES = 64


def build(optimizer_of: Callable, mode: str, problem: Problem) -> keras.Model:
    """A compiled model with a table for each category."""
    model = make_model([rows for rows, _ in problem.shapes], problem.width)
    tables = [x for x in model.layers if isinstance(x, keras.layers.Embedding)]
    model.compile(
        optimizer_of(tables), loss="binary_crossentropy", jit_compile=mode == "jit"
    )
    return model


def data(problem: Problem) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Synthetic clicks."""
    sizes = [rows for rows, _ in problem.shapes]
    return draw_clicks(sizes, BATCHES * problem.rows, seed=0)

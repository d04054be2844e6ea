"""The ordinary set-ups in which a model is trained, by name.

The dtype policy is apart, in `Problem`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras

ACCUMULATED = 4  # steps of a cycle; a timed run has whole cycles


class OneDevice:
    """No distribution."""

    scope = contextlib.nullcontext


def mirrored() -> Any:
    """Two replicas on logical CPUs."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def data_parallel() -> Any:
    """Two devices, each with the whole table and half of the batch."""
    return keras.distribution.DataParallel()


def model_parallel() -> Any:
    """Two devices, each with half of the table's rows."""
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"))
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*embeddings"] = ("model", None)
    return keras.distribution.ModelParallel(layout_map=layouts)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a set-up adds.

    Attributes:
        layer: arguments of the Embedding.
        optimizer: arguments of the inner optimizer.
        distribution: makes what has the `scope` to make and train the model in.
    """

    layer: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    distribution: Callable[[], Any] = OneDevice


SETUPS = {
    "plain": Setup(),
    "accumulation": Setup(optimizer={"gradient_accumulation_steps": ACCUMULATED}),
    "clipping": Setup(optimizer={"global_clipnorm": 1.0}),
    "activity": Setup(layer={"activity_regularizer": keras.regularizers.L2(1e-4)}),
    "regularizer": Setup(layer={"embeddings_regularizer": keras.regularizers.L2(1e-4)}),
    "ema": Setup(optimizer={"use_ema": True}),
    "mirrored": Setup(distribution=mirrored),
    "mirrored-clipping": Setup(
        optimizer={"global_clipnorm": 1.0}, distribution=mirrored
    ),
    "data-parallel": Setup(distribution=data_parallel),
    "model-parallel": Setup(distribution=model_parallel),
}


@functools.cache
def distribution(setup: str) -> Any:
    """What has the `scope` to make and train a model in."""
    return SETUPS[setup].distribution()

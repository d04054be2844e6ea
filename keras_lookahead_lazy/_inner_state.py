"""What a sync does to the inner optimizer's slots."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _keras
from keras_lookahead_lazy._backend import engine

INNER_STATES = ("maintain", "interpolate", "reset")


def filled(value: float, slot: Any) -> tuple:
    # On torch, `ops.full_like` would read the value from the device.
    return (ops.zeros_like(slot) + value,)


def initial_values(
    optimizer: keras.Optimizer, variables: list[keras.Variable]
) -> list[float]:
    """Return the constant that each slot of a new optimizer is filled with.

    The given optimizer may have been trained, so this builds a copy of it for small
    stand-ins of the weights.
    """
    with engine.outside_graph():
        fresh = _keras.fresh_slots(optimizer, variables)
        slots = [slot for each in fresh for slot in each.values()]
        arrays = [ops.convert_to_numpy(slot) for slot in slots]
    for slot, array in zip(slots, arrays, strict=True):
        if array.min() != array.max():
            raise ValueError(
                "inner_state='reset' sets each slot of the inner optimizer to the "
                f"constant that it starts from, but {slot.path} of "
                f"{type(optimizer).__name__} starts from the weights. Use "
                "inner_state='maintain' or 'interpolate'."
            )
    return [float(array.min()) for array in arrays]

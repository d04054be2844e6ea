"""Know by which factor each optimizer's slots decay under a zero gradient.

A step on rows needs these factors: one power applies the decay of n missed steps. An
optimizer of your own gives them with a method,

    def slot_decay_rates(self) -> dict[str, float]:
        return {"_accumulators": 1.0}

that returns for each slot, by the name of the list that holds it, the factor by which a
step with a zero gradient multiplies it. By defining the method, the optimizer also
states that `apply` and `update_step` treat each row of a gradient by itself. The method
counts for its class and the classes above it. A subclass that overrides `update_step`
or `apply` has to define the method again.

For Keras's optimizers, the factors follow from the equations:

* SGD:      m <- momentum m
* Adam:     m <- beta_1 m,  v <- beta_2 v,  max(v_hat, v) = v_hat as v only shrinks
* Nadam:    m <- beta_1 m,  v <- beta_2 v
* Adamax:   m <- beta_1 m,  u <- max(beta_2 u, 0) = beta_2 u
* RMSprop:  v <- rho v,  mean gradient <- rho mean gradient,  m <- momentum m
* Adagrad:  a <- a + 0
* Adadelta: both averages <- rho average (the update is a multiple of the gradient)
* Ftrl:     a <- a + 0,  z <- z + 0 without shrinkage
* Lion:     m <- beta_2 m
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras

from keras_lookahead_lazy import _keras

_RATES: dict[type, Callable[[Any], dict[str, float]]] = {
    keras.optimizers.SGD: lambda o: {"momentums": o.momentum},
    keras.optimizers.Adam: lambda o: {
        "_momentums": o.beta_1,
        "_velocities": o.beta_2,
        "_velocity_hats": 1.0,
    },
    keras.optimizers.Nadam: lambda o: {
        "_momentums": o.beta_1,
        "_velocities": o.beta_2,
    },
    keras.optimizers.Adamax: lambda o: {"_m": o.beta_1, "_u": o.beta_2},
    keras.optimizers.RMSprop: lambda o: {
        "_velocities": o.rho,
        "_average_gradients": o.rho,
        "_momentums": o.momentum,
    },
    keras.optimizers.Adagrad: lambda o: {"_accumulators": 1.0},
    keras.optimizers.Adadelta: lambda o: {
        "_accumulated_grads": o.rho,
        "_accumulated_delta_vars": o.rho,
    },
    keras.optimizers.Ftrl: lambda o: {"_accumulators": 1.0, "_linears": 1.0},
    keras.optimizers.Lion: lambda o: {"_momentums": o.beta_2},
}


def log_rates(optimizer: keras.Optimizer) -> dict[str, float] | None:
    """Return the logarithm of each slot's decay factor per step, by the slot's name.

    Returns:
        `None` if a step on a row depends on other rows (Lamb, Adafactor, Muon), if
        slots do not decay by a constant factor (Ftrl with shrinkage, which adds a
        multiple of the weight in every step), or if the optimizer has a step of its own
        and does not define `slot_decay_rates`.
    """
    rates = _rates(optimizer)
    if rates is None or getattr(
        optimizer, "l2_shrinkage_regularization_strength", False
    ):
        return None
    # exp(-1e4) is 0 in every float type, as 0 ** n is; 0 * -inf would be nan.
    return {name: math.log(rate) if rate else -1e4 for name, rate in rates.items()}


def _rates(optimizer: keras.Optimizer) -> dict[str, float] | None:
    if _keras.has_step_of_its_own(vars(optimizer)):
        return None
    for cls in type(optimizer).__mro__:
        if "slot_decay_rates" in vars(cls):
            return optimizer.slot_decay_rates()
        if cls in _RATES:
            return _RATES[cls](optimizer)
        if _keras.has_step_of_its_own(vars(cls), cls.__module__):
            return None
    return None

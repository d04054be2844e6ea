"""What the slots of Keras's element-wise optimizers do under a zero gradient.

With a zero gradient every one of them multiplies each slot by a constant, so a
row that missed n steps catches up with one power. Derived from the equations:

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
    """The logarithm of each slot's rate of decay a step, by the slot's name.

    Returns:
        `None` for an optimizer whose step on a row depends on other rows (Lamb,
        Adafactor, Muon), whose slots do not decay in closed form (Ftrl with
        shrinkage, which adds a multiple of the weight in every step), or whose
        `update_step` is the user's own.
    """
    update_steps = {_update_step(known): rates for known, rates in _RATES.items()}
    rates = update_steps.get(_update_step(type(optimizer)))
    if rates is None or getattr(
        optimizer, "l2_shrinkage_regularization_strength", False
    ):
        return None
    # exp(-1e4) is 0 in every float type, as 0 ** n is; 0 * -inf would be nan.
    return {
        name: math.log(rate) if rate else -1e4
        for name, rate in rates(optimizer).items()
    }


def _update_step(cls: type) -> Callable:
    return cls.update_step  # type: ignore[attr-defined]

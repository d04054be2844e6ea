"""`optax.lookahead`, in a jitted step of one's own.

optax leaves saving to others; here parameters and state go into a pickle of arrays.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

from benchmarks import _alive
from benchmarks.reliability import _properties
from benchmarks.reliability._properties import (
    RATE,
    WIDTH,
    Arrays,
    Gradients,
    Setup,
    Way,
)

AROUND, INSIDE = "apply_if_finite around", "apply_if_finite inside"
CHOICE = "a jnp.where of one's own"  # between old and new, as JAX's users write it
MOST_ERRORS = 5  # in a row, of apply_if_finite, as in its example


class Training(_properties.Training):
    """Parameters and state; a step makes new ones."""

    params: optax.LookaheadParams

    def __init__(self, optimizer: Any, weights: Arrays, skips: bool = False) -> None:
        self.set_weights(weights)
        self.state_ = optimizer.init(self.params)

        @jax.jit
        def update(params: Any, state: Any, gradients: Any) -> Any:
            updates, new_state = optimizer.update(gradients, state, params)
            new = optax.apply_updates(params, updates), new_state
            if not skips:
                return new
            finite = jnp.all(jnp.array([jnp.isfinite(g).all() for g in gradients]))
            old = params, state
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        self.update = update

    def step(self, gradients: Gradients) -> None:
        if any(gradient is None for gradient in gradients):
            raise _properties.NotAsked
        self.params, self.state_ = self.update(self.params, self.state_, gradients)

    def weights(self) -> Arrays:
        return list(map(np.array, self.params.fast))

    def set_weights(self, weights: Arrays) -> None:
        self.params = optax.LookaheadParams.init_synced(list(map(jnp.array, weights)))

    def slow(self) -> Arrays:
        return list(map(np.array, self.params.slow))

    def kept(self) -> Arrays:
        """With the slow weights, and without what apply_if_finite counts."""
        state = self.state_
        if isinstance(state, optax.ApplyIfFiniteState):
            state = state.inner_state
        fast = getattr(state, "fast_state", None)
        if isinstance(fast, optax.ApplyIfFiniteState):
            state = state._replace(fast_state=fast.inner_state)
        return self.slow() + list(map(np.array, jax.tree.leaves(state)))


def save(training: Training, folder: Path) -> None:
    content = jax.device_get((training.params, training.state_))
    (folder / "run.pickle").write_bytes(pickle.dumps(content))


def load(training: Training, folder: Path) -> Training:
    content = pickle.loads((folder / "run.pickle").read_bytes())
    training.params, training.state_ = jax.tree.map(jnp.array, content)
    return training


class Lookahead(_properties.Subject):
    """`optax.lookahead(optax.adam(...), ...)`."""

    name, column = "optax", "optax"
    ways: ClassVar = {"pickle": Way(save, load)}
    scalings = (AROUND, INSIDE, CHOICE)
    remarks: ClassVar = {
        "another-model": "optax has no files; this is a pickle",
        "another-k": "the state has no k",
        "another-inner": "optax has no files; this is a pickle",
        "frozen": "an update is of all weights",
    }
    runs_with = f"optax {optax.__version__}, JAX {jax.__version__}"

    def build(self, setup: Setup) -> Training:
        optimizer: Any = optax.adam(setup.rate)
        if setup.inner == "sgd":
            optimizer = optax.sgd(setup.rate, momentum=0.9)
        if setup.scaling == INSIDE:
            optimizer = optax.apply_if_finite(optimizer, MOST_ERRORS)
        optimizer = optax.lookahead(optimizer, setup.k, 0.5)
        if setup.scaling == AROUND:
            optimizer = optax.apply_if_finite(optimizer, MOST_ERRORS)
        shapes = (setup.rows, WIDTH), (WIDTH, setup.units), (setup.units,)
        weights = _properties.initial(shapes, setup.seed)
        return Training(optimizer, weights, skips=setup.scaling == CHOICE)

    def wrong_uses(self) -> Mapping[str, Callable[[], object]]:
        foreign: Any = keras.optimizers.Adam(RATE)
        unknown: Any = {"cycle": 5}
        params = optax.LookaheadParams.init_synced(jnp.ones(3))

        def use(inner: Any, k: float, alpha: float, **how: Any) -> object:
            return optax.lookahead(inner, k, alpha, **how).init(params)

        adam = optax.adam(RATE)
        return {
            "k=0": lambda: use(adam, 0, 0.5),
            "k=2.5": lambda: use(adam, 2.5, 0.5),
            "alpha=2": lambda: use(adam, 5, 2),
            "another library's optimizer": lambda: use(foreign, 5, 0.5),
            "an unknown argument": lambda: use(adam, 5, 0.5, **unknown),
        }

    def restart(self, training: Training) -> None:
        """`init_synced`, which is how parameters are written, has done it."""

    def alive(self) -> dict[str, int]:
        return _alive.of_jax()

    def versions(self) -> dict[str, str]:
        return {"optax": optax.__version__, "jax": jax.__version__}


SUBJECTS = [Lookahead()]

if __name__ == "__main__":
    _properties.main(SUBJECTS)

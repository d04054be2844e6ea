"""A small GAN: Adam for both players, and Lookahead(Adam) for both.

The generator has to learn eight narrow bells on a circle, a test on which a GAN often
turns from bell to bell or finds only some of them (Metz et al., "Unrolled Generative
Adversarial Networks", arXiv:1611.02163). Lookahead on both players is from Chavdarova
et al., "Taming GANs with Lookahead-Minmax", arXiv:2006.14567. Each optimizer trains at
each learning rate from each seed. It runs on JAX.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from examples.common.options import add_learning_rates, add_optimizers
from examples.common.plots import BLACK, BLUE, SKY, Curve
from examples.common.sources import Data
from experiments._runs import Settings, add_run_options, run_all
from keras_lookahead_lazy import Lookahead

BELLS, RADIUS, SPREAD = 8, 2.0, 0.05
NOISE, UNITS, BATCH_SIZE = 16, 128, 256
EPOCHS, STEPS_AN_EPOCH = 20, 1_000
POINTS = 2_000  # that an evaluation draws
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


# What stands around each player's Adam: a Lookahead with this k, or nothing.
KS = {"adam": None, "lookahead-5": 5, "lookahead-50": 50}
CURVES = {
    "adam": Curve("Adam", BLACK),
    "lookahead-5": Curve("Lookahead(Adam) on both players, k 5", BLUE),
    "lookahead-50": Curve("Lookahead(Adam) on both players, k 50", SKY),
}


def build_optimizer(name: str, learning_rate: float) -> keras.Optimizer:
    """Build a player's optimizer."""
    k = KS[name]
    adam = keras.optimizers.Adam(learning_rate, beta_1=0.5)
    return adam if k is None else Lookahead(adam, k=k, alpha=0.5)


def centers() -> np.ndarray:
    """Return the middles of the bells, of shape `(BELLS, 2)`."""
    angles = 2 * np.pi * np.arange(BELLS) / BELLS
    return RADIUS * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def draw_points(random: np.random.Generator, shape: tuple) -> np.ndarray:
    """Draw from the bells; the points have shape `(*shape, 2)`."""
    middles = centers()[random.integers(0, BELLS, shape)]
    return (middles + SPREAD * random.standard_normal((*shape, 2))).astype("float32")


def network(inputs: int, outputs: int) -> keras.Model:
    """Build either player: two hidden layers."""
    hidden = [layers.Dense(UNITS, "relu") for _ in range(2)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(outputs)])


class Game:
    """A generator and a discriminator that move, and sync, at the same time."""

    def __init__(self, make: Callable[[], keras.Optimizer]) -> None:
        import jax

        self._models = network(NOISE, 2), network(2, 1)
        self._optimizers = make(), make()
        for model, optimizer in zip(self._models, self._optimizers, strict=True):
            optimizer.build(model.trainable_variables)
        self._state = [
            (
                [weight.value for weight in model.trainable_variables],
                [variable.value for variable in optimizer.variables],
            )
            for model, optimizer in zip(self._models, self._optimizers, strict=True)
        ]
        self._steps = jax.jit(
            lambda state, *batches: jax.lax.scan(self._step, state, batches)[0]
        )

    def play(self, real: np.ndarray, noise: np.ndarray) -> None:
        """Make a step with each batch; both have shape `(steps, batch, ...)`."""
        self._state = self._steps(self._state, real, noise)

    def _step(self, state: list, batch: tuple) -> tuple[list, None]:
        import jax

        real, noise = batch
        weights = [of_player for of_player, _ in state]

        def generator_loss(generator: list) -> Any:
            fake = self.points(generator, noise)
            return _loss(self.logits(weights[1], fake), 1.0)

        def discriminator_loss(discriminator: list) -> Any:
            fake = self.points(weights[0], noise)
            on_fake = _loss(self.logits(discriminator, fake), 0.0)
            return on_fake + _loss(self.logits(discriminator, real), 1.0)

        losses = generator_loss, discriminator_loss
        # Both gradients come from the weights before either player moves.
        gradients = [jax.grad(f)(w) for f, w in zip(losses, weights, strict=True)]
        moved = [
            optimizer.stateless_apply(variables, gradient, of_player)
            for optimizer, gradient, (of_player, variables) in zip(
                self._optimizers, gradients, state, strict=True
            )
        ]
        return moved, None

    def points(self, weights: list, noise: Any) -> Any:
        """Compute what the generator makes of noise."""
        return self._models[0].stateless_call(weights, [], noise)[0]

    def logits(self, weights: list, points: Any) -> Any:
        """Compute the discriminator's logits; positive stands for real."""
        return self._models[1].stateless_call(weights, [], points)[0]

    def generated(self, noise: np.ndarray) -> np.ndarray:
        """Return the generator's points as they are now."""
        return ops.convert_to_numpy(self.points(self._state[0][0], noise))


def _loss(logits: Any, label: float) -> Any:
    labels = label * ops.ones_like(logits)
    return ops.mean(ops.binary_crossentropy(labels, logits, from_logits=True))


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return how far two samples' distributions are apart; about 0 if they are equal.

    The squared energy distance, `2 E|X - Y| - E|X - X'| - E|Y - Y'|` (Szekely and
    Rizzo, 2013), of samples of shape `(points, 2)`.
    """

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a[:, None] - b[None], axis=-1).mean())

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def bells_found(points: np.ndarray) -> int:
    """Count bells that get at least a quarter of their share of the points.

    A point belongs to a bell if it lies within three standard deviations.
    """
    apart = np.linalg.norm(points[:, None] - centers()[None], axis=-1)
    share = (apart < 3 * SPREAD).mean(axis=0)
    return int(np.sum(share >= 1 / (4 * BELLS)))


def measure(data: Data, settings: Settings, name: str) -> dict[str, Any]:
    """Train once; return what each thousand steps measured.

    The number of steps between two evaluations is a multiple of k, so at each of them a
    sync has just made fast and slow weights the same.
    """
    random = np.random.default_rng(settings["seed"])
    game = Game(
        lambda: build_optimizer(settings["optimizer"], settings["learning_rate"])
    )
    steps = settings["steps_an_epoch"]
    epochs = []
    for epoch in range(1, settings["epochs"] + 1):
        real = draw_points(random, (steps, BATCH_SIZE))
        noise = random.standard_normal((steps, BATCH_SIZE, NOISE)).astype("float32")
        game.play(real, noise)
        noise = random.standard_normal((POINTS, NOISE)).astype("float32")
        points = game.generated(noise)
        distance = energy_distance(points, draw_points(random, (POINTS,)))
        measured = {"epoch": epoch, "distance": distance, "bells": bells_found(points)}
        epochs.append(measured)
        print(f"{name}  {measured}", flush=True)
    half = epochs[len(epochs) // 2 :]
    shown = points[:300].astype("float64").round(2).tolist()  # in the picture
    distance = float(np.mean([each["distance"] for each in half]))
    return {
        "distance": distance if np.isfinite(distance) else None,
        "bells": float(np.mean([each["bells"] for each in half])),
        **({"points": shown} if settings["seed"] == 0 else {}),
        "epochs": epochs,
    }


def load() -> Data:
    """Return empty data: every step draws its own."""
    none = np.zeros(0)
    return Data("eight bells on a circle", none, none, none, none, EPOCHS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = argparse.ArgumentParser("gan", description=__doc__)
    add_optimizers(parser, KS)
    add_learning_rates(parser, RATES)
    add_run_options(parser, seeds=list(range(9)))
    options = parser.parse_args(arguments)
    runs = {
        f"{optimizer}-rate{rate:g}-seed{seed}": {
            "optimizer": optimizer,
            "k": KS[optimizer],
            "learning_rate": rate,
            "seed": seed,
            "batch_size": BATCH_SIZE,
            "steps_an_epoch": STEPS_AN_EPOCH,
            "epochs": options.epochs or EPOCHS,
        }
        for rate in options.learning_rates
        for seed in options.seeds
        for optimizer in options.optimizers
    }
    return run_all("gan", runs, load, measure, options.output, options.jobs)


if __name__ == "__main__":
    sys.exit(main())

"""The bilinear game: descent-ascent circles, and Lookahead on both players converges.

`min over x, max over y of x y` has its only solution at 0 (Chavdarova et al., "Taming
GANs with Lookahead-Minmax", arXiv:2006.14567). The picture is that of `docs/outer.md`.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from matplotlib.figure import Figure

from examples.common.plots import BLACK, BLUE
from keras_lookahead_lazy import Lookahead

RATE, K, STEPS = 0.1, 20, 300
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "bilinear.png"


def sgd() -> keras.Optimizer:
    """Each player's own optimizer."""
    return keras.optimizers.SGD(RATE)


def lookahead() -> keras.Optimizer:
    """The same inside of Lookahead."""
    return Lookahead(sgd(), k=K, alpha=0.5)


def play(make: Callable[[], keras.Optimizer], steps: int = STEPS) -> np.ndarray:
    """Both players' weights after every step; they move and sync at the same time."""
    x, y = keras.Variable([1.0]), keras.Variable([1.0])
    players = [(make(), x), (make(), y)]
    path = [[1.0, 1.0]]
    for _ in range(steps):
        gradients = [1.0 * y, -1.0 * x]  # x descends x y, y ascends it
        for (optimizer, weight), gradient in zip(players, gradients, strict=True):
            optimizer.apply([gradient], [weight])
        path.append([float(keras.ops.convert_to_numpy(w)[0]) for w in (x, y)])
    return np.array(path)


def main() -> int:
    """Draw both paths and how far they are from the solution."""
    figure = Figure(figsize=(9, 4.2))
    plane, distance = figure.subplots(1, 2)
    for make, label, color in (
        (sgd, "descent-ascent", BLACK),
        (lookahead, f"Lookahead on both players, k {K}", BLUE),
    ):
        path = play(make)
        plane.plot(*path.T, color=color, linewidth=1, label=label)
        distance.semilogy(np.linalg.norm(path, axis=1), color=color, label=label)
    plane.plot(0, 0, "+", color=BLACK)
    plane.set(xlabel="x", ylabel="y", aspect="equal")
    distance.set(xlabel="steps", ylabel="distance from the solution")
    distance.legend()
    figure.savefig(IMAGE, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())

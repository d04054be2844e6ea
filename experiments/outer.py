"""An outer optimizer for Lookahead's slow weights, on three language models of words.

Two small GPTs and an LSTM read IMDB reviews once. `tune` trains every optimizer at
every learning rate of a grid, from one seed; `compare` trains it from other seeds at
the rate of the lowest validation loss. k divides the steps between two evaluations, so
at each of them a sync has just made fast and slow weights the same.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from examples.common.comparison import add_trained_seconds
from examples.common.options import add_optimizers, positive_int
from examples.common.plots import BLACK, BLUE, GREY, ORANGE, Curve
from examples.common.sources import Data, read_npz
from experiments import _tuning
from experiments._runs import Settings, add_options, run_all
from keras_lookahead_lazy import Lookahead

WORDS, TOKENS = 2_000, 64
BATCH_SIZE = 8
EPOCHS, STEPS_AN_EPOCH = 10, 60
HELD_OUT = 300  # sequences, of validation and of test each
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


@dataclass(frozen=True)
class Gpt:
    """The size of a GPT; a head is 32 wide."""

    blocks: int
    width: int


GPTS = {"gpt": Gpt(blocks=4, width=128), "gpt-6m": Gpt(blocks=6, width=256)}
LSTM_WIDTH = 128
MODELS = (*GPTS, "lstm")


@dataclass(frozen=True)
class Setting:
    """What stands around the inner optimizer: a Lookahead's arguments, or nothing.

    Attributes:
        eta, mu: learning rate and momentum of the outer SGD with Nesterov momentum.
    """

    k: int | None = None
    alpha: float | None = None
    eta: float | None = None
    mu: float | None = None
    inner: str = "adamw"

    @property
    def outer_optimizer(self) -> keras.Optimizer:
        """The outer optimizer of SNOO and DiLoCo."""
        return keras.optimizers.SGD(self.eta, momentum=self.mu, nesterov=True)


SETTINGS = {
    "adamw": Setting(),
    "lookahead": Setting(k=5, alpha=0.5),
    "outer-30-0.37": Setting(k=30, eta=0.68, mu=0.37),
    "outer-30-0.5": Setting(k=30, eta=0.7, mu=0.5),
    "outer-10-0.9": Setting(k=10, eta=0.7, mu=0.9),
    "muon": Setting(inner="muon"),
    "outer-muon": Setting(k=30, eta=0.7, mu=0.5, inner="muon"),
}
CURVES = {
    "adamw": Curve("AdamW", BLACK),
    "lookahead": Curve("Lookahead(AdamW), k 5, alpha 0.5", BLUE),
    "outer-30-0.37": Curve("outer Nesterov, k 30, eta 0.68, mu 0.37", ORANGE),
    "outer-30-0.5": Curve("outer Nesterov, k 30, eta 0.7, mu 0.5", ORANGE, dashed=True),
    "outer-10-0.9": Curve("outer Nesterov, k 10, eta 0.7, mu 0.9", GREY),
    "muon": Curve("Muon", BLACK, dashed=True),
    "outer-muon": Curve("outer Nesterov over Muon, k 30, eta 0.7, mu 0.5", BLUE, True),
}
USUAL = [name for name in SETTINGS if "muon" not in name]


def load(path: Path, train: int | None = None, test: int | None = None) -> Data:
    """Cut an `imdb.npz` into sequences of word ranks; rarer words are all one.

    Args:
        path: the file, as Keras caches it.
        train: at most so many sequences to train on.
        test: at most so many of validation and of test together.
    """
    reviews = read_npz(path, ["x_train", "x_test"], allow_pickle=True)
    x_train, x_test = (_sequences(part) for part in reviews)
    x_train, x_test = x_train[:train], x_test[: test or 2 * HELD_OUT]
    return Data(
        "IMDB, a stream of words",
        x_train[:, :-1],
        x_train[:, 1:],
        x_test[:, :-1],
        x_test[:, 1:],
        EPOCHS,
    )


def _sequences(reviews: np.ndarray) -> np.ndarray:
    """The reviews' words behind each other, with a 0 before each review."""
    stream = np.concatenate([[0, *review] for review in reviews]).astype("int32")
    stream[stream >= WORDS] = WORDS - 1
    count = len(stream) // (TOKENS + 1)
    return stream[: count * (TOKENS + 1)].reshape(count, TOKENS + 1)


class Positions(layers.Layer):
    """Adds a learned vector to each place of a sequence."""

    def build(self, shape: tuple) -> None:
        """Make the vectors."""
        self.vectors = self.add_weight(shape=shape[1:], initializer="random_normal")

    def call(self, inputs: Any) -> Any:
        """Add them."""
        return inputs + self.vectors


def build_model(kind: str) -> keras.Model:
    """Build a model that gives a logit for every word that may come next."""
    gpt = GPTS.get(kind)
    width = gpt.width if gpt else LSTM_WIDTH
    words = keras.Input((TOKENS,), dtype="int32")
    x = layers.Embedding(WORDS, width, embeddings_initializer="random_normal")(words)
    if not gpt:
        x = layers.LSTM(width, return_sequences=True)(x)
        return keras.Model(words, layers.Dense(WORDS)(x))
    x = Positions()(x)
    for _ in range(gpt.blocks):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(width // 32, 32)(y, y, use_causal_mask=True)
        y = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(width)(y)
    return keras.Model(words, layers.Dense(WORDS)(layers.LayerNormalization()(x)))


def build_optimizer(name: str, learning_rate: float, steps: int) -> keras.Optimizer:
    """Build one of `SETTINGS`; the rate rises for a tenth of the steps, then falls."""
    setting = SETTINGS[name]
    rate = keras.optimizers.schedules.CosineDecay(
        0.0,
        steps - steps // 10,
        alpha=0.1,
        warmup_target=learning_rate,
        warmup_steps=steps // 10,
    )
    if setting.inner == "muon":
        inner = keras.optimizers.Muon(rate, weight_decay=0.1)
    else:
        inner = keras.optimizers.AdamW(
            rate, weight_decay=0.1, beta_2=0.95, global_clipnorm=1.0
        )
    if setting.k is None:
        return inner
    if setting.alpha is not None:
        return Lookahead(inner, k=setting.k, alpha=setting.alpha)
    return Lookahead(inner, k=setting.k, outer_optimizer=setting.outer_optimizer)


def measure(data: Data, settings: Settings, name: str) -> dict[str, Any]:
    """Train once, on new sequences all the time; return losses over the steps.

    The seconds are those that the process had a core, so other programs on the machine
    do not count.
    """
    size = settings["batch_size"] * settings["steps_an_epoch"]
    steps = settings["epochs"] * settings["steps_an_epoch"]
    order = np.random.default_rng(settings["seed"]).permutation(len(data.x_train))
    model = build_model(settings["model"])
    model.compile(
        optimizer=build_optimizer(
            settings["optimizer"], settings["learning_rate"], steps
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=settings["jit_compile"],
    )
    half = len(data.x_test) // 2

    def held_out_loss(part: slice) -> float:
        x, y = data.x_test[part], data.y_test[part]
        return model.evaluate(x, y, batch_size=50, verbose=0)

    epochs = []
    for epoch in range(1, settings["epochs"] + 1):
        chosen = order[np.arange((epoch - 1) * size, epoch * size) % len(order)]
        start = time.process_time()
        history = model.fit(
            data.x_train[chosen],
            data.y_train[chosen],
            batch_size=settings["batch_size"],
            shuffle=False,
            verbose=0,
        ).history
        measured = {
            "epoch": epoch,
            "seconds": time.process_time() - start,
            "loss": history["loss"][0],
            "val_loss": held_out_loss(slice(half)),
        }
        epochs.append(measured)
        print(f"{name}  {epoch}  val_loss {measured['val_loss']:.4f}", flush=True)
    add_trained_seconds(epochs)
    val_loss = epochs[-1]["val_loss"]
    return {
        "val_loss": val_loss if np.isfinite(val_loss) else None,
        "test_loss": held_out_loss(slice(half, None)),
        "weights": int(sum(ops.size(weight) for weight in model.trainable_weights)),
        "epochs": epochs,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = argparse.ArgumentParser("outer", description=__doc__)
    _tuning.add_parts(parser, RATES)
    add_optimizers(parser, SETTINGS, USUAL)
    add = parser.add_argument
    add("--model", choices=MODELS, default="gpt", help="(default: %(default)s)")
    add(
        "--steps-an-epoch",
        type=positive_int,
        default=STEPS_AN_EPOCH,
        metavar="N",
        help="steps between two evaluations (default: %(default)s)",
    )
    add("--jit-compile", action="store_true", help="compile the step with XLA")
    add_options(parser, seeds=[1, 2, 3, 4, 5], data="a path of an imdb.npz")
    options = parser.parse_args(arguments)

    def run(optimizer: str, rate: float, seed: int) -> tuple[str, Settings]:
        setting = SETTINGS[optimizer]
        return f"{options.model}-{optimizer}-rate{rate:g}-seed{seed}", {
            "model": options.model,
            "optimizer": optimizer,
            "learning_rate": rate,
            "k": setting.k,
            "alpha": setting.alpha,
            "eta": setting.eta,
            "mu": setting.mu,
            "seed": seed,
            "batch_size": BATCH_SIZE,
            "steps_an_epoch": options.steps_an_epoch,
            "epochs": options.epochs or EPOCHS,
            "jit_compile": options.jit_compile,
            "train_samples": options.train_samples,
            "test_samples": options.test_samples,
        }

    def loss_of(results: dict[str, Any]) -> float | None:
        return results["val_loss"]

    runs = _tuning.runs_of_part(parser, options, run, loss_of)

    def data() -> Data:
        limits = options.train_samples, options.test_samples
        return load(Path(options.data), *limits)

    return run_all("outer", runs, data, measure, options.output, options.jobs)


if __name__ == "__main__":
    sys.exit(main())

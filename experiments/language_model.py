"""A language model of words: Adam and SGD, each with and without Lookahead.

An LSTM predicts the next word of IMDB reviews. `tune` trains with every learning rate
of a grid; `compare` takes, for each optimizer, the rate of the lowest perplexity on the
validation reviews, and trains from other seeds with it. The perplexities to compare are
those of test reviews, which took no part in the tuning.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
from keras import layers

from examples.common import imdb as reviews
from examples.common.options import add_optimizers
from examples.common.sources import Data, DataError
from experiments._runs import (
    Progress,
    Record,
    Scale,
    Settings,
    add_full_option,
    add_options,
    changed,
    read,
    run_all,
)
from keras_lookahead_lazy import Lookahead, SlowWeights

K, ALPHA = 5, 0.5
LEARNING_RATES = {
    "adam": (1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1),
    "sgd": (3.0, 10.0, 30.0, 50.0, 100.0, 200.0),
}
OPTIMIZERS = ("adam", "lookahead-adam", "sgd", "lookahead-sgd")
CLIPNORM = 0.25
TUNING_SEED = 0


@dataclass(frozen=True, kw_only=True)
class TextScale(Scale):
    """How much is trained, and how large an LSTM.

    `test_samples` are the reviews of validation and test together.
    """

    words: int
    embedding: int
    units: int
    recurrent_layers: int
    dropout: float


SMALL = TextScale(
    words=5_000,
    embedding=128,
    units=128,
    recurrent_layers=1,
    dropout=0.0,
    epochs=3,
    batch_size=16,
    train_samples=5_000,
    test_samples=3_000,
)
FULL = TextScale(
    words=20_000,
    embedding=400,
    units=1150,
    recurrent_layers=3,
    dropout=0.4,
    epochs=40,
    batch_size=16,
)


def load_data(
    source: str, words: int, train: int | None = None, test: int | None = None
) -> Data:
    """Load the last 80 words of reviews that have so many; rarer words are one."""
    data = reviews.load(source, train, test)

    def sequences(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        whole = texts[texts[:, 0] != 0]
        known = np.where(whole < words, whole, reviews.UNKNOWN)
        return known[:, :-1], known[:, 1:]

    x_train, y_train = sequences(data.x_train)
    x_test, y_test = sequences(data.x_test)
    return dataclasses.replace(
        data, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test
    )


def build_model(tokens: int, scale: TextScale) -> keras.Model:
    """Build a language model that ends in a logit for every word."""
    model = keras.Sequential([keras.Input((tokens,), dtype="int32")])
    model.add(layers.Embedding(scale.words, scale.embedding))
    for _ in range(scale.recurrent_layers):
        model.add(layers.LSTM(scale.units, return_sequences=True))
        model.add(layers.Dropout(scale.dropout))
    model.add(layers.Dense(scale.words))
    return model


def build_optimizer(settings: Settings, steps: int) -> keras.optimizers.Optimizer:
    """Build one of `OPTIMIZERS`, with a learning rate that falls to 0 in `steps`."""
    wrapper, _, inner = settings["optimizer"].rpartition("-")
    make = {"adam": keras.optimizers.Adam, "sgd": keras.optimizers.SGD}[inner]
    optimizer = make(
        keras.optimizers.schedules.CosineDecay(settings["learning_rate"], steps),
        global_clipnorm=settings["global_clipnorm"],
    )
    if wrapper:
        return Lookahead(optimizer, k=settings["k"], alpha=settings["alpha"])
    return optimizer


def measure(data: Data, settings: Settings, name: str) -> dict[str, Any]:
    """Train once; return perplexities on validation and test reviews.

    Lookahead is evaluated on its slow weights, on the test reviews on both.
    """
    scale = TextScale(**settings["scale"])
    steps = scale.updates_per_epoch(data) * scale.epochs
    model = build_model(data.x_train.shape[1], scale)
    model.compile(
        optimizer=build_optimizer(settings, steps),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    slow = [SlowWeights()] if isinstance(model.optimizer, Lookahead) else []
    half = len(data.x_test) // 2
    history = model.fit(
        data.x_train,
        data.y_train,
        batch_size=scale.batch_size,
        epochs=scale.epochs,
        validation_data=(data.x_test[:half], data.y_test[:half]),
        validation_batch_size=64,
        callbacks=[*slow, Progress(name)],
        verbose=0,
    ).history

    def test_perplexity(callbacks: list) -> float:
        loss = model.evaluate(
            data.x_test[half:],
            data.y_test[half:],
            batch_size=64,
            verbose=0,
            callbacks=callbacks,
        )
        return _perplexity(loss)

    return {
        "validation_perplexity": _perplexity(history["val_loss"][-1]),
        "test_perplexity": test_perplexity(slow),
        "test_perplexity_fast_weights": test_perplexity([]),
        "epochs": [
            {
                "epoch": epoch,
                "train_perplexity": _perplexity(loss),
                "validation_perplexity": _perplexity(val_loss),
            }
            for epoch, (loss, val_loss) in enumerate(
                zip(history["loss"], history["val_loss"], strict=True), 1
            )
        ],
    }


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def run(
    scale: TextScale, optimizer: str, learning_rate: float, seed: int
) -> tuple[str, Settings]:
    """Name a run and give its settings."""
    return f"{optimizer}-rate{learning_rate:g}-seed{seed}", {
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "global_clipnorm": CLIPNORM,
        "k": K if "lookahead" in optimizer else None,
        "alpha": ALPHA if "lookahead" in optimizer else None,
        "seed": seed,
        "scale": asdict(scale),
    }


def tuning(scale: TextScale, optimizers: Sequence[str]) -> dict[str, Settings]:
    """Every optimizer with every learning rate of its grid."""
    return dict(
        run(scale, optimizer, rate, TUNING_SEED)
        for optimizer in optimizers
        for rate in LEARNING_RATES[optimizer.rpartition("-")[2]]
    )


def comparison(
    scale: TextScale,
    optimizers: Sequence[str],
    seeds: Sequence[int],
    records: Sequence[Record],
) -> dict[str, Settings]:
    """Every optimizer with its best learning rate, from every seed."""
    made = {record["name"]: record for record in records}
    rates = {}
    for optimizer in optimizers:
        needed = tuning(scale, [optimizer])
        missing = [
            name
            for name, settings in needed.items()
            if name not in made or made[name]["settings"] != settings
        ]
        if missing:
            raise DataError(f"not tuned yet: {', '.join(missing)}; run `tune` first")
        rates[optimizer] = tuned_rate(records, optimizer)
    return dict(
        run(scale, optimizer, rates[optimizer], seed)
        for seed in seeds
        for optimizer in optimizers
    )


def tuned_rate(records: Sequence[Record], optimizer: str) -> float:
    """Return the learning rate of the lowest validation perplexity in the tuning."""
    perplexities = {
        record["settings"]["learning_rate"]: record["results"]["validation_perplexity"]
        for record in records
        if record["settings"]["optimizer"] == optimizer
        and record["settings"]["seed"] == TUNING_SEED
    }
    finite = {rate: value for rate, value in perplexities.items() if value is not None}
    if not finite:
        raise DataError(f"{optimizer} has diverged with every learning rate")
    return min(finite, key=finite.__getitem__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one half of the experiment; return the exit status."""
    parser = argparse.ArgumentParser("language_model", description=__doc__)
    parser.add_argument("experiment", choices=("tune", "compare"))
    add_optimizers(parser, OPTIMIZERS)
    add_options(parser, seeds=[1, 2, 3, 4, 5], data="keras, or a path of an imdb.npz")
    add_full_option(parser)
    options = parser.parse_args(arguments)
    scale = changed(
        FULL if options.full else SMALL,
        epochs=options.epochs,
        train_samples=options.train_samples,
        test_samples=options.test_samples,
    )
    runs: Mapping[str, Settings]
    try:
        if options.experiment == "tune":
            runs = tuning(scale, options.optimizers)
        else:
            records = read(options.output)
            runs = comparison(scale, options.optimizers, options.seeds, records)
    except DataError as error:
        parser.error(str(error))

    def load() -> Data:
        limits = scale.train_samples, scale.test_samples
        return load_data(options.data, scale.words, *limits)

    return run_all("language_model", runs, load, measure, options.output, options.jobs)


if __name__ == "__main__":
    sys.exit(main())

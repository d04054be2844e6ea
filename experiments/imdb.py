"""The IMDB experiment of bojone's article on lazy optimizers.

Trains the article's model with Adam, LazyOptimizer and Lookahead, and measures how far
rows of the embedding table move in steps that did not sample them, by which the article
explains the difference.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from examples.common import imdb as reviews
from examples.common.comparison import EpochTimer, epochs_of
from examples.common.options import add_optimizers
from examples.common.sources import Data
from examples.imdb_lazy import __main__ as imdb_lazy
from experiments import _candidates
from experiments._runs import Progress, Settings, add_options, copy_of, run_all
from keras_lookahead_lazy import SlowWeights

EPOCHS, BATCH_SIZE = 8, 32
CURVES = {**imdb_lazy.CURVES, **_candidates.CURVES}
# A step in so many is measured; coprime with k, so that syncs are seen as often as
# other steps.
PROBE_EVERY = 7


class Batches(keras.utils.PyDataset):
    """Batches in an order that depends on seed and epoch alone, so that it is known."""

    def __init__(self, x: np.ndarray, y: np.ndarray, seed: int) -> None:
        super().__init__()
        self.x, self.y, self.seed = x, y, seed
        self.start(epoch=0)

    def start(self, epoch: int) -> None:
        """Take an epoch's order; epochs count from 0.

        Not left to `on_epoch_end`, which Keras also calls once before the first epoch.
        """
        random = np.random.default_rng([self.seed, epoch + 1])
        self._order = random.permutation(len(self.x))

    def __len__(self) -> int:
        return -(-len(self.x) // BATCH_SIZE)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self._order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
        return self.x[chosen], self.y[chosen]


class RowMovement(keras.callbacks.Callback):
    """Starts the epochs of `batches`; measures how far rows move, sampled or not.

    `epochs` gets a dict an epoch: the distance (Euclidean) that a row moved in a step,
    averaged over the rows that were sampled in it and over those that were not, and the
    share of all movement that was of rows not sampled.
    """

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches = batches
        self.epochs: list[dict[str, float]] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begin to add up."""
        self.batches.start(epoch)
        self._distance = {True: 0.0, False: 0.0}
        self._rows = {True: 0, False: 0}

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Note the table before a step that is measured."""
        if batch % PROBE_EVERY == 0:
            self._before = self._table()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Add how far the rows went in it."""
        if batch % PROBE_EVERY:
            return
        moved = np.linalg.norm(self._table() - self._before, axis=1)
        tokens, _ = self.batches[batch]
        is_sampled = np.zeros(len(moved), bool)
        is_sampled[tokens] = True
        for sampled in (True, False):
            rows = moved[is_sampled == sampled]
            self._distance[sampled] += float(rows.sum(dtype="float64"))
            self._rows[sampled] += len(rows)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keep the epoch's means."""
        distance, rows = self._distance, self._rows
        self.epochs.append(
            {
                "moved_if_sampled": distance[True] / rows[True],
                "moved_if_not_sampled": distance[False] / rows[False],
                "share_not_sampled": distance[False] / sum(distance.values()),
            }
        )

    def _table(self) -> np.ndarray:
        return copy_of(self.model.layers[0].embeddings)


def measure(data: Data, settings: Settings, name: str) -> dict[str, Any]:
    """Train once; return what each epoch measured, with Lookahead on both weights."""
    model = imdb_lazy.build_model(tokens=data.x_train.shape[1])
    model.compile(
        optimizer=_candidates.build(settings),
        loss="binary_crossentropy",
        metrics=["accuracy"],
    )
    batches = Batches(data.x_train, data.y_train, settings["seed"])
    movement = RowMovement(batches)
    callbacks = [movement, Progress(name), EpochTimer()]
    if "lookahead" in settings["optimizer"]:
        callbacks.insert(0, SlowWeights(prefix="slow_"))
    history = model.fit(
        batches,
        epochs=settings["epochs"],
        shuffle=False,  # not the batches, too
        validation_data=(data.x_test, data.y_test),
        validation_batch_size=256,
        callbacks=callbacks,
        verbose=0,
    )
    return {
        "best_val_accuracy": max(history.history["val_accuracy"]),
        "epochs": [
            {**measured, **moved}
            for measured, moved in zip(epochs_of(history), movement.epochs, strict=True)
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = argparse.ArgumentParser("imdb", description=__doc__)
    add_optimizers(parser, CURVES, list(imdb_lazy.CURVES))
    _candidates.add_weight_decay(parser)
    add_options(parser, seeds=[0, 1, 2], data="keras, or a path of an imdb.npz")
    options = parser.parse_args(arguments)
    end, decay = _candidates.weight_decay(parser, options)
    runs: dict[str, Settings] = {
        f"{optimizer}{end}-seed{seed}": {
            "optimizer": optimizer,
            "seed": seed,
            "epochs": options.epochs or EPOCHS,
            "train_samples": options.train_samples,
            "test_samples": options.test_samples,
            **decay,
        }
        for seed in options.seeds
        for optimizer in options.optimizers
    }

    def load() -> Data:
        return reviews.load(options.data, options.train_samples, options.test_samples)

    return run_all("imdb", runs, load, measure, options.output, options.jobs)


if __name__ == "__main__":
    sys.exit(main())

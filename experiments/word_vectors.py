"""Word vectors: skip-gram with negative sampling on IMDB reviews, every word a row.

Two tables, of the words and of their contexts (Mikolov et al., "Distributed
Representations of Words and Phrases and their Compositionality", arXiv:1310.4546), of
88,585 rows each, most of which a batch does not sample.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from examples.common.comparison import add_trained_seconds
from examples.common.options import add_optimizers, positive_int
from examples.common.plots import BLACK, BLUE, GREY, ORANGE, Curve
from examples.common.sources import Data, read_npz
from experiments import _candidates, _tuning
from experiments._runs import Settings, add_options, copy_of, run_all
from keras_lookahead_lazy import LazyOptimizer

WIDTH = 32
WINDOW, NEGATIVES = 5, 5
KEEP = 1e-4  # a word more frequent than this is left out at random, as in the paper
POWER = 0.75  # of the frequencies by which negatives are drawn
BATCH_SIZE = 4096
EPOCHS, BATCHES_AN_EPOCH = 4, 250
HELD_OUT = 100_000  # pairs, of validation and of test each
RARE = 10_000  # words beyond this rank are rare
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# great, horror, awful, actress, zombie, spielberg, guitar, submarine
PROBES = (84, 186, 370, 521, 862, 3684, 5490, 7979)
NEIGHBOURS, AMONG = 5, 5_000

CURVES = {
    "adam": Curve("Adam", BLACK),
    "lazy-decay": Curve("LazyOptimizer, decay", BLUE),
    "lazy-freeze": Curve("LazyOptimizer, freeze", ORANGE),
    "lazy-adagrad": Curve("LazyOptimizer(Adagrad)", GREY),
    **_candidates.CURVES,
}
USUAL = [name for name in CURVES if name not in _candidates.CURVES]


@dataclass(frozen=True)
class Text(Data):
    """Reviews as word ranks from 1, all behind each other.

    Attributes:
        x_train, x_test: the ranks.
        y_train, y_test: the number of the review that each word is of.
        words: the words by rank, empty where they are not known.
    """

    words: list[str]


def load(
    path: Path, words: Path | None, train: int | None = None, test: int | None = None
) -> Text:
    """Read an `imdb.npz` as Keras caches it, with all of its words.

    Args:
        path: the file.
        words: Keras's `imdb_word_index.json`, which gives ranks their words.
        train: at most so many reviews to train on.
        test: at most so many held out.
    """
    parts = read_npz(path, ["x_train", "x_test"], allow_pickle=True)
    x_train, y_train = _in_a_row(parts[0][:train])
    x_test, y_test = _in_a_row(parts[1][:test])
    by_rank = [""]
    if words:
        ranks = json.loads(words.read_text(encoding="utf-8"))
        by_rank += sorted(ranks, key=ranks.__getitem__)
    return Text(
        "IMDB, all words", x_train, y_train, x_test, y_test, EPOCHS, words=by_rank
    )


def _in_a_row(reviews: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All words, and the review of each."""
    lengths = [len(review) for review in reviews]
    numbers = np.arange(len(lengths), dtype="int32")
    return np.concatenate(reviews).astype("int32"), np.repeat(numbers, lengths)


def pairs_of(
    words: np.ndarray,
    reviews: np.ndarray,
    counts: np.ndarray,
    random: np.random.Generator,
) -> np.ndarray:
    """List a text's pairs of a word and one near it, of shape `(pairs, 2)`.

    Frequent words are left out at random; then each word has its own window of 1 to
    `WINDOW` words to either side.

    Args:
        words: the words' ranks.
        reviews: the review of each; a pair is of one review.
        counts: how often each word is in the training text.
        random: draws which words are left out, and windows.
    """
    share = counts / counts.sum()
    keep = np.sqrt(KEEP / np.maximum(share, KEEP))
    kept = random.random(len(words)) < keep[words]
    words, reviews = words[kept], reviews[kept]
    window = random.integers(1, WINDOW + 1, len(words))
    found = []
    for distance in range(1, WINDOW + 1):
        left, right = words[:-distance], words[distance:]
        same = reviews[:-distance] == reviews[distance:]
        after = same & (window[:-distance] >= distance)
        before = same & (window[distance:] >= distance)
        found.append(np.stack([left[after], right[after]], axis=1))
        found.append(np.stack([right[before], left[before]], axis=1))
    return np.concatenate(found)


class Negatives:
    """Draws words by their frequency to the power `POWER`."""

    def __init__(self, counts: np.ndarray) -> None:
        weights = counts**POWER
        self._sums = np.cumsum(weights / weights.sum())

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Draw `NEGATIVES` words for each of `count` pairs."""
        drawn = np.searchsorted(self._sums, random.random((count, NEGATIVES)))
        return np.minimum(drawn, len(self._sums) - 1).astype("int32")


def build_model(rows: int) -> keras.Model:
    """Build a model that gives a logit to each pair of a word and a context."""
    word = keras.Input((), dtype="int32", name="word")
    contexts = keras.Input((1 + NEGATIVES,), dtype="int32", name="contexts")
    bound = 0.5 / WIDTH  # as word2vec starts
    start = keras.initializers.RandomUniform(-bound, bound)
    vector = layers.Embedding(rows, WIDTH, embeddings_initializer=start, name="words")(
        word
    )
    others = layers.Embedding(
        rows, WIDTH, embeddings_initializer="zeros", name="contexts_of_words"
    )(contexts)
    return keras.Model([word, contexts], layers.Dot((2, 1))([others, vector]))


def build(settings: Settings) -> keras.optimizers.Optimizer:
    """Build one of `CURVES`."""
    if settings["optimizer"] == "lazy-adagrad":
        return LazyOptimizer(keras.optimizers.Adagrad(settings["learning_rate"]))
    return _candidates.build(settings)


def measure(data: Data, settings: Settings, name: str) -> dict[str, Any]:
    """Train once; return losses on held-out pairs, and the neighbours of some words.

    The best epoch is that of the lowest loss on the validation pairs.
    """
    assert isinstance(data, Text)
    rows = 1 + int(max(data.x_train.max(), data.x_test.max()))
    counts = np.bincount(data.x_train, minlength=rows).astype("float64")
    negatives = Negatives(counts)
    random = np.random.default_rng(settings["seed"])
    pairs = random.permutation(
        pairs_of(data.x_train, data.y_train, counts, random), axis=0
    )
    held_out = _held_out(data, counts, negatives)
    model = build_model(rows)
    model.compile(
        optimizer=build(settings),
        # The sum over the batch, so that epsilon is small beside a row's gradient.
        loss=keras.losses.BinaryCrossentropy(from_logits=True, reduction="sum"),
    )
    size = settings["batch_size"] * settings["batches_an_epoch"]
    epochs = []
    for epoch in range(1, settings["epochs"] + 1):
        chosen = np.arange((epoch - 1) * size, epoch * size) % len(pairs)
        inputs, labels = _with_negatives(pairs[chosen], negatives, random)
        start = time.perf_counter()
        model.fit(
            inputs,
            labels,
            batch_size=settings["batch_size"],
            shuffle=False,
            verbose=0,
        )
        seconds = time.perf_counter() - start
        measured: dict[str, float] = {"epoch": epoch, "seconds": seconds}
        for part, (inputs, labels) in held_out.items():
            losses = _losses(model, inputs, labels)
            is_rare = np.maximum(inputs[0], inputs[1][:, 0]) > RARE
            measured[f"{part}_loss"] = float(losses.mean())
            measured[f"{part}_loss_rare"] = float(losses[is_rare].mean())
        epochs.append(measured)
        line = f"loss {measured['val_loss']:.4f}, rare {measured['val_loss_rare']:.4f}"
        print(f"{name}  epoch {epoch}  {line}", flush=True)
    add_trained_seconds(epochs)
    best = min(epochs, key=lambda each: each["val_loss"])
    return {
        "best_epoch": best["epoch"],
        **{key: value for key, value in best.items() if "loss" in key},
        "epochs": epochs,
        "neighbours": _neighbours(copy_of(model.get_layer("words").embeddings), data),
    }


Examples = tuple[list[np.ndarray], np.ndarray]  # inputs and labels


def _with_negatives(
    pairs: np.ndarray, negatives: Negatives, random: np.random.Generator
) -> Examples:
    drawn = negatives.draw(len(pairs), random)
    contexts = np.concatenate([pairs[:, 1:], drawn], axis=1)
    labels = np.zeros(contexts.shape, "float32")
    labels[:, 0] = 1
    return [pairs[:, 0], contexts], labels


def _held_out(
    data: Text, counts: np.ndarray, negatives: Negatives
) -> dict[str, Examples]:
    """The same pairs for every seed, of one half of the held-out reviews each."""
    random = np.random.default_rng(0)
    is_first = data.y_test <= data.y_test[-1] // 2
    held_out = {}
    for part, chosen in (("val", is_first), ("test", ~is_first)):
        pairs = pairs_of(data.x_test[chosen], data.y_test[chosen], counts, random)
        pairs = random.permutation(pairs, axis=0)[:HELD_OUT]
        held_out[part] = _with_negatives(pairs, negatives, random)
    return held_out


def _losses(
    model: keras.Model, inputs: list[np.ndarray], labels: np.ndarray
) -> np.ndarray:
    """Each pair's loss, with its negatives, as in the paper: a sum over them."""
    logits = model.predict(inputs, batch_size=16_384, verbose=0)
    return np.logaddexp(0, np.where(labels > 0, -logits, logits)).sum(axis=1)


def _neighbours(table: np.ndarray, data: Text) -> dict[str, list[str]]:
    """The words whose vectors point most nearly where a word's does."""

    def name(rank: int) -> str:
        return data.words[rank] if rank < len(data.words) else str(rank)

    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    found = {}
    for probe in PROBES:
        nearness = unit[1 : AMONG + 1] @ unit[probe]
        nearest = 1 + np.argsort(-nearness)
        ranks = [rank for rank in nearest.tolist() if rank != probe]
        found[name(probe)] = [name(rank) for rank in ranks[:NEIGHBOURS]]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = argparse.ArgumentParser("word_vectors", description=__doc__)
    _tuning.add_parts(parser, RATES)
    add_optimizers(parser, CURVES, USUAL)
    add = parser.add_argument
    for option, default in (
        ("--batch-size", BATCH_SIZE),
        ("--batches-an-epoch", BATCHES_AN_EPOCH),
    ):
        add(
            option,
            type=positive_int,
            default=default,
            metavar="N",
            help="(default: %(default)s)",
        )
    add(
        "--words",
        type=Path,
        metavar="FILE",
        help="Keras's imdb_word_index.json, to name neighbours (default: their ranks)",
    )
    _candidates.add_weight_decay(parser)
    add_options(parser, seeds=list(range(8)), data="a path of an imdb.npz")
    options = parser.parse_args(arguments)
    end, decay = _candidates.weight_decay(parser, options)

    def run(optimizer: str, rate: float, seed: int) -> tuple[str, Settings]:
        kind = f"batch{options.batch_size}"
        if options.batches_an_epoch != BATCHES_AN_EPOCH:
            kind += f"x{options.batches_an_epoch}"
        return f"{optimizer}-{kind}-rate{rate:g}{end}-seed{seed}", {
            "optimizer": optimizer,
            "seed": seed,
            "learning_rate": rate,
            "batch_size": options.batch_size,
            "batches_an_epoch": options.batches_an_epoch,
            "epochs": options.epochs or EPOCHS,
            "train_samples": options.train_samples,
            "test_samples": options.test_samples,
            **decay,
        }

    def loss_of(results: dict[str, Any]) -> float | None:
        return results["val_loss"]

    runs = _tuning.runs_of_part(parser, options, run, loss_of)

    def data() -> Data:
        limits = options.train_samples, options.test_samples
        return load(Path(options.data), options.words, *limits)

    return run_all("word_vectors", runs, data, measure, options.output, options.jobs)


if __name__ == "__main__":
    sys.exit(main())

"""IMDB reviews as padded word numbers, and a made-up corpus of the same kind."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import keras
import numpy as np

from examples.common.sources import Data, DataError, cached, choose, download, read_npz

NUM_WORDS = 20_000
TOKENS = 80
EPOCHS = 5

# Keras's conventions: 0 pads, and word ranks, which count from 1, move up by 3.
START, UNKNOWN, INDEX_FROM = 1, 2, 3
SHUFFLE_SEED = 113

URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/imdb.npz"
SOURCES = (
    "keras: keras.datasets.imdb; synthetic: made-up reviews; a path: a file as Keras "
    "caches it (imdb.npz; read with pickle, so only one you trust)"
)


def load(
    source: str,
    train: int | None = None,
    test: int | None = None,
    tokens: int = TOKENS,
    negated: float = 0.0,
) -> Data:
    """Load one of `SOURCES`, at most so many reviews of each part.

    Parameters
    ----------
    tokens : int
        How many words of a review to keep; the made-up ones have their own length.
    negated : float
        What share of the words of made-up reviews is negated.
    """
    return choose(
        source,
        (train, test),
        partial(from_keras, tokens=tokens),
        partial(from_path, tokens=tokens),
        "synthetic",
        partial(synthetic, negated=negated),
    )


def from_keras(
    train: int | None = None, test: int | None = None, tokens: int = TOKENS
) -> Data:
    """Load `keras.datasets.imdb`, from Keras's cache where it is there."""
    file = cached("imdb.npz")
    if file:
        # Read here, as Keras would delete one of another hash before it downloads.
        return from_path(file, train, test, tokens)
    (x_train, y_train), (x_test, y_test) = download(
        lambda: keras.datasets.imdb.load_data(num_words=NUM_WORDS), URL
    )
    return Data(
        "IMDB",
        pad(x_train[:train], tokens),
        y_train[:train],
        pad(x_test[:test], tokens),
        y_test[:test],
        EPOCHS,
    )


def from_path(
    path: Path,
    train: int | None = None,
    test: int | None = None,
    tokens: int = TOKENS,
) -> Data:
    """Load a file as Keras caches it: word ranks and labels, as object arrays."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    x_train, y_train, x_test, y_test = read_npz(path, keys, allow_pickle=True)
    random = np.random.RandomState(SHUFFLE_SEED)  # one for both parts, as in Keras
    try:
        return Data(
            "IMDB",
            *prepare(x_train, y_train, train, random, tokens),
            *prepare(x_test, y_test, test, random, tokens),
            EPOCHS,
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: wrong format, {error}") from error


def prepare(
    reviews: np.ndarray,
    labels: np.ndarray,
    limit: int | None,
    random: np.random.RandomState,
    tokens: int = TOKENS,
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle, number and pad reviews as `keras.datasets.imdb` and `fit` want them."""
    if reviews.ndim == 0 or labels.shape != reviews.shape[:1]:
        raise ValueError("reviews and labels differ in number")
    if len(reviews) == 0:
        raise ValueError("no reviews in it")
    labels = labels.astype("int64")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels other than 0 and 1")
    order = np.arange(len(reviews))
    random.shuffle(order)
    order = order[:limit]
    return pad(number(reviews[order]), tokens), labels[order]


def number(reviews: Iterable[Iterable[int]]) -> list[np.ndarray]:
    """Turn word ranks into the numbers that `keras.datasets.imdb` gives."""
    numbered = []
    for review in reviews:
        ranks = np.asarray(review, dtype="int64")
        if ranks.ndim != 1 or (ranks < 1).any():
            raise ValueError("a review that is not a list of word ranks from 1")
        words = ranks + INDEX_FROM
        words[words >= NUM_WORDS] = UNKNOWN
        numbered.append(np.concatenate(([START], words)))
    return numbered


def pad(reviews: Iterable[Iterable[int]], tokens: int = TOKENS) -> np.ndarray:
    """Keep the last `tokens` words of each review, with zeros before a shorter one."""
    return keras.utils.pad_sequences(list(reviews), maxlen=tokens)


def synthetic(
    train: int | None = None, test: int | None = None, negated: float = 0.0
) -> Data:
    """Make up short reviews in which many words, none of them common, carry the label.

    A word's frequency falls with its rank as in natural language (Zipf, Mandelbrot).
    After the 50 most frequent words, three words in ten lean to one of the labels, each
    by its own strength. The rarest of them occur in too few reviews to be learnt, so
    that a model which remembers its training reviews does worse on others: there the
    optimizers differ. Someone who knew all frequencies could label 89 % correctly.

    A word that is negated has the most frequent word before it, and is one that a
    review of the other label would have: then it takes pairs of words to tell.
    """
    ranks = np.arange(1, 5_001)
    words = np.random.default_rng(7)
    leaning = words.normal(scale=1.5, size=ranks.size)
    leaning[words.random(ranks.size) > 0.3] = 0
    leaning[:50] = 0
    frequencies = []
    for sign in (-1, 1):
        frequency = np.exp(-1.05 * np.log(ranks + 2.7) + sign * leaning / 2)
        frequencies.append(frequency / frequency.sum())

    def reviews(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(seed)
        labels = random.integers(0, 2, count)
        lengths = random.integers(12, 21, count)
        texts = [
            random.choice(ranks, size=length, p=frequencies[label])
            for length, label in zip(lengths, labels, strict=True)
        ]
        if negated:
            for i, label in enumerate(labels):
                chosen = random.random(lengths[i]) < negated
                others = random.choice(ranks, size=lengths[i], p=frequencies[1 - label])
                words = np.where(chosen, others, texts[i])
                texts[i] = np.insert(words, np.flatnonzero(chosen), ranks[0])
        return pad(number(texts), tokens=40 if negated else 18), labels

    x_train, y_train = reviews(train or 3_000, seed=1)
    x_test, y_test = reviews(test or 1_000, seed=2)
    return Data("synthetic reviews", x_train, y_train, x_test, y_test, epochs=4)

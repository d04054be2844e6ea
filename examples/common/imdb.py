"""IMDB reviews as padded word numbers, and a made-up corpus of the same kind."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

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
    **settings: Any,
) -> Data:
    """Load one of `SOURCES`, at most so many reviews of each part.

    Args:
        source: what to load.
        train: at most so many reviews to train on.
        test: at most so many reviews to test on.
        tokens: how many words of a review to keep; synthetic ones are short.
        **settings: of `synthetic`.
    """
    return choose(
        source,
        (train, test),
        partial(from_keras, tokens=tokens),
        partial(from_path, tokens=tokens),
        "synthetic",
        partial(synthetic, **settings),
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
    train: int | None = None,
    test: int | None = None,
    count: int = 3_000,
    words: tuple[int, int] = (12, 20),
    share: float = 0.3,
    strength: float = 1.5,
    negated: float = 0.0,
) -> Data:
    """Make short reviews in which many words, none of them common, carry the label.

    A word's frequency falls with its rank as in natural language (Zipf, Mandelbrot).
    After the 50 most frequent words, a share of the words lean to one of the labels,
    each by its own strength. The rarest of them occur in too few reviews to be learned,
    so a model that remembers its training reviews does worse on others: this is where
    the optimizers differ. With the defaults, someone who knew all frequencies could
    label 89 % of the reviews correctly.

    Args:
        train: number of reviews to train on, `count` if `None`.
        test: number of reviews to test on, a third of `count` if `None`.
        count: the usual number of reviews to train on.
        words: the shortest and the longest length of a review.
        share: how many of the words lean to a label.
        strength: how far they lean, as a standard deviation.
        negated: share of the words in a review that are negated. A negated word is one
            that a review of the other label would have, after the most frequent word.
            Then it takes pairs of words to tell the label.
    """
    ranks = np.arange(1, 5_001)
    lexicon = np.random.default_rng(7)
    leaning = lexicon.normal(scale=strength, size=ranks.size)
    leaning[lexicon.random(ranks.size) > share] = 0
    leaning[:50] = 0
    frequencies = []
    for sign in (-1, 1):
        frequency = np.exp(-1.05 * np.log(ranks + 2.7) + sign * leaning / 2)
        frequencies.append(frequency / frequency.sum())

    def reviews(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(seed)
        labels = random.integers(0, 2, count)
        lengths = random.integers(words[0], words[1] + 1, count)
        texts = [
            random.choice(ranks, size=length, p=frequencies[label])
            for length, label in zip(lengths, labels, strict=True)
        ]
        if negated:
            for i, label in enumerate(labels):
                chosen = random.random(lengths[i]) < negated
                others = random.choice(ranks, size=lengths[i], p=frequencies[1 - label])
                mixed = np.where(chosen, others, texts[i])
                texts[i] = np.insert(mixed, np.flatnonzero(chosen), ranks[0])
        tokens = 2 * words[1] if negated else words[1] - 2
        return pad(number(texts), tokens), labels

    x_train, y_train = reviews(train or count, seed=1)
    x_test, y_test = reviews(test or count // 3, seed=2)
    return Data("synthetic reviews", x_train, y_train, x_test, y_test, epochs=4)

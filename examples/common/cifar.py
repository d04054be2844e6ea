"""CIFAR-10 from Keras or from a file of JPEGs, and scikit-learn's digits."""

import io
from pathlib import Path

import keras
import numpy as np
from PIL import Image

from examples.common.sources import (
    Data,
    DataError,
    attempt,
    cached,
    choose,
    download,
    read_npz,
)

EPOCHS = 10
SIDE = 32
CLASSES = 10
SHUFFLE_SEED = 0

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SOURCES = (
    "keras: keras.datasets.cifar10; digits: scikit-learn's handwritten digits; a path: "
    "an .npz file of JPEGs (train_jpeg, train_size, train_label and the same for test)"
)


def load(source: str, train: int | None = None, test: int | None = None) -> Data:
    """Load one of `SOURCES`, at most so many pictures of each part."""
    return choose(source, (train, test), from_keras, from_path, "digits", digits)


def from_keras(train: int | None = None, test: int | None = None) -> Data:
    """Load `keras.datasets.cifar10`, from Keras's cache where it is there."""
    load = keras.datasets.cifar10.load_data
    # The archive's name in the cache has changed between Keras versions.
    (x_train, y_train), (x_test, y_test) = (
        attempt(load) if cached("cifar-10-batches-py*") else download(load, URL)
    )
    return scale(
        x_train[:train],
        y_train[:train].ravel(),
        x_test[:test],
        y_test[:test].ravel(),
    )


def from_path(path: Path, train: int | None = None, test: int | None = None) -> Data:
    """Load an .npz file of JPEGs.

    `train_jpeg` holds the bytes of all files end to end, `train_size` the number of
    bytes of each, `train_label` its class; `test_jpeg` and so on likewise.
    """
    parts = ("train", "test")
    keys = [f"{part}_{kind}" for part in parts for kind in ("jpeg", "size", "label")]
    arrays = read_npz(path, keys)
    try:
        x_train, y_train = decode(train, *arrays[:3])
        x_test, y_test = decode(test, *arrays[3:])
    # Pillow raises an OSError or a SyntaxError for a file it cannot read.
    except (TypeError, ValueError, OSError, SyntaxError) as error:
        raise DataError(f"{path}: wrong format, {error}") from error
    return scale(x_train, y_train, x_test, y_test)


def decode(
    limit: int | None, jpeg: np.ndarray, sizes: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Decode `limit` of the JPEGs, shuffled, as the file may be sorted by class."""
    if jpeg.dtype != np.uint8 or jpeg.ndim != 1:
        raise ValueError("JPEG data that are not a row of bytes")
    if sizes.ndim != 1 or sizes.shape != labels.shape:
        raise ValueError("sizes and labels differ in number")
    if len(sizes) == 0:
        raise ValueError("no pictures in it")
    if sizes.dtype.kind not in "iu" or (sizes < 1).any() or sizes.sum() != len(jpeg):
        raise ValueError("sizes that do not add up to the JPEG data")
    labels = labels.astype("int64")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"labels other than 0 to {CLASSES - 1}")
    ends = np.cumsum(sizes, dtype="int64")
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(sizes))[:limit]
    pictures = np.empty((len(order), SIDE, SIDE, 3), "uint8")
    for picture, index in zip(pictures, order, strict=True):
        data = jpeg[ends[index] - sizes[index] : ends[index]].tobytes()
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if image.size != (SIDE, SIDE):
                raise ValueError(f"a picture that is not {SIDE} x {SIDE}")
            picture[:] = image.convert("RGB")
    return pictures, labels[order]


def digits(train: int | None = None, test: int | None = None) -> Data:
    """Load scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn, not installed") from error
    pictures, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(labels))
    pictures, labels = pictures[order].reshape(-1, 8, 8, 1), labels[order]
    held_out = 360
    return scale(
        pictures[held_out:][:train],
        labels[held_out:][:train],
        pictures[:held_out][:test],
        labels[:held_out][:test],
        source="scikit-learn's digits",
        epochs=15,
    )


def scale(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    source: str = "CIFAR-10",
    epochs: int = EPOCHS,
) -> Data:
    """Give every colour mean 0 and deviation 1 over the training pictures."""
    x_train, x_test = x_train.astype("float32"), x_test.astype("float32")
    mean = x_train.mean(axis=(0, 1, 2))
    deviation = x_train.std(axis=(0, 1, 2)) + 1e-6
    return Data(
        source,
        (x_train - mean) / deviation,
        y_train,
        (x_test - mean) / deviation,
        y_test,
        epochs,
    )

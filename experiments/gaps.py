"""How many steps lie between two samples of a row, in each of the tasks.

Nothing is trained: the batches of a whole training are drawn, and each time that a row
is sampled again, the steps since the time before are counted.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.common import imdb as reviews
from examples.common.options import add_output
from examples.common.sources import Data
from examples.large_table.__main__ import with_pairs
from experiments import imdb, large_table, ncf, word_vectors
from experiments._runs import RESULTS, Settings, run_all

Batches = Iterator[list[np.ndarray]]  # the rows of each table, a step after the other


def gaps_of(batches: Batches, tables: Sequence[int]) -> dict[str, float]:
    """Count the steps since each sampled row was sampled before, if it was.

    Args:
        batches: the rows that each step samples, of each table.
        tables: how many rows each table has.

    Returns:
        Quantiles over the samples, where a row counts as often as it is sampled; and
        the median over rows of the steps for each sample, where all rows count alike
        but those that are never sampled.
    """
    last = [np.full(rows, -1) for rows in tables]
    samples = [np.zeros(rows, int) for rows in tables]
    gaps = []
    for step, batch in enumerate(batches):
        for ids, seen, times in zip(batch, last, samples, strict=True):
            sampled = np.unique(ids)
            before = seen[sampled]
            gaps.append(step - before[before >= 0])
            seen[sampled] = step
            times[sampled] += 1
    quarter, median, most = np.quantile(np.concatenate(gaps), (0.25, 0.5, 0.75))
    times = np.concatenate(samples)
    return {
        "first_quartile": float(quarter),
        "median": float(median),
        "third_quartile": float(most),
        "median_row": float(np.median((step + 1) / times[times > 0])),
        "rows_sampled": float(np.mean(times > 0)),
    }


def _shuffled(x: np.ndarray, batch_size: int, epochs: int) -> Batches:
    random = np.random.default_rng(0)
    for _ in range(epochs):
        order = random.permutation(len(x))
        for start in range(0, len(x), batch_size):
            yield [x[order[start : start + batch_size]]]


def _imdb(data: Data) -> tuple[Batches, list[int]]:
    return _shuffled(data.x_train, imdb.BATCH_SIZE, imdb.EPOCHS), [reviews.NUM_WORDS]


def _large_table(data: Data) -> tuple[Batches, list[int]]:
    x = with_pairs(data.x_train, large_table.ROWS)
    batches = _shuffled(x, large_table.BATCH_SIZE, large_table.EPOCHS)
    not_padding = ([ids[ids > 0]] for (ids,) in batches)
    return not_padding, [large_table.ROWS]


def _ncf(
    data: Data, batch_size: int, epochs: int, crosses: bool = False
) -> tuple[Batches, list[int]]:
    assert isinstance(data, ncf.Ratings)

    def batches(data: ncf.Ratings = data) -> Batches:
        for epoch in range(1, epochs + 1):
            pairs, _ = ncf.examples_of(data, 0, epoch)
            inputs = ncf.inputs_of(pairs, data.items, ncf.CROSSES if crosses else 0)
            for start in range(0, len(pairs), batch_size):
                batch = [ids[start : start + batch_size] for ids in inputs]
                yield batch[2:] if crosses else batch

    return batches(), [ncf.CROSSES] if crosses else [data.users, data.items]


def _word_vectors(data: Data) -> tuple[Batches, list[int]]:
    assert isinstance(data, word_vectors.Text)
    rows = 1 + int(max(data.x_train.max(), data.x_test.max()))
    counts = np.bincount(data.x_train, minlength=rows).astype("float64")
    random = np.random.default_rng(0)
    pairs = word_vectors.pairs_of(data.x_train, data.y_train, counts, random)
    pairs = random.permutation(pairs, axis=0)
    negatives = word_vectors.Negatives(counts)
    size = word_vectors.BATCH_SIZE
    steps = word_vectors.EPOCHS * word_vectors.BATCHES_AN_EPOCH

    def batches() -> Batches:
        for step in range(steps):
            batch = pairs[step * size : (step + 1) * size]
            drawn = negatives.draw(len(batch), random)
            yield [batch[:, 0], np.concatenate([batch[:, 1:], drawn], axis=1)]

    return batches(), [rows, rows]


# By the name of the task: where its data come from, and its batches.
TASKS: dict[str, tuple[str, Callable[[Data], tuple[Batches, list[int]]]]] = {
    "imdb": ("imdb", _imdb),
    "large_table": ("pairs", _large_table),
    "ncf-256": ("ratings", lambda data: _ncf(data, 256, 20)),
    "ncf-16384": ("ratings", lambda data: _ncf(data, 16_384, 30)),
    "ncf-16384-crosses": ("ratings", lambda data: _ncf(data, 16_384, 30, True)),
    "word_vectors": ("text", _word_vectors),
}


def measure(data: Data, settings: Settings, name: str) -> dict[str, Any]:
    """Draw a task's batches; return how far apart a row's samples are."""
    return gaps_of(*TASKS[settings["task"]][1](data))


def main(arguments: Sequence[str] | None = None) -> int:
    """Count for every task; return the exit status."""
    parser = argparse.ArgumentParser("gaps", description=__doc__)
    add = parser.add_argument
    add("--imdb", required=True, metavar="FILE", help="a path of an imdb.npz")
    add("--ratings", required=True, type=Path, metavar="FILE", help="as for ncf")
    add_output(parser, str(RESULTS / "gaps"), "where the files go")
    options = parser.parse_args(arguments)
    loaders: dict[str, Callable[[], Data]] = {
        "imdb": lambda: reviews.load(options.imdb),
        "pairs": lambda: reviews.load(options.imdb, tokens=large_table.TOKENS),
        "ratings": lambda: ncf.load(options.ratings),
        "text": lambda: word_vectors.load(Path(options.imdb), None),
    }
    failed = 0
    for source, load in loaders.items():
        runs: dict[str, Settings] = {
            task: {"task": task, "seed": 0}
            for task, (its, _) in TASKS.items()
            if its == source
        }
        failed |= run_all("gaps", runs, load, measure, options.output)
    return failed


if __name__ == "__main__":
    sys.exit(main())

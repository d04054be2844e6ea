"""Compare runs that were made again with those in `experiments/results`.

`python -m experiments.compare results/imdb` prints a line a run. On the same machine a
run ends where it ended before, to the last digit: "equal". Another one rounds
differently, and that grows; what a run was made for then has to lie within the interval
in which 95 % of further seeds would, by what the committed ones say. The status is 1 if
one lies outside, or if there are no two seeds to tell.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.common.sources import DataError
from experiments._intervals import next_interval
from experiments._runs import RESULTS, Record, Settings, read

# What a run was made for, by the experiment.
MEASURES = {
    "imdb": "best_val_accuracy",
    "large_table": "best_val_accuracy",
    "cifar": "test.accuracy",
    "language_model": "test_perplexity",
    "ncf": "test_hr10",
    "word_vectors": "test_loss",
}


def numbers(results: Any, path: str = "") -> Iterator[tuple[str, float | None]]:
    """List the numbers that a run measured, but for the time it took, with places."""
    if isinstance(results, dict):
        for key, value in results.items():
            if not key.endswith("seconds"):
                yield from numbers(value, f"{path}.{key}" if path else key)
    elif isinstance(results, list):
        for index, value in enumerate(results):
            yield from numbers(value, f"{path}[{index}]")
    elif not isinstance(results, str):
        yield path, results


def difference(again: Any, before: Any) -> str:
    """Say how far two runs' results are apart; empty if they are equal."""
    first, second = dict(numbers(again)), dict(numbers(before))
    if first.keys() != second.keys():
        return "not measured in the same way"
    off = {
        path: _relative(value, second[path])
        for path, value in first.items()
        if value != second[path]
    }
    if not off:
        return ""
    farthest = max(off, key=off.__getitem__)
    return f"{farthest} is {first[farthest]}, was {second[farthest]}"


def differing(settings: Settings, before: Settings) -> str:
    """Say which settings two runs do not share, and what each has."""
    first, second = dict(numbers(settings)), dict(numbers(before))
    return ", ".join(
        f"{name} is {_shown(first, name)}, was {_shown(second, name)}"
        for name in {**second, **first}
        if _shown(first, name) != _shown(second, name)
    )


def _shown(settings: Settings, name: str) -> str:
    return repr(settings[name]) if name in settings else "not set"


def against_seeds(again: Record, committed: Iterable[Record]) -> tuple[bool, str]:
    """Say whether a run lies where further seeds would, and in words."""
    measure = MEASURES.get(again["experiment"], "")
    values = [
        dict(numbers(record["results"])).get(measure)
        for record in committed
        if _but_seed(record) == _but_seed(again)
    ]
    value = dict(numbers(again["results"])).get(measure)
    known = [each for each in values if each is not None]
    if value is None or len(known) < max(2, len(values)):
        return False, f"no interval, from {len(known)} seeds"
    mean, margin = next_interval(known)
    is_within = abs(value - mean) <= margin
    verdict = "within" if is_within else "outside of"
    return is_within, (
        f"{verdict} the interval: {measure} is {value:.6g}; {len(known)} seeds say "
        f"{mean:.6g} ± {margin:.2g}"
    )


def _but_seed(record: Record) -> tuple[str, Settings]:
    return record["experiment"], {**record["settings"], "seed": None}


def _relative(value: float | None, before: float | None) -> float:
    if value is None or before is None:  # one of them diverged
        return math.inf
    return abs(value - before) / max(abs(value), abs(before))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare a folder with the committed one; return the exit status."""
    parser = argparse.ArgumentParser("compare", description=__doc__)
    parser.add_argument("folder", type=Path, help="where runs were made again")
    options = parser.parse_args(arguments)
    try:
        records = read(options.folder)
    except DataError as error:
        parser.error(str(error))
    if not records:
        parser.error(f"no runs in {options.folder}")
    committed = {
        (record["experiment"], record["name"]): record
        for folder in RESULTS.iterdir()
        for record in read(folder)
    }
    failed = 0
    for record in records:
        is_fine, verdict = _compare(record, committed)
        failed += not is_fine
        print(f"{record['name']}: {verdict}")
    return min(failed, 1)


def _compare(record: Record, committed: Mapping[Any, Record]) -> tuple[bool, str]:
    before = committed.get((record["experiment"], record["name"]))
    if before is None:
        return False, "not in experiments/results"
    if before["settings"] != record["settings"]:
        settings = differing(record["settings"], before["settings"])
        return False, f"made with other settings: {settings}"
    off = difference(record["results"], before["results"])
    if not off:
        return True, "equal"
    is_fine, verdict = against_seeds(record, committed.values())
    others = [
        f"{key} {record['environment'].get(key)}, was {value}"
        for key, value in before["environment"].items()
        if key != "date" and value != record["environment"].get(key)
    ]
    return is_fine, "; ".join([verdict, off, *others])


if __name__ == "__main__":
    sys.exit(main())

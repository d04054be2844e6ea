"""Compare runs that were made again with those in `experiments/results`.

`python -m experiments.compare results/imdb` prints a line a run: what both hold is
equal, or which number is farthest off. The status is 1 unless all are equal.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments._runs import RESULTS, read


def numbers(results: Any, path: str = "") -> Iterator[tuple[str, float | None]]:
    """List what a run measured, all but the time it took, with its place."""
    if isinstance(results, dict):
        for key, value in results.items():
            if not key.endswith("seconds"):
                yield from numbers(value, f"{path}.{key}" if path else key)
    elif isinstance(results, list):
        for index, value in enumerate(results):
            yield from numbers(value, f"{path}[{index}]")
    else:
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


def _relative(value: float | None, before: float | None) -> float:
    if value is None or before is None:  # one of them diverged
        return math.inf
    return abs(value - before) / max(abs(value), abs(before))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare a folder with the committed one; return the exit status."""
    parser = argparse.ArgumentParser("compare", description=__doc__)
    parser.add_argument("folder", type=Path, help="where runs were made again")
    options = parser.parse_args(arguments)
    records = read(options.folder)
    if not records:
        parser.error(f"no runs in {options.folder}")
    committed = {
        (record["experiment"], record["name"]): record
        for folder in RESULTS.iterdir()
        for record in read(folder)
    }
    differing = 0
    for record in records:
        before = committed.get((record["experiment"], record["name"]))
        if before is None:
            verdict = "not in experiments/results"
        elif before["settings"] != record["settings"]:
            verdict = "of other settings"
        else:
            verdict = difference(record["results"], before["results"])
            others = [
                f"{key} {record['environment'].get(key)}, was {value}"
                for key, value in before["environment"].items()
                if key != "date" and value != record["environment"].get(key)
            ]
            verdict += f" ({'; '.join(others)})" if verdict and others else ""
        differing += bool(verdict)
        print(f"{record['name']}: {verdict or 'equal'}")
    return min(differing, 1)


if __name__ == "__main__":
    sys.exit(main())

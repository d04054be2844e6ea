"""Compare runs that were made again with those in `experiments/results`.

`python -m experiments.compare results/imdb` prints a line a run: what both hold is
equal, or by how much the farthest number is off. The status is 1 unless all are equal.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments._runs import RESULTS, read


def numbers(results: Any, path: str = "") -> Iterator[tuple[str, float | None]]:
    """List what a run measured, all but the time it took, with its place."""
    if isinstance(results, dict):
        for key, value in results.items():
            if key != "seconds":
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
        path: abs(value - (second[path] or 0)) if value is not None else float("inf")
        for path, value in first.items()
        if value != second[path]
    }
    if not off:
        return ""
    farthest = max(off, key=off.__getitem__)
    return f"{farthest} is {first[farthest]}, was {second[farthest]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two folders; return the exit status."""
    parser = argparse.ArgumentParser("compare", description=__doc__)
    parser.add_argument("folder", type=Path, help="where runs were made again")
    options = parser.parse_args(arguments)
    before = {
        (record["experiment"], record["name"]): record
        for folder in RESULTS.iterdir()
        for record in read(folder)
    }
    differing = 0
    for record in read(options.folder):
        key = record["experiment"], record["name"]
        if key not in before:
            verdict = "not in experiments/results"
        elif before[key]["settings"] != record["settings"]:
            verdict = "of other settings"
        else:
            verdict = difference(record["results"], before[key]["results"])
        differing += bool(verdict)
        print(f"{record['name']}: {verdict or 'equal'}")
    return min(differing, 1)


if __name__ == "__main__":
    sys.exit(main())

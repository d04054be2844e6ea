"""Options that several command lines have, and how these say what is wrong."""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from examples.common.sources import one_line


def add_comparison(
    parser: argparse.ArgumentParser, optimizers: Iterable[str], batch_size: int
) -> None:
    """Add the options of an example that compares optimizers."""
    add_optimizers(parser, optimizers)
    add_samples(parser)
    add_trainings(parser, [0], "where results.json and curves.png go")
    add, text = parser.add_argument, "(default: %(default)s)"
    add("--batch-size", type=positive_int, default=batch_size, metavar="N", help=text)


def add_lookahead(parser: argparse.ArgumentParser) -> None:
    """Add the settings of Lookahead."""
    add, text = parser.add_argument, "Lookahead's (default: %(default)s)"
    add("--k", type=positive_int, default=5, metavar="N", help=text)
    add("--alpha", type=fraction, default=0.5, metavar="SHARE", help=text)


def add_data(parser: argparse.ArgumentParser, sources: str) -> None:
    """Add what chooses the data."""
    parser.add_argument(
        "--data",
        default="auto",
        metavar="SOURCE",
        help=f"{sources}; auto: keras where it is cached or can be downloaded, else "
        "what needs no download (default: %(default)s)",
    )


def add_rate(parser: argparse.ArgumentParser, option: str, default: float) -> None:
    """Add a learning rate."""
    add, text = parser.add_argument, "default: %(default)s"
    add(option, type=positive_float, default=default, metavar="RATE", help=text)


def add_size(
    parser: argparse.ArgumentParser, option: str, default: int, least: int, whose: str
) -> None:
    """Add a number that has to be so large at least."""

    def size(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return number

    text = f"{whose} (default: %(default)s)"
    parser.add_argument(option, type=size, default=default, metavar="N", help=text)


def add_learning_rates(
    parser: argparse.ArgumentParser, default: Sequence[float]
) -> None:
    """Add what chooses learning rates."""
    parser.add_argument(
        "--learning-rates",
        type=positive_float,
        nargs="+",
        default=default,
        metavar="RATE",
        help="(default: %(default)s)",
    )


def add_samples(parser: argparse.ArgumentParser) -> None:
    """Add what says on how many samples is trained and tested."""
    for part in ("train", "test"):
        text = f"{part} on at most so many"
        parser.add_argument(
            f"--{part}-samples", type=positive_int, metavar="N", help=text
        )


def add_trainings(
    parser: argparse.ArgumentParser, seeds: Sequence[int], output: str
) -> None:
    """Add what says how long is trained, and where the results go."""
    add = parser.add_argument
    add("--epochs", type=positive_int, metavar="N", help="instead of the usual number")
    add(
        "--seeds",
        nargs="+",
        type=seed_number,
        default=seeds,
        metavar="SEED",
        help="train everything once from each (default: %(default)s)",
    )
    add_output(parser, f"results/{parser.prog}", output)


def add_optimizers(
    parser: argparse.ArgumentParser,
    names: Iterable[str],
    default: Sequence[str] | None = None,
) -> None:
    """Add what chooses among the optimizers, by default all."""
    names = list(names)
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=names,
        default=default or names,
        metavar="NAME",
        help=f"any of {', '.join(names)} (default: {' '.join(default or ['all'])})",
    )


def add_output(parser: argparse.ArgumentParser, folder: str, text: str) -> None:
    """Add the folder of the results."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(folder),
        metavar="FOLDER",
        help=f"{text} (default: %(default)s)",
    )


def positive_int(text: str) -> int:
    """Parse an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def positive_float(text: str) -> float:
    """Parse a learning rate."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def fraction(text: str) -> float:
    """Parse a share of one, zero left out."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return number


def seed_number(text: str) -> int:
    """Parse a seed that every backend takes."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError("must be from 0 to 4294967295")
    return number


def refuse(program: str, error: Exception) -> int:
    """Say in a line why a program does not go on; return its exit status."""
    print(f"{program}: error: {one_line(error)}", file=sys.stderr)
    return 2

"""Kill trainings at random moments, let them go on, and compare where they end.

`KERAS_BACKEND=jax python -m tests.kill_and_resume --kills 30` kills processes that
train with each optimizer and each way to save: after a number of steps, or at some
moment while a file is written. Each is started again until it ends, and has to end bit
for bit, optimizer included, where a training that nobody interrupted does.

`BackupAndRestore` of Keras writes two files, one after the other and each in its place.
A training that was killed in there is told apart, and is no failure of this program.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
BACKEND = os.environ.get("KERAS_BACKEND", "tensorflow")
CASES = (
    *("Adam", "maintain", "interpolate", "reset"),
    *("decay", "freeze", "both", "both-interpolate"),
)
METHODS = ["backup", "replace", "files", "weights"]
if BACKEND == "tensorflow":
    METHODS.append("checkpoint")
STEPS_OF_A_TRAINING = 24


@dataclass
class Training:
    """One optimizer and one way to save, as CASE:METHOD.

    Attributes:
        name: that.
        kills: how often it was killed.
        kills_in_saving: of these, how often while it saved.
        unreadable: files that it passed over when it went on.
        outcome: how it ended.
    """

    name: str
    kills: int = 0
    kills_in_saving: int = 0
    unreadable: int = 0
    outcome: str = ""

    def path(self, folder: Path) -> Path:
        return folder / self.name.replace(":", "-") / "result.npz"

    @property
    def failed(self) -> bool:
        is_torn = self.name.endswith(":backup") and self.kills_in_saving > 0
        return self.outcome != "same bits" and not is_torn


def survive(names: Sequence[str], kills: int, seed: int) -> list[Training]:
    """Kill so often, over as many rounds of all trainings as that takes."""
    done: list[Training] = []
    with tempfile.TemporaryDirectory() as temporary:
        expected = Path(temporary) / "expected"
        duration = uninterrupted(names, expected)
        random_ = random.Random(seed)
        while not done or kills > 0:
            folder = Path(temporary) / f"round {len(done)}"
            trainings = [Training(name) for name in names]
            kills = one_round(trainings, folder, kills, duration, random_)
            for training in trainings:
                training.outcome = training.outcome or compared(
                    training.path(folder), training.path(expected)
                )
            done += trainings
    return done


def uninterrupted(names: Sequence[str], folder: Path) -> float:
    """Run trainings as they are; the shortest time that it takes to save."""
    process = start(folder, names)
    times, begun = [], 0.0
    for line in lines(process):
        if line.startswith("saving"):
            begun = time.monotonic()
        elif line == "saved":
            times.append(time.monotonic() - begun)
    if process.wait():
        raise RuntimeError(f"an uninterrupted training ended with {process.returncode}")
    return min(times)


def one_round(
    trainings: list[Training],
    folder: Path,
    kills: int,
    duration: float,
    random_: random.Random,
) -> int:
    """Let all trainings end, with as many kills as fit; those that are left."""
    while pending := [t for t in trainings if not (t.outcome or is_done(t, folder))]:
        random_.shuffle(pending)
        steps = saves = 0
        if kills > 0:
            left = STEPS_OF_A_TRAINING * len(pending)
            steps = random_.randint(1, max(2, 2 * left // (kills + 1)))
            if kills % 2:
                steps, saves = 0, max(1, steps // 4)
        delay = random_.uniform(0.001, duration)
        process = start(folder, [t.name for t in pending], steps, saves, delay)
        kills -= follow(process, trainings)
    return kills


def follow(process: subprocess.Popen, trainings: list[Training]) -> bool:
    """Read what a process says, and note how it ended: whether it was killed."""
    by_name = {training.name: training for training in trainings}
    current, is_saving, line = trainings[0], False, ""
    for line in lines(process):
        word, _, rest = line.partition(" ")
        if word == "training":
            current = by_name[rest]
        elif word == "unreadable":
            current.unreadable += 1
        elif word in ("saving", "saved"):
            is_saving = word == "saving"
    if process.wait() in (-signal.SIGKILL, -signal.SIGALRM):
        current.kills += 1
        current.kills_in_saving += is_saving
        return True
    if process.returncode:
        current.outcome = f"does not go on: {line}"
    return False


def start(
    folder: Path,
    names: Iterable[str],
    steps: int = 0,
    saves: int = 0,
    delay: float = 0.0,
) -> subprocess.Popen:
    tests = ROOT / "tests"
    folders = [tests / "one_backend", ROOT, tests, *filter(None, sys.path)]
    program = [sys.executable, "-m", "tests.training_to_kill"]
    return subprocess.Popen(
        [*program, *map(str, (folder, steps, saves, delay)), *names],
        cwd=ROOT,
        env={
            **os.environ,
            "KERAS_BACKEND": BACKEND,
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines(process: subprocess.Popen) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.strip()


def is_done(training: Training, folder: Path) -> bool:
    return training.path(folder).exists()


def compared(path: Path, expected: Path) -> str:
    with np.load(path) as ours, np.load(expected) as theirs:
        same = set(ours) == set(theirs) and all(
            np.array_equal(ours[name], theirs[name]) for name in theirs
        )
    return "same bits" if same else "other bits"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.kill_and_resume",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=30, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options = parser.parse_args(arguments)
    names = [f"{case}:{method}" for case in options.cases for method in options.methods]
    done = survive(names, options.kills, options.seed)
    for t in done:
        print(
            f"{t.name:26} killed {t.kills}, while saving {t.kills_in_saving}, "
            f"unreadable files {t.unreadable}: "
            f"{t.outcome}{', FAILED' if t.failed else ''}"
        )
    kills = sum(t.kills for t in done)
    saving = sum(t.kills_in_saving for t in done)
    print(f"{BACKEND}: {kills} kills, {saving} while saving, {len(done)} trainings")
    return int(any(t.failed for t in done))


if __name__ == "__main__":
    sys.exit(main())

"""What a training should survive: each property as a check of any optimizer.

A check drives a `Training` with prepared gradients, and returns an `Answer`. Nothing
here knows a framework. The script of a peer ends in `main(SUBJECTS)`.
"""

from __future__ import annotations

import abc
import argparse
import gc
import logging
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.workers._serve import resident
from examples.common.record import machine, write_json
from examples.common.sources import one_line

ROOT = Path(__file__).parents[2]
ROWS, WIDTH, SAMPLED, UNITS = 12, 4, 4, 3
K, RATE = 5, 0.05
MIDDLE, END = 7, 13  # updates: of three cycles, in the middle of the second
CUTS = 8
SCALE = 2.0**10  # of a loss: powers of two change no bit of a gradient
EARLY, LATE, GROWTH_MB = 1000, 4000, 8.0
KILLS, STEPS_TO_KILL = 4, 40
PAUSE = 0.02  # seconds after a save, for a kill not to come when all is over

Arrays = list[np.ndarray]
Gradients = Sequence["np.ndarray | None"]  # None: the weight is left out


# What a script says of a peer


class Training(abc.ABC):
    """A table of embeddings, a matrix and a vector, and what trains them."""

    @abc.abstractmethod
    def step(self, gradients: Gradients) -> None:
        """Make an update, or what the optimizer makes of it."""

    @abc.abstractmethod
    def weights(self) -> Arrays:
        """Copies of the weights."""

    @abc.abstractmethod
    def set_weights(self, weights: Arrays) -> None:
        """Write into the weights, as a user would."""

    @abc.abstractmethod
    def kept(self) -> Arrays:
        """Copies of all that the optimizer keeps, but not of the loss's scale."""

    def slow(self) -> Arrays:
        """Copies of the slow weights. Of an optimizer without any, the weights."""
        return self.weights()

    def state(self) -> Arrays:
        """All that there is."""
        return self.weights() + self.kept()


@dataclass(frozen=True)
class Way:
    """A way to save.

    Attributes:
        save: writes into a folder.
        load: reads from a folder, and returns the training that goes on.
        into: whether that is the training given, and not one as the file has it.
    """

    save: Callable[[Any, Path], None]
    load: Callable[[Any, Path], Any]
    into: bool = True


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a training is made of.

    Attributes:
        k: updates in a cycle.
        inner: the inner optimizer, "adam" or "sgd".
        rows, units: sizes of the table and of the last layer.
        seed: of the weights, which are `initial(...)`.
        scaling: one of the subject's `scalings`.
        rate: the learning rate.
    """

    k: int = K
    inner: str = "adam"
    rows: int = ROWS
    units: int = UNITS
    seed: int = 0
    scaling: str | None = None
    rate: float = RATE


class Subject(abc.ABC):
    """An optimizer of a peer."""

    name: str  # of the file of answers
    column: str  # of the table; empty for a control, which is in the files alone
    place = ""  # where that has several files, whose it is
    runs_with: str  # its version, and the framework's
    has_slow_weights = True
    # Ways to save by name, the usual one first.
    ways: ClassVar[Mapping[str, Way]]
    # How a step is skipped when gradients are not finite.
    scalings: Sequence[str]
    # What the peer does not promise, by property; said with what was seen.
    remarks: ClassVar[Mapping[str, str]] = {}

    def make(self, **settings: Any) -> Any:
        """Make a new training, set up as the defaults say but for these settings."""
        return self.build(Setup(**settings))

    @abc.abstractmethod
    def build(self, setup: Setup) -> Any:
        """Make a new training."""

    @abc.abstractmethod
    def wrong_uses(self) -> Mapping[str, Callable[[], object]]:
        """Return calls that should raise, and that end before the first step."""

    @abc.abstractmethod
    def alive(self) -> dict[str, int]:
        """Count programs and arrays."""

    @abc.abstractmethod
    def versions(self) -> dict[str, str]:
        """Return what it ran with."""

    def not_with(self) -> str:
        """Return what a newer framework says, if it does not run with that."""
        return ""

    def restart(self, training: Any) -> None:
        """Begin a new cycle at the weights as they are, by what the peer offers."""
        raise NotImplementedError


def initial(shapes: Sequence[tuple[int, ...]], seed: int) -> Arrays:
    """Weights to begin with."""
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype("float32") for shape in shapes]


# What checks are made with


class NotAsked(Exception):
    """A property of something that the subject has not."""


@dataclass(frozen=True)
class Answer:
    """What the table has in a cell and in a note to it."""

    cell: str
    says: str = ""
    details: str = ""  # which the file of answers has, and the table not


def gradients(steps: int, like: Arrays, seed: int = 1) -> list[Arrays]:
    """Gradients of which the table's concern a few rows, as many in each step."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(steps):
        step = [random.normal(size=each.shape).astype("float32") for each in like]
        sampled = random.choice(ROWS, SAMPLED, replace=False)
        step[0][np.setdiff1d(np.arange(len(step[0])), sampled)] = 0.0
        made.append(step)
    return made


def trained(training: Any, steps: Sequence[Gradients]) -> Any:
    """Make steps."""
    for step in steps:
        training.step(step)
    return training


def same(some: Arrays, others: Arrays) -> bool:
    """Whether all bits are, NaN included."""
    return len(some) == len(others) and all(
        a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        for a, b in zip(some, others, strict=True)
    )


def collected(seen: Mapping[str, str]) -> Answer:
    """An answer from what went wrong in each of several cases; nothing where none."""
    wrong: dict[str, list[str]] = {}
    for case, what in seen.items():
        if what:
            wrong.setdefault(what, []).append(case)
    if not wrong:
        return Answer("yes")
    if len(seen) == 1:
        return Answer("no", *wrong)
    says = "; ".join(f"{', '.join(cases)}: {what}" for what, cases in wrong.items())
    return Answer("in part" if "" in seen.values() else "no", says)


def raised(action: Callable[[], object]) -> str:
    """What came of it: the error in short, "a warning", or nothing."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            action()
        except Exception as error:
            return short(error)
    about = [each for each in warned if not issubclass(each.category, OLD)]
    return "a warning" if about else ""


@contextmanager
def logged_of_files() -> Iterator[list[str]]:
    """What TensorFlow logs of values in a file that nothing took."""
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "restored object" in record.getMessage():
                messages.append(record.getMessage())

    handler, logger = Handler(logging.WARNING), logging.getLogger("tensorflow")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


OLD = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def short(error: BaseException) -> str:
    """Put an error into a few words."""
    text = one_line(error).replace("|", "/").replace("`", "'")
    text = text if len(text) < 90 else text[:90].rsplit(" ", 1)[0] + " ..."
    return f"{type(error).__name__}: {text}"


@contextmanager
def saved(subject: Subject, way: Way, **settings: Any) -> Iterator[Path]:
    """A folder with a file of a training in the middle of a cycle."""
    training = subject.make(**settings)
    trained(training, gradients(MIDDLE, training.weights()))
    with tempfile.TemporaryDirectory() as folder:
        way.save(training, Path(folder))
        yield Path(folder)


# The properties


def resumed(subject: Subject) -> Answer:
    """Saved in the middle of a cycle, into a new training, and on to the end."""
    whole = subject.make()
    steps = gradients(END, whole.weights())
    trained(whole, steps)

    def other_end(way: Way) -> str:
        with saved(subject, way) as folder:
            again = way.load(subject.make(seed=2), folder)
            trained(again, steps[MIDDLE:])
        if same(again.state(), whole.state()):
            return ""
        apart = max(
            float(np.max(np.abs(a - b)))
            for a, b in zip(again.weights(), whole.weights(), strict=True)
        )
        return f"ends elsewhere, by up to {apart:.2g} in the weights"

    return collected(
        {name: tried(other_end, way) for name, way in subject.ways.items()}
    )


def tried(check: Callable[..., str], *arguments: Any) -> str:
    """What a check finds; an error of its own is a find, too."""
    try:
        return check(*arguments)
    except NotAsked:
        raise
    except Exception as error:
        return short(error)


def killed(subject: Subject) -> Answer:
    """Killed while it saves after each update, the whole file put in its place."""
    steps = [*gradients(STEPS_TO_KILL, subject.make().weights())]
    expected = trained(subject.make(), steps)
    random, kills, in_saves = np.random.default_rng(0), 0, 0
    durations: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-m", subject_module(subject), subject.name]
        while True:
            process = subprocess.Popen(
                [*program, "--train", folder], stdout=subprocess.PIPE, cwd=ROOT
            )
            saves = int(random.integers(2, STEPS_TO_KILL // (KILLS + 1)))
            delay = random.uniform(0, 1.2)
            is_in_save = follow(process, saves * (kills < KILLS), delay, durations)
            if process.wait() != -signal.SIGKILL:
                break
            kills, in_saves = kills + 1, in_saves + is_in_save
        if process.returncode:
            return Answer("no", f"does not go on after {kills} kills")
        if kills < KILLS:  # No answer: a machine so busy that the kills came late.
            raise SystemExit(f"only {kills} of {KILLS} kills came in time")
        again = subject.ways[first(subject.ways)].load(
            subject.make(seed=2), newest(Path(folder))
        )
        if not same(again.state(), expected.state()):
            return Answer("no", f"ends elsewhere after {kills} kills")
    return Answer("yes", details=f"{kills} kills, {in_saves} of them in a save")


def follow(
    process: subprocess.Popen, saves: int, delay: float, durations: list[float]
) -> bool:
    """Kill it in that save, if any, after so much of the time that one takes.

    Returns:
        Whether it died in a save.
    """
    assert process.stdout is not None
    begun, line = 0.0, b""
    for line in process.stdout:
        if line.startswith(b"saving"):
            begun, saves = time.monotonic(), saves - 1
            if saves == 0:
                # The first of a process may take long.
                time.sleep(delay * min(durations))
                process.kill()
        elif line.startswith(b"saved") and saves > 0:
            durations.append(time.monotonic() - begun)
    return line.startswith(b"saving")


def train_to_be_killed(subject: Subject, folder: Path) -> None:
    """What `killed` starts: go on from the newest file, and save after each update."""
    way = subject.ways[first(subject.ways)]
    training, done = subject.make(), 0
    steps = gradients(STEPS_TO_KILL, training.weights())
    if newest(folder).exists():
        training, done = way.load(training, newest(folder)), int(newest(folder).name)
    for number in range(done, STEPS_TO_KILL):
        training.step(steps[number])
        print("saving", flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            way.save(training, Path(unfinished))
            Path(unfinished).rename(folder / f"{number + 1:04d}")
            Path(unfinished).mkdir()  # for the block to remove
        print("saved", flush=True)
        time.sleep(PAUSE)


def newest(folder: Path) -> Path:
    """The latest of the folders that were put there whole."""
    return max(folder.glob("[0-9]*"), default=folder / "none")


def first(names: Mapping[str, Any]) -> str:
    """The usual way."""
    return next(iter(names))


def cut_off(subject: Subject) -> Answer:
    """The largest file, at several lengths, into a training that goes on."""

    def harm(way: Way) -> str:
        with saved(subject, way) as folder:
            file = max(folder.rglob("*"), key=lambda path: path.stat().st_size)
            content = file.read_bytes()
            for length in np.linspace(0, len(content) - 1, CUTS).astype(int):
                file.write_bytes(content[:length])
                if harmed := harm_of_loading(subject, way, folder):
                    return harmed
        return ""

    return collected({name: tried(harm, way) for name, way in subject.ways.items()})


def of_another_model(subject: Subject) -> Answer:
    """A longer table, or a wider last layer, into a training that goes on."""

    def harm(way: Way) -> str:
        for other in ({"rows": ROWS + 8}, {"units": UNITS + 1}):
            with saved(subject, way, **other) as folder:
                if harmed := harm_of_loading(subject, way, folder):
                    return harmed
        return ""

    ways = {name: way for name, way in subject.ways.items() if way.into}
    return collected({name: tried(harm, way) for name, way in ways.items()})


def harm_of_loading(subject: Subject, way: Way, folder: Path) -> str:
    """What is wrong after a file was loaded that has to be refused."""
    training = trained(subject.make(seed=2), gradients(3, subject.make().weights()))
    before = training.weights(), training.kept()
    step = gradients(1, before[0])[0]
    loaded = [training]

    def load() -> None:
        loaded[0] = way.load(training, folder)

    if not raised(load):
        late = raised(lambda: loaded[0].step(step))
        return f"loads it, and raises in the next step ({late})" if late else "loads it"
    harmed = [
        name
        for name, old, new in zip(
            ("weights", "the optimizer's state"),
            before,
            (training.weights(), training.kept()),
            strict=True,
        )
        if not same(old, new)
    ]
    return f"an error, but it has changed {' and '.join(harmed)}" if harmed else ""


def another_k(subject: Subject) -> Answer:
    """A file of k=5 into a training with k=3."""
    need_slow_weights(subject)

    def silent(way: Way) -> str:
        with saved(subject, way) as folder:
            by_file = way.load(subject.make(seed=2), folder)
            training = subject.make(seed=2, k=3)
            if raised(lambda: way.load(training, folder)):
                return ""
            steps = gradients(10, training.weights(), seed=3)
            ends = [trained(each, steps).weights() for each in (by_file, training)]
        return "silent, with the file's k" if same(*ends) else "silent, with its own k"

    ways = {name: way for name, way in subject.ways.items() if way.into}
    return collected({name: tried(silent, way) for name, way in ways.items()})


def another_inner(subject: Subject) -> Answer:
    """A file of Adam into a training with SGD and momentum."""

    def go_on(way: Way, folder: Path) -> str:
        training = subject.make(seed=2, inner="sgd")
        if raised(lambda: way.load(training, folder)):
            return ""
        late = raised(lambda: training.step(gradients(1, training.weights())[0]))
        return f"silent until the next step ({late})" if late else "silent"

    def silent(way: Way) -> str:
        with saved(subject, way) as folder, logged_of_files() as messages:
            came = go_on(way, folder)
            gc.collect()  # TensorFlow logs then what the file had besides.
        return "" if messages else came

    ways = {name: way for name, way in subject.ways.items() if way.into}
    return collected({name: tried(silent, way) for name, way in ways.items()})


def nan_in_a_row(subject: Subject) -> Answer:
    """All other rows and weights, slow ones too, are those of a finite gradient."""
    finite, training = subject.make(), subject.make()
    row = 3
    others = np.arange(ROWS) != row
    for number, step in enumerate(gradients(END, training.weights())):
        step[0][row] = 1.0
        bad = [step[0].copy(), *step[1:]]
        if number == 1:
            bad[0][row, 1] = np.nan
        finite.step(step)
        training.step(bad)
    seen = {}
    for name in ("weights", "slow"):
        table, *rest = getattr(training, name)()
        wanted, *wanted_rest = getattr(finite, name)()
        is_same = same([table[others], *rest], [wanted[others], *wanted_rest])
        seen[f"{name} of others"] = "" if is_same else "change"
        if name == "weights" and not np.isnan(table[row]).any():
            return Answer("-", "the row stays finite")
    return collected(seen)


def skipped(subject: Subject) -> Answer:
    """A step that scaling of the loss skips, where a sync would have been."""

    def trace(scaling: str) -> str:
        training, control = (subject.make(scaling=scaling) for _ in range(2))
        steps = gradients(END, training.weights())
        for each in (training, control):
            trained(each, steps[: K - 1])
            each.slow(), each.kept()  # To read may let rows catch up, and so round.
        bad = [each.copy() for each in steps[0]]
        bad[1][0, 0] = np.inf
        before = [training.weights(), training.slow(), training.kept()]
        training.step(bad)
        after = [training.weights(), training.slow(), training.kept()]
        names = ("weights", "slow weights", "what the optimizer keeps")
        changed = [
            name
            for name, *pair in zip(names, before, after, strict=True)
            if not same(*pair)
        ]
        if changed:
            return f"changes {' and '.join(changed)}"
        trained(training, steps[K - 1 :])
        trained(control, steps[K - 1 :])
        is_same = same(training.weights(), control.weights())
        return "" if is_same else "ends elsewhere than without that step"

    return collected({name: tried(trace, name) for name in subject.scalings})


def wrong_uses(subject: Subject) -> Answer:
    """Arguments that have no meaning raise before the first step."""
    uses = subject.wrong_uses()
    silent = [name for name, use in uses.items() if not raised(use)]
    if not silent:
        return Answer("yes")
    says = f"no error before the first step: {', '.join(silent)}"
    return Answer("in part" if len(silent) < len(uses) else "no", says)


def constant(subject: Subject) -> Answer:
    """Memory, programs and arrays after 1,000 steps and after 4,000."""
    training = subject.make()
    steps = gradients(50, training.weights())
    counts, memory = [], []
    for number in range(1, LATE + 1):
        training.step(steps[number % len(steps)])
        if number in (EARLY, LATE):
            counts.append(subject.alive())
            memory.append(resident())
    grown = [
        f"{name} grow from {counts[0][name]} to {counts[1][name]}"
        for name in counts[0]
        if counts[1][name] > counts[0][name]
    ]
    growth = (memory[1] - memory[0]) / 1e6
    if growth > GROWTH_MB:
        grown.append(f"memory grows by {growth:.0f} MB")
    return Answer("no", ", ".join(grown)) if grown else Answer("yes")


def two_threads(subject: Subject) -> Answer:
    """Two trainings at the same time end where they end alone."""
    settings: list[dict[str, Any]] = [{"seed": 0}, {"seed": 1, "k": 3, "rate": 0.01}]
    steps = gradients(100, subject.make().weights())
    alone = [trained(subject.make(**each), steps).state() for each in settings]
    ends: dict[int, Arrays] = {}
    errors: list[str] = []
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        try:
            barrier.wait()
            ends[number] = trained(subject.make(**settings[number]), steps).state()
        except Exception as error:
            errors.append(short(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        return Answer("no", errors[0])
    is_same = all(same(ends[i], alone[i]) for i in range(2))
    return Answer("yes") if is_same else Answer("no", "end elsewhere")


def loaded_first(subject: Subject) -> Answer:
    """Weights loaded before the first update are what the first sync goes back to."""
    need_slow_weights(subject)
    training, wanted = subject.make(seed=2), subject.make()
    training.set_weights(wanted.weights())
    steps = gradients(2 * K, wanted.weights())
    is_same = same(trained(training, steps).weights(), trained(wanted, steps).weights())
    return Answer("yes" if is_same else "no", "" if is_same else PULLED)


PULLED = "syncs pull toward the weights from when the optimizer was made"


def replaced(subject: Subject) -> Answer:
    """Weights replaced in mid-cycle: what the peer offers for it, and then no pull."""
    need_slow_weights(subject)
    # A learning rate of zero: nothing but a sync moves the weights.
    training = subject.make(inner="sgd", rate=0.0, k=2)
    steps = gradients(5, training.weights())
    trained(training, steps[:3])
    new = [weight + np.float32(1) for weight in training.weights()]
    training.set_weights(new)
    offered = True
    try:
        subject.restart(training)
    except NotImplementedError:
        offered = False
    trained(training, steps[3:])
    back = float(np.mean(new[0] - training.weights()[0]))
    if back == 0:
        return Answer("yes")
    says = "in spite of the call" if offered else "there is no such call"
    return Answer("no", f"{says}: the next sync pulls {back:.0%} of the way back")


def frozen(subject: Subject) -> Answer:
    """A weight without gradient is not moved by syncs, and its slow copy follows."""
    training = subject.make()
    steps: list[Gradients] = [*gradients(END, training.weights())]
    trained(training, steps[:MIDDLE])
    before = training.weights()[-1]
    trained(training, [[*step[:-1], None] for step in steps[MIDDLE:]])
    if not same([training.weights()[-1]], [before]):
        return Answer("no", "a sync moves it")
    is_stale = not same([training.slow()[-1]], [before])
    return Answer("no", "its slow weights stay behind") if is_stale else Answer("yes")


def need_slow_weights(subject: Subject) -> None:
    """Raise where there are none."""
    if not subject.has_slow_weights:
        raise NotAsked


def runs_with(subject: Subject) -> Answer:
    """What it ran with."""
    return Answer(subject.runs_with, subject.not_with())


@dataclass(frozen=True)
class Property:
    """A line of the table."""

    title: str
    check: Callable[[Subject], Answer]


PROPERTIES = {
    "resumed": Property("Resumed mid-cycle: ends with the same bits", resumed),
    "killed": Property(
        "Killed while saving (complete files replace old ones): the same bits", killed
    ),
    "cut-off": Property("File that was cut off: raises, changes nothing", cut_off),
    "another-model": Property(
        "File of another model: raises, changes nothing", of_another_model
    ),
    "another-k": Property("File with another k: raises or warns", another_k),
    "another-inner": Property(
        "File of another inner optimizer: raises or warns", another_inner
    ),
    "nan": Property("NaN in one row's gradient: other rows unaffected", nan_in_a_row),
    "skipped": Property("Step skipped by loss scaling: changes nothing", skipped),
    "wrong-uses": Property("Wrong arguments: raise before training", wrong_uses),
    "constant": Property("4,000 steps: memory does not grow", constant),
    "threads": Property("Two trainings in two threads: same as alone", two_threads),
    "loaded-first": Property(
        "Weights loaded before the first update: training starts from them",
        loaded_first,
    ),
    "replaced": Property(
        "Weights replaced mid-cycle: a call starts a new cycle", replaced
    ),
    "frozen": Property(
        "Weight without gradients: syncs leave it alone, its slow copy follows", frozen
    ),
    "runs-with": Property("Tested with", runs_with),
}


# The program


def subject_module(subject: Subject) -> str:
    """The module that can be started, of a subject of it."""
    module = sys.modules[type(subject).__module__]
    spec = module.__spec__
    return spec.name if spec is not None else module.__name__


def ask(subject: Subject, name: str) -> Answer:
    """Check a property; what cannot be asked is "-"."""
    try:
        answer = PROPERTIES[name].check(subject)
    except NotAsked:
        answer = Answer("-")
    except Exception as error:
        answer = Answer("no", short(error))
    remark = "" if answer.cell == "yes" else subject.remarks.get(name, "")
    says = [text for text in (answer.says, remark) if text]
    return replace(answer, says="; ".join(says))


def main(subjects: Sequence[Subject], arguments: Sequence[str] | None = None) -> None:
    """Ask one of a script's subjects, print and write its answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    by_name = {subject.name: subject for subject in subjects}
    add("subject", choices=by_name)
    add("--output", type=Path, default=Path("results"), metavar="FOLDER")
    add("--only", nargs="+", choices=PROPERTIES, default=list(PROPERTIES))
    add("--train", type=Path, metavar="FOLDER", help="be the training that is killed")
    options = parser.parse_args(arguments)
    subject = by_name[options.subject]
    if options.train:
        train_to_be_killed(subject, options.train)
        return
    # A script that cannot train fails here, and answers nothing.
    sound = subject.make()
    trained(sound, gradients(END, sound.weights()))
    answers = {}
    for name in options.only:
        answers[name] = ask(subject, name)
        print(f"{subject.name}: {name}: {answers[name]}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    report = {
        "column": subject.column,
        "place": subject.place,
        "versions": subject.versions(),
        "machine": machine(),
        "answers": {name: asdict(answer) for name, answer in answers.items()},
    }
    write_json(options.output / f"{subject.name}.json", report)

"""Keras's own tests of its optimizers, each optimizer within one of ours.

`KERAS_BACKEND=jax python -m tests.keras_suite` fetches the source archive of the Keras
that is installed, and runs its optimizers' tests. In them every optimizer that is made
becomes `Lookahead(optimizer, k=K)`, whose weights until its first sync are those of the
optimizer alone: so what a test expects has to hold. With `--within lazy` it becomes a
`LazyOptimizer` for which every weight is a table, if only of one number a row (not on
torch), and with `--within both` a Lookahead of that: where each row has a gradient, the
weights are those of the optimizer alone again. Each failure is printed with its reason.
With `--within nothing` the same tests run with the optimizers as they are.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import keras
import pytest

from keras_lookahead_lazy import LazyOptimizer, Lookahead, _tables

K = 2**20  # No test makes so many steps.
WITHIN: dict[str, Callable] = {
    "lookahead": lambda optimizer: Lookahead(optimizer, k=K),
    "lazy": LazyOptimizer,
    "both": lambda optimizer: Lookahead(LazyOptimizer(optimizer), k=K),
}
# What Keras has around optimizers stays as it is, and goes around ours.
AROUND = ("LossScaleOptimizer", "MultiOptimizer")


class Wrapping:
    """A plugin of pytest that puts wrapped optimizers in the place of a module's."""

    def __init__(self, wrap: Callable) -> None:
        self.wrap = wrap

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for module in {item.module for item in session.items}:  # type: ignore[attr-defined]
            for name, value in list(vars(module).items()):
                if is_optimizer(value):
                    setattr(module, name, wrapped(value, self.wrap))
                elif isinstance(value, ModuleType) and value.__name__.endswith(
                    ".optimizers"
                ):
                    made = {
                        kind: wrapped(each, self.wrap) if is_optimizer(each) else each
                        for kind, each in vars(value).items()
                    }
                    setattr(module, name, SimpleNamespace(**made))


def is_optimizer(value: Any) -> bool:
    is_one = isinstance(value, type) and issubclass(value, keras.Optimizer)
    return is_one and value.__name__ not in AROUND


class Wrapped(type):
    """A class of optimizers, each of which is made within another optimizer."""

    kind: type[keras.Optimizer]
    wrap: Callable

    def __call__(cls, *arguments: Any, **settings: Any) -> keras.Optimizer:
        return cls.wrap(cls.kind(*arguments, **settings))

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.kind)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.kind, name)


def wrapped(kind: type[keras.Optimizer], wrap: Callable) -> Wrapped:
    return Wrapped(kind.__name__, (), {"kind": kind, "wrap": staticmethod(wrap)})


def every_weight(sources: None, variables: list, weights: list) -> tuple[list, list]:
    """In the place of `find_tables`: weights with rows are tables, none is frozen."""
    least = 2 if keras.backend.backend() == "torch" else 1  # dimensions
    return [variable for variable in variables if len(variable.shape) >= least], []


def fetch(folder: Path) -> Path:
    """The tests of the installed Keras's optimizers."""
    command = [sys.executable, "-m", "pip", "download", f"keras=={keras.__version__}"]
    options = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, *options, f"--dest={folder}"], check=True)
    (archive,) = folder.glob("keras-*.tar.gz")
    tests = folder / "tests"
    tests.mkdir()
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            path = Path(member.name)
            if path.match("keras/src/optimizers/*_test.py"):
                content = source.extractfile(member)
                assert content is not None
                (tests / path.name).write_bytes(content.read())
    return tests


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.keras_suite", description=__doc__)
    parser.add_argument(
        "--within", choices=[*WITHIN, "nothing"], default="lookahead", help="see above"
    )
    within = parser.parse_args().within
    tables = mock.patch.object(_tables, "find_tables", every_weight)
    with tempfile.TemporaryDirectory() as temporary, tables:
        tests = fetch(Path(temporary))
        arguments = ["-q", "--tb=line", "-rf", "-p", "no:cacheprovider", "-W", "ignore"]
        plugins = [] if within == "nothing" else [Wrapping(WITHIN[within])]
        return int(pytest.main([*arguments, f"--rootdir={tests}", str(tests)], plugins))


if __name__ == "__main__":
    sys.exit(main())

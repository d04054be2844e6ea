"""Keras's own tests of its optimizers, each optimizer within a Lookahead.

`KERAS_BACKEND=jax python -m tests.keras_suite` fetches the source archive of the Keras
that is installed, and runs its optimizers' tests. In them every optimizer that is made
becomes `Lookahead(optimizer, k=K)`, whose weights until its first sync are those of the
optimizer alone: so what a test expects has to hold. Each failure is printed with its
reason. With `--plain` the same tests run with the optimizers as they are.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import keras
import pytest

from keras_lookahead_lazy import Lookahead

K = 2**20  # No test makes so many steps.
# Tests of what wraps optimizers itself.
LEFT_OUT = {"loss_scale_optimizer_test.py", "multi_optimizer_test.py"}


class Wrapping:
    """A plugin of pytest that puts wrapped optimizers in the place of a module's."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for module in {item.module for item in session.items}:  # type: ignore[attr-defined]
            for name, value in list(vars(module).items()):
                if is_optimizer(value):
                    setattr(module, name, wrapped(value))
                elif isinstance(value, ModuleType) and value.__name__.endswith(
                    ".optimizers"
                ):
                    made = {
                        kind: wrapped(each) if is_optimizer(each) else each
                        for kind, each in vars(value).items()
                    }
                    setattr(module, name, SimpleNamespace(**made))


def is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, keras.Optimizer)


class Wrapped(type):
    """A class of optimizers, each of which is made within a Lookahead."""

    kind: type[keras.Optimizer]

    def __call__(cls, *arguments: Any, **settings: Any) -> keras.Optimizer:
        return Lookahead(cls.kind(*arguments, **settings), k=K)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.kind)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.kind, name)


def wrapped(kind: type[keras.Optimizer]) -> Wrapped:
    return Wrapped(kind.__name__, (), {"kind": kind})


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
            is_test = path.match("keras/src/optimizers/*_test.py")
            if is_test and path.name not in LEFT_OUT:
                content = source.extractfile(member)
                assert content is not None
                (tests / path.name).write_bytes(content.read())
    return tests


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.keras_suite", description=__doc__)
    parser.add_argument(
        "--plain", action="store_true", help="with the optimizers as they are"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        tests = fetch(Path(temporary))
        arguments = ["-q", "--tb=line", "-rf", "-p", "no:cacheprovider", "-W", "ignore"]
        plugins = [] if options.plain else [Wrapping()]
        return int(pytest.main([*arguments, f"--rootdir={tests}", str(tests)], plugins))


if __name__ == "__main__":
    sys.exit(main())

"""The wheel and the sdist are whole, install, and train where no checkout is."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("build")
pytest.importorskip("twine")

ROOT = Path(__file__).parents[2]
SMOKE = """
import sys
from pathlib import Path

import keras
import numpy as np

import keras_lookahead_lazy
from keras_lookahead_lazy import LazyOptimizer, Lookahead

assert Path(sys.argv[1]) in Path(keras_lookahead_lazy.__file__).parents
words = keras.layers.Embedding(20, 3)
model = keras.Sequential([words, keras.layers.Flatten(), keras.layers.Dense(1)])
optimizer = Lookahead(LazyOptimizer(keras.optimizers.Adam(0.01), [words]), k=2)
model.compile(optimizer, "mse")
x, y = np.arange(12).reshape(4, 3), np.ones((4, 1))
model.fit(x, y, epochs=3, batch_size=2, verbose=0)
model.save("model.keras")
again = keras.models.load_model("model.keras")
assert repr(again.optimizer).startswith("Lookahead(LazyOptimizer(Adam(")
for each, loaded in zip(model.optimizer.variables, again.optimizer.variables):
    np.testing.assert_array_equal(each.numpy(), loaded.numpy())
"""


def python(*arguments: object, **how: Any) -> None:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheel and the sdist, of a copy: setuptools leaves folders in the tree."""
    folder = tmp_path_factory.mktemp("packages")
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            target = folder / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    python("-m", "build", "--no-isolation", "--outdir", folder, folder / "tree")
    return sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")])


def test_metadata(packages: list[Path]) -> None:
    assert len(packages) == 2
    python("-m", "twine", "check", "--strict", *packages)


def test_the_wheel_holds_the_package_and_nothing_else(packages: list[Path]) -> None:
    (wheel,) = (path for path in packages if path.suffix == ".whl")
    inside = {
        name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name
    }
    package = ROOT / "keras_lookahead_lazy"
    sources = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    assert inside == sources | {"keras_lookahead_lazy/py.typed"}


@pytest.mark.parametrize("suffix", [".whl", ".gz"])
def test_installed_it_trains(packages: list[Path], suffix: str, tmp_path: Path) -> None:
    """Beside the packages that are here: what it needs is not fetched again."""
    (package,) = (path for path in packages if path.suffix == suffix)
    target = tmp_path / "installed"
    install = ["-m", "pip", "install", "--no-index", "--no-deps", "--target", target]
    python(*install, "--no-build-isolation", package)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    python("-c", SMOKE, target, cwd=tmp_path, env=environment)

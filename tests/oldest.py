"""An environment with the oldest versions that pyproject.toml admits.

Every requirement `name>=version` of the package, of its backends and of its tests is
taken at that version. On Linux the oldest torch brings CUDA's libraries along, several
gigabytes that nothing here uses.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-oldest"
BACKENDS = ("tensorflow", "jax", "torch")
# No test calls them.
LEFT_OUT = {"mypy", "ruff"}


def make(python: str | None = None) -> str:
    """The environment's Python; the environment is made, or brought up to date."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = find(lower_bound(SpecifierSet(project["requires-python"])), python)
    pinned = sorted({lowest(requirement) for requirement in requirements(project)})
    print(f"=== {FOLDER.name}: {', '.join(pinned)}", flush=True)
    subprocess.run([python, "-m", "venv", FOLDER], check=True)
    inside = FOLDER / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [str(inside), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *pinned, "-e", str(ROOT)], check=True)
    return str(inside)


def find(version: str, python: str | None) -> str:
    """A Python of this version, e.g. "3.10": the one given, or one on the PATH."""
    python = python or shutil.which(f"python{version}")
    if python is None:
        sys.exit(f"The oldest Python is {version}: no python{version}; use --python.")
    code = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
    asked = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=False
    )
    if asked.stdout.strip() != version:
        said = asked.stdout.strip() or asked.stderr.strip()
        sys.exit(f"The oldest Python is {version}; {python} said: {said}")
    return python


def requirements(project: dict[str, Any]) -> Iterator[Requirement]:
    """What the package and its tests need here, with the package's own bounds."""
    extras = project["optional-dependencies"]
    needed = [Requirement(r) for r in project["dependencies"]]
    own = needed + [Requirement(r) for backend in BACKENDS for r in extras[backend]]
    bounds = {requirement.name: requirement for requirement in own}
    for requirement in [
        *needed,
        *map(Requirement, extras["test"] + extras["examples"]),
    ]:
        here = requirement.marker is None or requirement.marker.evaluate()
        itself = requirement.name == project["name"]
        if here and not itself and requirement.name not in LEFT_OUT:
            yield bounds.get(requirement.name, requirement)


def lowest(requirement: Requirement) -> str:
    """`name==version` of the lower bound."""
    return f"{requirement.name}=={lower_bound(requirement.specifier)}"


def lower_bound(specifier: SpecifierSet) -> str:
    (bound,) = [s.version for s in specifier if s.operator in (">=", "==")]
    return bound

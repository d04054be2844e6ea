"""Every file and name on the map of the code is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "keras_lookahead_lazy"
MAP = (ROOT / "docs" / "architecture.md").read_text()
CELLS = [line.strip("|").split("|") for line in MAP.splitlines() if line[:1] == "|"]
HOPS = [
    (re.findall("`([^`]+)`", cells[1])[0], re.findall("`([^`]+)`", cells[2]))
    for cells in CELLS
    if cells[0].strip().isdecimal()
]


def defines(text, name):
    return re.search(rf"(?m)^ *(?:def|class) {name}\b|^{name}\b.* = ", text)


@pytest.mark.parametrize(("file", "names"), HOPS)
def test_each_hop_exists(file, names):
    text = (PACKAGE / file).read_text()
    assert names
    for name in names:
        assert defines(text, name), (file, name)


def test_the_internals_are_in_one_folder():
    modules = (PACKAGE / "_keras").glob("*.py")
    text = "\n".join(module.read_text() for module in modules)
    start = MAP.index("| in Keras |")
    lines = MAP[start : MAP.index("\n\n", start)].splitlines()[2:]
    for line in lines:
        used_by = line.split("|")[2]
        for name in re.findall("`([^`]+)`", used_by):
            assert defines(text, name), name


def test_the_files_exist():
    modules = set(re.findall(r"_?\w+(?:/\w+)*\.py", MAP))
    folders = (ROOT, PACKAGE, PACKAGE / "_backend")
    for module in modules:
        assert any((folder / module).exists() for folder in folders), module
    drawn = set(re.findall(r"_\w+\.py", MAP[: MAP.index("## One gradient")]))
    there = {path.name for path in PACKAGE.glob("_*.py")} - {"_version.py"}
    assert there - drawn <= {"_accumulation.py", "_decay_rates.py", "__init__.py"}


def test_the_map_is_one_page():
    assert len(MAP.splitlines()) < 90

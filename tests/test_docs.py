"""The examples in docstrings, README and documentation run, and do what they say.

On a page, a block may use what the blocks before it made. A comment right before a
block says where it runs: `<!-- backend: jax -->`, or `<!-- not run: REASON -->`.
"""

import doctest
import importlib
import pkgutil
import re
import textwrap
from pathlib import Path

import keras
import pytest

import keras_lookahead_lazy

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BACKEND = keras.backend.backend()
BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>backend|not run): (?P<what>.*?) -->\n *)?"
    r"```python\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)

# What the loops in the README take for granted.
LOOP = """
optimizer = model.optimizer
ids, y = keras.ops.ones((32, 10), "int32"), keras.ops.zeros((32, 1))
weights = model.trainable_variables
"""
OWN_LOOP = {
    "tensorflow": """
import tensorflow as tf
with tf.GradientTape() as tape:
    loss = tf.reduce_mean((model(ids) - y) ** 2)
""",
    "torch": "loss = ((model(ids) - y) ** 2).mean()\n",
    "jax": "gradients = [keras.ops.ones(w.shape) for w in weights]\n",
}
BEFORE = {"README.md": {"Your own loop": LOOP + OWN_LOOP[BACKEND]}}

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.iter_modules(
        keras_lookahead_lazy.__path__, "keras_lookahead_lazy."
    )
    if not module.ispkg
]
MODULES.append(importlib.import_module("keras_lookahead_lazy._keras.models"))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module):
    failed, _ = doctest.testmod(module)
    assert failed == 0


@pytest.mark.parametrize(
    "name", [n for n in keras_lookahead_lazy.__all__ if n != "__version__"]
)
def test_public_names_have_examples(name):
    """Each one an example that also does something, not only the imports."""
    public = getattr(keras_lookahead_lazy, name)
    parts = doctest.DocTestParser().get_examples(public.__doc__)
    assert any("model.compile" in part.source for part in parts)
    assert any(name in part.source for part in parts)


def blocks_to_run(page: str) -> list[tuple[int, str]]:
    """The blocks of a page that run on this backend, with the lines they begin at."""
    return [
        (page.count("\n", 0, match.start("code")), textwrap.dedent(match["code"]))
        for match in BLOCK.finditer(page)
        if match["mark"] is None
        or (match["mark"] == "backend" and BACKEND in match["what"])
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = path.read_text(encoding="utf-8")
    before = dict(BEFORE.get(path.name, {}))
    names: dict[str, object] = {}
    for line, code in blocks_to_run(page):
        for heading in [h for h in before if page.index(f"## {h}") < page.index(code)]:
            exec(before.pop(heading), names)
        # As many empty lines first, so that a traceback has the page's line.
        exec(compile("\n" * line + code, str(path), "exec"), names)
    assert not before


def test_every_python_block_is_found():
    """A fence that the pattern misses would be a block that never runs."""
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        fences = re.findall(r"^ *``` *(?:python|py)\b.*$", page, re.MULTILINE)
        assert len(fences) == len(BLOCK.findall(page)), path

"""How the package is built: what Keras does not publish stands in one module."""

import ast
import re
from pathlib import Path

import keras
import pytest

import keras_lookahead_lazy
from keras_lookahead_lazy import __version__

PACKAGE = Path(keras_lookahead_lazy.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
KERAS = sorted((PACKAGE / "_keras").glob("*.py"))


def private_names_of_keras():
    """Attributes with an underscore of what the package works with."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Embedding(2, 2)])
    model.compile("adam", "mse")
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    things = [model, model.layers[0], model.weights[0], optimizer]
    things += [
        keras.optimizers.LossScaleOptimizer(optimizer),
        keras.callbacks.Callback(),
    ]
    names = {name for thing in things for name in dir(thing)}
    return {name for name in names if name.startswith("_") and name[1] != "_"}


def own_names():
    """What the package's own classes call their attributes and methods."""
    names = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p not in KERAS], ids=lambda p: p.name
)
def test_private_names_of_keras_stand_in_one_folder(path):
    tree = ast.parse(path.read_text())
    private = private_names_of_keras() - own_names() - {"_version"}  # of tensors
    used = [
        f"{node.attr} in line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in private
    ]
    assert used == []
    assert "keras.src" not in path.read_text()


def test_the_test_above_sees_them():
    used = {
        node.attr
        for path in KERAS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    found = used & (private_names_of_keras() - own_names())
    assert {"_iterations", "_trainable_variables", "_var_key", "_embeddings"} <= found


def test_the_version_is_the_same_everywhere():
    root = Path(__file__).parents[1]
    citation = (root / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.M) == [__version__]
    headings = re.findall(r"^## \[(.*)\]", (root / "CHANGELOG.md").read_text(), re.M)
    assert next(name for name in headings if name != "Unreleased") == __version__

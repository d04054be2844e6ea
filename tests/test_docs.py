"""The examples in the docstrings run, and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import keras_lookahead_lazy

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.iter_modules(
        keras_lookahead_lazy.__path__, "keras_lookahead_lazy."
    )
    if not module.ispkg
]


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

"""What the package replaces in Keras is taken back, and all of it."""

import functools

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    QUICK,
    assert_agree,
    make_data,
    make_model,
    run_python,
)

from keras_lookahead_lazy import LazyOptimizer, Lookahead, restore_keras

# Runs in a Python of its own, in which nothing has used the package yet.
EVERYTHING = """
import inspect, sys
import keras
import numpy as np

def everything():
    '''Each attribute of each class and module of Keras.'''
    modules = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "keras"}
    owners = dict(modules)
    for module in modules.values():
        for cls in vars(module).values():
            if inspect.isclass(cls):
                owners[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return {
        (owner, name): attribute
        for owner, thing in owners.items()
        for name, attribute in vars(thing).items()
        if name not in ("__annotations__", "_abc_impl")  # made when they are read
    }

def changed(before):
    now = everything()
    return {k for k in before.keys() | now if now.get(k) is not before.get(k)}

def train(optimizer):
    words = keras.layers.Embedding(50, 3)
    layers = [words, keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,), dtype="int32"), *layers])
    model.compile(optimizer, "mse", auto_scale_loss=False)
    model.fit(np.ones((16, 4)), np.ones((16, 1)), batch_size=4, verbose=0)

def scaled(optimizer):
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0)

plain = keras.optimizers.Adam(0.01)
train(plain)  # Keras's own caches are filled
train(scaled(keras.optimizers.Adam(0.01)))
before = everything()
from keras_lookahead_lazy import LazyOptimizer, Lookahead, restore_keras
assert not changed(before), changed(before)  # by the import
inner = keras.optimizers.Adam(0.01)
train(scaled(Lookahead(LazyOptimizer(inner), k=2)))
found = sorted(f"{owner.split('.')[-1]}.{name}" for owner, name in changed(before))
print(*found)
restore_keras()
assert not changed(before), changed(before)
assert vars(inner).keys() == vars(plain).keys(), vars(inner).keys() ^ vars(plain)
assert type(inner) is type(plain)
restore_keras()  # once more does nothing
assert not changed(before), changed(before)
"""


def test_every_class_is_what_it_was():
    replaced = run_python("-c", EVERYTHING)
    assert replaced.split() == [
        "Embedding.call",
        "LossScaleOptimizer.apply",
        "LossScaleOptimizer.check_finite",
        "LossScaleOptimizer.stateless_apply",
        "Trainer.compile",
    ]


def trained(restores: bool) -> list[np.ndarray]:
    """Weights after twelve steps, before the last eight of which Keras is restored."""
    optimizer = Lookahead(LazyOptimizer(keras.optimizers.Adam(0.01)), k=5)
    model = make_model(optimizer, vocabulary=500, **QUICK)
    x, y = make_data(48)
    how = {"batch_size": 4, "shuffle": False, "verbose": 0}
    model.fit(x[:16], y[:16], **how)
    if restores:
        restore_keras()
        model.compile(optimizer, "mse", **QUICK)
    model.fit(x[16:], y[16:], **how)
    (form,) = optimizer.inner_optimizer.step_forms.values()
    # TensorFlow's own lookups have gradients by rows.
    assert (form == "rows") == (not restores or BACKEND == "tensorflow")
    return model.get_weights()


def test_training_continues_without_the_replaced_methods():
    assert_agree(trained(restores=True), trained(restores=False))


def test_what_another_library_has_wrapped_stays(monkeypatch):
    Lookahead("adam")
    scaling = keras.optimizers.LossScaleOptimizer
    ours = scaling.apply

    @functools.wraps(ours)
    def theirs(*arguments):
        ours(*arguments)

    with monkeypatch.context() as context:
        context.setattr(scaling, "apply", theirs)
        with pytest.warns(UserWarning, match=r"LossScaleOptimizer\.apply is not"):
            restore_keras()
        assert scaling.apply is theirs
    assert scaling.apply is ours
    restore_keras()
    assert scaling.apply is not ours

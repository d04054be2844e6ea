"""What is stored means what it says, and is loaded whole or not at all."""

from typing import Any

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    QUICK,
    make_two_tables,
    numpy,
    tensor,
)

from keras_lookahead_lazy import LazyOptimizer, Lookahead

ROWS, SAMPLED, K = 50, 10, 5


def adam():
    return keras.optimizers.Adam(0.01)


NESTINGS = {
    "adam": adam,
    "lookahead": lambda: Lookahead(adam(), k=K),
    "lazy": lambda: LazyOptimizer(adam()),
    "freeze": lambda: LazyOptimizer(adam(), moments="freeze"),
    "both": lambda: Lookahead(LazyOptimizer(adam()), k=K),
    "outer": lambda: Lookahead(
        LazyOptimizer(adam()),
        k=K,
        outer_optimizer=keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True),
    ),
    "one of two": lambda: Lookahead(LazyOptimizer(adam(), ["words"]), k=K),
    "the other": lambda: Lookahead(LazyOptimizer(adam(), ["tags"]), k=K),
    "twice": lambda: Lookahead(Lookahead(LazyOptimizer(adam()), k=3), k=K),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        Lookahead(LazyOptimizer(adam()), k=K), initial_scale=8.0
    ),
}


def make_built(optimizer):
    model = make_two_tables(optimizer, ROWS, auto_scale_loss=False)
    model.optimizer.build(model.trainable_variables)
    return model


def train(model, updates, seed=0):
    """Rows from `SAMPLED` on are never looked up."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, SAMPLED, (8 * updates, 4)).astype("int32")
    y = rng.normal(size=(8 * updates, 1)).astype("float32")
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)


def wrappers(optimizer):
    found = []
    while optimizer is not None:
        found.append(optimizer)
        optimizer = vars(optimizer).get("inner_optimizer")
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of a model after 7 updates, in mid-cycle, under each nesting."""
    folder = tmp_path_factory.mktemp("weights")
    for name, optimizer in NESTINGS.items():
        model = make_built(optimizer())
        train(model, 7)
        model.save_weights(folder / f"{name}.weights.h5")
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", ["both", "one of two", "twice", "lazy"])
@pytest.mark.parametrize("loaded", ["adam", "lookahead", "both", "the other", "scaled"])
def test_no_file_moves_an_idle_row(files, saved, loaded):
    """Nor is a sync's pull toward something that is no slow weight.

    Rows that nobody looked up stay, and no weight goes further in five updates than
    Adam's steps can carry it.
    """
    model = make_built(NESTINGS[loaded]())
    try:
        model.load_weights(files / f"{saved}.weights.h5")
    except ValueError:  # Keras's, of another optimizer with as many variables
        assert saved != loaded
    before = model.get_weights()
    train(model, K + 1, seed=1)
    for old, new in zip(before, model.get_weights(), strict=True):
        if old.shape[0] == ROWS:
            np.testing.assert_array_equal(new[SAMPLED:], old[SAMPLED:])
        assert np.max(np.abs(new - old)) < 0.01 * 10 * (K + 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NESTINGS)
def test_the_same_nesting_goes_on(files, name):
    whole, resumed = make_built(NESTINGS[name]()), make_built(NESTINGS[name]())
    train(whole, 7)
    resumed.load_weights(files / f"{name}.weights.h5")
    for model in (whole, resumed):
        train(model, 4, seed=1)
    for ours, expected in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_slow_weights_of_idle_rows_are_their_weights():
    """In `variables`, `get_weights` and on the device, not only in files."""
    model = make_built(NESTINGS["both"]())
    train(model, 7)
    lookahead = model.optimizer
    for fast, slow in lookahead._pairs:
        if fast.shape[0] == ROWS:
            fast, slow = numpy([fast, slow])
            np.testing.assert_array_equal(slow[SAMPLED:], fast[SAMPLED:])
            assert np.any(slow[:SAMPLED] != fast[:SAMPLED])


def test_an_inside_that_starts_anew_restarts_lookahead(files):
    model = make_built(NESTINGS["both"]())
    with pytest.warns(UserWarning, match="starts from the beginning"):
        model.load_weights(files / "lookahead.weights.h5")
    assert int(keras.ops.convert_to_numpy(model.optimizer._counter)) == 0


def test_tables_are_told_apart_by_more_than_their_shape(files):
    model = make_built(NESTINGS["the other"]())
    with pytest.warns(UserWarning, match="other tables"):
        model.load_weights(files / "one of two.weights.h5")


@pytest.mark.parametrize("name", NESTINGS)
def test_keras_finds_each_optimizer_once(name):
    """By the attributes that `dir` shows, as its saving does."""
    model = make_built(NESTINGS[name]())
    found = []

    def visit(optimizer):
        found.append(id(optimizer))
        for attribute in dir(optimizer):
            if not attribute.startswith("__"):
                child = getattr(optimizer, attribute, None)
                if isinstance(child, keras.Optimizer):
                    visit(child)

    visit(model.optimizer)
    outer = vars(model.optimizer).get("outer_optimizer") is not None
    assert len(found) == len(set(found)) == len(wrappers(model.optimizer)) + outer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [name for name in NESTINGS if name not in ("one of two", "the other")]
)
def test_a_file_that_keras_refuses(name, tmp_path):
    """Saved with one layer frozen, loaded with another: Keras's error, for all."""

    def model_with_frozen(layer):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((4,), dtype="int32"),
                keras.layers.Embedding(ROWS, 3, name="words"),
                keras.layers.Flatten(),
                keras.layers.Dense(5, use_bias=False, name="hidden"),
                keras.layers.Dense(1),
            ]
        )
        model.get_layer(layer).trainable = False
        model.compile(NESTINGS[name](), "mse", auto_scale_loss=False, **QUICK)
        model.optimizer.build(model.trainable_variables)
        return model

    saved, loaded = model_with_frozen("words"), model_with_frozen("hidden")
    train(saved, 2)
    saved.save_weights(tmp_path / "frozen.weights.h5")
    with pytest.raises(ValueError, match="could not be loaded"):
        loaded.load_weights(tmp_path / "frozen.weights.h5")


def test_parts_that_are_missing_are_named(tmp_path):
    import h5py

    path = tmp_path / "cut.weights.h5"
    model = make_built(NESTINGS["both"]())
    train(model, 7)
    model.save_weights(path)
    with h5py.File(path, "r+") as file:
        del file["optimizer"]["vars"]["2"]
    other = make_built(NESTINGS["both"]())
    with pytest.warns(UserWarning, match="parts 2 are"):
        other.load_weights(path)
    assert int(keras.ops.convert_to_numpy(other.optimizer._counter)) == 0


def test_a_file_of_a_newer_format(tmp_path, monkeypatch):
    path = tmp_path / "new.weights.h5"
    model = make_built(NESTINGS["both"]())
    train(model, 7)
    monkeypatch.setattr("keras_lookahead_lazy._saving.FORMAT", 9)
    model.save_weights(path)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="format 9"):
        make_built(NESTINGS["both"]()).load_weights(path)


def test_a_file_of_the_first_version(tmp_path):
    """Without a format, and with other variables: refused with what to do."""
    import h5py

    path = tmp_path / "old.weights.h5"
    model = make_built(NESTINGS["lazy"]())
    train(model, 7)
    model.save_weights(path)
    with h5py.File(path, "r+") as file:
        variables = file["optimizer"]["vars"]
        kept = [variables[str(i)][()] for i in (0, 1, 2, 4, 5)]
        for name in list(variables):
            del variables[name]
        for i, value in enumerate(kept):
            variables[str(i)] = value
    with pytest.warns(UserWarning, match=r"before 0\.2\.0"):
        make_built(NESTINGS["lazy"]()).load_weights(path)


def test_other_moments_are_told(files):
    model = make_built(NESTINGS["freeze"]())
    with pytest.warns(UserWarning, match="moments='decay'"):
        model.load_weights(files / "lazy.weights.h5")


def test_wrapping_again_leaves_nothing_behind():
    """Lookaheads around one LazyOptimizer, one after the other: each as if alone."""
    lazy = LazyOptimizer(adam())
    model = make_built(lazy)
    train(model, 3)
    for k in (3, 4, 5):
        model.compile(Lookahead(lazy, k=k), "mse", **QUICK)
        train(model, 7, seed=k)
    kept = [v.path for table in lazy._tables.values() for v in table.variables]
    assert len(kept) == 2 * 4  # the table, last_update, two slots
    lookahead = model.optimizer
    assert not lookahead._is_nested()
    idle = {id(fast): numpy([fast])[0][SAMPLED:] for fast, _ in lookahead._pairs}
    train(model, 5)
    for fast, _ in lookahead._pairs:
        if fast.shape[0] == ROWS:
            np.testing.assert_array_equal(numpy([fast])[0][SAMPLED:], idle[id(fast)])


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipnorm": {"clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "EMA": {"use_ema": True, "ema_overwrite_frequency": 2},
}


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="SavedModel and tf.train.Checkpoint"
)
@pytest.mark.parametrize(("around", "eagerly"), [(False, True), (True, False)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_exports_after_a_step(setting, around, eagerly, tmp_path):
    import tensorflow as tf

    lazy = LazyOptimizer(keras.optimizers.Adam(0.01, **SETTINGS[setting]))
    model = make_built(Lookahead(lazy, k=2) if around else lazy)
    model.compile(model.optimizer, "mse", run_eagerly=eagerly)
    train(model, 3)
    model.export(tmp_path / "exported", verbose=False)
    tf.saved_model.save(model, str(tmp_path / "saved"))
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = checkpoint.save(str(tmp_path / "checkpoint" / "x"))
    before = [*numpy(model.weights), *numpy(model.optimizer._variables)]
    train(model, 3)
    checkpoint.restore(path)
    after = [*numpy(model.weights), *numpy(model.optimizer._variables)]
    for ours, expected in zip(after, before, strict=True):
        np.testing.assert_array_equal(ours, expected)
    x = np.zeros((2, 4), "int32")
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(exported.serve(x), expected, atol=1e-5)


def test_a_step_that_raised_leaves_no_ids(monkeypatch):
    """The next step has its own."""
    table = keras.Variable(np.ones((400, 2), "float32"), name="embeddings")
    inner = keras.optimizers.SGD(0.1, clipnorm=100.0)
    lazy = LazyOptimizer(inner, [table])
    gradient = np.zeros((400, 2), "float32")
    gradient[3] = 1.0
    lazy.apply([tensor(gradient)], [table])
    with monkeypatch.context() as context:
        context.setattr(keras.optimizers.SGD, "update_step", raise_error)
        with pytest.raises(RuntimeError, match="as asked"):
            lazy.apply([tensor(gradient)], [table])
    assert not lazy._taken
    lazy.apply([tensor(gradient[::-1].copy())], [table])
    expected = np.ones((400, 2)) - 0.1 * gradient - 0.1 * gradient[::-1]
    np.testing.assert_allclose(numpy([table])[0], expected, rtol=1e-6)


def raise_error(*_):
    raise RuntimeError("as asked")


# A compiled step keeps the setting until the model is compiled again, as in Keras.
@pytest.mark.parametrize("compiled", [True] if BACKEND == "jax" else [False, True])
def test_a_momentum_that_is_set_between_steps(compiled):
    """Steps missed before it count with the old momentum, later ones with the new."""
    inner = keras.optimizers.SGD(0.1, momentum=0.9)
    lazy = LazyOptimizer(inner)
    model = make_built(lazy)
    if compiled:
        model.compile(lazy, "mse")
    momentum = [np.zeros(w.shape) for w in model.get_weights()]
    rng = np.random.default_rng(3)
    weights = [w.astype("float64") for w in model.get_weights()]
    for step in range(8):
        if step == 4:
            inner.momentum = 0.5
            if compiled:
                model.compile(lazy, "mse")
        rate = 0.9 if step < 4 else 0.5
        x = rng.integers(0, SAMPLED, (2, 4)).astype("int32")
        y = rng.normal(size=(2, 1)).astype("float32")
        gradients = gradients_of(weights, x, y)
        for i, gradient in enumerate(gradients):
            momentum[i] = rate * momentum[i] - 0.1 * gradient
            moved = np.ones(len(gradient), bool)
            if len(gradient) == ROWS:
                moved = np.any(gradient != 0, axis=1)
            weights[i][moved] += momentum[i][moved]
        model.train_on_batch(x, y)
        for ours, expected in zip(model.get_weights(), weights, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)


def gradients_of(weights, x, y):
    """Of the mean squared error, for words, tags, kernel and bias."""
    words, tags, kernel, bias = weights
    flat = (words[x] + tags[x]).reshape(len(x), -1)
    error = 2 * (flat @ kernel + bias - y) / len(x)
    table = np.zeros_like(words)
    np.add.at(table, x, (error @ kernel.T).reshape(*x.shape, -1))
    return [table, table.copy(), flat.T @ error, error.sum(axis=0)]

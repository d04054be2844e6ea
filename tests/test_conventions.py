"""What Keras users expect of an optimizer beside training: configs, clones, counts."""

import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from harness import BACKEND, make, name_of
from harness import OPTIMIZERS as INNER

from keras_lookahead_lazy import LazyOptimizer, Lookahead

VOCABULARY, WIDTH, LENGTH = 7, 2, 3
WEIGHTS = VOCABULARY * WIDTH + LENGTH * WIDTH + 1

random = np.random.default_rng(0)
IDS = random.integers(0, VOCABULARY, (12, LENGTH))
TARGETS = random.normal(size=(12, 1))

OPTIMIZERS = {
    "lookahead": lambda: Lookahead(keras.optimizers.SGD(0.1, momentum=0.9), 2, 0.3),
    "interpolate": lambda: Lookahead("adam", k=2, inner_state="interpolate"),
    "lazy": lambda: LazyOptimizer(keras.optimizers.Adam(0.1), moments="freeze"),
    "named": lambda: LazyOptimizer("rmsprop", ["words"]),
    "both": lambda: Lookahead(LazyOptimizer(keras.optimizers.Adam(0.1)), k=3),
}


def make_small() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((LENGTH,)),
            keras.layers.Embedding(VOCABULARY, WIDTH, name="words"),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    values = np.random.default_rng(1)
    model.set_weights([values.normal(size=w.shape) for w in model.get_weights()])
    return model


def trained(model: keras.Model, optimizer: keras.Optimizer) -> list[np.ndarray]:
    """The weights after seven steps."""
    model.compile(optimizer=optimizer, loss="mse")
    for i in range(7):
        model.train_on_batch(IDS[i : i + 4], TARGETS[i : i + 4])
    return model.get_weights()


def assert_equal(weights: list[np.ndarray], others: list[np.ndarray]) -> None:
    for weight, other in zip(weights, others, strict=True):
        np.testing.assert_array_equal(weight, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_serialized_and_deserialized(name):
    """What comes back from JSON trains exactly as what went in."""
    optimizer = OPTIMIZERS[name]()
    config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    again = keras.optimizers.deserialize(config)
    assert type(again) is type(optimizer)
    assert keras.optimizers.serialize(again) == keras.optimizers.serialize(optimizer)
    assert_equal(trained(make_small(), again), trained(make_small(), optimizer))


def test_get():
    optimizer = Lookahead("adam", k=7)
    assert keras.optimizers.get(optimizer) is optimizer
    again = keras.optimizers.get(keras.optimizers.serialize(optimizer))
    assert (type(again), again.k) == (Lookahead, 7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clone_of_a_trained_model(name):
    """Keras compiles it with an optimizer of its own, of the same config."""
    model = make_small()
    expected = trained(model, OPTIMIZERS[name]())
    clone = keras.models.clone_model(model)
    assert type(clone.optimizer) is type(model.optimizer)
    assert clone.optimizer is not model.optimizer
    clone.set_weights(make_small().get_weights())
    assert_equal(trained(clone, clone.optimizer), expected)
    assert_equal(model.get_weights(), expected)


def test_clone_of_a_lazy_model_trains_as_keras_has_it():
    model = make_small()
    trained(model, LazyOptimizer("adam"))
    clone = keras.models.clone_model(model)
    clone.set_weights(make_small().get_weights())
    assert_equal(trained(clone, "adam"), trained(make_small(), "adam"))


def optimizer_parameters(optimizer: keras.Optimizer) -> int:
    """What `model.summary()` says of a model that is compiled with it."""
    model = make_small()
    model.compile(optimizer=optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    lines: list[str] = []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    (count,) = re.findall(r"Optimizer params: ([\d,]+)", "\n".join(lines))
    return int(count.replace(",", ""))


def test_summary_counts_the_optimizers_parameters():
    adam = optimizer_parameters(keras.optimizers.Adam())
    assert adam == 2 * WEIGHTS + 2  # and iterations, learning rate
    lookahead = optimizer_parameters(Lookahead("adam"))
    assert lookahead == adam + WEIGHTS + 1
    interpolated = optimizer_parameters(Lookahead("adam", inner_state="interpolate"))
    assert interpolated == lookahead + 2 * WEIGHTS
    # A number for each row, two for the table, and the updates.
    lazy = optimizer_parameters(LazyOptimizer("adam"))
    assert lazy == adam + VOCABULARY + 3
    both = optimizer_parameters(Lookahead(LazyOptimizer("adam")))
    assert both == lazy + WEIGHTS + 1
    three = optimizer_parameters(Lookahead(Lookahead(LazyOptimizer("adam"))))
    assert three == both + WEIGHTS + 1


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_summary_counts_with_loss_scaling(place):
    scaling = keras.optimizers.LossScaleOptimizer
    plain = optimizer_parameters(keras.optimizers.Adam())
    scaled = optimizer_parameters(scaling(keras.optimizers.Adam()))
    if place == "outside":
        nested = scaling(Lookahead(LazyOptimizer("adam")))
    else:
        nested = Lookahead(LazyOptimizer(scaling(keras.optimizers.Adam())))
    both = optimizer_parameters(Lookahead(LazyOptimizer("adam")))
    assert optimizer_parameters(nested) == both + scaled - plain


# repr


def evaluated(text: str) -> keras.Optimizer:
    """The optimizer that a `repr` is the code of."""
    names = {**vars(keras.optimizers), **vars(keras.optimizers.schedules)}
    return eval(text, {**names, "LazyOptimizer": LazyOptimizer, "Lookahead": Lookahead})


def config(optimizer: keras.Optimizer) -> str:
    """What an optimizer is made from, without names, which count up."""
    text = json.dumps(keras.optimizers.serialize(optimizer))
    return re.sub(r'"name": ".*?", ', "", text)


@pytest.mark.parametrize("case", INNER, ids=name_of)
def test_repr_is_the_code_of_the_optimizer(case):
    lazy = LazyOptimizer(make(case), ["words"], moments="freeze")
    optimizer = Lookahead(Lookahead(lazy, alpha=0.3), k=2, inner_state="interpolate")
    again = evaluated(repr(optimizer))
    assert config(again) == config(optimizer)
    assert repr(again) == repr(optimizer)


@pytest.mark.parametrize("built", [False, True])
def test_repr(built):
    schedule = keras.optimizers.schedules.CosineDecay(0.5, 100, alpha=0.25)
    sgd = keras.optimizers.SGD(schedule, momentum=0.5, clipnorm=1.0)
    scaled = keras.optimizers.LossScaleOptimizer(sgd, initial_scale=4.0)
    optimizer = Lookahead(LazyOptimizer(scaled), k=3)
    if built:
        trained(make_small(), optimizer)
    assert repr(optimizer) == (
        "Lookahead(LazyOptimizer(LossScaleOptimizer(SGD("
        "learning_rate=CosineDecay(initial_learning_rate=0.5, decay_steps=100, "
        "alpha=0.25), clipnorm=1.0, momentum=0.5), initial_scale=4.0), "
        "moments='decay'), k=3, alpha=0.5, inner_state='maintain')"
    )


def test_repr_has_the_learning_rate_and_the_tables_of_now():
    words = keras.layers.Embedding(7, 2, name="words")
    optimizer = LazyOptimizer("adam", [words])
    assert repr(optimizer) == (
        "LazyOptimizer(Adam(learning_rate=0.001), embedding_layers=['words'], "
        "moments='decay')"
    )
    optimizer.learning_rate = 0.25
    optimizer.moments = "freeze"
    words.build()
    optimizer.build([words.embeddings])
    assert repr(optimizer) == (
        "LazyOptimizer(Adam(learning_rate=0.25), "
        "embedding_layers=['words/embeddings:0'], moments='freeze')"
    )


def test_repr_of_a_function_as_learning_rate():
    def rate():
        raise AssertionError("called")

    optimizer = Lookahead(keras.optimizers.SGD(rate))
    assert repr(optimizer).startswith("Lookahead(SGD(learning_rate=rate), k=5")


def test_repr_of_a_users_optimizer():
    class Mine(keras.optimizers.SGD):
        def __init__(self, scale, **arguments):
            super().__init__(**arguments)
            self.scale = scale

        def get_config(self):
            return {**super().get_config(), "scale": self.scale}

    class Without(keras.optimizers.SGD):
        def get_config(self):
            raise NotImplementedError

    scale = keras.ops.ones((2, 3))
    assert repr(Lookahead(Mine(scale, momentum=0.5))).startswith(
        "Lookahead(Mine(learning_rate=0.01, momentum=0.5, "
        "scale=<array of shape (2, 3)>), k=5"
    )
    assert repr(Lookahead(Without(0.5))).startswith("Lookahead(Without(learning_rate=0")


def test_repr_of_what_was_not_made():
    assert "Lookahead object at" in repr(object.__new__(Lookahead))


class Repr(keras.callbacks.Callback):
    """The optimizer's `repr` where a step may hold its state."""

    def on_train_batch_end(self, batch, logs=None):
        self.shown = repr(self.model.optimizer)


@pytest.mark.parametrize("eagerly", [False, True])
def test_repr_in_training(eagerly, monkeypatch):
    """It neither fails within a step, nor works on slots, nor changes the training."""
    shown: list[str] = []

    class Mine(keras.optimizers.Adam):
        def update_step(self, *arguments):
            if callbacks:
                shown.append(repr(optimizer))
            super().update_step(*arguments)

    weights = []
    for callbacks in [], [callback := Repr()]:
        optimizer = Lookahead(LazyOptimizer(Mine(0.25)))
        model = make_small()
        eager = eagerly and BACKEND != "jax"
        model.compile(optimizer, "mse", run_eagerly=eager)
        if callbacks:
            monkeypatch.setattr(LazyOptimizer, "catch_up", None)
        model.fit(IDS, TARGETS, 4, callbacks=callbacks, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    assert_equal(*weights)
    for text in [*shown, callback.shown]:
        rate = re.fullmatch(
            r"Lookahead\(LazyOptimizer\(Mine\(learning_rate=(.*?)\), "
            r"moments='decay'\), k=5, alpha=0.5, inner_state='maintain'\)",
            text,
        )
        assert rate
        assert rate[1] in ("0.25", "...")
    assert "Mine(learning_rate=0.25)" in repr(optimizer)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX tells what it compiles")
def test_repr_compiles_nothing(caplog):
    import jax

    optimizer = Lookahead(LazyOptimizer(keras.optimizers.Adam(0.1)))
    trained(make_small(), optimizer)
    jax.clear_caches()
    with jax.log_compiles():
        repr(optimizer)
        assert not caplog.records
        jax.jit(lambda x: x + 1)(1)
        assert caplog.records


def test_a_search_over_k_and_alpha(capsys, monkeypatch):
    """The example finds settings, and a trial's model is trained with its own."""
    pytest.importorskip("keras_tuner")
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from examples.search_k_alpha import __main__ as search_k_alpha

    tuner = search_k_alpha.search(trials=3, epochs=1, seed=0)
    for trial in tuner.oracle.get_best_trials(3):
        assert 0.05 < trial.score <= 1
        model = search_k_alpha.build_model(trial.hyperparameters)
        chosen = trial.hyperparameters.values
        assert (model.optimizer.k, model.optimizer.alpha) == (
            chosen["k"],
            chosen["alpha"],
        )
    search_k_alpha.main(["--trials", "1", "--epochs", "1"])
    heading, line = capsys.readouterr().out.splitlines()[-2:]
    assert heading.split() == ["accuracy", "learning", "rate", "k", "alpha"]
    assert 0 < float(line.split()[0]) <= 1

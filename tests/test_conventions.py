"""What Keras users expect of an optimizer beside training: configs, clones, counts."""

import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest

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


def make_model() -> keras.Model:
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
    assert_equal(trained(make_model(), again), trained(make_model(), optimizer))


def test_get():
    optimizer = Lookahead("adam", k=7)
    assert keras.optimizers.get(optimizer) is optimizer
    again = keras.optimizers.get(keras.optimizers.serialize(optimizer))
    assert (type(again), again.k) == (Lookahead, 7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clone_of_a_trained_model(name):
    """Keras compiles it with an optimizer of its own, of the same config."""
    model = make_model()
    expected = trained(model, OPTIMIZERS[name]())
    clone = keras.models.clone_model(model)
    assert type(clone.optimizer) is type(model.optimizer)
    assert clone.optimizer is not model.optimizer
    clone.set_weights(make_model().get_weights())
    assert_equal(trained(clone, clone.optimizer), expected)
    assert_equal(model.get_weights(), expected)


def test_clone_of_a_lazy_model_trains_as_keras_has_it():
    model = make_model()
    trained(model, LazyOptimizer("adam"))
    clone = keras.models.clone_model(model)
    clone.set_weights(make_model().get_weights())
    assert_equal(trained(clone, "adam"), trained(make_model(), "adam"))


def optimizer_parameters(optimizer: keras.Optimizer) -> int:
    """What `model.summary()` says of a model that is compiled with it."""
    model = make_model()
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
    # A number for each row, and a few for all.
    lazy = optimizer_parameters(LazyOptimizer("adam"))
    assert VOCABULARY + 1 <= lazy - adam <= VOCABULARY + 3
    both = optimizer_parameters(Lookahead(LazyOptimizer("adam")))
    assert both - lazy == lookahead - adam


def test_a_search_over_k_and_alpha(capsys, monkeypatch):
    """The example finds settings, and a trial's model is trained with its own."""
    pytest.importorskip("keras_tuner")
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from examples import search_k_alpha

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

"""Beside the table of wrong uses: what is none, and errors around training."""

import inspect
import re
from typing import Any

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    QUICK,
    adam,
    assert_same_bits,
    dtype_policy,
    make_data,
    numpy,
)

from keras_lookahead_lazy import LazyOptimizer, Lookahead, inject

WRAPPERS = [Lookahead, LazyOptimizer]


def model_of(*embeddings):
    """A model of the given layers, or of one Embedding called words."""
    embeddings = embeddings or (keras.layers.Embedding(12, 3, name="words"),)
    tokens = keras.Input((4,), dtype="int32")
    merged = [keras.layers.Flatten()(layer(tokens)) for layer in embeddings]
    merged = keras.layers.Concatenate()([*merged, *merged])
    return keras.Model(tokens, keras.layers.Dense(1, name="head")(merged), name="net")


# Arguments


def test_integers_and_floats_of_numpy_are_fine():
    numbers: dict[str, Any] = {"k": np.int64(3), "alpha": np.float32(0.5)}
    optimizer = Lookahead(adam(), **numbers)
    assert (optimizer.k, optimizer.alpha) == (3, 0.5)
    assert Lookahead(adam(), k=1, alpha=1).alpha == 1.0


class TwiceAsFast(keras.optimizers.Adam):
    """A user's optimizer that hands on what it does not know."""

    def __init__(self, learning_rate=1e-3, **kwargs):
        super().__init__(2 * learning_rate, **kwargs)


class Fixed(keras.optimizers.Adam):
    """One that does not."""

    def __init__(self, learning_rate=1e-3):
        super().__init__(learning_rate)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_setting_is_recommended_only_where_it_exists(wrapper):
    arguments = {
        Lookahead: "optimizer, k, alpha, inner_state, outer_optimizer, name",
        LazyOptimizer: "optimizer, embedding_layers, moments, name",
    }[wrapper]
    for inner, setting, accepted in (
        (keras.optimizers.SGD(), "momentum", True),
        (keras.optimizers.SGD(), "beta_1", False),
        (keras.optimizers.Adam(), "lr", False),
        (keras.optimizers.Adam(), "kwargs", False),
        (TwiceAsFast(), "beta_1", True),
        (TwiceAsFast(), "clipnorm", True),
        (TwiceAsFast(), "momentum", False),
        (Fixed(), "beta_1", False),
    ):
        with pytest.raises(TypeError, match=f"no argument `{setting}`") as e:
            wrapper(inner, **{setting: 0.5})
        advice = f"{wrapper.__name__}({type(inner).__name__}({setting}=0.5), ...)"
        assert (advice in str(e.value)) == accepted
        assert (arguments in str(e.value)) != accepted


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_settings_without_an_optimizer(wrapper):
    """What a user writes who takes the wrapper for an optimizer of its own."""
    advice = re.escape(f"{wrapper.__name__}(Adam(learning_rate=0.1), ...)")
    with pytest.raises(TypeError, match=advice):
        wrapper(**{"learning_rate": 0.1})


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_signature_is_that_of_the_arguments(wrapper):
    parameters = inspect.signature(wrapper).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    documented = re.findall(r"^ {4}(\w+): ", inspect.getdoc(wrapper) or "", re.M)
    assert list(parameters) == [name for name in documented if name in parameters]


@keras.saving.register_keras_serializable(package="tests")
class Renamed(Lookahead):
    """A user's wrapper with an argument of its own, which hands on the others."""

    def __init__(self, optimizer, label="", **kwargs):
        super().__init__(optimizer, **kwargs)
        self.label = label

    def get_config(self):
        return {**super().get_config(), "label": self.label}


def test_subclass_of_a_wrapper(tmp_path):
    with pytest.raises(TypeError, match=r"Renamed has no argument `moments`"):
        Renamed(adam(), "mine", moments="freeze")
    model = model_of()
    model.compile(Renamed(adam(), label="mine", k=2), "mse", **QUICK)
    x, y = make_data(12)
    fit = {"batch_size": 4, "shuffle": False, "verbose": 0}
    model.fit(x, y, **fit)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert (loaded.optimizer.label, loaded.optimizer.k) == ("mine", 2)
    for each in (model, loaded):
        each.fit(x, y, **fit)
    assert_same_bits(loaded.get_weights(), model.get_weights())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_and_configs_of_optimizers_are_fine(wrapper):
    for given in ("adam", keras.optimizers.serialize(adam())):
        assert isinstance(wrapper(given).inner_optimizer, keras.optimizers.Adam)


# Tables


def build(optimizer, model):
    optimizer.build(model.trainable_variables)


def test_source_that_is_not_in_the_model_stops_fit_before_the_first_step():
    model = model_of()
    model.compile(LazyOptimizer(adam(), ["nowhere"]), "mse")
    before = model.get_weights()
    with pytest.raises(ValueError, match="'nowhere'"):
        model.fit(*make_data(8), verbose=0)
    assert_same_bits(model.get_weights(), before)


@pytest.mark.parametrize("source", ["all", "layer", "variable", "name", "path"])
def test_frozen_embedding(source):
    """A warning, and the rest trains as under the inner optimizer."""
    model = model_of()
    words = model.get_layer("words")
    words.trainable = False
    sources = {
        "all": None,
        "layer": [words],
        "variable": [words.embeddings],
        "name": ["words"],
        "path": [words.embeddings.path],
    }[source]
    initial, ended = model.get_weights(), []
    for wrap in (lambda o: o, lambda o: LazyOptimizer(o, sources)):
        model.set_weights(initial)
        optimizer = wrap(adam())
        model.compile(optimizer, "mse", **QUICK)
        if isinstance(optimizer, LazyOptimizer):
            with pytest.warns(UserWarning, match="frozen: .*words.*unfreezing"):
                model.fit(*make_data(8), batch_size=4, shuffle=False, verbose=0)
        else:
            model.fit(*make_data(8), batch_size=4, shuffle=False, verbose=0)
        ended.append(model.get_weights())
    assert_same_bits(*ended)
    assert optimizer.step_forms == {}
    words.trainable = True  # the second phase, with the same line
    model.compile(LazyOptimizer(adam(), sources), "mse")
    model.fit(*make_data(8), verbose=0)
    assert list(model.optimizer.step_forms) == [words.embeddings.path]


def test_one_of_two_tables_frozen():
    tables = [keras.layers.Embedding(12, 3, name=name) for name in ("words", "tags")]
    model = model_of(*tables)
    tables[0].trainable = False
    optimizer = LazyOptimizer(adam(), tables)
    with pytest.warns(UserWarning, match="frozen: words"):
        build(optimizer, model)
    assert list(optimizer.step_forms) == ["tags/embeddings"]
    assert optimizer.get_config()["embedding_layers"] == ["tags/embeddings:0", "words"]


def test_path_of_one_of_two_tables_with_a_name():
    towers = [
        keras.Sequential(
            [keras.Input((4,)), keras.layers.Embedding(12, 3, name="words")], name=name
        )
        for name in ("left", "right")
    ]
    model = model_of(*towers)
    optimizer = LazyOptimizer(adam(), ["right/words"])
    build(optimizer, model)
    assert list(optimizer.step_forms) == ["right/words/embeddings"]


def test_naming_a_table_twice_is_fine():
    words = keras.layers.Embedding(12, 3, name="words")
    model = model_of(words)
    optimizer = LazyOptimizer(adam(), [words, "words", words.embeddings])
    build(optimizer, model)
    assert list(optimizer.step_forms) == [words.embeddings.path]


# Nesting


@pytest.mark.parametrize(
    "wrap",
    [Lookahead, LazyOptimizer, lambda o: Lookahead(LazyOptimizer(o))],
    ids=["Lookahead", "LazyOptimizer", "both"],
)
def test_loss_scaling_on_both_sides(wrap):
    """mixed_float16 scales the loss; inside a wrapper that is done already."""
    with dtype_policy("mixed_float16"):
        model = model_of()
    optimizer = wrap(keras.optimizers.LossScaleOptimizer(adam()))
    with pytest.raises(ValueError, match=r"LossScaleOptimizer.*compile the plain"):
        model.compile(optimizer, "mse")
    model.compile(optimizer, "mse", auto_scale_loss=False)
    assert model.optimizer is optimizer


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_wrapper_for_two_models(wrapper):
    """Their weights have the same shapes, so that only their identity tells."""
    optimizer = wrapper(adam())
    x, y = make_data(8)
    model, other = model_of(), model_of()
    for _ in range(2):  # a model that is compiled again is the same
        model.compile(optimizer, "mse")
        model.fit(x, y, verbose=0)
    other.compile(optimizer, "mse")
    before = other.get_weights()
    with pytest.raises(ValueError, match=r"other weights.*its own"):
        other.fit(x, y, verbose=0)
    if BACKEND != "jax":  # where fit had taken the values out of the variables
        assert_same_bits(other.get_weights(), before)


# Around training


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch: no float16 on a CPU")
def test_inject_with_bad_arguments_in_float16():
    with dtype_policy("mixed_float16"):
        model = model_of()
    inner = adam()
    model.compile(inner, "mse")
    with pytest.raises(ValueError, match="`k`"):
        inject(model, k=0)
    assert model.optimizer.inner_optimizer is inner


def test_set_weights():
    """A list that does not fit is refused as a whole."""
    model = model_of()
    optimizer = Lookahead(LazyOptimizer(adam()))
    build(optimizer, model)
    before = numpy(optimizer.variables)
    filled = [np.full_like(value, 1) for value in before]
    for i in range(len(before)):
        wrong = list(filled)
        wrong[i] = np.ones((3, *before[i].shape), before[i].dtype)
        path = optimizer.variables[i].path
        with pytest.raises(ValueError, match=rf"{path}.*shape"):
            optimizer.set_weights(wrong)
    with pytest.raises(ValueError, match=f"{len(before)} variables.*{len(before) - 1}"):
        optimizer.set_weights(filled[1:])
    assert_same_bits(numpy(optimizer.variables), before)
    optimizer.set_weights(filled)
    assert_same_bits(numpy(optimizer.variables), filled)


@pytest.mark.parametrize(
    "wrap", [lambda o: o, *WRAPPERS], ids=["plain", "ahead", "lazy"]
)
def test_no_gradients_are_no_update(wrap):
    """As with Keras's optimizers: neither built on nothing nor counted."""
    optimizer = wrap(adam())
    optimizer.apply([], [])
    optimizer.apply([])
    assert not optimizer.built
    model = model_of()
    build(optimizer, model)
    before = numpy(optimizer.variables)
    optimizer.apply([], [])
    optimizer.apply([])
    assert_same_bits(numpy(optimizer.variables), before)
    optimizer.apply([keras.ops.ones(w.shape) for w in model.trainable_variables])
    assert int(optimizer.iterations) == 1

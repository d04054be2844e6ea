"""Bad arguments: what came, what to write instead, and never during training."""

from typing import Any

import keras
import numpy as np
import pytest
from harness import BACKEND, QUICK, assert_same_bits, dtype_policy, make_data, numpy

from keras_lookahead_lazy import LazyOptimizer, Lookahead, SlowWeights, inject

WRAPPERS = [Lookahead, LazyOptimizer]
nan = float("nan")


def adam():
    return keras.optimizers.Adam(0.05)


def model_of(*embeddings):
    """A model of the given layers, or of one Embedding called words."""
    embeddings = embeddings or (keras.layers.Embedding(12, 3, name="words"),)
    tokens = keras.Input((4,), dtype="int32")
    merged = [keras.layers.Flatten()(layer(tokens)) for layer in embeddings]
    merged = keras.layers.Concatenate()([*merged, *merged])
    return keras.Model(tokens, keras.layers.Dense(1, name="head")(merged), name="net")


def assert_trains_like_new(inner, model=None):
    """An optimizer that a wrapper refused does what it would have done without."""
    model = model or model_of()
    model.trainable = True
    initial = model.get_weights()
    weights = []
    for optimizer in (inner, type(inner).from_config(inner.get_config())):
        model.set_weights(initial)
        model.compile(optimizer, "mse", **QUICK)
        model.fit(*make_data(8), batch_size=4, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    assert_same_bits(*weights)


# Arguments


@pytest.mark.parametrize("k", [0, -1, 2.5, 5.0, True, "5", None, nan, [5]], ids=repr)
def test_k(k):
    with pytest.raises(ValueError, match=r"`k` .*at least 1.*k=5.*Received: k=") as e:
        Lookahead(adam(), k=k)
    assert f"k={k!r}" in str(e.value)


@pytest.mark.parametrize(
    "alpha", [0, -0.1, 1.5, nan, float("inf"), "0.5", None, True, [0.5]], ids=repr
)
def test_alpha(alpha):
    with pytest.raises(ValueError, match=r"`alpha` .*\(0, 1\].*alpha=0\.5") as e:
        Lookahead(adam(), alpha=alpha)
    assert f"Received: alpha={alpha!r}" in str(e.value)


def test_integers_and_floats_of_numpy_are_fine():
    numbers: dict[str, Any] = {"k": np.int64(3), "alpha": np.float32(0.5)}
    optimizer = Lookahead(adam(), **numbers)
    assert (optimizer.k, optimizer.alpha) == (3, 0.5)
    assert Lookahead(adam(), k=1, alpha=1).alpha == 1.0


@pytest.mark.parametrize("inner_state", ["pullback", "Reset", None, 0, ["reset"]])
def test_inner_state(inner_state):
    match = "`inner_state` .*'maintain', 'interpolate', 'reset'.*Received"
    with pytest.raises(ValueError, match=match) as e:
        Lookahead(adam(), inner_state=inner_state)
    assert repr(inner_state) in str(e.value)


@pytest.mark.parametrize("moments", ["Decay", "frozen", None, 1, ["decay"]])
def test_moments(moments):
    match = "`moments` .*'decay' or 'freeze'.*Received"
    with pytest.raises(ValueError, match=match) as e:
        LazyOptimizer(adam(), moments=moments)
    assert repr(moments) in str(e.value)
    optimizer = LazyOptimizer(adam())
    with pytest.raises(ValueError, match=match):
        optimizer.moments = moments
    assert optimizer.moments == "decay"


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("clipnorm", 1.0),
        ("clipvalue", 1.0),
        ("global_clipnorm", 1.0),
        ("learning_rate", 0.1),
        ("weight_decay", 0.01),
        ("use_ema", True),
        ("gradient_accumulation_steps", 2),
        ("loss_scale_factor", 8.0),
        ("beta_1", 0.8),
    ],
)
def test_setting_of_the_inner_optimizer(wrapper, setting, value):
    match = rf"{wrapper.__name__} .*`{setting}`.*inner.*\({setting}={value}\)"
    with pytest.raises(TypeError, match=match):
        wrapper(adam(), **{setting: value})


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        ({"sync_period": 6, "slow_step_size": 0.5}, "k=6, alpha=0.5"),
        ({"la_steps": 7, "la_alpha": 0.8}, "k=7, alpha=0.8"),
        ({"pullback_momentum": "reset"}, "inner_state='reset'"),
        ({"pullback_momentum": "none"}, "inner_state='maintain'"),
        ({"pullback_momentum": "pullback"}, "inner_state='interpolate'"),
    ],
    ids=str,
)
def test_names_that_others_give_to_the_arguments(arguments, ours):
    """TensorFlow Addons and optax, then two ports to torch."""
    with pytest.raises(TypeError) as e:
        Lookahead("adam", **arguments)
    assert f"Lookahead(..., {ours})" in str(e.value)
    assert all(f"`{name}`" in str(e.value) for name in arguments)
    assert "Adam" not in str(e.value)
    with pytest.raises(TypeError, match=r"are optimizer, embedding_layers, moments, n"):
        LazyOptimizer("adam", **arguments)


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
        Lookahead: "optimizer, k, alpha, inner_state, name",
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
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (keras.optimizers.Adam, r"class Adam; write Adam\(\)"),
        (1e-3, "0.001 of type float"),
        (None, "None of type NoneType"),
        ([keras.optimizers.Adam], "of type list"),
        (keras.layers.Dense(1), "of type Dense"),
    ],
    ids=["class", "number", "None", "list", "layer"],
)
def test_no_optimizer(wrapper, given, words):
    match = rf"{wrapper.__name__} wraps a Keras optimizer.*Adam.*{words}"
    with pytest.raises(TypeError, match=match):
        wrapper(given)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_unknown_name_of_an_optimizer(wrapper):
    with pytest.raises(ValueError, match="adamm"):
        wrapper("adamm")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_and_configs_of_optimizers_are_fine(wrapper):
    for given in ("adam", keras.optimizers.serialize(adam())):
        assert isinstance(wrapper(given).inner_optimizer, keras.optimizers.Adam)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_the_constructor_fixes(wrapper, built):
    """Setting it afterwards had no effect, or half of one."""
    optimizer = wrapper(adam())
    if built:
        build(optimizer, model_of())
    fixed = {"inner_optimizer": adam()}
    if wrapper is Lookahead:
        fixed |= {"k": 7, "alpha": 0.25, "inner_state": "reset"}
    config = optimizer.get_config()
    for name, value in fixed.items():
        match = rf"`{name}` is fixed.*new optimizer, {wrapper.__name__}\(\.\.\.\)"
        with pytest.raises(AttributeError, match=match):
            setattr(optimizer, name, value)
    assert optimizer.get_config() == config


# Tables


@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [
        ([], ValueError, "empty list.*None for every"),
        ([keras.layers.Dense(1, name="d")], ValueError, "'d'.*Dense, not an Embedding"),
        ([keras.layers.LSTM(1, name="l")], ValueError, "'l'.*LSTM, not an Embedding"),
        (keras.layers.Embedding(2, 2), TypeError, r"list.*Embedding.*\[\.\.\.\]"),
        ("words", TypeError, r"list.*'words' of type str.*\[\.\.\.\]"),
        ({"words"}, TypeError, r"list.*of type set.*\[\.\.\.\]"),
        (3, TypeError, r"list.*3 of type int.*\[\.\.\.\]"),
        ([3], TypeError, "3 of type int"),
        ([None], TypeError, "None of type NoneType"),
        ([np.zeros((2, 2))], TypeError, "of type ndarray"),
        ([keras.layers.Embedding], TypeError, "of type type"),
    ],
    ids=lambda value: None if isinstance(value, (list, type)) else str(value)[:20],
)
def test_embedding_layers(layers, error, words):
    inner = adam()
    with pytest.raises(error, match=f"(?s){words}"):
        LazyOptimizer(inner, layers)
    assert_trains_like_new(inner)


def test_a_vector_is_no_table():
    bias = model_of().get_layer("head").bias
    with pytest.raises(ValueError, match=r"head/bias.*\(1,\).*two dimensions"):
        LazyOptimizer(adam(), [bias])


def build(optimizer, model):
    optimizer.build(model.trainable_variables)


def other_model():
    return model_of(keras.layers.Embedding(7, 3, name="others"))


SOURCES = {
    "layer of another model": (
        lambda: [other_model().get_layer("others")],
        "'others'.*not part of this model.*words/embeddings",
    ),
    "layer that is not built": (
        lambda: [keras.layers.Embedding(3, 3, name="loose")],
        "'loose'.*not part of this model.*words/embeddings",
    ),
    "variable of another model": (
        lambda: [other_model().get_layer("others").embeddings],
        "'others/embeddings'.*not among.*words/embeddings",
    ),
    "unknown name": (lambda: ["word"], "'word'.*no trainable.*words/embeddings"),
    "empty name": (lambda: [""], "''.*words/embeddings"),
    "name of a Dense": (lambda: ["head"], "'head'.*head/kernel"),
    "path of a bias": (lambda: ["head/bias"], r"'head/bias'.*no.*table.*\(1,\)"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_source_that_is_not_in_the_model(case):
    make_sources, words = SOURCES[case]
    inner = adam()
    optimizer = LazyOptimizer(inner, make_sources())
    model = model_of()
    with pytest.raises(ValueError, match=f"(?s){words}"):
        build(optimizer, model)
    assert not inner.built
    assert_trains_like_new(inner, model)


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
            with pytest.warns(UserWarning, match="Frozen, .*words.*unfreezing"):
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
    with pytest.warns(UserWarning, match="Frozen, .*: words"):
        build(optimizer, model)
    assert list(optimizer.step_forms) == ["tags/embeddings"]
    assert optimizer.get_config()["embedding_layers"] == ["tags/embeddings:0", "words"]


def test_model_without_embedding():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="head")])
    inner = adam()
    optimizer = LazyOptimizer(inner)
    for _ in range(2):  # whether or not it knows the model
        with pytest.raises(ValueError, match=r"no embedding table.*head/kernel \(4, 1"):
            build(optimizer, model)
        assert not inner.built
        model.compile(optimizer, "mse")


def test_ambiguous_name():
    towers = [
        keras.Sequential(
            [keras.Input((4,)), keras.layers.Embedding(12, 3, name="words")], name=name
        )
        for name in ("left", "right")
    ]
    model = model_of(*towers)
    with pytest.raises(ValueError, match=r"'words'.*several.*left/words.*right/words"):
        build(LazyOptimizer(adam(), ["words"]), model)
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


def test_lazy_around_lookahead():
    match = r"inside Lookahead, not around.*Lookahead\(LazyOptimizer\(Adam"
    with pytest.raises(ValueError, match=match):
        LazyOptimizer(Lookahead(adam()))


def test_lazy_around_lazy():
    match = r"LazyOptimizer inside a LazyOptimizer.*one.*embedding_layers=\["
    for inner in (
        LazyOptimizer(adam()),
        keras.optimizers.LossScaleOptimizer(LazyOptimizer(adam())),
    ):
        with pytest.raises(ValueError, match=match):
            LazyOptimizer(inner)


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
    with pytest.raises(ValueError, match=r"LossScaleOptimizer.*compile the plain"):
        keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, "mse", auto_scale_loss=False)
    assert model.optimizer is optimizer


@pytest.mark.parametrize("built", [True, False])
def test_one_inner_optimizer_in_two_lazy_optimizers(built):
    inner = adam()
    first = LazyOptimizer(inner)
    if built:
        build(first, model_of())
        with pytest.raises(ValueError, match=r"Adam.*another LazyOptimizer.*its own"):
            LazyOptimizer(inner)
        return
    second = LazyOptimizer(inner)
    model = model_of()
    build(first, model)
    with pytest.raises(ValueError, match=r"Adam.*another LazyOptimizer.*its own"):
        build(second, model)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_inner_optimizer_of_another_model(wrapper):
    inner = adam()
    build(inner, model_of())
    match = r"Adam .adam.*was built for other weights.*words/embeddings.*its own "
    with pytest.raises(ValueError, match=match + wrapper.__name__):
        build(wrapper(inner), model_of())


@pytest.mark.parametrize("train", ["fit", "train_on_batch"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_wrapper_for_two_models(wrapper, train):
    """Their weights have the same shapes, so that only their identity tells."""
    optimizer = wrapper(adam())
    x, y = make_data(8)
    model, other = model_of(), model_of()
    for _ in range(2):  # a model that is compiled again is the same
        model.compile(optimizer, "mse")
        getattr(model, train)(x, y)
    other.compile(optimizer, "mse")
    before = other.get_weights()
    with pytest.raises(ValueError, match=r"other weights.*its own"):
        getattr(other, train)(x, y)
    if BACKEND != "jax":  # where fit had taken the values out of the variables
        assert_same_bits(other.get_weights(), before)


# Around training


def test_inject():
    with pytest.raises(ValueError, match=r"'net' is not compiled.*compile"):
        inject(model_of())
    model = model_of()
    optimizer = adam()
    model.compile(optimizer, "mse")
    for arguments in ({"k": 0}, {"k": 2.5}, {"alpha": 0}, {"alpha": nan}):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
            inject(model, **arguments)
        assert model.optimizer is optimizer


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch: no float16 on a CPU")
def test_inject_with_bad_arguments_in_float16():
    with dtype_policy("mixed_float16"):
        model = model_of()
    inner = adam()
    model.compile(inner, "mse")
    with pytest.raises(ValueError, match="`k`"):
        inject(model, k=0)
    assert model.optimizer.inner_optimizer is inner


def test_inject_twice():
    model = model_of()
    model.compile(LazyOptimizer(adam()), "mse")
    lookahead = inject(model, k=3)
    match = r"'net' has a Lookahead already.*k=3.*compile"
    with pytest.raises(ValueError, match=match):
        inject(model, k=7)
    assert model.optimizer is lookahead
    assert isinstance(lookahead.inner_optimizer, LazyOptimizer)


def test_slow_weights_callback_without_lookahead():
    model = model_of()
    model.compile(LazyOptimizer(adam()), "mse")
    before = model.get_weights()
    match = r"no slow weights.*LazyOptimizer.*Lookahead\(\.\.\.\).*inject"
    with pytest.raises(ValueError, match=match):
        model.fit(*make_data(8), callbacks=[SlowWeights()], verbose=0)
    assert_same_bits(model.get_weights(), before)


def test_slow_weights_of_another_model():
    model, other = model_of(), model_of()
    lookahead = Lookahead(adam())
    with (
        pytest.raises(ValueError, match=r"does not train the model 'net'.*build"),
        lookahead.slow_weights(model),
    ):
        pass
    build(lookahead, model)
    with (
        pytest.raises(ValueError, match="does not train the model 'net'"),
        lookahead.slow_weights(other),
    ):
        pass
    with lookahead.slow_weights(model):
        pass


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


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_set_weights_before_the_build(wrapper):
    """Its only variables then are counters, which a list may happen to fit."""
    for weights in ([], [np.int32(3), np.int32(2), np.float32(0.1)]):
        optimizer = wrapper(adam())
        with pytest.raises(
            ValueError, match=rf"{wrapper.__name__} is not built.*\.build"
        ):
            optimizer.set_weights(weights)
        assert int(optimizer.iterations) == 0


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


def test_gradients_without_variables():
    with pytest.raises(ValueError, match=r"not built.*optimizer\.build"):
        Lookahead(adam()).apply([keras.ops.ones((2,))])

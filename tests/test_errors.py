"""Bad arguments: what came, what to write instead, and never during training."""

import keras
import numpy as np
import pytest
from harness import BACKEND, assert_same_bits

from keras_lookahead_lazy import LazyOptimizer, Lookahead, SlowWeights, inject

WRAPPERS = [Lookahead, LazyOptimizer]
nan = float("nan")


def adam():
    return keras.optimizers.Adam(0.05)


def make_model(*embeddings):
    """A model of the given layers, or of one Embedding called words."""
    if not embeddings:
        embeddings = [keras.layers.Embedding(10, 3, name="words")]
    tokens = keras.Input((4,), dtype="int32")
    merged = [keras.layers.Flatten()(layer(tokens)) for layer in embeddings]
    merged = keras.layers.Concatenate()([*merged, *merged])
    return keras.Model(tokens, keras.layers.Dense(1, name="head")(merged), name="net")


def make_data(samples=8):
    rng = np.random.default_rng(0)
    return rng.integers(0, 10, (samples, 4)), rng.normal(size=(samples, 1))


def numpy(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def assert_trains_like_new(inner, model=None):
    """An optimizer that a wrapper refused does what it would have done without."""
    model = model or make_model()
    model.trainable = True
    initial = model.get_weights()
    weights = []
    for optimizer in (inner, type(inner).from_config(inner.get_config())):
        model.set_weights(initial)
        model.compile(optimizer, "mse", run_eagerly=BACKEND != "jax")
        model.fit(*make_data(), batch_size=4, shuffle=False, verbose=0)
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
    optimizer = Lookahead(adam(), k=np.int64(3), alpha=np.float32(0.5))
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
    bias = make_model().get_layer("head").bias
    with pytest.raises(ValueError, match=r"head/bias.*\(1,\).*two dimensions"):
        LazyOptimizer(adam(), [bias])


def build(optimizer, model):
    optimizer.build(model.trainable_variables)


def other_model():
    return make_model(keras.layers.Embedding(7, 3, name="others"))


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
    model = make_model()
    with pytest.raises(ValueError, match=f"(?s){words}"):
        build(optimizer, model)
    assert not inner.built
    assert_trains_like_new(inner, model)


def test_source_that_is_not_in_the_model_stops_fit_before_the_first_step():
    model = make_model()
    model.compile(LazyOptimizer(adam(), ["nowhere"]), "mse")
    before = model.get_weights()
    with pytest.raises(ValueError, match="'nowhere'"):
        model.fit(*make_data(), verbose=0)
    assert_same_bits(model.get_weights(), before)


def test_frozen_embedding():
    model = make_model()
    words = model.get_layer("words")
    words.trainable = False
    inner = adam()
    with pytest.raises(ValueError, match=r"'words'.*frozen.*head/kernel"):
        build(LazyOptimizer(inner, [words]), model)
    with pytest.raises(ValueError, match=r"no embedding table.*head/kernel"):
        build(LazyOptimizer(inner), model)
    with pytest.raises(ValueError, match=r"'words'.*no trainable"):
        build(LazyOptimizer(inner, ["words"]), model)
    assert not inner.built
    assert_trains_like_new(inner, model)


def test_model_without_embedding():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="head")])
    inner = adam()
    with pytest.raises(ValueError, match=r"no embedding table.*head/kernel \(4, 1\)"):
        build(LazyOptimizer(inner), model)
    assert not inner.built


def test_ambiguous_name():
    towers = [
        keras.Sequential(
            [keras.Input((4,)), keras.layers.Embedding(10, 3, name="words")], name=name
        )
        for name in ("left", "right")
    ]
    model = make_model(*towers)
    with pytest.raises(ValueError, match=r"'words'.*several.*left/words.*right/words"):
        build(LazyOptimizer(adam(), ["words"]), model)
    optimizer = LazyOptimizer(adam(), ["right/words"])
    build(optimizer, model)
    assert list(optimizer.step_forms) == ["right/words/embeddings"]


def test_naming_a_table_twice_is_fine():
    words = keras.layers.Embedding(10, 3, name="words")
    model = make_model(words)
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
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make_model()
    finally:
        keras.config.set_dtype_policy("float32")
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
        build(first, make_model())
        with pytest.raises(ValueError, match=r"Adam.*another LazyOptimizer.*its own"):
            LazyOptimizer(inner)
        return
    second = LazyOptimizer(inner)
    model = make_model()
    build(first, model)
    with pytest.raises(ValueError, match=r"Adam.*another LazyOptimizer.*its own"):
        build(second, model)


# Around training


def test_inject():
    with pytest.raises(ValueError, match=r"'net' is not compiled.*compile"):
        inject(make_model())
    model = make_model()
    optimizer = adam()
    model.compile(optimizer, "mse")
    for arguments in ({"k": 0}, {"k": 2.5}, {"alpha": 0}, {"alpha": nan}):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
            inject(model, **arguments)
        assert model.optimizer is optimizer


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch: no float16 on a CPU")
def test_inject_with_bad_arguments_in_float16():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make_model()
    finally:
        keras.config.set_dtype_policy("float32")
    inner = adam()
    model.compile(inner, "mse")
    with pytest.raises(ValueError, match="`k`"):
        inject(model, k=0)
    assert model.optimizer.inner_optimizer is inner


def test_inject_twice():
    model = make_model()
    model.compile(LazyOptimizer(adam()), "mse")
    lookahead = inject(model, k=3)
    match = r"'net' has a Lookahead already.*k=3.*compile"
    with pytest.raises(ValueError, match=match):
        inject(model, k=7)
    assert model.optimizer is lookahead
    assert isinstance(lookahead.inner_optimizer, LazyOptimizer)


def test_slow_weights_callback_without_lookahead():
    model = make_model()
    model.compile(LazyOptimizer(adam()), "mse")
    before = model.get_weights()
    match = r"no slow weights.*LazyOptimizer.*Lookahead\(\.\.\.\).*inject"
    with pytest.raises(ValueError, match=match):
        model.fit(*make_data(), callbacks=[SlowWeights()], verbose=0)
    assert_same_bits(model.get_weights(), before)


def test_slow_weights_of_another_model():
    model, other = make_model(), make_model()
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
    model = make_model()
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


def test_gradients_without_variables():
    with pytest.raises(ValueError, match=r"not built.*optimizer\.build"):
        Lookahead(adam()).apply([keras.ops.ones((2,))])

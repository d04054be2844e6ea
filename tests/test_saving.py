"""Training that is saved, loaded and continued, against training in one go."""

import copy
import pickle
import warnings

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    QUICK,
    Run,
    assert_agree,
    assert_same_bits,
    dtype_policy,
    make,
    make_data,
    make_gradients,
    make_model,
    make_weights,
    name_of,
    numpy,
    random_weights,
    rotated,
    sgd,
    state,
)
from reference import Reference

from keras_lookahead_lazy import LazyOptimizer, Lookahead

BATCH, BEFORE, AFTER = 4, 7, 6  # 7 steps leave every cycle below in its middle


def adam():
    return keras.optimizers.Adam(0.05, amsgrad=True)


def nadam():
    return keras.optimizers.Nadam(0.05)


def rmsprop():
    return keras.optimizers.RMSprop(0.02, momentum=0.9, centered=True)


def accumulating():
    return keras.optimizers.Adam(0.05, gradient_accumulation_steps=2)


def nesterov():
    return keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)


CASES = {
    "maintain": lambda: Lookahead(sgd(), 5),
    "interpolate": lambda: Lookahead(adam(), 5, 0.3, "interpolate"),
    "reset": lambda: Lookahead(nadam(), 5, inner_state="reset"),
    "decay": lambda: LazyOptimizer(adam()),
    "freeze": lambda: LazyOptimizer(rmsprop(), moments="freeze"),
    "both": lambda: Lookahead(LazyOptimizer(rmsprop()), 5, 0.7, "interpolate"),
    "both-freeze": lambda: Lookahead(LazyOptimizer(nadam(), moments="freeze"), 4),
    "twice": lambda: Lookahead(Lookahead(adam(), 3), 2, 0.8, "interpolate"),
    "outer": lambda: Lookahead(adam(), 5, outer_optimizer=nesterov()),
    "outer-lazy": lambda: Lookahead(
        LazyOptimizer(rmsprop()), 2, inner_state="reset", outer_optimizer="adam"
    ),
    "outer-twice": lambda: Lookahead(
        Lookahead(LazyOptimizer(sgd()), 2), 3, outer_optimizer=nesterov()
    ),
    "accumulating": lambda: Lookahead(LazyOptimizer(accumulating()), 2),
}


def fit(model, first=0, last=BEFORE + AFTER, **arguments):
    x, y = make_data((BEFORE + AFTER) * BATCH)
    part = slice(first * BATCH, last * BATCH)
    inputs = [x[part]] * len(model.inputs)
    arguments = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | arguments
    return model.fit(inputs if len(inputs) > 1 else x[part], y[part], **arguments)


@pytest.fixture(scope="module", params=CASES)
def training(request, tmp_path_factory):
    """The model's factory, the state in the end, files from the middle, and the
    state in the end of the run that wrote them. Every second case records a graph."""
    make_optimizer = CASES[request.param]
    how = QUICK if list(CASES).index(request.param) % 2 == 0 else {}
    whole = make_model(make_optimizer(), **how)
    fit(whole)
    half = make_model(make_optimizer(), **how)
    fit(half, last=BEFORE)
    files = tmp_path_factory.mktemp(request.param)
    half.save(files / "model.keras")
    half.save_weights(files / "model.weights.h5")
    if BACKEND == "tensorflow":
        import tensorflow as tf

        checkpoint = tf.train.Checkpoint(model=half, optimizer=half.optimizer)
        checkpoint.write(str(files / "checkpoint"))
    fit(half, BEFORE)
    return lambda: make_model(make_optimizer(), **how), state(whole), files, state(half)


def test_saving_changes_nothing(training):
    _, expected, _, saved_and_went_on = training
    assert_same_bits(saved_and_went_on, expected)


def test_keras_file(training):
    _, expected, files, _ = training
    model = keras.models.load_model(files / "model.keras")
    fit(model, BEFORE)
    assert_same_bits(state(model), expected)


def test_weights_file(training):
    new_model, expected, files, _ = training
    model = new_model()
    model.optimizer.build(model.trainable_variables)
    model.load_weights(files / "model.weights.h5")
    fit(model, BEFORE)
    assert_same_bits(state(model), expected)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.train.Checkpoint")
def test_checkpoint(training):
    import tensorflow as tf

    new_model, expected, files, _ = training
    model = new_model()
    model.optimizer.build(model.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    checkpoint.read(str(files / "checkpoint")).assert_consumed()
    fit(model, BEFORE)
    assert_same_bits(state(model), expected)


def test_second_round_trip(tmp_path):
    whole = make_model(CASES["both"](), **QUICK)
    fit(whole)
    model = make_model(CASES["both"](), **QUICK)
    for first, last in ((0, 3), (3, 7), (7, 8), (8, 13)):
        fit(model, first, last)
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    assert_same_bits(state(model), state(whole))


class Interrupt(keras.callbacks.Callback):
    def __init__(self, at_batch):
        super().__init__()
        self.at_batch, self.batches = at_batch, 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        if self.batches == self.at_batch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("case", ["interpolate", "both"])
def test_backup_and_restore(case, tmp_path):
    """Epochs of 3 batches: interrupted in the third, taken up at its beginning."""
    optimizer = CASES[case]
    whole = make_model(optimizer(), **QUICK)
    fit(whole, last=3, epochs=4)
    model = make_model(optimizer(), **QUICK)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        fit(model, last=3, epochs=4, callbacks=[backup, Interrupt(8)])
    model = make_model(optimizer(), **QUICK)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    history = fit(model, last=3, epochs=4, callbacks=[backup])
    assert history.epoch == [2, 3]
    assert_same_bits(state(model), state(whole))


@pytest.mark.parametrize("file", ["model.keras", "model.weights.h5"])
def test_model_checkpoint(file, tmp_path):
    optimizer = CASES["both"]
    whole = make_model(optimizer(), **QUICK)
    fit(whole, last=4, epochs=3)
    model = make_model(optimizer(), **QUICK)
    path = tmp_path / ("{epoch}." + file)
    callback = keras.callbacks.ModelCheckpoint(
        path, save_weights_only=file.endswith(".h5")
    )
    fit(model, last=4, epochs=2, callbacks=[callback])
    if file.endswith(".h5"):
        model = make_model(optimizer(), **QUICK)
        model.optimizer.build(model.trainable_variables)
        model.load_weights(str(path).format(epoch=2))
    else:
        model = keras.models.load_model(str(path).format(epoch=2))
    fit(model, last=4)
    assert_same_bits(state(model), state(whole))


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch: no float16 on a CPU")
@pytest.mark.parametrize("case", ["interpolate", "freeze", "both"])
def test_mixed_float16(case, tmp_path):
    """Also where slots lag and the LossScaleOptimizer outside writes the file."""
    with dtype_policy("mixed_float16"):
        whole = make_model(CASES[case](), **QUICK)
        fit(whole)
        model = make_model(CASES[case](), **QUICK)
        fit(model, last=BEFORE)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
        fit(model, BEFORE)
    assert_same_bits(state(model), state(whole))


# Which tables


SOURCES = {
    "layer": lambda model: [model.get_layer("words")],
    "variable": lambda model: [model.get_layer("words").embeddings],
    "name": lambda model: ["words"],
    "short path": lambda model: ["words/embeddings"],
    "path": lambda model: [model.get_layer("words").embeddings.path],
    "all": lambda model: None,
}


@pytest.mark.parametrize(
    ("source", "trained"),
    [*((source, True) for source in SOURCES), ("layer", False), ("path", False)],
)
def test_tables_are_found_again(source, trained, tmp_path):
    """Also where the path has changed: net/words/embeddings, then words/embeddings."""
    model = make_model()
    assert model.get_layer("words").embeddings.path.startswith("net/words/")
    model.compile(LazyOptimizer(sgd(), SOURCES[source](model)), "mse", **QUICK)
    if trained:
        fit(model, last=3)
    for _ in range(2):
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    fit(model, last=3)
    words = model.get_layer("words").embeddings
    assert list(model.optimizer.step_forms) == [words.path]
    before = keras.ops.convert_to_numpy(words).copy()
    model.train_on_batch(np.full((4, 4), 7), np.ones((4, 1)))
    moved = np.any(keras.ops.convert_to_numpy(words) != before, axis=1)
    assert list(np.flatnonzero(moved)) == [7]


def tower(name):
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(16, 3, name="words"),
            keras.layers.Flatten(),
        ],
        name=name,
    )


def two_towers():
    """Nested models, in each of which a layer is called words."""
    inputs = [keras.Input((4,), dtype="int32") for _ in range(2)]
    towers = [tower("left"), tower("right")]
    merged = keras.layers.Concatenate()(
        [t(x) for t, x in zip(towers, inputs, strict=True)]
    )
    return keras.Model(inputs, keras.layers.Dense(1)(merged), name="net")


def two_tables():
    inputs = [keras.Input((4,), dtype="int32") for _ in range(2)]
    tables = [keras.layers.Embedding(16, 3, name=n) for n in ("words", "tags")]
    merged = keras.layers.Concatenate()(
        [keras.layers.Flatten()(t(x)) for t, x in zip(tables, inputs, strict=True)]
    )
    return keras.Model(inputs, keras.layers.Dense(1)(merged), name="net")


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow: no colon in a name")
@pytest.mark.parametrize("names", [("user:id",), ("user:0",), ("user:1", "user:0")])
def test_name_with_a_colon(names, tmp_path):
    """Which also stands between a path and a position."""

    def compiled():
        tokens = keras.Input((4,), dtype="int32")
        layers = [keras.layers.Embedding(16, 3, name=name) for name in names]
        parts = [keras.layers.Flatten()(layer(tokens)) for layer in layers]
        merged = keras.layers.Concatenate()([*parts, *parts])
        model = keras.Model(tokens, keras.layers.Dense(1)(merged))
        model.set_weights(random_weights(model, seed=3))
        model.compile(Lookahead(LazyOptimizer(adam(), layers), 5), "mse", **QUICK)
        return model

    whole, half = compiled(), compiled()
    fit(whole, last=9)
    fit(half, last=7)
    half.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    forms = loaded.optimizer.inner_optimizer.step_forms
    assert [path.split("/")[-2] for path in forms] == list(names)
    fit(loaded, 7, 9)
    assert_same_bits(state(loaded), state(whole))


def tables_of(model):
    return [w for w in model.trainable_variables if w.name == "embeddings"]


@pytest.mark.parametrize("make_model", [two_tables, two_towers])
@pytest.mark.parametrize("chosen", [[1], [0, 1], None], ids=str)
def test_two_tables(make_model, chosen, tmp_path):
    model = make_model()
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Embedding)
    ]
    initial = model.get_weights()
    given = chosen and [layers[i] for i in chosen]
    model.compile(Lookahead(LazyOptimizer(adam(), given), k=5), "mse", **QUICK)
    fit(model, last=7)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    tables = tables_of(loaded)
    step_forms = loaded.optimizer.inner_optimizer.step_forms
    # Paths may have become one; names then have the position behind them.
    assert [name.partition(":")[0] for name in step_forms] == [
        tables[i].path for i in chosen or (0, 1)
    ]
    if BACKEND == "torch" and make_model is two_towers:
        pytest.skip("Keras on torch adds up the gradients of weights with one path")
    fit(loaded, 7, 9)
    whole = make_model()
    whole.set_weights(initial)
    tables = tables_of(whole)
    given = chosen and [tables[i].path for i in chosen]
    whole.compile(Lookahead(LazyOptimizer(adam(), given), k=5), "mse", **QUICK)
    fit(whole, last=9)
    assert_same_bits(state(loaded), state(whole))


# Keras's Nadam has a variable whose path is another each time.
@pytest.mark.parametrize(
    "case", [c for c in CASES if c not in ("reset", "both-freeze")]
)
def test_state_tree(case):
    """In which Keras finds variables by their paths, whoever builds the optimizer."""
    if case == "outer-twice" and keras.__version__ < "3.11":
        pytest.skip("Keras called both outer optimizers SGD, and refuses that")

    def compiled():
        keras.backend.clear_session()  # the names of a new process
        model = two_tables()
        model.set_weights(random_weights(model, seed=3))
        model.compile(CASES[case](), "mse", **QUICK)
        return model

    whole, half, other = compiled(), compiled(), compiled()
    fit(whole)
    fit(half, last=BEFORE)
    tree = half.get_state_tree(value_format="numpy_array")
    other.optimizer.build(other.trainable_variables)
    other.set_state_tree(tree)
    for model in (half, other):
        fit(model, BEFORE)
        assert_same_bits(state(model), state(whole))


# Configurations


@pytest.mark.parametrize("case", CASES)
def test_config(case):
    optimizer = CASES[case]()
    config = optimizer.get_config()
    again = type(optimizer).from_config(config)
    assert again.get_config() == config
    serialized = keras.optimizers.serialize(optimizer)
    again = keras.optimizers.deserialize(serialized)
    assert type(again) is type(optimizer)
    assert keras.optimizers.serialize(again) == serialized
    assert keras.optimizers.get(serialized).get_config() == config


def test_config_keeps_every_argument():
    inner = keras.optimizers.AdamW(0.25, weight_decay=0.5, clipnorm=2.0)
    lazy = LazyOptimizer(inner, ["words"], "freeze", name="rows")
    optimizer = Lookahead(lazy, 7, 0.25, "reset", name="ahead")
    optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert (optimizer.k, optimizer.alpha, optimizer.inner_state, optimizer.name) == (
        7,
        0.25,
        "reset",
        "ahead",
    )
    lazy = optimizer.inner_optimizer
    assert (lazy.moments, lazy.name) == ("freeze", "rows")
    assert lazy.get_config()["embedding_layers"] == ["words"]
    innermost = lazy.inner_optimizer
    assert isinstance(innermost, keras.optimizers.AdamW)
    assert innermost.get_config() == inner.get_config()


# Files that do not fit


FOREIGN = {
    "no wrapper": (adam, lambda: Lookahead(adam(), 4)),
    "no wrapper, lazy": (adam, lambda: LazyOptimizer(adam())),
    "another state": (
        lambda: Lookahead(adam()),
        lambda: Lookahead(adam(), 4, inner_state="interpolate"),
    ),
    "another wrapper": (lambda: Lookahead(adam()), lambda: LazyOptimizer(adam())),
}


@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.parametrize("case", FOREIGN)
def test_file_of_another_optimizer(case, tmp_path):
    """Keras has loaded the weights by then: the first sync keeps them.

    Whatever state was taken over, the wrapper must not have slow weights, or counts
    of missed steps, of a run that it does not belong to. Here the optimizer has
    made a few steps of its own before the file comes.
    """
    saved_with, loaded_with = FOREIGN[case]
    model = make_model(saved_with(), **QUICK)
    fit(model, last=3)
    weights = model.get_weights()
    model.save_weights(tmp_path / "model.weights.h5")

    model = make_model(loaded_with(), **QUICK)
    fit(model, last=6)
    with pytest.warns(UserWarning, match="saved"):
        model.load_weights(tmp_path / "model.weights.h5")
    assert_same_bits(model.get_weights(), weights)
    model.optimizer.learning_rate = 0.0
    fit(model, last=9)
    assert_same_bits(model.get_weights(), weights)


@pytest.mark.parametrize("setting", [("k", 5, 3), ("alpha", 0.5, 0.8)])
def test_a_file_of_another_k_or_alpha_is_warned_of(setting, tmp_path):
    """Its state is taken all the same, and training goes on with what was made."""
    name, in_file, own = setting
    model = make_model(Lookahead(sgd(), **{name: in_file}), **QUICK)
    fit(model, last=3)
    model.save_weights(tmp_path / "model.weights.h5")

    for number in (in_file, own):
        new = make_model(Lookahead(sgd(), **{name: number}), **QUICK)
        fit(new, last=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            new.load_weights(tmp_path / "model.weights.h5")
        said = [str(warning.message) for warning in caught]
        if number == own:
            (warning,) = said
            assert f"saved with {name}={in_file}; training continues" in warning
            assert f"with {name}={own} of this Lookahead" in warning
        else:
            assert not said
        assert_same_bits(state(new), state(model))
        assert getattr(new.optimizer, name) == number


OURS = "holds no state"


def test_file_of_another_optimizer_is_warned_of_once(tmp_path):
    model = make_model(adam(), **QUICK)
    fit(model, last=3)
    model.save_weights(tmp_path / "model.weights.h5")
    model = make_model(CASES["both"](), **QUICK)
    fit(model, last=3)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.load_weights(tmp_path / "model.weights.h5")
        assert sum(OURS in str(warning.message) for warning in caught) == 1


@pytest.mark.filterwarnings(f"error:.*{OURS}")
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.parametrize("case", ["maintain", "decay", "both"])
def test_no_warning_where_an_optimizer_is_not_built_yet(case, tmp_path):
    """Neither the one that loads, nor the one that was saved."""
    trained = make_model(CASES[case](), **QUICK)
    fit(trained, last=3)
    trained.save_weights(tmp_path / "trained.weights.h5")
    new = make_model(CASES[case](), **QUICK)
    new.load_weights(tmp_path / "trained.weights.h5")
    assert_same_bits(new.get_weights(), trained.get_weights())

    new = make_model(CASES[case](), **QUICK)
    for copied in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        fit(copied, last=7)
        whole = make_model(CASES[case](), **QUICK)
        fit(whole, last=7)
        assert_same_bits(state(copied), state(whole))


@pytest.mark.filterwarnings("error:.*frozen")
@pytest.mark.parametrize("case", ["maintain", "decay", "both"])
def test_an_old_h5_file_keeps_the_weights_only(case, tmp_path):
    """Keras builds the optimizer in it for no weights, its own ones, too."""
    loss = keras.losses.MeanSquaredError()  # Keras 3.15 does not find "mse" in a file
    model = make_model()
    model.compile(CASES[case](), loss, **QUICK)
    fit(model, last=3)
    model.save(tmp_path / "model.h5")
    loaded = keras.models.load_model(tmp_path / "model.h5")
    assert_same_bits(loaded.get_weights(), model.get_weights())
    kind = type(loaded.optimizer).__name__
    with pytest.raises(ValueError, match=rf"\.h5.*a new {kind}\(.*save.*\.keras'"):
        fit(loaded, last=3)


# Slots that lag behind


def slots_of(optimizer, names, weight):
    """Slots of a weight as a user reads them, by the reference's names."""
    found = {v.path.split("/")[-1]: v for v in optimizer.variables}
    return [numpy([found[f"{weight}_{name}"]])[0] for name in names]


SLOTS = [
    ("SGD", {"learning_rate": 0.1, "momentum": 0.9}),
    ("Adam", {"learning_rate": 0.05, "amsgrad": True}),
    ("RMSprop", {"learning_rate": 0.02, "momentum": 0.9, "centered": True}),
]


@pytest.mark.parametrize(
    ("mode", "case", "moments"), rotated(SLOTS, ["decay", "freeze"]), ids=name_of
)
def test_reading_variables(mode, case, moments):
    """Every slot of every row is current whenever it is read, however often."""
    weights = make_weights()
    lazy = {"tables": [0], "moments": moments}
    reference = Reference(weights, case, lazy=lazy)
    optimizer = LazyOptimizer(make(case), moments=moments)
    run = Run(optimizer, weights, mode, sparse=(0,))
    for i, step in enumerate(make_gradients(16, weights)):
        reference.apply(step)
        assert_agree(run.step(step), reference.weights)
        if i % 5 == 2:
            for j, name in enumerate(["words_embeddings", "dense_kernel"]):
                slots = reference.slots[j]
                assert_agree(
                    slots_of(optimizer, slots, name), list(slots.values()), 5e-6
                )


MOMENTUM = {"SGD": {"momentum": 0.9}, "Adam": {}}


@pytest.mark.parametrize(
    ("mode", "kind", "first"), rotated(MOMENTUM, ["decay", "freeze"])
)
def test_switch_moments(mode, kind, first):
    """decay, freeze, decay (or the other way round), 6 steps each."""
    case = (kind, {"learning_rate": 0.05} | MOMENTUM[kind])
    weights = make_weights()
    lazy = {"tables": [0], "moments": first}
    reference = Reference(weights, case, lazy=lazy)
    optimizer = LazyOptimizer(make(case), moments=first)
    run = Run(optimizer, weights, mode, sparse=(0,))
    other = {"decay": "freeze", "freeze": "decay"}
    for i, step in enumerate(make_gradients(18, weights)):
        if i in (6, 12):
            optimizer.moments = reference.moments = other[optimizer.moments]
            run = Run(optimizer, run.variables, mode, sparse=(0,))
        reference.apply(step)
        assert_agree(run.step(step), reference.weights)
    slots = reference.slots[0]
    ours = slots_of(optimizer, slots, "words_embeddings")
    assert_agree(ours, list(slots.values()), 5e-6)

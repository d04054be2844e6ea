"""Everything that users set on an optimizer, through the wrappers."""

from typing import Any

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    GRADIENTS,
    MODES,
    VOCABULARY,
    Run,
    assert_agree,
    assert_follows,
    assert_same_bits,
    both,
    dtype_policy,
    make,
    make_data,
    make_gradients,
    make_model,
    make_weights,
    numpy,
    rotated,
)
from reference import Reference, sampled_rows

from keras_lookahead_lazy import LazyOptimizer, Lookahead

LAZY = {"tables": [0], "moments": "decay"}
LOOKAHEAD: dict[str, Any] = {"k": 3, "alpha": 0.5}


SETTINGS = [
    {"weight_decay": 0.05},
    {"clipnorm": 0.5},
    {"clipvalue": 0.3},
    {"global_clipnorm": 0.8},
    {"use_ema": True, "ema_momentum": 0.8},
    {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 4},
    {"loss_scale_factor": 8.0},
    {"gradient_accumulation_steps": 3},
    {"gradient_accumulation_steps": 2, "weight_decay": 0.05, "clipnorm": 0.5},
]


@pytest.mark.parametrize(
    ("mode", "settings", "kind", "gradients"),
    rotated(SETTINGS, ["SGD", "Adam"], GRADIENTS),
    ids=str,
)
def test_settings(mode, settings, kind, gradients):
    arguments = {"learning_rate": 0.05, **settings}
    if kind == "SGD":
        arguments["momentum"] = 0.9
    weights = make_weights()
    reference = Reference(weights, (kind, arguments), lazy=LAZY, lookahead=LOOKAHEAD)
    optimizer = both(make((kind, arguments)))
    run = Run(optimizer, weights, mode, (0,) if gradients == "sparse" else ())
    assert_follows(run, reference, make_gradients(20, weights))
    for name, value in settings.items():
        assert getattr(optimizer, name) == value
    if settings.get("use_ema"):
        averages = optimizer._model_variables_moving_average
        averages = [keras.ops.convert_to_numpy(average) for average in averages]
        assert_agree(averages, reference.averages)
        optimizer.finalize_variable_values(run.variables)
        assert_agree(run.weights, reference.averages)


def test_settings_can_be_changed():
    optimizer = both(keras.optimizers.Adam(1e-3))
    for name, value in {
        "weight_decay": 0.1,
        "clipnorm": 1.0,
        "loss_scale_factor": 2.0,
        "learning_rate": 0.5,
    }.items():
        setattr(optimizer, name, value)
        innermost = optimizer.inner_optimizer.inner_optimizer
        assert float(getattr(innermost, name)) == value
        assert float(getattr(optimizer, name)) == value


@pytest.mark.parametrize("mode", MODES)
def test_learning_rate_schedule(mode):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)
    case = ("Adam", {"learning_rate": schedule})
    weights = make_weights()
    reference = Reference(weights, case, lazy=LAZY, lookahead=LOOKAHEAD)
    run = Run(both(make(case)), weights, mode)
    assert_follows(run, reference, make_gradients(12, weights))


@pytest.mark.filterwarnings("error::UserWarning")
def test_callable_learning_rate_and_reset():
    """What a slot starts from is found without a copy of the learning rate."""
    arguments = {"momentum": 0.9}
    weights = make_weights()
    lookahead = LOOKAHEAD | {"inner_state": "reset"}
    case = ("SGD", arguments | {"learning_rate": 0.1})
    reference = Reference(weights, case, lookahead=lookahead)
    inner = keras.optimizers.SGD(lambda: 0.1, **arguments)
    run = Run(Lookahead(inner, **lookahead), weights)
    assert_follows(run, reference, make_gradients(8, weights))


def test_exclude_from_weight_decay():
    case = ("AdamW", {"learning_rate": 0.05, "weight_decay": 0.2})
    weights = make_weights()
    reference = Reference(weights, case, lazy=LAZY, undecayed=(2,))
    optimizer = LazyOptimizer(make(case))
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    run = Run(optimizer, weights)
    assert_follows(run, reference, make_gradients(8, weights))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axis", [0, 1], ids=["across rows", "by row"])
def test_constraint_moves_no_row_that_was_not_sampled(axis, mode):
    def max_norm(w):
        norms = np.sqrt(np.sum(w**2, axis=axis, keepdims=True))
        return w * np.clip(norms, 0, 0.9) / (1e-7 + norms)

    case = ("Adam", {"learning_rate": 0.1})
    weights = make_weights()
    constraints = [max_norm, None, None]
    reference = Reference(weights, case, lazy=LAZY, constraints=constraints)
    optimizer = LazyOptimizer(make(case))
    constraint = keras.constraints.MaxNorm(0.9, axis=axis)
    run = Run(optimizer, weights, mode, (0,), constraint)
    before = run.weights[0]
    for step in make_gradients(10, weights):
        reference.apply(step)
        ours = run.step(step)
        assert_agree(ours, reference.weights)
        idle = ~np.any(step[0] != 0, axis=1)
        assert_same_bits([ours[0][idle]], [before[idle]])
        before = ours[0]
    form = optimizer.step_forms["words/embeddings"]
    assert ("looks across rows" in form) == (axis != 1)
    # For anybody else the table still has the user's constraint.
    table = run.variables[0]
    constrained = keras.ops.convert_to_numpy(table.constraint(table))
    assert_agree([constrained], [max_norm(ours[0].astype("float64"))])


def test_constraint_stays_the_users():
    """Through compiling again, with another optimizer, and in a copy of the model."""

    constraint = keras.constraints.MaxNorm(0.02, axis=1)
    words = keras.layers.Embedding(10, 3, embeddings_constraint=constraint)
    layers = [keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,), dtype="int32"), words, *layers])
    tokens, y = np.full((4, 4), 7), np.ones((4, 1))
    for _ in range(3):
        optimizer = LazyOptimizer(keras.optimizers.Adam(0.1))
        model.compile(optimizer, "mse")
        before = keras.ops.convert_to_numpy(words.embeddings).copy()
        model.train_on_batch(tokens, y)
        after = keras.ops.convert_to_numpy(words.embeddings)
        (form,) = optimizer.step_forms.values()
        assert "constraint" not in form
        assert words.embeddings.constraint is constraint
        assert list(np.flatnonzero(np.any(after != before, axis=1))) == [7]
        assert np.linalg.norm(after[7]) == pytest.approx(0.02, rel=1e-4)

    words.embeddings.assign(np.ones((10, 3)))
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.train_on_batch(tokens, y)
    norms = np.linalg.norm(keras.ops.convert_to_numpy(words.embeddings), axis=1)
    np.testing.assert_allclose(norms, 0.02, rtol=1e-4)
    copy = type(words).from_config(words.get_config())
    assert copy.embeddings_constraint.get_config() == constraint.get_config()


class Fails(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        raise RuntimeError("in the step")


def test_constraint_comes_back_after_an_error():
    constraint = keras.constraints.MaxNorm(0.9, axis=1)
    optimizer = LazyOptimizer(Fails(0.1))
    weights = make_weights()
    run = Run(optimizer, weights, MODES[-1], constraint=constraint)
    with pytest.raises(RuntimeError, match="in the step"):
        run.step(weights)
    assert run.variables[0].constraint is constraint


def test_iterations_count_updates():
    case = ("Adam", {"gradient_accumulation_steps": 2})
    weights = make_weights()
    optimizer = both(make(case))
    run = Run(optimizer, weights)
    for step in make_gradients(6, weights):
        run.step(step)
    assert int(optimizer.iterations) == 3
    assert int(optimizer.inner_optimizer.iterations) == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("accumulating", [False, True])
def test_lookahead_beyond_31_bits(accumulating, mode):
    """A run that has been counted to the end of its counters, by an older version."""
    arguments = {"learning_rate": 0.1}
    if accumulating:
        arguments["gradient_accumulation_steps"] = 2
    weights = make_weights()
    case = ("SGD", arguments)
    reference = Reference(weights, case, lookahead=LOOKAHEAD)
    inner = make(case)
    optimizer = Lookahead(inner, **LOOKAHEAD)
    run = Run(optimizer, weights, mode)
    for i, step in enumerate(make_gradients(26, weights)):
        reference.apply(step)
        assert_agree(run.step(step), reference.weights)
        if i == 11:  # in the end of a cycle, as 2 ** 31 - 2 is
            optimizer._iterations.assign(2**31 - 2)
            inner._iterations.assign(2**31 - 2)
    assert int(keras.ops.convert_to_numpy(optimizer._iterations)) <= LOOKAHEAD["k"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [2**31 - 18, 2**32 - 18])
def test_lazy_at_the_limits_of_its_numbers(mode, limit):
    """Numbers of updates wrap around; what they differ by stays."""
    weights = make_weights()
    case = ("Adam", {"learning_rate": 0.01})
    reference = Reference(weights, case, lazy={"tables": [0]}, lookahead=LOOKAHEAD)
    lazy = LazyOptimizer(make(case))
    run = Run(Lookahead(lazy, **LOOKAHEAD), weights, mode)
    for i, step in enumerate(make_gradients(24, weights)):
        reference.apply(step)
        assert_agree(run.step(step), reference.weights)
        if i == 11:
            names = "last_update", "caught_up"
            counts = [v for v in lazy.variables if v.path.endswith(names)]
            for count in [*counts, lazy._iterations]:
                number = keras.ops.convert_to_numpy(count).astype("int64") + limit
                count.assign((number + 2**31) % 2**32 - 2**31)
    count = int(keras.ops.convert_to_numpy(lazy._iterations))
    assert (count - limit) % 2**32 == 24


@pytest.mark.parametrize("idle", [2**30, 2**31, 2**31 + 12, 3 * 2**30 - 2])
@pytest.mark.parametrize("reads", [False, True])
def test_a_row_that_was_idle_for_very_long(idle, reads):
    """Its slots have decayed to nothing, and stay so when it is sampled again."""
    weights = make_weights()
    lazy = LazyOptimizer(make(("SGD", {"learning_rate": 0.1, "momentum": 0.9})))
    run = Run(lazy, weights)
    (first, *_), zeros = make_gradients(1, weights), [np.zeros_like(w) for w in weights]
    run.step(first)
    lazy._iterations.assign((1 + idle + 2**31) % 2**32 - 2**31)
    before = run.weights[0]
    if reads:
        lazy.catch_up()
        lazy._iterations.assign((1 + 2 * idle + 2**31) % 2**32 - 2**31)
    zeros[0][sampled_rows(first[0])] = 1.0
    run.step(zeros)
    expected = before - np.float32(0.1) * zeros[0]
    np.testing.assert_allclose(run.weights[0], expected, rtol=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.Variable")
@pytest.mark.parametrize(
    ("mode", "distributed"),
    # Distributed in a graph plain Adam fails, too: 'destinations can not be empty'.
    [("eager", True), *((mode, False) for mode in MODES)],
)
@pytest.mark.parametrize("inner_state", ["maintain", "interpolate", "reset"])
def test_variables_of_a_saved_model(inner_state, mode, distributed, tmp_path):
    """Fine-tuning what `tf.saved_model.load` gives: `tf.Variable`, not Keras's."""
    import tensorflow as tf

    case = ("Adam", {"learning_rate": 0.05})
    lookahead = LOOKAHEAD | {"inner_state": inner_state}
    weights = make_weights()[1:]
    reference = Reference(weights, case, lookahead=lookahead)
    module = tf.Module()
    module.kernel, module.bias = (tf.Variable(w, name="w") for w in weights)
    tf.saved_model.save(module, str(tmp_path))
    strategy = tf.distribute.get_strategy()
    if distributed:
        strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        module = tf.saved_model.load(str(tmp_path))
        variables = [module.kernel, module.bias]
        optimizer = Lookahead(make(case), **lookahead)
        optimizer.build(variables)

    def apply(gradients):
        strategy.run(lambda: optimizer.apply(gradients, variables))

    if mode != "eager":
        apply = tf.function(apply, jit_compile=mode == "jit")
    for step in make_gradients(8, weights, tables=()):
        reference.apply(step)
        apply([tf.constant(gradient) for gradient in step])
        assert_agree([v.numpy() for v in variables], reference.weights)


def test_learning_rate_callbacks():
    x, y = make_data(32)
    model = make_model()
    model.compile(both(keras.optimizers.Adam(0.1)), "mse")
    model.fit(
        x,
        y,
        epochs=2,
        verbose=0,
        callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr / 2)],
    )
    assert float(model.optimizer.learning_rate) == pytest.approx(0.025)
    model.fit(
        x,
        y,
        epochs=2,
        verbose=0,
        callbacks=[
            keras.callbacks.ReduceLROnPlateau("loss", 0.1, patience=1, min_delta=1e9)
        ],
    )
    assert float(model.optimizer.learning_rate) == pytest.approx(0.0025)


def test_swap_ema_weights():
    x, y = make_data(32)
    losses = {}
    for name in ("plain", "wrapped"):
        keras.utils.set_random_seed(1)
        model = make_model()
        optimizer = keras.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.5)
        if name == "wrapped":  # with a sync that is never reached
            optimizer = Lookahead(optimizer, k=1000)
        model.compile(optimizer, "mse")
        history = model.fit(
            x,
            y,
            validation_data=(x, y),
            epochs=2,
            verbose=0,
            callbacks=[keras.callbacks.SwapEMAWeights()],
        )
        losses[name] = history.history["val_loss"]
    assert losses["plain"] == pytest.approx(losses["wrapped"], rel=1e-6)


@pytest.mark.parametrize("order", ["automatic", "inside"])
def test_loss_scaling_that_skips_a_step(order):
    """A step that LossScaleOptimizer skips is none: not for k, not for slots."""
    case = ("Adam", {"learning_rate": 0.05})
    weights = make_weights()
    steps = make_gradients(9, weights)
    reference = Reference(weights, case, lazy=LAZY, lookahead=LOOKAHEAD)
    scale = 2.0**10
    scaled = keras.optimizers.LossScaleOptimizer
    if order == "automatic":
        optimizer = scaled(both(make(case)), initial_scale=scale)
    else:
        inside = LazyOptimizer(scaled(make(case), initial_scale=scale))
        optimizer = Lookahead(inside, **LOOKAHEAD)
    run = Run(optimizer, weights, sparse=(0,))
    for i, step in enumerate(steps):
        if i in (2, 5):
            bad = [g.copy() for g in step]
            bad[1][0, 0] = np.inf
            before = run.weights
            assert_same_bits(run.step(bad), before)
            scale /= 2
        reference.apply(step)
        ours = run.step([g * np.float32(scale) for g in step])
        assert_agree(ours, reference.weights)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_fit(policy):
    if policy == "mixed_float16" and BACKEND == "torch":
        pytest.skip("Keras on torch has no float16 matmul gradient on this CPU")
    x, y = make_data(32)
    with dtype_policy(policy):
        model = make_model(both(keras.optimizers.Adam(0.05)))
        history = model.fit(x, y, epochs=3, verbose=0)
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    assert history.history["loss"][-1] < history.history["loss"][0]
    wrapper = model.optimizer.inner_optimizer if scaled else model.optimizer
    assert isinstance(wrapper, Lookahead)


@pytest.mark.parametrize("inner_state", ["maintain", "interpolate", "reset"])
def test_scales_of_float8_are_not_synced(inner_state):
    """Their layer sets them, as gradients; at a rate of 0 nothing else moves."""
    x, y = make_data(48)
    trained = []
    for is_wrapped in (False, True):
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense(1)
        model = keras.Sequential(
            [keras.Input((4,)), keras.layers.Embedding(VOCABULARY, 2), dense]
        )
        dense.quantize("float8")
        optimizer = keras.optimizers.SGD(0.0, momentum=0.9)
        if is_wrapped:
            inside = LazyOptimizer(optimizer)
            optimizer = Lookahead(inside, **LOOKAHEAD, inner_state=inner_state)
        model.compile(optimizer, "mse")
        model.fit(x, y[:, None], batch_size=8, shuffle=False, verbose=0)
        trained.append(numpy(model.trainable_variables))
    assert_same_bits(*trained)


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="came after Keras 3.12"
)
@pytest.mark.parametrize("mode", MODES)
def test_inside_of_a_multi_optimizer(mode):
    """An optimizer for the table and one for the rest, each with its own cycle."""
    weights = make_weights()
    cases: list[Any] = [
        ("Adam", {"learning_rate": 0.05}),
        ("SGD", {"learning_rate": 0.05, "momentum": 0.9}),
    ]
    cycles: list[dict[str, Any]] = [
        {"k": 2, "alpha": 0.3, "inner_state": "interpolate"},
        {"k": 3, "alpha": 0.6, "inner_state": "reset"},
    ]
    words = Lookahead(LazyOptimizer(make(cases[0])), **cycles[0])
    others = Lookahead(make(cases[1]), **cycles[1])
    references = [
        Reference(weights[:1], cases[0], lazy=LAZY, lookahead=cycles[0]),
        Reference(weights[1:], cases[1], lookahead=cycles[1]),
    ]
    run = Run(
        keras.optimizers.MultiOptimizer(
            lambda variable: words if "words" in variable.path else others
        ),
        weights,
        mode,
        sparse=(0,),
    )
    for step in make_gradients(13, weights):
        references[0].apply(step[:1])
        references[1].apply(step[1:])
        assert_agree(run.step(step), references[0].weights + references[1].weights)


@pytest.mark.parametrize("inner_state", ["interpolate", "reset"])
def test_slots_that_are_not_found_are_not_left_out(inner_state):
    """A sync that knew nothing of them would be that of "maintain"."""

    class ByNumber(keras.optimizers.SGD):
        def build(self, variables):
            super().build(variables)
            self.shadows = {
                i: self.add_variable_from_reference(variable, "shadow")
                for i, variable in enumerate(variables)
            }

    optimizer = Lookahead(ByNumber(0.1), inner_state=inner_state)
    with pytest.raises(
        ValueError, match=r"words_embeddings_shadow, .*than a list with one"
    ):
        Run(optimizer, make_weights())
    assert not optimizer.built
    if hasattr(keras.optimizers, "MultiOptimizer"):
        inside = keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1, momentum=0.9))
        )
        with pytest.raises(ValueError, match="Wrap each of those"):
            Run(Lookahead(inside, inner_state=inner_state), make_weights())


@pytest.mark.parametrize("inner_state", ["maintain", "interpolate", "reset"])
def test_around_an_optimizer_that_knows_more_weights(inner_state):
    """The slots of those that are frozen now are slots all the same."""
    weights = [np.ones((4, 2), "float32"), np.ones((4, 3), "float32")]
    case = "Adam", {"learning_rate": 0.1}
    first = Run(make(case), weights)
    cycle = {**LOOKAHEAD, "inner_state": inner_state}
    reference = Reference(weights[:1], case, lookahead=cycle)
    # Keras's stateless step takes gradients of all weights that Adam knows.
    mode = "eager" if BACKEND == "jax" else MODES[0]
    run = Run(Lookahead(first.optimizer, **cycle), first.variables[:1], mode)
    for gradients in make_gradients(7, weights[:1]):
        reference.apply(gradients)
        assert_agree(run.step(gradients), reference.weights)

"""An outer optimizer updates the slow weights, against NumPy in float64."""

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    MODES,
    QUICK,
    Run,
    assert_agree,
    assert_same_bits,
    dtype_policy,
    make_data,
    make_gradients,
    make_model,
    make_weights,
    numpy,
    state,
)

from keras_lookahead_lazy import LazyOptimizer, Lookahead, SlowWeights, inject

K, STEPS, RATE = 3, 11, 0.1
ETA, MU = 0.7, 0.9


def nesterov():
    return keras.optimizers.SGD(ETA, momentum=MU, nesterov=True)


class Nesterov:
    """As SNOO and DiLoCo have it: buf := mu buf + s, phi := phi - eta (s + mu buf)."""

    def __init__(self, shape):
        self.buffer = np.zeros(shape)

    def __call__(self, phi, s, rows):
        self.buffer[rows] = MU * self.buffer[rows] + s[rows]
        phi[rows] -= ETA * (s[rows] + MU * self.buffer[rows])


class Adam:
    """Kingma and Ba, with a count of syncs."""

    def __init__(self, shape):
        self.m, self.v, self.count = np.zeros(shape), np.zeros(shape), 0

    def __call__(self, phi, s, rows):
        self.count += 1
        self.m[rows] = 0.9 * self.m[rows] + 0.1 * s[rows]
        self.v[rows] = 0.999 * self.v[rows] + 0.001 * s[rows] ** 2
        rate = 0.05 * np.sqrt(1 - 0.999**self.count) / (1 - 0.9**self.count)
        phi[rows] -= rate * self.m[rows] / (np.sqrt(self.v[rows]) + 1e-7)


OUTER = {
    "nesterov": (nesterov, Nesterov),
    "adam": (lambda: keras.optimizers.Adam(0.05), Adam),
}


def reference(weights, gradients, make_outer, lazy=False):
    """Weights after each step, with SGD inside."""
    theta = [weight.astype("float64") for weight in weights]
    phi = [weight.copy() for weight in theta]
    outer = [make_outer(weight.shape) for weight in theta]
    moved = np.zeros(len(theta[0]), bool)
    for step, gradient in enumerate(gradients, 1):
        moved |= gradient[0].any(axis=1)
        for weight, g in zip(theta, gradient, strict=True):
            weight -= RATE * g
        if step % K == 0:
            for i, update in enumerate(outer):
                rows = moved if lazy and i == 0 else slice(None)
                update(phi[i], phi[i] - theta[i], rows)
                theta[i][rows] = phi[i][rows]
            moved[:] = False
        yield [weight.copy() for weight in theta]


def inner(lazy):
    sgd = keras.optimizers.SGD(RATE)
    return LazyOptimizer(sgd, ["words/embeddings"]) if lazy else sgd


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", OUTER)
def test_trajectory(name, lazy, mode):
    make_outer, numpy_outer = OUTER[name]
    weights = make_weights()
    gradients = make_gradients(STEPS, weights)
    lookahead = Lookahead(inner(lazy), k=K, outer_optimizer=make_outer())
    run = Run(lookahead, weights, mode, sparse=(0,) if lazy else ())
    expected = reference(weights, gradients, numpy_outer, lazy)
    for gradient, point in zip(gradients, expected, strict=True):
        assert_agree(run.step(gradient), point)
    assert int(lookahead.outer_optimizer.iterations) == STEPS // K


@pytest.mark.parametrize(("eta", "mu"), [(0.7, 0.9), (0.68, 0.37)])
def test_a_loop_in_torch(eta, mu):
    """SNOO's loop (DiLoCo's with one worker): `torch.optim.SGD` on phi - theta."""
    torch = pytest.importorskip("torch")
    weights = make_weights()
    outer = keras.optimizers.SGD(eta, momentum=mu, nesterov=True)
    adam = keras.optimizers.AdamW(0.05, weight_decay=0.1, epsilon=1e-7)
    run = Run(Lookahead(adam, k=K, outer_optimizer=outer), weights)
    plain = Run(keras.optimizers.AdamW(0.05, weight_decay=0.1, epsilon=1e-7), weights)

    phi = [torch.tensor(w, dtype=torch.float64) for w in weights]
    torch_outer = torch.optim.SGD(phi, lr=eta, momentum=mu, nesterov=True)
    for step, gradient in enumerate(make_gradients(5 * K, weights), 1):
        theta = plain.step(gradient)  # the inner optimizer is Keras's own
        if step % K == 0:
            for slow, fast in zip(phi, theta, strict=True):
                slow.grad = slow - torch.tensor(fast, dtype=torch.float64)
            torch_outer.step()
            theta = [slow.numpy().astype("float32") for slow in phi]
            for variable, value in zip(plain.variables, theta, strict=True):
                variable.assign(value)
        assert_agree(run.step(gradient), theta)


@pytest.mark.parametrize("mode", MODES)
def test_sgd_with_rate_alpha_is_lookahead(mode):
    weights = make_weights()
    gradients = make_gradients(STEPS, weights)
    alpha = 0.3
    outer = keras.optimizers.SGD(alpha)
    runs = [
        Run(Lookahead(inner(lazy=True), k=K, **how), weights, mode)
        for how in ({"alpha": alpha}, {"outer_optimizer": outer})
    ]
    for gradient in gradients:
        plain, ours = (run.step(gradient) for run in runs)
        assert_agree(ours, plain, 1e-6)


def test_a_schedule_counts_syncs():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [1.0, 0.0])
    lookahead = Lookahead(
        inner(lazy=False), k=K, outer_optimizer=keras.optimizers.SGD(schedule)
    )
    weights = make_weights()
    run = Run(lookahead, weights)
    gradients = make_gradients(2 * K, weights)
    for gradient in gradients[:K]:
        first = run.step(gradient)
    total = [sum(g[i] for g in gradients[:K]) for i in range(len(weights))]
    moved = [w - RATE * g for w, g in zip(weights, total, strict=True)]
    assert_agree(first, moved)  # rate 1: theta stays where it is
    for gradient in gradients[K:]:
        second = run.step(gradient)
    assert_agree(second, first)  # rate 0: back to the slow weights


def compiled(lazy=True):
    fast = keras.optimizers.Adam(0.01)
    fast = LazyOptimizer(fast) if lazy else fast
    return make_model(Lookahead(fast, k=K, outer_optimizer=nesterov()), **QUICK)


def fit(model, start, stop):
    x, y = make_data(8 * 12)
    part = slice(8 * start, 8 * stop)
    model.fit(x[part], y[part], batch_size=8, shuffle=False, verbose=0)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("kind", ["model.keras", "model.weights.h5"])
def test_a_run_is_resumed_in_mid_cycle(kind, lazy, tmp_path):
    whole = compiled(lazy)
    fit(whole, 0, 12)
    first = compiled(lazy)
    fit(first, 0, 7)
    path = tmp_path / kind
    if kind == "model.keras":
        first.save(path)
        second = keras.saving.load_model(path)
    else:
        first.save_weights(path)
        second = compiled(lazy)
        second.optimizer.build(second.trainable_variables)
        second.load_weights(path)
    fit(second, 7, 12)
    assert_same_bits(state(second), state(whole))


def test_slow_weights_and_restart():
    model = compiled()
    fit(model, 0, 5)
    lookahead, fast = model.optimizer, model.get_weights()
    with lookahead.slow_weights(model):
        slow = model.get_weights()
    assert_same_bits(model.get_weights(), fast)
    assert any((a != b).any() for a, b in zip(fast, slow, strict=True))
    slots = numpy(lookahead.outer_optimizer.variables)
    model.set_weights([weight + 1 for weight in fast])
    lookahead.restart()
    assert_same_bits(numpy(lookahead.outer_optimizer.variables), slots)
    fit(model, 5, 6)
    with lookahead.slow_weights(model):
        slow = model.get_weights()
    assert_agree(slow, [weight + 1 for weight in fast], 1e-6)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch: no float16 on a CPU")
def test_float16():
    """A step that loss scaling skips is none."""
    with dtype_policy("mixed_float16"):
        lazy = LazyOptimizer(keras.optimizers.Adam(0.01))
        lookahead = Lookahead(lazy, k=2, outer_optimizer=nesterov())
        model = make_model(lookahead)
        fit(model, 0, 12)
    assert int(lookahead.iterations) > 3
    syncs = int(lookahead.outer_optimizer.iterations)
    assert syncs == int(lookahead.iterations) // 2


def test_accumulated_steps_do_not_count():
    fast = keras.optimizers.SGD(RATE, gradient_accumulation_steps=2)
    lookahead = Lookahead(LazyOptimizer(fast), k=2, outer_optimizer=nesterov())
    fit(make_model(lookahead), 0, 9)
    assert int(lookahead.outer_optimizer.iterations) == 2


def test_mixed_bfloat16():
    """Slow weights and outer slots are float32, as the weights are."""
    with dtype_policy("mixed_bfloat16"):
        model = compiled()
        fit(model, 0, 2 * K)
    outer = model.optimizer.outer_optimizer
    assert int(outer.iterations) == 2
    slots = [v for v in outer.variables if len(v.shape)]
    assert {keras.backend.standardize_dtype(v.dtype) for v in slots} == {"float32"}
    with model.optimizer.slow_weights(model):
        slow = model.get_weights()
    assert_same_bits(model.get_weights(), slow)  # just after a sync


def test_validation_on_slow_weights():
    model = compiled()
    x, y = make_data(8 * 4)
    callbacks = [SlowWeights()]
    how = {"batch_size": 8, "shuffle": False, "verbose": 0}
    history = model.fit(x, y, validation_data=(x, y), callbacks=callbacks, **how)
    fast = model.evaluate(x, y, verbose=0)
    model.optimizer.load_slow_weights(model)
    loss = model.evaluate(x, y, verbose=0)
    np.testing.assert_allclose(history.history["val_loss"], [loss], rtol=1e-6)
    assert abs(loss - fast) > 1e-4


def test_clone_and_config():
    """`clone_model` and `from_config` give a new outer optimizer, not built."""
    model = compiled()
    fit(model, 0, K)
    config = keras.optimizers.serialize(model.optimizer)
    other = keras.optimizers.deserialize(config)
    assert not other.outer_optimizer.built
    assert other.outer_optimizer.get_config() == nesterov().get_config() | {
        "name": model.optimizer.outer_optimizer.name
    }
    clone = keras.models.clone_model(model)
    clone.set_weights(make_model().get_weights())
    clone.compile(other, "mse", **QUICK)
    again = compiled()
    for each in (clone, again):
        fit(each, 0, 2 * K)
    assert_same_bits(clone.get_weights(), again.get_weights())


def test_config_and_repr():
    lookahead = Lookahead("adam", k=7, outer_optimizer=nesterov())
    assert repr(lookahead) == (
        "Lookahead(Adam(learning_rate=0.001), k=7, outer_optimizer=SGD("
        "learning_rate=0.7, momentum=0.9, nesterov=True), inner_state='maintain')"
    )
    copy = Lookahead.from_config(lookahead.get_config())
    assert repr(copy) == repr(lookahead)
    assert copy.alpha is None
    assert "outer_optimizer" not in Lookahead("adam").get_config()
    by_name = Lookahead("adam", outer_optimizer="sgd")
    assert isinstance(by_name.outer_optimizer, keras.optimizers.SGD)


def test_inject():
    model = make_model(keras.optimizers.Adam(0.01), **QUICK)
    lookahead = inject(model, k=2, outer_optimizer=nesterov())
    fit(model, 0, 5)
    assert int(lookahead.outer_optimizer.iterations) == 2


ADAM = keras.optimizers.Adam


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"alpha": 0.8, "outer_optimizer": "sgd"}, "takes its place"),
        ({"alpha": 0.5, "outer_optimizer": "sgd"}, "takes its place"),
        ({"inner_state": "interpolate", "outer_optimizer": "sgd"}, "interpolate"),
        ({"outer_optimizer": ADAM(clipnorm=1.0)}, "clipnorm"),
        ({"outer_optimizer": ADAM(use_ema=True)}, "use_ema"),
        ({"outer_optimizer": ADAM(gradient_accumulation_steps=2)}, "larger k"),
        ({"outer_optimizer": Lookahead("adam")}, "others inside"),
    ],
)
def test_what_has_no_meaning_is_an_error(arguments, words):
    with pytest.raises(ValueError, match=words):
        Lookahead("adam", **arguments)


def test_other_errors():
    with pytest.raises(TypeError, match="outer_optimizer"):
        Lookahead("adam", outer_optimizer=0.7)
    same = keras.optimizers.SGD(0.1)
    with pytest.raises(ValueError, match="the same SGD"):
        Lookahead(same, outer_optimizer=same)
    across_rows = keras.optimizers.Lamb(0.1)
    lookahead = Lookahead(inner(lazy=True), outer_optimizer=across_rows)
    with pytest.raises(ValueError, match="each row by itself"):
        Run(lookahead, make_weights())
    Run(Lookahead(inner(lazy=False), outer_optimizer=across_rows), make_weights())

"""Slow weights in `fit`, `inject`, and which weights are backed up first.

The reference is Keras's own optimizer with the sync done in NumPy between steps.
"""

import gc

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    QUICK,
    adam,
    assert_agree,
    assert_same_bits,
    dtype_policy,
    make_model,
    numpy,
    random_weights,
    sgd,
    state,
)
from harness import make_data as make_samples

from keras_lookahead_lazy import LazyOptimizer, Lookahead, SlowWeights, inject

BATCH, STEPS = 4, 8


WRAPPED = {
    "Lookahead": lambda: Lookahead(adam(), k=5),
    "both": lambda: Lookahead(LazyOptimizer(sgd()), k=3),
}


def make_data(steps=STEPS, seed=5):
    return make_samples(steps * BATCH, seed)


def batches(steps=STEPS):
    x, y = make_data(steps)
    for i in range(0, len(x), BATCH):
        yield x[i : i + BATCH], y[i : i + BATCH]


def fit(model, callbacks=(), epochs=1, steps=STEPS, **arguments):
    return model.fit(
        *make_data(steps),
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        epochs=epochs,
        callbacks=list(callbacks),
        **arguments,
    )


def evaluate(model):
    return model.evaluate(*make_data(seed=6), batch_size=BATCH, verbose=0)


class Recorder(keras.callbacks.Callback):
    """The weights after every step of training, and the updates up to there."""

    def __init__(self):
        super().__init__()
        self.weights, self.updates = [], []

    def on_train_begin(self, logs=None):
        self.weights.append(self.model.get_weights())
        self.updates.append(int(self.model.optimizer.iterations))

    def on_train_batch_end(self, batch, logs=None):
        if BACKEND == "jax":
            self.model.jax_state_sync()
        self.on_train_begin()


def steps_of_reference(model, data, k, alpha=0.5, done=0):
    """Weights after each step: the sync in NumPy, the steps by Keras.

    Args:
        model: compiled with the inner optimizer alone.
        done: updates of Lookahead before this.
    """
    slow = model.get_weights()
    for i, (x, y) in enumerate(data, 1):
        model.train_on_batch(x, y)
        if (done + i) % k == 0:
            pairs = zip(slow, model.get_weights(), strict=True)
            slow = [s + alpha * (f - s) for s, f in pairs]
            model.set_weights(slow)
        yield model.get_weights(), slow


# SlowWeights and slow_weights


@pytest.mark.parametrize("case", WRAPPED)
def test_validation_is_on_the_slow_weights(case):
    """After a sync fast and slow are the same: that is what the slow weights are."""
    optimizer = WRAPPED[case]()
    recorder = Recorder()
    model = make_model(optimizer)
    history = fit(
        model,
        [recorder, SlowWeights()],
        epochs=3,
        validation_data=make_data(seed=6),
        validation_batch_size=BATCH,
    )
    plain = make_model("sgd")
    for epoch, loss in enumerate(history.history["val_loss"], 1):
        updates = epoch * STEPS
        plain.set_weights(recorder.weights[updates - updates % optimizer.k])
        assert loss == pytest.approx(evaluate(plain), rel=1e-6)
        plain.set_weights(recorder.weights[updates])
        if updates % optimizer.k:
            assert loss != pytest.approx(evaluate(plain), rel=1e-3)


class EvaluateSlow(keras.callbacks.Callback):
    """Evaluates on the slow weights by hand, after every epoch and amid them."""

    def __init__(self, lookahead):
        super().__init__()
        self.lookahead, self.losses = lookahead, []

    def on_epoch_end(self, epoch, logs=None):
        with self.lookahead.slow_weights(self.model):
            self.losses.append(evaluate(self.model))


@pytest.mark.parametrize("case", WRAPPED)
def test_fast_trajectory_is_the_same(case):
    runs = {}
    for how in ("without", "callback", "by hand"):
        optimizer = WRAPPED[case]()
        model, recorder = make_model(optimizer), Recorder()
        callbacks = [recorder]
        callbacks += [SlowWeights()] * (how == "callback")
        callbacks += [EvaluateSlow(optimizer)] * (how == "by hand")
        history = fit(
            model, callbacks, epochs=2, validation_data=make_data(seed=6)
        ).history["val_loss"]
        runs[how] = recorder.weights, state(model)
        if how == "callback":
            losses = history
        if how == "by hand":
            assert callbacks[1].losses == pytest.approx(losses, rel=1e-6)
    for how in ("callback", "by hand"):
        for ours, expected in zip(runs[how][0], runs["without"][0], strict=True):
            assert_same_bits(ours, expected)
        assert_same_bits(runs[how][1], runs["without"][1])


def test_callback_in_evaluate_and_predict():
    optimizer = WRAPPED["Lookahead"]()
    model = make_model(optimizer)
    fit(model, steps=7)
    fast = state(model)
    x, _ = make_data(seed=6)
    with optimizer.slow_weights(model):
        loss, prediction = evaluate(model), model.predict(x, verbose=0)
    assert loss != pytest.approx(evaluate(model), rel=1e-3)
    callback = [SlowWeights()]
    ours = model.evaluate(
        *make_data(seed=6), batch_size=BATCH, verbose=0, callbacks=callback
    )
    assert ours == pytest.approx(loss, rel=1e-6)
    assert_same_bits([model.predict(x, verbose=0, callbacks=callback)], [prediction])
    assert_same_bits(state(model), fast)


def test_exception_in_the_block():
    optimizer = WRAPPED["both"]()
    model = make_model(optimizer, **QUICK)
    fit(model, steps=5)
    fast = state(model)
    inside = []

    def stop():
        with optimizer.slow_weights(model):
            inside.extend(model.get_weights())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert not np.array_equal(inside[1], fast[1])
    assert_same_bits(state(model), fast)


def test_slow_weights_within_slow_weights():
    optimizer = WRAPPED["both"]()
    model = make_model(optimizer, **QUICK)
    fit(model, steps=5)
    fast = state(model)
    with optimizer.slow_weights(model):
        slow = model.get_weights()
        with optimizer.slow_weights(model):
            assert_same_bits(model.get_weights(), slow)
        assert_same_bits(model.get_weights(), slow)
    assert_same_bits(state(model), fast)


class StopIn(keras.callbacks.Callback):
    """Raises in the given method, the first time."""

    def __init__(self, method):
        super().__init__()
        self.stopped = False

        def stop(*_, **__):
            if not self.stopped:
                self.stopped = True
                raise KeyboardInterrupt

        setattr(self, method, stop)


def interrupt(model, method="on_test_batch_end"):
    """Ctrl-C while evaluating on the slow weights; the callbacks live on."""
    callbacks = [SlowWeights(), StopIn(method)]
    with pytest.raises(KeyboardInterrupt):
        model.evaluate(*make_data(seed=6), verbose=0, callbacks=callbacks)
    return callbacks


INTERRUPTED = {
    **WRAPPED,
    "nested": lambda: Lookahead(Lookahead(sgd(), k=2), k=3),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        Lookahead(sgd(), k=3), initial_scale=2.0
    ),
}


@pytest.mark.parametrize("method", ["on_test_begin", "on_test_batch_end"])
@pytest.mark.parametrize("case", INTERRUPTED)
def test_interrupted_validation(case, method):
    """Training goes on from the fast weights, whatever callbacks it has."""
    whole = make_model(INTERRUPTED[case]())
    fit(whole, epochs=2)
    model, callback = make_model(INTERRUPTED[case]()), SlowWeights()
    with pytest.raises(KeyboardInterrupt):
        fit(
            model,
            [callback, StopIn(method)],
            validation_data=make_data(seed=6),
            validation_batch_size=BATCH,
        )
    fit(model)
    assert_same_bits(state(model), state(whole))
    del callback
    gc.collect()
    assert_same_bits(state(model), state(whole))
    assert not {"fit", "call", "get_weights"} & set(vars(model))


def apply(model):
    """An update by given gradients."""
    variables = model.trainable_variables
    gradients = [keras.ops.ones(v.shape) for v in variables]
    model.optimizer.apply(gradients, variables)


def custom_step(model):
    """One step of a loop of the user's own, not compiled."""
    x, y = make_data(1)
    variables = model.trainable_variables
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        gradients = tape.gradient(loss, [v.value for v in variables])
    else:
        import torch

        model.zero_grad()
        loss = torch.mean((model(x) - torch.tensor(y)) ** 2)
        loss.backward()
        gradients = [v.value.grad for v in variables]
    with keras.device("cpu:0"):
        model.optimizer.apply(gradients, variables)


def metrics_after_reset(model):
    """What JAX keeps elsewhere meanwhile must not come back over it."""
    model.reset_metrics()
    model.get_weights()
    return numpy(model.metrics_variables)


NEXT = {
    "fit": fit,
    "train_on_batch": lambda model: model.train_on_batch(*make_data(1)),
    "apply": apply,
    "evaluate": evaluate,
    "test_on_batch": lambda model: model.test_on_batch(*make_data(1)),
    "predict": lambda model: model.predict(make_data()[0], verbose=0),
    "get_weights": lambda model: model.get_weights(),
    "reset_metrics": metrics_after_reset,
    "evaluate on slow weights": lambda model: model.evaluate(
        *make_data(seed=6), verbose=0, callbacks=[SlowWeights()]
    ),
}
if BACKEND != "jax":
    NEXT["custom step"] = custom_step


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("following", NEXT)
def test_after_an_interrupted_evaluation(following):
    """What comes next does what it does without the interruption."""
    results = {}
    for interrupted in (False, True):
        model = make_model(WRAPPED["both"](), **QUICK)
        fit(model, steps=5)
        fast = model.get_weights()
        if interrupted:
            _callbacks = interrupt(model)
            if BACKEND != "jax":  # which keeps no weights in the variables then
                slow = numpy(model.trainable_variables)
                assert not np.array_equal(slow[1], fast[1])
        if keras.__version__ < "3.15":  # train_on_batch goes on with metrics there
            model.reset_metrics()
        result = NEXT[following](model)
        if isinstance(result, keras.callbacks.History):
            result = result.history["loss"]
        result = [np.asarray(part) for part in keras.tree.flatten(result)]
        results[interrupted] = result, state(model)
    for ours, expected in zip(results[True], results[False], strict=True):
        assert_same_bits(ours, expected)


@pytest.mark.parametrize("how", ["save", "save_weights"])
def test_save_after_an_interrupted_evaluation(how, tmp_path):
    model = make_model(WRAPPED["Lookahead"](), **QUICK)
    fit(model, steps=7)
    fast = model.get_weights()
    _callbacks = interrupt(model)
    file = tmp_path / ("model.keras" if how == "save" else "model.weights.h5")
    getattr(model, how)(file)
    if how == "save":
        loaded = keras.models.load_model(file)
    else:
        loaded = make_model(WRAPPED["Lookahead"]())
        loaded.load_weights(file)
    assert_same_bits(loaded.get_weights(), fast)
    interrupt(model)
    if how == "save_weights":  # what is loaded stays
        loaded = random_weights(model, seed=8)
        model.set_weights(loaded)
        assert_same_bits(model.get_weights(), loaded)


@pytest.mark.skipif(BACKEND != "jax", reason="a stateless loop")
def test_stateless_step_after_an_interrupted_evaluation():
    """Its weights were collected before anything can put the fast ones back."""
    model = make_model(WRAPPED["Lookahead"]())
    fit(model, steps=7)
    fast = model.get_weights()
    weights = [keras.ops.convert_to_tensor(v) for v in random_weights(model, seed=8)]
    interrupt(model)
    with pytest.raises(RuntimeError, match=r"interrupted.*model\.get_weights"):
        model.stateless_call(weights, [], make_data(1)[0])
    assert_same_bits(model.get_weights(), fast)
    model.stateless_call(weights, [], make_data(1)[0])


def test_garbage_collection_writes_nothing():
    model = make_model(WRAPPED["Lookahead"](), **QUICK)
    fit(model, steps=7)
    interrupt(model)
    variables = model.trainable_variables
    for variable in variables:
        variable.assign(keras.ops.ones(variable.shape))
    del model
    gc.collect()
    assert all((value == 1).all() for value in numpy(variables))


TRAINING = {name: NEXT[name] for name in ("fit", "train_on_batch", "apply")}


@pytest.mark.parametrize("training", TRAINING)
def test_training_on_the_slow_weights(training):
    """Is refused: it would be undone in the weights, but not in the counters."""
    model = make_model(WRAPPED["both"]())
    fit(model, steps=5)
    lookahead, fast = model.optimizer, state(model)
    with lookahead.slow_weights(model):
        slow = state(model)
        with pytest.raises(RuntimeError, match=r"slow weights.*Train before or after"):
            TRAINING[training](model)
        assert_same_bits(state(model), slow)
    assert_same_bits(state(model), fast)
    TRAINING[training](model)


def test_training_in_a_validation():
    """Of a callback: refused too, and nothing is lost."""

    class Train(keras.callbacks.Callback):
        def on_test_end(self, logs=None):
            with pytest.raises(RuntimeError, match="slow weights"):
                self.model.train_on_batch(*make_data(1))
            self.predicted = self.model.predict(make_data(1)[0], verbose=0)

    model = make_model(WRAPPED["Lookahead"](), **QUICK)
    train, recorder = Train(), Recorder()
    validation = {"validation_data": make_data(seed=6)}
    fit(model, [recorder, train, SlowWeights()], steps=7, **validation)
    fast = model.get_weights()
    assert_same_bits(fast, recorder.weights[7])
    model.set_weights(recorder.weights[5])
    expected = model.predict(make_data(1)[0], verbose=0)
    assert_same_bits([train.predicted], [expected])


def test_slow_weights_of_a_part():
    """Two optimizers on one model: each serves the weights that it trains."""
    model = make_model()
    parts = model.trainable_variables[:2], model.trainable_variables[2:]
    optimizers = Lookahead(sgd(), k=3), Lookahead(sgd(), k=4)
    weights = []
    for _ in range(5):
        for optimizer, part in zip(optimizers, parts, strict=True):
            optimizer.apply([keras.ops.ones(v.shape) for v in part], part)
        weights.append(model.get_weights())
    first, second = optimizers
    with first.slow_weights(model):
        assert_same_bits(model.get_weights(), weights[2][:2] + weights[4][2:])
        with second.slow_weights(model):
            assert_same_bits(model.get_weights(), weights[2][:2] + weights[3][2:])
        assert_same_bits(model.get_weights(), weights[2][:2] + weights[4][2:])
    assert_same_bits(model.get_weights(), weights[4])
    second.load_slow_weights(model)
    assert_same_bits(model.get_weights(), weights[4][:2] + weights[3][2:])


@pytest.mark.parametrize("case", WRAPPED)
def test_end_on_slow_weights(case):
    optimizer = WRAPPED[case]()
    recorder = Recorder()
    model = make_model(optimizer, **QUICK)
    fit(model, [recorder, SlowWeights(end_on_slow_weights=True)])
    last_sync = STEPS - STEPS % optimizer.k
    assert_same_bits(model.get_weights(), recorder.weights[last_sync])
    assert not np.array_equal(model.get_weights()[1], recorder.weights[-1][1])


def test_before_the_first_update():
    """Both are the same, whatever has been loaded since the build."""
    optimizer = Lookahead(adam())
    model = make_model(optimizer, **QUICK)
    optimizer.build(model.trainable_variables)
    weights = random_weights(model, seed=8)
    model.set_weights(weights)
    with optimizer.slow_weights(model):
        assert_same_bits(model.get_weights(), weights)
    evaluate(model)
    model.evaluate(*make_data(), verbose=0, callbacks=[SlowWeights()])
    assert_same_bits(model.get_weights(), weights)
    fit(model, [SlowWeights(end_on_slow_weights=True)], steps=1)
    assert_same_bits(model.get_weights(), weights)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch: no float16 on a CPU")
def test_in_a_loss_scale_optimizer():
    with dtype_policy("mixed_float16"):
        recorder = Recorder()
        model = make_model(Lookahead(adam(), k=3))
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        validation = {"validation_data": make_data(seed=6)}
        history = fit(model, [recorder, SlowWeights()], epochs=2, **validation)
        plain = make_model("sgd")
    for epoch, loss in enumerate(history.history["val_loss"], 1):
        # The loss scale begins too high: the first steps are none.
        updates = recorder.updates[epoch * STEPS]
        assert 3 < updates < epoch * STEPS
        sync = recorder.updates.index(updates - updates % 3)
        plain.set_weights(recorder.weights[sync])
        assert loss == pytest.approx(evaluate(plain), rel=1e-3)


@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
@pytest.mark.parametrize("use", ["fit", "evaluate", "predict"])
def test_with_swap_ema_weights(use, order):
    """Both would move the weights aside; they are refused before anything changes."""
    model = make_model(Lookahead(keras.optimizers.SGD(0.1, use_ema=True)), **QUICK)
    fit(model, steps=3)
    before = state(model)
    callbacks = [SlowWeights(), keras.callbacks.SwapEMAWeights()][::order]
    x, y = make_data()
    data = (x,) if use == "predict" else (x, y)
    with pytest.raises(ValueError, match=r"SwapEMAWeights.*Remove one"):
        getattr(model, use)(*data, callbacks=callbacks, verbose=0)
    assert_same_bits(state(model), before)


class SetLoss(keras.callbacks.Callback):
    """Gives each epoch a loss to be monitored, the second's the lowest."""

    def on_epoch_end(self, epoch, logs=None):
        logs["val_loss"] = [0.5, 0.1, 0.3, 0.4][epoch]


@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
@pytest.mark.parametrize("end_on_slow_weights", [False, True])
@pytest.mark.parametrize("case", WRAPPED)
def test_early_stopping(case, end_on_slow_weights, order):
    """Restores the best epoch's slow weights, those that were validated."""
    optimizer = WRAPPED[case]()
    recorder = Recorder()
    stop = keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)
    both = [SlowWeights(end_on_slow_weights), stop][::order]
    model = make_model(optimizer, **QUICK)
    fit(model, [recorder, SetLoss(), *both], epochs=6, steps=7)
    assert len(recorder.weights) == 1 + 4 * 7
    best = recorder.weights[14 - 14 % optimizer.k]
    assert not np.array_equal(best[1], recorder.weights[14][1])
    assert_same_bits(model.get_weights(), best)
    # The next update is the first, and the callback is as it was.
    with optimizer.slow_weights(model):
        assert_same_bits(model.get_weights(), best)
    stop.model.set_weights(recorder.weights[0])
    stop.on_train_begin()
    stop.on_epoch_end(0, {"val_loss": 1.0})
    assert_same_bits(stop.best_weights, recorder.weights[0])


@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
@pytest.mark.parametrize("slow", [False, True])
def test_model_checkpoint(slow, order, tmp_path):
    optimizer = WRAPPED["Lookahead"]()
    recorder, file = Recorder(), tmp_path / "best.weights.h5"
    save = keras.callbacks.ModelCheckpoint(
        file, save_best_only=True, save_weights_only=True
    )
    both = [SlowWeights(save_best_slow_weights=slow), save][::order]
    model = make_model(optimizer, **QUICK)
    fit(model, [recorder, SetLoss(), *both], epochs=3, steps=7)
    assert_same_bits(model.get_weights(), recorder.weights[21])
    model.load_weights(file)
    best = 14 - 14 % optimizer.k if slow else 14
    assert_same_bits(model.get_weights(), recorder.weights[best])


@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
def test_backup_and_restore(order, tmp_path):
    """The backup is of the fast weights: a run that is resumed is the whole run."""
    whole, model = (make_model(WRAPPED["Lookahead"](), **QUICK) for _ in range(2))
    fit(whole, epochs=3, steps=7)
    for stopping in (True, False):
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        slow = SlowWeights(save_best_slow_weights=True)
        callbacks = [slow, backup][::order]
        validation = {"validation_data": make_data(seed=6)}
        if stopping:
            callbacks.append(StopIn("on_epoch_end"))
            with pytest.raises(KeyboardInterrupt):
                fit(model, callbacks, epochs=3, steps=7, **validation)
            model.set_weights(random_weights(model, seed=8))
        else:
            fit(model, callbacks, epochs=3, steps=7, **validation)
    assert_same_bits(state(model), state(whole))


# Slow metrics beside the fast ones


@pytest.mark.parametrize("case", WRAPPED)
def test_prefix_validates_on_both(case):
    """The usual names are of the fast weights, those with the prefix of the slow."""
    optimizer, recorder = WRAPPED[case](), Recorder()
    model = make_model(optimizer, metrics=["mae"])
    history = fit(
        model,
        [recorder, SlowWeights(prefix="slow_")],
        epochs=3,
        validation_data=make_data(seed=6),
        validation_batch_size=BATCH,
        validation_freq=2,
    ).history
    plain = make_model("sgd", metrics=["mae"])
    updates = 2 * STEPS  # the second epoch is the only one that is validated
    assert updates % optimizer.k
    for prefix, step in ("", updates), ("slow_", updates - updates % optimizer.k):
        plain.set_weights(recorder.weights[step])
        ours = [history[f"{prefix}val_loss"], history[f"{prefix}val_mae"]]
        assert ours == [[pytest.approx(value, rel=1e-6)] for value in evaluate(plain)]


class Noise(keras.layers.Layer):
    """Draws in training and in evaluation."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(7)

    def call(self, x):
        noise = keras.random.normal(keras.ops.shape(x), seed=self.seed_generator)
        return x + 0.1 * noise


def fit_drawing(callbacks):
    """A model that draws in every call, fitted on shuffled samples."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(12, 3),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3, seed=1),
            Noise(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(Lookahead(adam(), k=3), "mse", metrics=["mae"])
    x, y = make_data()
    history = model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=3,
        validation_split=0.25,
        callbacks=callbacks,
        verbose=0,
    ).history
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return history, numpy(variables)


def test_training_is_the_same_with_the_prefix():
    """Weights, slots, seeds, metrics, and the order in which samples come."""
    without, variables = fit_drawing([])
    history, ours = fit_drawing([SlowWeights(prefix="slow_")])
    assert {name for name in history if name.startswith("slow_")} == {
        "slow_val_loss",
        "slow_val_mae",
    }
    assert {name: history[name] for name in without} == without
    assert_same_bits(ours, variables)


class SetLosses(keras.callbacks.Callback):
    """Logs for which the second epoch's slow weights are the best, the third's fast."""

    def on_epoch_end(self, epoch, logs=None):
        assert {"val_loss", "slow_val_loss"} <= set(logs)
        logs["slow_val_loss"] = [0.5, 0.1, 0.3, 0.4][epoch]
        logs["val_loss"] = [0.5, 0.4, 0.1, 0.3][epoch]


@pytest.mark.parametrize("monitor", ["val_loss", "slow_val_loss"])
def test_callbacks_that_monitor_with_a_prefix(monitor, tmp_path):
    """They keep the weights of which the metric is."""
    optimizer, recorder = WRAPPED["Lookahead"](), Recorder()
    file = tmp_path / "best.weights.h5"
    stop = keras.callbacks.EarlyStopping(
        monitor, mode="min", patience=9, restore_best_weights=True
    )
    save = keras.callbacks.ModelCheckpoint(
        file, monitor, mode="min", save_best_only=True, save_weights_only=True
    )
    slow = SlowWeights(prefix="slow_", save_best_slow_weights=True)
    model = make_model(optimizer, **QUICK)
    callbacks = [recorder, slow, SetLosses(), stop, save]
    validation = {"validation_data": make_data(seed=6)}
    fit(model, callbacks, epochs=4, steps=7, **validation)
    best = 14 - 14 % optimizer.k if monitor == "slow_val_loss" else 21
    assert best % 7 or monitor == "val_loss"
    assert_same_bits(model.get_weights(), recorder.weights[best])
    model.load_weights(file)
    assert_same_bits(model.get_weights(), recorder.weights[best])


def test_prefix_is_shown_in_the_progress_bar(capsys):
    model = make_model(WRAPPED["both"](), **QUICK)
    data = {"validation_data": make_data(seed=6)}
    model.fit(*make_data(), callbacks=[SlowWeights(prefix="slow_")], **data, verbose=2)
    (loss,) = model.history.history["slow_val_loss"]
    assert f"slow_val_loss: {loss:.4f}" in capsys.readouterr().out


def test_prefix_in_evaluate_and_predict():
    """They have one result, which is that of the slow weights."""
    model = make_model(WRAPPED["Lookahead"](), **QUICK)
    fit(model, [callback := SlowWeights(prefix="slow_")], steps=7)
    data = make_data(seed=6)
    with model.optimizer.slow_weights(model):
        loss, prediction = evaluate(model), model.predict(data[0], verbose=0)
    how = {"verbose": 0, "callbacks": [callback]}
    assert model.evaluate(*data, batch_size=BATCH, **how) == pytest.approx(loss)
    assert_same_bits([model.predict(data[0], **how)], [prediction])


@pytest.mark.parametrize("prefix", ["", 3])
def test_no_prefix(prefix):
    with pytest.raises(TypeError, match=r"prefix='slow_'.*Received"):
        SlowWeights(prefix=prefix)


# inject


@pytest.mark.parametrize("make_optimizer", [adam, sgd])
@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
def test_inject(make_optimizer, how):
    """The inner optimizer keeps its state; the backup is of the first update."""
    model, plain = (make_model(make_optimizer()) for _ in range(2))
    fit(model, steps=6)
    fit(plain, steps=6)
    assert_same_bits(state(model), state(plain))
    inner = model.optimizer
    lookahead = inject(model, k=3, alpha=0.4)
    assert model.optimizer is lookahead
    assert lookahead.inner_optimizer is inner
    recorder = Recorder()
    if how == "fit":
        fit(model, [recorder])
        ours = recorder.weights[1:]
    else:
        ours = []
        for x, y in batches():
            model.train_on_batch(x, y)
            ours.append(model.get_weights())
    expected = steps_of_reference(plain, batches(), 3, 0.4)
    for weights, (fast, _) in zip(ours, expected, strict=True):
        assert_agree(weights, fast, 2e-6)
    assert_agree(numpy(inner.variables), numpy(plain.optimizer.variables), 2e-6)
    assert int(lookahead.iterations) == 6 + STEPS


def test_inject_around_lazy():
    """Rows that Lookahead has never seen move are rows it must not forget."""
    model = make_model(LazyOptimizer(sgd()), **QUICK)
    plain = make_model(LazyOptimizer(sgd()), **QUICK)
    fit(model, steps=6)
    fit(plain, steps=6)
    inject(model, k=3, alpha=0.4)
    for (x, y), (fast, _) in zip(
        batches(), steps_of_reference(plain, batches(), 3, 0.4), strict=True
    ):
        model.train_on_batch(x, y)
        assert_agree(model.get_weights(), fast, 2e-6)


def test_inject_keeps_how_the_model_was_compiled():
    model = make_model()
    model.compile(adam(), "mae", metrics=["mse"], run_eagerly=True, loss_weights=[2.0])
    inject(model)
    reference = make_model()
    reference.compile(
        adam(), "mae", metrics=["mse"], run_eagerly=True, loss_weights=[2.0]
    )
    assert model.run_eagerly
    assert evaluate(model) == pytest.approx(evaluate(reference))


@pytest.mark.parametrize("when", ["before a step", "after steps"])
def test_save_after_inject(when, tmp_path):
    steps = {"before a step": 0, "after steps": 4}[when]
    whole, model = (make_model(adam(), **QUICK) for _ in range(2))
    for each in (whole, model):
        fit(each, steps=6)
        inject(each, k=3)
    data = list(batches())
    for x, y in data:
        whole.train_on_batch(x, y)
    for x, y in data[:steps]:
        model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(model.optimizer, Lookahead)
    for x, y in data[steps:]:
        model.train_on_batch(x, y)
    assert_same_bits(state(model), state(whole))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch: no float16 on a CPU")
def test_inject_into_a_loss_scale_optimizer():
    with dtype_policy("mixed_float16"):
        model, plain = (make_model(adam()) for _ in range(2))
        for each in (model, plain):
            fit(each, steps=16)  # the loss scale begins too high
        lookahead = inject(model, k=3)
        outer = model.optimizer
        assert isinstance(outer, keras.optimizers.LossScaleOptimizer)
        assert outer.inner_optimizer is lookahead
        before = int(lookahead.iterations)
        for (x, y), (fast, _) in zip(
            batches(), steps_of_reference(plain, batches(), 3), strict=True
        ):
            model.train_on_batch(x, y)
            assert_agree(model.get_weights(), fast, 2e-6)
        assert int(lookahead.iterations) == before + STEPS


# Weights that are loaded after the build


def load(model, how, tmp_path):
    weights = random_weights(model, seed=9)
    if how == "set_weights":
        model.set_weights(weights)
    else:
        source = make_model()
        source.set_weights(weights)
        source.save_weights(tmp_path / "new.weights.h5")
        model.load_weights(tmp_path / "new.weights.h5")
    return weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["set_weights", "load_weights"])
@pytest.mark.parametrize("training", ["fit", "train_on_batch"])
@pytest.mark.parametrize("case", WRAPPED)
def test_first_sync_pulls_to_the_loaded_weights(case, training, how, tmp_path):
    optimizer = WRAPPED[case]()
    model = make_model(optimizer)
    optimizer.build(model.trainable_variables)
    evaluate(model)
    weights = load(model, how, tmp_path)
    inner = optimizer.inner_optimizer
    plain = make_model(type(inner).from_config(inner.get_config()))
    plain.set_weights(weights)
    recorder = Recorder()
    if training == "fit":
        fit(model, [recorder])
        ours = recorder.weights[1:]
    else:
        ours = []
        for x, y in batches():
            model.train_on_batch(x, y)
            ours.append(model.get_weights())
    expected = steps_of_reference(plain, batches(), optimizer.k)
    for fast, (reference, _) in zip(ours, expected, strict=True):
        assert_agree(fast, reference, 2e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="a stateless loop")
@pytest.mark.parametrize("case", WRAPPED)
def test_first_sync_in_a_stateless_loop(case):
    """The weights are never in the variables: only the arguments count."""
    import jax

    optimizer = WRAPPED[case]()
    model = make_model()
    optimizer.build(model.trainable_variables)
    weights = random_weights(model, seed=9)

    def loss(weights, x, y):
        prediction, _ = model.stateless_call(weights, [], x)
        return jax.numpy.mean((prediction - y) ** 2)

    @jax.jit
    def step(weights, state, x, y):
        gradients = jax.grad(loss)(weights, x, y)
        return optimizer.stateless_apply(state, gradients, weights)

    inner = optimizer.inner_optimizer
    plain = make_model(type(inner).from_config(inner.get_config()))
    plain.set_weights(weights)
    optimizer_state = [v.value for v in optimizer.variables]
    expected = steps_of_reference(plain, batches(), optimizer.k)
    for (x, y), (reference, _) in zip(batches(), expected, strict=True):
        weights, optimizer_state = step(weights, optimizer_state, x, y)
        assert_agree([np.asarray(w) for w in weights], reference, 2e-6)

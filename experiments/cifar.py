"""CIFAR-10: experiments on Lookahead's robustness (Zhang et al. 2019).

`sweep` varies the learning rate and the momentum of SGD, with and without Lookahead;
`k-alpha` varies Lookahead's k and alpha; `updates` measures the test accuracy after
every fast update and every sync, late in training; `longer` trains three times as long,
each optimizer at the learning rate that was its best in the sweep.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import layers

from examples.common import cifar as pictures
from examples.common.comparison import epochs_of
from examples.common.sources import Data, DataError
from experiments._runs import (
    Measure,
    Progress,
    Record,
    Scale,
    Settings,
    add_full_option,
    add_options,
    changed,
    copy_of,
    read,
    run_all,
)
from keras_lookahead_lazy import Lookahead, SlowWeights

LEARNING_RATE, MOMENTUM = 0.1, 0.9  # where the other one is varied
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
MOMENTA = (0.0, 0.5, 0.9, 0.95, 0.99)
SWEEP = tuple(
    dict.fromkeys(
        [(rate, MOMENTUM) for rate in LEARNING_RATES]
        + [(LEARNING_RATE, momentum) for momentum in MOMENTA]
    )
)
K, ALPHA = 5, 0.5
KS, ALPHAS = (5, 10, 20), (0.2, 0.5, 0.8)
LARGE_ALPHA = ALPHAS[-1]
# What trains `TIMES_LONGER` as many epochs: SGD, and Lookahead of such k and alpha.
LONGER, TIMES_LONGER = ((None, None), (K, ALPHA), (K, LARGE_ALPHA)), 3
# The paper divides the learning rate by 5 after 60, 120 and 160 of 200 epochs.
DECAYS, DECAY = (0.3, 0.6, 0.8), 0.2
# Where `updates` begins to measure: a share of training, in the middle of each phase
# that follows a decay. The learning rate must not change while it measures.
WINDOW_STARTS = (0.4, 0.7, 0.9)
CYCLES = 30
MAX_SHIFT = 4  # pixels
STATISTICS_MOMENTUM, STATISTICS_SAMPLES = 0.9, 2_000


@dataclass(frozen=True, kw_only=True)
class ImageScale(Scale):
    """How much is trained, and how large a residual network.

    Attributes:
        filters: the filters of each stage of the residual network; a stage but the
            first halves the image's sides.
        blocks: residual blocks of two convolutions in a stage.
        first_stride: the stride of the first convolution.
        augment: whether images are shifted by up to four pixels and flipped.
        weight_decay: that of a penalty in the loss, which momentum multiplies by 1 / (1
            - momentum).
    """

    filters: list[int]
    blocks: int
    first_stride: int
    augment: bool
    weight_decay: float


SMALL = ImageScale(
    filters=[16, 32, 64],
    blocks=1,
    first_stride=2,
    augment=False,
    weight_decay=0.0,
    epochs=10,
    batch_size=128,
    train_samples=20_000,
)
FULL = ImageScale(  # ResNet-18
    filters=[64, 128, 256, 512],
    blocks=2,
    first_stride=1,
    augment=True,
    weight_decay=5e-4,
    epochs=200,
    batch_size=128,
)


def build_model(shape: Sequence[int], scale: ImageScale) -> keras.Model:
    """Build a residual network (He et al. 2016) that ends in logits."""
    images = keras.Input(shape)
    x = images
    if scale.augment:
        shift = MAX_SHIFT / shape[0], MAX_SHIFT / shape[1]
        x = layers.RandomTranslation(*shift, fill_mode="constant")(x)
        x = layers.RandomFlip("horizontal")(x)
    x = layers.ReLU()(
        _convolve_and_normalize(x, scale.filters[0], 3, scale.first_stride)
    )
    for stage, filters in enumerate(scale.filters):
        for block in range(scale.blocks):
            stride = 2 if stage and not block else 1
            y = layers.ReLU()(_convolve_and_normalize(x, filters, 3, stride))
            y = _convolve_and_normalize(y, filters, 3)
            if stride > 1 or x.shape[-1] != filters:
                x = _convolve_and_normalize(x, filters, 1, stride)
            x = layers.ReLU()(layers.add([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, layers.Dense(pictures.CLASSES)(x))


def _convolve_and_normalize(x: Any, filters: int, side: int, stride: int = 1) -> Any:
    x = layers.Conv2D(filters, side, stride, padding="same", use_bias=False)(x)
    return layers.BatchNormalization(momentum=STATISTICS_MOMENTUM)(x)


def schedule(
    data: Data, settings: Settings
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Build the paper's schedule, stretched to the epochs of the scale."""
    scale = ImageScale(**settings["scale"])
    updates = scale.updates_per_epoch(data) * scale.epochs
    return keras.optimizers.schedules.PiecewiseConstantDecay(
        [round(share * updates) for share in DECAYS],
        [settings["learning_rate"] * DECAY**n for n in range(len(DECAYS) + 1)],
    )


def compile_model(data: Data, settings: Settings) -> keras.Model:
    """Build the model and compile it with the optimizer of the settings."""
    scale = ImageScale(**settings["scale"])
    model = build_model(data.x_train.shape[1:], scale)
    optimizer = keras.optimizers.SGD(
        schedule(data, settings),
        momentum=settings["momentum"],
        # Keras's acts beside the gradient and so beside momentum.
        weight_decay=scale.weight_decay / (1 - settings["momentum"]) or None,
    )
    if settings["k"]:
        optimizer = Lookahead(optimizer, k=settings["k"], alpha=settings["alpha"])
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def measure_training(data: Data, settings: Settings, name: str) -> dict[str, Any]:
    """Train to the end; validate Lookahead on its slow weights, at the end on both."""
    scale = ImageScale(**settings["scale"])
    model = compile_model(data, settings)
    slow = [SlowWeights()] if settings["k"] else []
    history = model.fit(
        data.x_train,
        data.y_train,
        batch_size=scale.batch_size,
        epochs=scale.epochs,
        validation_data=(data.x_test, data.y_test),
        validation_batch_size=500,
        callbacks=[*slow, Progress(name)],
        verbose=0,
    )

    def evaluate(x: np.ndarray, y: np.ndarray, callbacks: list) -> dict[str, float]:
        return model.evaluate(
            x, y, batch_size=500, verbose=0, return_dict=True, callbacks=callbacks
        )

    return {
        "train": evaluate(data.x_train, data.y_train, slow),
        "test": evaluate(data.x_test, data.y_test, slow),
        "test_fast_weights": evaluate(data.x_test, data.y_test, []),
        "epochs": epochs_of(history),
    }


def measure_updates(data: Data, settings: Settings, name: str) -> dict[str, Any]:
    """Train part of the way, then evaluate on the test set after every update.

    A cycle of k updates gives k + 2 evaluations: at its start, after each fast update,
    and after the sync. The moving statistics of BatchNormalization lag behind the fast
    weights and are nearer to synced ones, which alone could favour a sync; so a cycle
    is also evaluated at its start, before and after its sync with statistics of the
    weights that are evaluated ("with_fresh_statistics").
    """
    scale = ImageScale(**settings["scale"])
    k, alpha = settings["k"], settings["alpha"]
    rate = schedule(data, settings)
    start = settings["start_epoch"] * scale.updates_per_epoch(data)
    if float(rate(start)) != float(rate(start + (settings["cycles"] + 1) * k)):
        raise ValueError("the learning rate falls while single updates are measured")
    model = compile_model(data, settings)
    model.fit(
        data.x_train,
        data.y_train,
        batch_size=scale.batch_size,
        epochs=settings["start_epoch"],
        callbacks=[Progress(name)],
        verbose=0,
    )
    batches = _batches(data, scale.batch_size, settings["seed"])

    def update() -> None:
        model.train_on_batch(*next(batches))

    def evaluate() -> dict[str, float]:
        return model.evaluate(
            data.x_test, data.y_test, batch_size=500, verbose=0, return_dict=True
        )

    def evaluate_fresh() -> dict[str, float]:
        with _fresh_statistics(model, data.x_train[:STATISTICS_SAMPLES]):
            return evaluate()

    while int(model.optimizer.iterations) % k:
        update()
    cycles = []
    for _ in range(settings["cycles"]):
        evaluations, fresh = [evaluate()], [evaluate_fresh()]
        slow_weights = [copy_of(weight) for weight in model.trainable_variables]
        for _ in range(k - 1):
            update()
            evaluations.append(evaluate())
        update()
        # The k-th update comes with the sync, which has to be undone for a look at the
        # fast weights: synced = slow + alpha (fast - slow).
        synced = [copy_of(weight) for weight in model.trainable_variables]
        for weight, slow, after in zip(
            model.trainable_variables, slow_weights, synced, strict=True
        ):
            weight.assign(slow + (after - slow) / alpha)
        evaluations.append(evaluate())
        fresh.append(evaluate_fresh())
        for weight, after in zip(model.trainable_variables, synced, strict=True):
            weight.assign(after)
        evaluations.append(evaluate())
        fresh.append(evaluate_fresh())
        cycles.append(
            {**_by_measure(evaluations), "with_fresh_statistics": _by_measure(fresh)}
        )
    return {"learning_rate": float(model.optimizer.learning_rate), "cycles": cycles}


def _by_measure(evaluations: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {
        measure: [evaluation[measure] for evaluation in evaluations]
        for measure in ("accuracy", "loss")
    }


@contextmanager
def _fresh_statistics(model: keras.Model, images: np.ndarray) -> Iterator[None]:
    """Give BatchNormalization the images' statistics under the present weights."""
    normalizations = [
        layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)
    ]
    statistics = [
        variable for layer in normalizations for variable in layer.non_trainable_weights
    ]
    before = [copy_of(variable) for variable in statistics]
    for layer in normalizations:
        layer.momentum = 0.0
    model(images, training=True)
    for layer in normalizations:
        layer.momentum = STATISTICS_MOMENTUM
    try:
        yield
    finally:
        for variable, value in zip(statistics, before, strict=True):
            variable.assign(value)


def _batches(
    data: Data, batch_size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(len(data.x_train))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield data.x_train[chosen], data.y_train[chosen]


def training(
    scale: ImageScale,
    seed: int,
    learning_rate: float = LEARNING_RATE,
    momentum: float = MOMENTUM,
    k: int | None = K,
    alpha: float | None = ALPHA,
) -> tuple[str, Settings]:
    """Name a run of SGD, or of Lookahead around it, and give its settings."""
    name = f"k{k}-alpha{alpha:g}" if k else "sgd"
    return f"{name}-rate{learning_rate:g}-momentum{momentum:g}-seed{seed}", {
        "learning_rate": learning_rate,
        "momentum": momentum,
        "k": k,
        "alpha": alpha,
        "seed": seed,
        "scale": asdict(scale),
    }


def sweep(scale: ImageScale, seed: int) -> dict[str, Settings]:
    """Vary the learning rate and the momentum, with and without Lookahead.

    Without also at alpha times the learning rate: a cycle of Lookahead goes alpha of
    the way that its fast weights go, so that alone might be what one sees. A larger
    alpha goes with the learning rate only.
    """
    settings = [
        each
        for rate, momentum in SWEEP
        for each in (
            (rate, momentum, None, None),
            (ALPHA * rate, momentum, None, None),
            (rate, momentum, K, ALPHA),
        )
    ]
    settings += [(rate, MOMENTUM, K, LARGE_ALPHA) for rate in LEARNING_RATES]
    return dict(training(scale, seed, *each) for each in settings)


def k_alpha(scale: ImageScale, seed: int) -> dict[str, Settings]:
    """Vary k and alpha."""
    return dict(training(scale, seed, k=k, alpha=alpha) for k in KS for alpha in ALPHAS)


def updates(scale: ImageScale, seed: int) -> dict[str, Settings]:
    """Look at single updates in several phases of training."""
    name, settings = training(scale, seed)
    starts = [round(share * scale.epochs) for share in WINDOW_STARTS]
    return {
        f"updates-{name}-epoch{start}": {
            **settings,
            "start_epoch": start,
            "cycles": CYCLES,
        }
        for start in starts
    }


def longer(
    scale: ImageScale, seed: int, records: Sequence[Record]
) -> dict[str, Settings]:
    """Train longer, each at the learning rate that was its best in the sweep."""
    long = replace(scale, epochs=TIMES_LONGER * scale.epochs)
    runs = {}
    for k, alpha in LONGER:
        rate = best_rate(records, scale, k, alpha)
        name, settings = training(long, seed, rate, MOMENTUM, k, alpha)
        runs[f"longer-{name}"] = settings
    return runs


def best_rate(
    records: Sequence[Record], scale: ImageScale, k: int | None, alpha: float | None
) -> float:
    """Return the sweep's learning rate of the highest mean test accuracy."""
    accuracies = {}
    for rate in LEARNING_RATES:
        _, wanted = training(scale, 0, rate, MOMENTUM, k, alpha)
        accuracies[rate] = [
            record["results"]["test"]["accuracy"]
            for record in records
            if {**record["settings"], "seed": 0} == wanted
        ]
        if not accuracies[rate]:
            raise DataError(
                f"no run with k={k}, alpha={alpha}, learning rate {rate:g}; run "
                "`sweep` first"
            )
    return max(LEARNING_RATES, key=lambda rate: statistics.mean(accuracies[rate]))


EXPERIMENTS: dict[str, tuple[Callable[..., dict[str, Settings]], Measure]] = {
    "sweep": (sweep, measure_training),
    "k-alpha": (k_alpha, measure_training),
    "updates": (updates, measure_updates),
    "longer": (longer, measure_training),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the experiments; return the exit status."""
    parser = argparse.ArgumentParser("cifar", description=__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    add_options(parser, seeds=[0, 1], data="keras, or a path of an .npz of JPEGs")
    add_full_option(parser)
    options = parser.parse_args(arguments)
    scale = changed(
        FULL if options.full else SMALL,
        epochs=options.epochs,
        train_samples=options.train_samples,
        test_samples=options.test_samples,
    )
    name_runs, measure = EXPERIMENTS[options.experiment]
    if options.experiment == "longer":
        name_runs = partial(longer, records=read(options.output))
    try:
        runs: Mapping[str, Settings] = {
            name: settings
            for seed in options.seeds
            for name, settings in name_runs(scale, seed).items()
        }
    except DataError as error:
        parser.error(str(error))

    def load() -> Data:
        return pictures.load(options.data, scale.train_samples, scale.test_samples)

    return run_all("cifar", runs, load, measure, options.output, options.jobs)


if __name__ == "__main__":
    sys.exit(main())

"""Search Lookahead's `k` and `alpha` with KerasTuner, on handwritten digits."""

import argparse
import tempfile
from collections.abc import Sequence

import keras
import keras_tuner
from sklearn.datasets import load_digits

from keras_lookahead_lazy import Lookahead, SlowWeights


def build_model(choices: keras_tuner.HyperParameters) -> keras.Model:
    """Build a small network, compiled with what the tuner chose."""
    inner = keras.optimizers.SGD(
        choices.Float("learning_rate", 0.01, 1.0, sampling="log"), momentum=0.9
    )
    lookahead = Lookahead(
        inner,
        k=choices.Int("k", 5, 20, step=5),
        alpha=choices.Choice("alpha", [0.2, 0.5, 0.8]),
    )
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        optimizer=lookahead,
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def search(trials: int, epochs: int, seed: int) -> keras_tuner.Tuner:
    """Train each trial on the digits, and validate it on the slow weights."""
    digits = load_digits()
    x, y = digits.data / 16, digits.target
    with tempfile.TemporaryDirectory() as folder:
        tuner = keras_tuner.RandomSearch(
            build_model,
            objective="val_accuracy",
            max_trials=trials,
            seed=seed,
            directory=folder,
        )
        tuner.search(
            x[:1_200],
            y[:1_200],
            validation_data=(x[1_200:], y[1_200:]),
            epochs=epochs,
            callbacks=[SlowWeights()],
            verbose=0,
        )
    return tuner


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, and print the trials, the best one first."""
    parser = argparse.ArgumentParser("search_k_alpha", description=__doc__)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    tuner = search(options.trials, options.epochs, options.seed)
    print("accuracy   learning rate    k  alpha")
    for trial in tuner.oracle.get_best_trials(options.trials):
        chosen = trial.hyperparameters
        print(
            f"{trial.score:8.4f} {chosen['learning_rate']:15.4f} "
            f"{chosen['k']:4} {chosen['alpha']:6}"
        )


if __name__ == "__main__":
    main()

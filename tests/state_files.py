"""Files with the state of a training, of every kind, which have to load for ever.

`KERAS_BACKEND=tensorflow python tests/state_files.py` writes those of this version. Run
it once for each version that changes `FORMAT` in `_wrapper.py`, with the oldest Keras
that is supported, because a newer Keras may not write what an older one reads. An
archive holds the files as Keras wrote them, and the weights after further training.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from keras.optimizers import SGD, Adam, LossScaleOptimizer

from keras_lookahead_lazy import LazyOptimizer, Lookahead, __version__

FOLDER = Path(__file__).parent / "files"
ROWS, TOKENS, BATCH = 64, 2, 3
# The files are written in mid-cycle, and while a gradient is accumulated.
BEFORE, AFTER, K = 7, 6, 5


def adam(**settings: int) -> keras.Optimizer:
    return Adam(0.05, **settings)


def nesterov() -> keras.Optimizer:
    return SGD(0.7, momentum=0.9, nesterov=True)


KINDS: dict[str, Callable[[], keras.Optimizer]] = {
    "lazy-decay": lambda: LazyOptimizer(adam()),
    "lazy-freeze": lambda: LazyOptimizer(adam(), moments="freeze"),
    "lookahead": lambda: Lookahead(adam(), k=K),
    "interpolate": lambda: Lookahead(adam(), k=K, inner_state="interpolate"),
    "reset": lambda: Lookahead(SGD(0.05, momentum=0.9), k=K, inner_state="reset"),
    "both": lambda: Lookahead(LazyOptimizer(adam()), k=K),
    "both-interpolate": lambda: Lookahead(
        LazyOptimizer(adam(), moments="freeze"), k=K, inner_state="interpolate"
    ),
    "nested": lambda: Lookahead(Lookahead(LazyOptimizer(adam()), k=3), k=2),
    "outer": lambda: Lookahead(adam(), k=K, outer_optimizer=nesterov()),
    "outer-both": lambda: Lookahead(
        LazyOptimizer(adam()), k=K, outer_optimizer=nesterov()
    ),
    "accumulation": lambda: Lookahead(
        LazyOptimizer(adam(gradient_accumulation_steps=2)), k=2
    ),
    "scaled": lambda: LossScaleOptimizer(
        Lookahead(LazyOptimizer(adam()), k=K), initial_scale=8.0
    ),
}


def make_stored(optimizer: keras.Optimizer, **how: bool) -> keras.Model:
    tokens = keras.Input((TOKENS,), dtype="int32")
    rows = keras.layers.Embedding(ROWS, 2, name="words")(tokens)
    head = keras.layers.Dense(1, name="head")
    model = keras.Model(tokens, head(keras.layers.Flatten()(rows)), name="net")
    model.set_weights([pattern(i, w.shape) for i, w in enumerate(model.get_weights())])
    model.compile(optimizer, "mse", auto_scale_loss=False, **how)
    model.optimizer.build(model.trainable_variables)
    return model


def pattern(start: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1] that no random generator has to repeat."""
    numbers = (np.arange(np.prod(shape)) * 37 + start * 11) % 65
    return (numbers.reshape(shape) / 32 - 1).astype("float32")


def train(model: keras.Model, first: int, batches: int) -> None:
    """Train on some batches. The rows up to 23 are sampled, some of them rarely.

    No batch has a row twice: Keras's own Adam on TensorFlow would square the gradients
    of each lookup, and not of their sum.
    """
    batch = np.arange(first, first + batches)[:, None]
    place = np.arange(BATCH * TOKENS)
    x = (4 * place + batch * place % 4).reshape(-1, TOKENS).astype("int32")
    y = pattern(first, (len(x), 1))
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)


def write(folder: Path, name: str) -> list[list]:
    """Write the files of one kind; the weights after further training."""
    import tensorflow as tf

    keras.utils.clear_session()
    model = make_stored(KINDS[name]())
    train(model, 0, BEFORE)
    model.save_weights(folder / f"{name}.weights.h5")
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    checkpoint.write(str(folder / f"{name}.checkpoint"))
    model.save(folder / f"{name}.keras")
    train(model, BEFORE, AFTER)
    return [weight.tolist() for weight in model.get_weights()]


def main() -> None:
    archive = FOLDER / f"{__version__}.zip"
    if archive.exists():
        sys.exit(f"{archive} is there already. It must not change.")
    with tempfile.TemporaryDirectory() as folder:
        weights = {name: write(Path(folder), name) for name in KINDS}
        (Path(folder) / "weights.json").write_text(json.dumps(weights))
        shutil.make_archive(str(archive.with_suffix("")), "zip", folder)


if __name__ == "__main__":
    main()

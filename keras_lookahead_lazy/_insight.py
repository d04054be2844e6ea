"""Insight, a callback that logs what the wrappers do in each epoch."""

from __future__ import annotations

from typing import Any

import keras

from keras_lookahead_lazy._backend import engine
from keras_lookahead_lazy._keras import chain
from keras_lookahead_lazy._lazy import LazyOptimizer
from keras_lookahead_lazy._lookahead import Lookahead


class Insight(keras.callbacks.Callback):
    r"""Logs in each epoch how far Lookahead steps and which rows are sampled.

    The values appear in `History`, in the progress bar, and in the logs of callbacks
    later in the list, such as `TensorBoard`:

    - `fast_slow_distance`: \(\lVert \theta - \phi \rVert_2\) over all weights at the
      end of the epoch, with the fast weights \(\theta\) and the slow weights \(\phi\).
    - `updates_since_sync`: the number of updates since the last sync. If it is 0, so
      is the distance. To see a distance, choose a number of steps per epoch that is
      not a multiple of `k`.
    - `sampled/TABLE`, for each table of a `LazyOptimizer`: the share of its rows that
      was sampled in the epoch.
    - `by_rows/TABLE`: 1 if the last step worked on the table's rows, 0 if it worked on
      the whole table. `LazyOptimizer.step_forms` gives the reason.
    - `never_sampled/TABLE`: the share of rows that has never been sampled, counted
      across saving and resuming.

    This adds no work to training steps. The end of an epoch reads the fast and slow
    weights once, and one number per table row, which the optimizer keeps anyway.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lookahead_lazy import Insight, LazyOptimizer, Lookahead
    >>> words = keras.layers.Embedding(10, 4, name="words")
    >>> model = keras.Sequential([words, keras.layers.Flatten(), keras.layers.Dense(1)])
    >>> model.compile(optimizer=Lookahead(LazyOptimizer("adam")), loss="mse")
    >>> ids, y = np.array([[1, 2], [2, 3]]), np.ones((2, 1))
    >>> history = model.fit(ids, y, callbacks=[Insight()], verbose=0).history
    >>> sampled = [name for name in history if name.startswith("sampled/")]
    >>> [round(history[name][0], 3) for name in sampled]
    [0.3]

    Raises:
        ValueError: At the start of `fit`, if the model's optimizer neither is nor
            contains a Lookahead or LazyOptimizer.
    """

    def on_train_begin(self, logs: dict | None = None) -> None:
        optimizers = chain(self.model.optimizer)
        self._lookahead = _first(optimizers, Lookahead)
        self._lazy = _first(optimizers, LazyOptimizer)
        if self._lookahead is None and self._lazy is None:
            raise ValueError(
                "Insight logs what Lookahead and LazyOptimizer do, but the model's "
                f"optimizer is {type(self.model.optimizer).__name__}. Compile the "
                "model with Lookahead(...) or LazyOptimizer(...), or remove Insight "
                "from the callbacks."
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        if self._lazy is not None:
            engine.store_state(self.model)
            self._updates_before = self._lazy.update_counts()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is None:
            return
        engine.store_state(self.model)
        if self._lookahead is not None:
            logs["fast_slow_distance"] = self._lookahead.distance()
            logs["updates_since_sync"] = int(self._lookahead.updates_in_cycle())
        if self._lazy is not None:
            in_epoch = self._lazy.sampled_shares(self._updates_before)
            ever = self._lazy.sampled_shares(dict.fromkeys(in_epoch, 0))
            logs.update({f"sampled/{name}": share for name, share in in_epoch.items()})
            logs.update({f"never_sampled/{n}": 1 - share for n, share in ever.items()})
            forms = self._lazy.step_forms.items()
            logs.update(
                {f"by_rows/{name}": int(form == "rows") for name, form in forms}
            )


def _first(optimizers: list, cls: type) -> Any:
    return next((each for each in optimizers if isinstance(each, cls)), None)

"""Lookahead and lazy optimizers for Keras 3."""

from keras_lookahead_lazy._callbacks import SlowWeights, inject
from keras_lookahead_lazy._ddp import distributed_data_parallel
from keras_lookahead_lazy._insight import Insight
from keras_lookahead_lazy._keras import restore_keras
from keras_lookahead_lazy._lazy import LazyOptimizer
from keras_lookahead_lazy._lookahead import Lookahead
from keras_lookahead_lazy._version import __version__

__all__ = [
    "Insight",
    "LazyOptimizer",
    "Lookahead",
    "SlowWeights",
    "__version__",
    "distributed_data_parallel",
    "inject",
    "restore_keras",
]

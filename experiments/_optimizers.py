"""The optimizers that several experiments compare."""

import keras

from keras_lookahead_lazy import LazyOptimizer, Lookahead


def build_optimizer(
    name: str, learning_rate: float = 1e-3, epsilon: float = 1e-7
) -> keras.optimizers.Optimizer:
    """Build the optimizer that a name describes, from the inside out.

    Args:
        name: "adam", with "lazy" in it, "lookahead" or both; "freeze" sets `moments`.
            For example "lookahead-lazy-freeze".
        learning_rate: of Adam.
        epsilon: of Adam.
    """
    optimizer = keras.optimizers.Adam(learning_rate, epsilon=epsilon)
    if "lazy" in name:
        moments = "freeze" if "freeze" in name else "decay"
        optimizer = LazyOptimizer(optimizer, moments=moments)
    return Lookahead(optimizer, k=5, alpha=0.5) if "lookahead" in name else optimizer

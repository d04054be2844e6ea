"""Row-wise Adagrad, an inner optimizer of one's own for `LazyOptimizer`."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("examples")
class RowWiseAdagrad(keras.optimizers.Optimizer):
    r"""Adagrad with one second moment for each row of a table, 4 bytes per row.

    FBGEMM and TorchRec call it exact row-wise Adagrad:

    \[ a_i \leftarrow a_i + \frac{1}{d} \sum_j g_{ij}^2, \qquad
       \theta_i \leftarrow \theta_i - \eta \, \frac{g_i}{\sqrt{a_i} + \epsilon} . \]
    """

    def __init__(
        self, learning_rate: Any = 0.01, epsilon: float = 1e-8, **kwargs: Any
    ) -> None:
        super().__init__(learning_rate, **kwargs)
        self.epsilon = epsilon

    def build(self, variables: list) -> None:
        """Create the second moments."""
        if self.built:
            return
        super().build(variables)
        self._accumulators = [
            self.add_variable(v.shape[:1] + (1,) * (len(v.shape) - 1), name="moment")
            for v in variables
        ]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update a weight, or the rows of a table that a batch looked up."""
        moment = self._accumulators[self._get_variable_index(variable)]
        gradient = ops.convert_to_tensor(gradient)
        axes = tuple(range(1, len(gradient.shape)))
        squares = ops.mean(ops.square(gradient), axis=axes, keepdims=True)
        self.assign_add(moment, squares)
        step = learning_rate * gradient / (ops.sqrt(moment) + self.epsilon)
        self.assign_sub(variable, step)

    def slot_decay_rates(self) -> dict[str, float]:
        """Tell LazyOptimizer that a zero gradient leaves the second moments alone."""
        return {"_accumulators": 1.0}

    def get_config(self) -> dict[str, Any]:
        """Return the arguments, for saving."""
        return {**super().get_config(), "epsilon": self.epsilon}

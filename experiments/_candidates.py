r"""What other systems do with rare rows, to be tried before it is offered.

Each is an Adam that a `LazyOptimizer` with `moments="freeze"` wraps; it keeps one more
number for each weight, of which one for each row would do. None is part of the package.

* `CorrectedAdam` corrects the bias by a row's own samples, as DGL and FBGEMM can.
* `ReplayAdam` makes up for the steps that a row missed: when the row is sampled again,
  it first goes where Adam's momentum would have taken it meanwhile.
* `MissedDecayAdamW` decays the weights by the steps that a row missed, as FBGEMM can.
"""

import argparse
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from examples.common.options import positive_float
from examples.common.plots import GREEN, SKY, Curve
from experiments._optimizers import build_optimizer
from experiments._runs import Settings
from keras_lookahead_lazy import LazyOptimizer, _decay_rates


class CorrectedAdam(keras.optimizers.Adam):
    """Adam whose bias correction counts the samples of each row, not the steps."""

    def build(self, variables: list) -> None:
        """Create the slots."""
        super().build(variables)
        self._samples = self.add_optimizer_variables(variables, "samples")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update a weight, or some rows of a table."""
        index = self._get_variable_index(variable)
        samples = self._samples[index]
        self.assign(samples, samples + 1)
        m, v = self._momentums[index], self._velocities[index]
        self.assign(m, self.beta_1 * m + (1 - self.beta_1) * gradient)
        self.assign(v, self.beta_2 * v + (1 - self.beta_2) * ops.square(gradient))
        first = m / (1 - self.beta_1**samples)
        second = v / (1 - self.beta_2**samples)
        step = learning_rate * first / (ops.sqrt(second) + self.epsilon)
        self.assign(variable, variable - step)


class _RowClock:
    """Knows how many steps the rows of a table have missed."""

    _last: list

    def _missed(self: Any, variable: Any) -> Any:
        """The steps since a row's last sample, between it and this one; then note this.

        A row that was never sampled has missed none.
        """
        last = self._last[self._get_variable_index(variable)]
        now = ops.cast(self.iterations + 1, last.dtype)
        value = ops.convert_to_tensor(last)
        missed = ops.where(value > 0, now - 1 - value, 0.0)
        self.assign(last, now + ops.zeros_like(value))
        return missed


class ReplayAdam(_RowClock, keras.optimizers.Adam):
    r"""Adam that first pays a row what it missed.

    In the \(j\)-th step without gradient Adam moves a weight by
    \(\eta\, \beta_1^j m / \sqrt{\beta_2^j v}\), a geometric series of the ratio
    \(r = \beta_1 / \sqrt{\beta_2}\), which is
    \(\eta\, m / \sqrt v \; r (1 - r^n) / (1 - r)\) after \(n\) steps. The bias
    correction is that of the present step, and epsilon shrinks with \(\sqrt v\).
    """

    def build(self, variables: list) -> None:
        """Create the slots."""
        super().build(variables)
        self._last = self.add_optimizer_variables(variables, "last")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Replay the steps that were missed, and update."""
        index = self._get_variable_index(variable)
        m, v = self._momentums[index], self._velocities[index]
        missed = self._missed(variable)
        now = ops.cast(self.iterations + 1, variable.dtype)
        correction = ops.sqrt(1 - self.beta_2**now) / (1 - self.beta_1**now)
        ratio = self.beta_1 / self.beta_2**0.5
        series = ratio * (1 - ratio**missed) / (1 - ratio)
        drift = learning_rate * correction * m / (ops.sqrt(v) + self.epsilon) * series
        self.assign(variable, variable - drift)
        self.assign(m, self.beta_1**missed * m)
        self.assign(v, self.beta_2**missed * v)
        super().update_step(gradient, variable, learning_rate)


class MissedDecayAdamW(_RowClock, keras.optimizers.AdamW):
    """AdamW whose rows also decay for the steps that they missed."""

    def build(self, variables: list) -> None:
        """Create the slots."""
        super().build(variables)
        self._last = self.add_optimizer_variables(variables, "last")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Decay for the steps that were missed, and update."""
        factor = 1 - learning_rate * (self.weight_decay or 0.0)
        self.assign(variable, variable * factor ** self._missed(variable))
        super().update_step(gradient, variable, learning_rate)


# Their steps on a row do not depend on other rows, which LazyOptimizer has to know.
for _candidate in (CorrectedAdam, ReplayAdam, MissedDecayAdamW):
    _decay_rates._RATES[_candidate] = _decay_rates._RATES[keras.optimizers.Adam]

INNER: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "lazy-corrected": CorrectedAdam,
    "lazy-replay": ReplayAdam,
    "lazy-adamw": keras.optimizers.AdamW,
    "lazy-missed-decay": MissedDecayAdamW,
}
CURVES = {
    "lazy-corrected": Curve("freeze, bias corrected by row", SKY),
    "lazy-replay": Curve("replay of missed steps", SKY, dashed=True),
    "lazy-adamw": Curve("freeze, AdamW", GREEN),
    "lazy-missed-decay": Curve("freeze, AdamW, missed decay", GREEN, dashed=True),
}
DECAYING = ("lazy-adamw", "lazy-missed-decay")


def build(settings: Settings, **adam: Any) -> keras.optimizers.Optimizer:
    """Build one of `CURVES`, or another that `build_optimizer` knows.

    Args:
        settings: of a run.
        adam: further arguments of Adam.
    """
    name = settings["optimizer"]
    kept = {"learning_rate", "weight_decay"} & set(settings)
    adam |= {argument: settings[argument] for argument in kept}
    if name not in INNER:
        return build_optimizer(name, **adam)
    return LazyOptimizer(INNER[name](**adam), moments="freeze")


def add_weight_decay(parser: argparse.ArgumentParser) -> None:
    """Add the weight decay of the optimizers that have one."""
    parser.add_argument(
        "--weight-decay",
        type=positive_float,
        metavar="RATE",
        help=f"of {' and '.join(DECAYING)}; needed for them",
    )


def weight_decay(parser: argparse.ArgumentParser, options: Any) -> tuple[str, Settings]:
    """The end of a run's name, and its settings, if there is a weight decay."""
    is_given = options.weight_decay is not None
    if {optimizer in DECAYING for optimizer in options.optimizers} != {is_given}:
        parser.error(f"--weight-decay is for {' and '.join(DECAYING)}, which need it")
    if not is_given:
        return "", {}
    return f"-decay{options.weight_decay:g}", {"weight_decay": options.weight_decay}

"""What the optimizers must compute: NumPy, float64, no Keras code.

`train` feeds a fixed sequence of gradients to one of Keras's optimizers, with or
without lazy rows and Lookahead around it, and returns the state after every step:

    states = train(weights, grads, ("Adam", {"learning_rate": 0.01, "beta_1": 0.8}),
                   lookahead={"k": 5, "alpha": 0.5, "inner_state": "reset"},
                   lazy={"tables": [0], "moments": "freeze"})
    states[3].weights[0], states[3].slots[0]["momentum"]

The pair (name, arguments) also makes `getattr(keras.optimizers, name)(**arguments)`,
and slots bear the names that Keras gives them.

Throughout: w weight, g gradient, s slots, lr learning rate, t update from 1 on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray
Slots = dict[str, Array]
Constraint = Callable[[Array], Array]


def full(w: Array, value: float, *names: str) -> Slots:
    return {name: np.full(w.shape, value) for name in names}


def mix(old: Array, new: Array, rate: float) -> Array:
    """Exponential average: rate * old + (1 - rate) * new."""
    return rate * old + (1 - rate) * new


def norm(x: Array) -> float:
    return float(np.sqrt(np.sum(x**2)))


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


# --- Keras's optimizers --------------------------------------------------------------


@dataclass(kw_only=True)
class Optimizer:
    """The arguments that all optimizers share. `learning_rate` may be a function (or
    a Keras schedule) of the step, counted from 0 in calls of `apply`."""

    learning_rate: float | Callable[[int], Any] = 0.001
    weight_decay: float | None = None
    clipnorm: float | None = None
    clipvalue: float | None = None
    global_clipnorm: float | None = None
    use_ema: bool = False
    ema_momentum: float = 0.99
    ema_overwrite_frequency: int | None = None
    loss_scale_factor: float | None = None
    gradient_accumulation_steps: int | None = None

    def slots(self, w: Array, name: str) -> Slots:
        """Initial values."""
        raise NotImplementedError

    def is_by_row(self, name: str, slot: Array) -> bool:
        """Whether a table's slot has an entry for each row."""
        return True

    def step(
        self, w: Array, g: Array, s: Slots, lr: float, t: int
    ) -> tuple[Array, Slots]:
        """One update of one weight, after clipping and weight decay."""
        raise NotImplementedError

    def decay_of(self, s: Slots) -> float | None:
        """Weight decay of the weight with these slots."""
        return self.weight_decay

    def clip(self, grads: list[Array]) -> list[Array]:
        """g c / max(c, |g|), with |g| of each weight or of all; or g within +-c."""
        if c := self.clipnorm:
            return [g * c / max(c, norm(g)) for g in grads]
        if c := self.global_clipnorm:
            total = float(np.sqrt(sum(norm(g) ** 2 for g in grads)))
            return [g * c / max(c, total) for g in grads]
        if c := self.clipvalue:
            return [np.clip(g, -c, c) for g in grads]
        return grads


@dataclass(kw_only=True)
class SGD(Optimizer):
    """w -= lr g; with momentum m = mu m - lr g, w += m (nesterov: mu m - lr g)."""

    learning_rate: float | Callable[[int], Any] = 0.01
    momentum: float = 0.0
    nesterov: bool = False

    def slots(self, w, name):
        return full(w, 0, "momentum") if self.momentum else {}

    def step(self, w, g, s, lr, t):
        if not self.momentum:
            return w - lr * g, {}
        m = self.momentum * s["momentum"] - lr * g
        move = self.momentum * m - lr * g if self.nesterov else m
        return w + move, {"momentum": m}


@dataclass(kw_only=True)
class TwoMoments(Optimizer):
    """m, v: averages of g, g^2 with the rates beta_1, beta_2."""

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7

    def slots(self, w, name):
        return full(w, 0, "momentum", "velocity")

    def moments(self, g: Array, s: Slots) -> tuple[Array, Array]:
        m = mix(s["momentum"], g, self.beta_1)
        return m, mix(s["velocity"], g**2, self.beta_2)


@dataclass(kw_only=True)
class Adam(TwoMoments):
    """w -= lr sqrt(1 - beta_2^t) / (1 - beta_1^t) m / (sqrt(v) + epsilon), with
    amsgrad the greatest v so far in place of v."""

    amsgrad: bool = False

    def slots(self, w, name):
        hat = full(w, 0, "velocity_hat") if self.amsgrad else {}
        return super().slots(w, name) | hat

    def step(self, w, g, s, lr, t):
        m, v = self.moments(g, s)
        new = {"momentum": m, "velocity": v}
        if self.amsgrad:
            v = new["velocity_hat"] = np.maximum(s["velocity_hat"], v)
        rate = lr * np.sqrt(1 - self.beta_2**t) / (1 - self.beta_1**t)
        return w - rate * m / (np.sqrt(v) + self.epsilon), new


@dataclass(kw_only=True)
class AdamW(Adam):
    """Adam with weight decay by default."""

    weight_decay: float | None = 0.004


@dataclass(kw_only=True)
class Nadam(TwoMoments):
    """u_t = beta_1 (1 - 0.96^t / 2), U_t = u_1 ... u_t

    m_hat = u_{t+1} m / (1 - U_{t+1}) + (1 - u_t) g / (1 - U_t)
    w -= lr m_hat / (sqrt(v / (1 - beta_2^t)) + epsilon)
    """

    def step(self, w, g, s, lr, t):
        u = self.beta_1 * (1 - 0.5 * 0.96 ** np.arange(1, t + 2))
        m, v = self.moments(g, s)
        m_hat = u[-1] * m / (1 - u.prod()) + (1 - u[-2]) * g / (1 - u[:-1].prod())
        v_hat = v / (1 - self.beta_2**t)
        w = w - lr * m_hat / (np.sqrt(v_hat) + self.epsilon)
        return w, {"momentum": m, "velocity": v}


@dataclass(kw_only=True)
class Adamax(Optimizer):
    """m: average of g, n = max(beta_2 n, |g|).

    w -= lr m / ((1 - beta_1^t) (n + epsilon))
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7

    def slots(self, w, name):
        return full(w, 0, "momentum", "norm")

    def step(self, w, g, s, lr, t):
        m = mix(s["momentum"], g, self.beta_1)
        n = np.maximum(self.beta_2 * s["norm"], np.abs(g))
        w = w - lr * m / ((1 - self.beta_1**t) * (n + self.epsilon))
        return w, {"momentum": m, "norm": n}


@dataclass(kw_only=True)
class RMSprop(Optimizer):
    """v, a: averages of g^2, g. d = lr g / sqrt(v + epsilon), centered:
    d = lr g / sqrt(v - a^2 + epsilon). w -= d; with momentum m = mu m + d, w -= m."""

    rho: float = 0.9
    momentum: float = 0.0
    epsilon: float = 1e-7
    centered: bool = False

    def slots(self, w, name):
        names = ["velocity"] + ["momentum"] * (self.momentum > 0)
        return full(w, 0, *names, *["average_gradient"] * self.centered)

    def step(self, w, g, s, lr, t):
        v = mix(s["velocity"], g**2, self.rho)
        new = {"velocity": v}
        if self.centered:
            a = new["average_gradient"] = mix(s["average_gradient"], g, self.rho)
            v = v - a**2
        move = lr * g / np.sqrt(v + self.epsilon)
        if self.momentum > 0:
            move = new["momentum"] = self.momentum * s["momentum"] + move
        return w - move, new


@dataclass(kw_only=True)
class Adagrad(Optimizer):
    """a += g^2, w -= lr g / sqrt(a + epsilon)."""

    initial_accumulator_value: float = 0.1
    epsilon: float = 1e-7

    def slots(self, w, name):
        return full(w, self.initial_accumulator_value, "accumulator")

    def step(self, w, g, s, lr, t):
        a = s["accumulator"] + g**2
        return w - lr * g / np.sqrt(a + self.epsilon), {"accumulator": a}


@dataclass(kw_only=True)
class Adadelta(Optimizer):
    """a, b: averages of g^2, d^2, where d = g sqrt(b + epsilon) / sqrt(a + epsilon)
    takes the new a and the old b. w -= lr d."""

    rho: float = 0.95
    epsilon: float = 1e-7

    def slots(self, w, name):
        return full(w, 0, "accumulated_grad", "accumulated_delta_var")

    def step(self, w, g, s, lr, t):
        a = mix(s["accumulated_grad"], g**2, self.rho)
        b = s["accumulated_delta_var"]
        d = g * np.sqrt(b + self.epsilon) / np.sqrt(a + self.epsilon)
        b = mix(b, d**2, self.rho)
        return w - lr * d, {"accumulated_grad": a, "accumulated_delta_var": b}


@dataclass(kw_only=True)
class Ftrl(Optimizer):
    """With p = -learning_rate_power and a' = a + g^2:

    z += g + 2 shrinkage w - (a'^p - a^p) / lr w
    w = (clip(z, -l1, l1) - z) / (a'^p / lr + 2 l2 + beta / lr)
    """

    learning_rate_power: float = -0.5
    initial_accumulator_value: float = 0.1
    l1_regularization_strength: float = 0.0
    l2_regularization_strength: float = 0.0
    l2_shrinkage_regularization_strength: float = 0.0
    beta: float = 0.0

    def slots(self, w, name):
        start = full(w, self.initial_accumulator_value, "accumulator")
        return start | full(w, 0, "linear")

    def step(self, w, g, s, lr, t):
        p, l1 = -self.learning_rate_power, self.l1_regularization_strength
        l2, shrinkage = (
            self.l2_regularization_strength,
            self.l2_shrinkage_regularization_strength,
        )
        old = s["accumulator"]
        a = old + g**2
        z = s["linear"] + g + 2 * shrinkage * w - (a**p - old**p) / lr * w
        w = (np.clip(z, -l1, l1) - z) / (a**p / lr + 2 * l2 + self.beta / lr)
        return w, {"accumulator": a, "linear": z}


@dataclass(kw_only=True)
class Lion(Optimizer):
    """w -= lr sign(beta_1 m + (1 - beta_1) g), then m = beta_2 m + (1 - beta_2) g."""

    beta_1: float = 0.9
    beta_2: float = 0.99

    def slots(self, w, name):
        return full(w, 0, "momentum")

    def step(self, w, g, s, lr, t):
        m = s["momentum"]
        w = w - lr * np.sign(mix(m, g, self.beta_1))
        return w, {"momentum": mix(m, g, self.beta_2)}


@dataclass(kw_only=True)
class Lamb(TwoMoments):
    """d = m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + epsilon)

    w -= lr |w| / |d| d, with 1 for the ratio where a norm is 0.
    """

    def step(self, w, g, s, lr, t):
        m, v = self.moments(g, s)
        d = m / (1 - self.beta_1**t)
        d = d / (np.sqrt(v / (1 - self.beta_2**t)) + self.epsilon)
        ratio = norm(w) / norm(d) if norm(w) > 0 and norm(d) > 0 else 1.0
        return w - ratio * lr * d, {"momentum": m, "velocity": v}


@dataclass(kw_only=True)
class Adafactor(Optimizer):
    """r, c: averages of g^2 + epsilon_1 along the last axis and the last but one, with
    the rate 1 - t^beta_2_decay; v = r c / mean(r) (below two axes: the average itself).

    d = g / sqrt(v)
    w -= min(lr, 1 / sqrt(t)) max(epsilon_2, rms(w)) d / max(1, rms(d) / clip_threshold)

    `relative_step` changes nothing in Keras: the minimum is taken in any case.
    """

    beta_2_decay: float = -0.8
    epsilon_1: float = 1e-30
    epsilon_2: float = 1e-3
    clip_threshold: float = 1.0
    relative_step: bool = True

    def slots(self, w, name):
        if w.ndim < 2:
            return full(w, 0, "velocity")
        row, column = full(w[..., 0], 0, "r"), full(w[..., 0, :], 0, "c")
        return row | column | full(w, 0, "velocity")

    def is_by_row(self, name, slot):
        return name != "c" or slot.ndim > 1  # of a matrix c is over all of its rows

    def step(self, w, g, s, lr, t):
        rate, square = 1 - t**self.beta_2_decay, g**2 + self.epsilon_1
        if w.ndim < 2:
            v = mix(s["velocity"], square, rate)
            new = {"velocity": v}
        else:
            r = mix(s["r"], square.mean(-1), rate)
            c = mix(s["c"], square.mean(-2), rate)
            v = (r / r.mean(-1, keepdims=True))[..., None] * c[..., None, :]
            new = {"r": r, "c": c, "velocity": v}
        d = g / np.sqrt(v)
        d = d / max(1.0, rms(d) / self.clip_threshold)
        scale = min(lr, t**-0.5) * max(self.epsilon_2, rms(w))
        return w - scale * d, new


@dataclass(kw_only=True)
class Muon(Optimizer):
    """Matrices: m = mu m + g, x = g + mu m (without nesterov: m), x /= |x| + 1e-7,
    `ns_steps` times x := a x + (b x x' + c (x x')^2) x on the wide side, then

    w -= lr rms_rate sqrt(max(rows, columns)) x

    Other shapes, and paths with "embedding" or an excluded layer in them: Adam.
    """

    weight_decay: float | None = 0.004
    adam_beta_1: float = 0.9
    adam_beta_2: float = 0.999
    adam_weight_decay: float | None = 0.004
    adam_lr_ratio: float = 1
    epsilon: float = 1e-7
    exclude_layers: Sequence[str] | None = None
    exclude_embeddings: bool = True
    muon_a: float = 3.4445
    muon_b: float = -4.7750
    muon_c: float = 2.0315
    momentum: float = 0.95
    ns_steps: int = 5
    nesterov: bool = True
    rms_rate: float | None = 0.2

    ranks: ClassVar[tuple[int, ...]] = (2,)

    def slots(self, w, name):
        excluded = any(re.search(layer, name) for layer in self.exclude_layers or ())
        embedding = self.exclude_embeddings and "embedding" in name.lower()
        by_adam = w.ndim not in self.ranks or embedding or excluded
        return full(w, 0, "momentum", *["velocity"] * by_adam)

    def decay_of(self, s):
        return self.adam_weight_decay if "velocity" in s else self.weight_decay

    def step(self, w, g, s, lr, t):
        if "velocity" in s:
            adam = Adam(
                beta_1=self.adam_beta_1, beta_2=self.adam_beta_2, epsilon=self.epsilon
            )
            return adam.step(w, g, s, lr * self.adam_lr_ratio, t)
        m = self.momentum * s["momentum"] + g
        x = g + self.momentum * m if self.nesterov else m
        tall = x.shape[-2] > x.shape[-1]
        x = np.swapaxes(x, -1, -2) if tall else x
        x = x / (np.sqrt(np.sum(x**2, axis=(-2, -1), keepdims=True)) + 1e-7)
        for _ in range(self.ns_steps):
            xx = x @ np.swapaxes(x, -1, -2)
            x = self.muon_a * x + (self.muon_b * xx + self.muon_c * xx @ xx) @ x
        x = np.swapaxes(x, -1, -2) if tall else x
        return w - lr * self.scale(w) * x, {"momentum": m}

    def scale(self, w: Array) -> float:
        return 1 if self.rms_rate is None else self.rms_rate * max(w.shape) ** 0.5


@dataclass(kw_only=True)
class EarlyMuon(Muon):
    """Muon up to Keras 3.12: stacks of matrices, too, and the scale is

    sqrt(max(1, rows / columns)), of a stack its first two dimensions
    """

    weight_decay: float | None = 0.1
    adam_lr_ratio: float = 0.1
    ns_steps: int = 6

    ranks: ClassVar[tuple[int, ...]] = (2, 3)

    def decay_of(self, s):
        return self.weight_decay

    def scale(self, w):
        return max(1, w.shape[0] / w.shape[1]) ** 0.5


@dataclass(kw_only=True)
class ScheduleFreeAdamW(Optimizer):
    """z, v in the slots; w lies between z and an average x of all z:

    x = (w - (1 - beta_1) z) / beta_1
    v: average of g^2,  z -= lr min(t / warmup_steps, 1) g / (sqrt(v / (1 - beta_2^t))
    + epsilon),  x += (z - x) / t,  w = (1 - beta_1) z + beta_1 x
    """

    learning_rate: float | Callable[[int], Any] = 0.0025
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    warmup_steps: int = 0

    def slots(self, w, name):
        return {"momentum": w} | full(w, 0, "velocity")

    def step(self, w, g, s, lr, t):
        if self.warmup_steps:
            lr = lr * min(t / self.warmup_steps, 1)
        v = mix(s["velocity"], g**2, self.beta_2)
        v_hat = v / (1 - self.beta_2**t)
        z = s["momentum"] - lr * g / (np.sqrt(v_hat) + self.epsilon)
        x = mix(self.average(w, s["momentum"], z), z, 1 - 1 / t)
        return mix(x, z, self.beta_1), {"momentum": z, "velocity": v}

    def average(self, w: Array, z: Array, new_z: Array) -> Array:
        """x before the update."""
        return (w - (1 - self.beta_1) * z) / self.beta_1


@dataclass(kw_only=True)
class InPlaceScheduleFreeAdamW(ScheduleFreeAdamW):
    """Keras's step on TensorFlow and torch: it finds x by the z that it has updated."""

    def average(self, w, z, new_z):
        return super().average(w, new_z, new_z)


OPTIMIZERS: dict[str, type[Optimizer]] = {
    kind.__name__: kind
    for kind in (
        *(SGD, Adam, AdamW, Nadam, Adamax, RMSprop, Adagrad, Adadelta, Ftrl, Lion),
        *(Lamb, Adafactor, Muon, ScheduleFreeAdamW),
    )
}


# --- Lazy rows -----------------------------------------------------------------------


def sampled_rows(g: Array) -> Array:
    """A row is sampled where its gradient, summed over the batch, is not all zero."""
    return np.any(g != 0, axis=tuple(range(1, g.ndim)))


def only_rows(sampled: Array, new: Array, old: Array) -> Array:
    return np.where(sampled.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def lazy(
    optimizer: Optimizer, moments: str, sampled: Array, old: Slots, new: Slots
) -> Slots:
    """Slots of a table after the optimizer's step on all its rows. "decay" takes that
    step for every row, where the gradient is zero too; "freeze" for sampled rows."""
    if moments == "decay":
        return new
    return {
        name: slot
        if not optimizer.is_by_row(name, slot)
        else only_rows(sampled, slot, old[name])
        for name, slot in new.items()
    }


# --- Lookahead -----------------------------------------------------------------------


def lookahead(slow: Array, fast: Array, alpha: float) -> Array:
    """The step back: slow + alpha (fast - slow), what both become at a sync."""
    return slow + alpha * (fast - slow)


# --- Training ------------------------------------------------------------------------


@dataclass
class Cycle:
    """A Lookahead's settings and, from its first update on, its slow copies.

    `moved` tells of each table which rows were updated in this cycle. `outer` is an
    outer optimizer's kind and arguments, whose slots and syncs a restart leaves alone.
    """

    k: int = 5
    alpha: float = 0.5
    inner_state: str = "maintain"
    outer: tuple[str, dict[str, Any]] | None = None
    outer_slots: list[Slots] | None = None
    syncs: int = 0
    updates: int = 0
    slow_weights: list[Array] | None = None
    slow_slots: list[Slots] | None = None
    moved: dict[int, Array] = field(default_factory=dict)


@dataclass
class State:
    """All values after a step; a list holds one item a weight."""

    weights: list[Array]
    slots: list[Slots]
    averages: list[Array]
    slow_weights: list[Array] | None
    slow_slots: list[Slots] | None


class Reference:
    """Weights under an optimizer, whose `apply` does what Keras's `apply` does, in
    Keras's order: accumulate, clip, decay, update, average (EMA), constrain.

    A table's rows that are not sampled then get their weights back, as they were
    before decay, update and constraint. The EMA and its overwriting of the weights
    know no rows. Lookahead acts last, and only in steps that update; of several
    the inner one first.

    Args:
        names: the weights' paths. Only Muon reads them.
        undecayed: indices of the weights that `exclude_from_weight_decay` was given.
        lookahead: `k`, `alpha`, `inner_state`, with the package's defaults; of nested
            ones a list, the inner one first.
        lazy: `tables` (indices of weights) and `moments` (by default "decay").
    """

    def __init__(
        self,
        weights: Sequence[Array],
        optimizer: tuple[str, dict[str, Any]],
        *,
        names: Sequence[str] | None = None,
        constraints: Sequence[Constraint | None] | None = None,
        undecayed: Collection[int] = (),
        lookahead: dict[str, Any] | list[dict[str, Any]] | None = None,
        lazy: dict[str, Any] | None = None,
    ):
        kind, arguments = optimizer
        self.optimizer = OPTIMIZERS[kind](**arguments)
        self.weights = [np.array(w, "float64") for w in weights]
        self.names = list(names or [""] * len(self.weights))
        self.constraints = list(constraints or [None] * len(self.weights))
        self.undecayed = undecayed
        nested = lookahead if isinstance(lookahead, list) else [lookahead]
        self.cycles = [Cycle(**each) for each in nested if each is not None]
        self.tables = lazy["tables"] if lazy else ()
        self.moments = lazy.get("moments", "decay") if lazy else "decay"
        self.slots = self._initial_slots()
        self.averages = [np.zeros_like(w) for w in self.weights]
        self.accumulated = [np.zeros_like(w) for w in self.weights]
        self.applied = 0

    @property
    def updates(self) -> int:
        """Real updates of the weights so far: Keras's `iterations`."""
        return self.applied // (self.optimizer.gradient_accumulation_steps or 1)

    @property
    def state(self) -> State:
        outer = self.cycles[-1] if self.cycles else Cycle()
        return State(
            weights=list(self.weights),
            slots=list(self.slots),
            averages=list(self.averages),
            slow_weights=outer.slow_weights and list(outer.slow_weights),
            slow_slots=outer.slow_slots and list(outer.slow_slots),
        )

    def set_weights(self, weights: Sequence[Array]) -> None:
        """Somebody else writes the weights: a slow copy that was taken stays."""
        self.weights = [np.array(w, "float64") for w in weights]

    def restart(self) -> None:
        """The next update is the first of each Lookahead."""
        for cycle in self.cycles:
            cycle.updates, cycle.slow_weights, cycle.slow_slots = 0, None, None
            cycle.moved.clear()

    def apply(self, grads: Sequence[Array], left_out: Collection[int] = ()) -> None:
        """A step. The weights (and slots) at the indices `left_out` are not given."""
        scale = self.optimizer.loss_scale_factor or 1
        every = self.optimizer.gradient_accumulation_steps or 1
        total = [
            a + np.asarray(g, "float64") / scale
            for a, g in zip(self.accumulated, grads, strict=True)
        ]
        updates = (self.applied + 1) % every == 0
        self.accumulated = [np.zeros_like(g) if updates else g for g in total]
        sampled = [updates & sampled_rows(total[i]) for i in self.tables]
        if updates:
            for cycle in self.cycles:
                self._back_up(cycle, sampled, left_out)
            self._update([g / every for g in total], sampled, left_out)
        self._average()
        self._constrain(sampled)
        self.applied += 1
        for cycle in self.cycles:
            cycle.updates += updates
            if updates and cycle.updates % cycle.k == 0:
                self._sync(cycle, left_out)

    def _back_up(
        self, cycle: Cycle, sampled: list[Array], left_out: Collection[int]
    ) -> None:
        """phi = theta before the first update, and which rows the cycle moves.

        Overwriting with averages moves every row, as do Lookaheads in each other."""
        if cycle.slow_weights is None:
            cycle.slow_weights, cycle.slow_slots = list(self.weights), self.slots
        if self.optimizer.ema_overwrite_frequency or len(self.cycles) > 1:
            return
        for i, rows in zip(self.tables, sampled, strict=True):
            if i not in left_out:
                cycle.moved[i] = cycle.moved.get(i, np.zeros_like(rows)) | rows

    def _initial_slots(self) -> list[Slots]:
        slots = self.optimizer.slots
        return [slots(w, n) for w, n in zip(self.weights, self.names, strict=True)]

    def _update(
        self, grads: list[Array], sampled: list[Array], left_out: Collection[int]
    ) -> None:
        rate = self.optimizer.learning_rate
        lr = float(rate(self.applied) if callable(rate) else rate)
        before, slots = self.weights, self.slots
        self.weights, self.slots = [], []
        given = [i for i in range(len(grads)) if i not in left_out]
        clipped = self.optimizer.clip([grads[i] for i in given])
        for i, w in enumerate(before):
            if i in left_out:
                self.weights.append(w)
                self.slots.append(slots[i])
                continue
            g = clipped[given.index(i)]
            decay = 0.0 if i in self.undecayed else self.optimizer.decay_of(slots[i])
            w = before[i] - before[i] * (decay or 0.0) * lr
            w, s = self.optimizer.step(w, g, slots[i], lr, self.updates + 1)
            self.weights.append(w)
            self.slots.append(s)
        for i, rows in zip(self.tables, sampled, strict=True):
            if i in left_out:
                continue
            self.weights[i] = only_rows(rows, self.weights[i], before[i])
            self.slots[i] = lazy(
                self.optimizer, self.moments, rows, slots[i], self.slots[i]
            )

    def _average(self) -> None:
        """average = w in the first update, then the exponential average."""
        if not self.optimizer.use_ema:
            return
        rate = self.optimizer.ema_momentum if self.updates else 0.0
        pairs = zip(self.averages, self.weights, strict=True)
        self.averages = [mix(average, w, rate) for average, w in pairs]
        every = self.optimizer.ema_overwrite_frequency
        if every and (self.updates + 1) % every == 0:
            self.weights = list(self.averages)

    def _constrain(self, sampled: list[Array]) -> None:
        before = self.weights
        self.weights = [
            constraint(w) if constraint else w
            for constraint, w in zip(self.constraints, before, strict=True)
        ]
        for i, rows in zip(self.tables, sampled, strict=True):
            self.weights[i] = only_rows(rows, self.weights[i], before[i])

    def _sync(self, cycle: Cycle, left_out: Collection[int]) -> None:
        assert cycle.slow_weights is not None
        assert cycle.slow_slots is not None
        before, slow_weights = self.weights, cycle.slow_weights
        if cycle.outer:
            self.weights = self._outer_step(cycle, left_out)
        else:
            pairs = zip(slow_weights, before, strict=True)
            self.weights = [lookahead(slow, fast, cycle.alpha) for slow, fast in pairs]
        cycle.slow_weights = list(self.weights)
        for i, moved in cycle.moved.items():
            self.weights[i] = only_rows(moved, self.weights[i], before[i])
            cycle.slow_weights[i] = only_rows(
                moved, cycle.slow_weights[i], slow_weights[i]
            )
        for i in left_out:  # the slow copy follows
            self.weights[i] = cycle.slow_weights[i] = before[i]
        cycle.moved = {i: np.zeros_like(moved) for i, moved in cycle.moved.items()}
        if cycle.inner_state == "reset":
            self.slots = self._initial_slots()
        elif cycle.inner_state == "interpolate":
            self.slots = [
                {name: lookahead(slow[name], fast[name], cycle.alpha) for name in fast}
                for slow, fast in zip(cycle.slow_slots, self.slots, strict=True)
            ]
            cycle.slow_slots = self.slots

    def _outer_step(self, cycle: Cycle, left_out: Collection[int]) -> list[Array]:
        """phi after a step with the pseudo-gradient s = phi - theta."""
        assert cycle.outer is not None
        assert cycle.slow_weights is not None
        kind, arguments = cycle.outer
        outer = OPTIMIZERS[kind](**arguments)
        if cycle.outer_slots is None:
            cycle.outer_slots = [outer.slots(w, "") for w in self.weights]
        rate = outer.learning_rate
        lr = float(rate(cycle.syncs) if callable(rate) else rate)
        cycle.syncs += 1
        after = []
        for i, (phi, theta) in enumerate(
            zip(cycle.slow_weights, self.weights, strict=True)
        ):
            old = cycle.outer_slots[i]
            decayed = phi - phi * (outer.decay_of(old) or 0.0) * lr
            w, new = outer.step(decayed, phi - theta, old, lr, cycle.syncs)
            constraint = self.constraints[i]
            after.append(constraint(w) if constraint else w)
            if i in cycle.moved:
                rows = cycle.moved[i]
                new = {name: only_rows(rows, new[name], old[name]) for name in new}
            if i not in left_out:
                cycle.outer_slots[i] = new
        return after


def train(
    weights: Sequence[Array],
    grads_per_step: Sequence[Sequence[Array]],
    optimizer: tuple[str, dict[str, Any]],
    **around: Any,
) -> list[State]:
    """The state after every step. `around`: the keywords of `Reference`."""
    reference, states = Reference(weights, optimizer, **around), []
    for grads in grads_per_step:
        reference.apply(grads)
        states.append(reference.state)
    return states

"""torch: no step asks an accelerator for a value, which would make the host wait.

Fake tensors lie on a device that is not there and have no values. An operation whose
result's shape depends on data raises on them, and one that hands a number to Python is
counted here. With a GPU, torch itself looks out for the same.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import pytest
from harness import BACKEND

from keras_lookahead_lazy import LazyOptimizer, Lookahead
from keras_lookahead_lazy._keras import chain, unique

if BACKEND != "torch":
    pytest.skip("torch alone", allow_module_level=True)

import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

# A build of torch for the CPU alone knows no guard for devices of CUDA.
DEVICE = "cuda:0" if torch.version.cuda else "lazy:0"
VOCABULARY, LENGTH, BATCH, K, ACCUMULATED = 1000, 4, 8, 3, 2
STEPS = 2 * K  # a whole number of cycles

Make = Callable[[keras.layers.Layer], keras.Optimizer]


def adam(**settings: Any) -> keras.Optimizer:
    return keras.optimizers.Adam(1e-3, **settings)


def lazy(words: keras.layers.Layer, moments: str = "decay", **settings: Any) -> Any:
    return LazyOptimizer(adam(**settings), [words], moments=moments)


def lookahead(inner: keras.Optimizer, inner_state: str = "maintain") -> Lookahead:
    return Lookahead(inner, k=K, inner_state=inner_state)


def masked(words: keras.layers.Layer) -> LazyOptimizer:
    """A step that looks at every row."""
    words.embeddings.constraint = keras.constraints.UnitNorm(axis=0)
    return lazy(words)


scaled = keras.optimizers.LossScaleOptimizer
NEVER: dict[str, Make] = {
    "lazy decay": lazy,
    "lazy freeze": lambda words: lazy(words, "freeze"),
    "lookahead": lambda words: lookahead(adam()),
    "lookahead interpolate": lambda words: lookahead(adam(), "interpolate"),
    "lookahead reset": lambda words: lookahead(adam(), "reset"),
    "lookahead lazy": lambda words: lookahead(lazy(words)),
    "lookahead lazy freeze": lambda words: lookahead(lazy(words, "freeze")),
    "lookahead lazy interpolate": lambda w: lookahead(lazy(w), "interpolate"),
    "lookahead lazy reset": lambda words: lookahead(lazy(words), "reset"),
    "lookahead lookahead lazy": lambda words: lookahead(lookahead(lazy(words))),
    "clipnorm": lambda words: lazy(words, clipnorm=1.0),
    "clipvalue": lambda words: lazy(words, clipvalue=1.0),
    "global_clipnorm": lambda words: lazy(words, global_clipnorm=1.0),
    "use_ema": lambda words: lazy(words, use_ema=True),
    "weight_decay": lambda words: lazy(words, weight_decay=0.1),
    "accumulation": lambda w: lazy(w, gradient_accumulation_steps=ACCUMULATED),
    "lookahead accumulation": lambda words: lookahead(
        lazy(words, gradient_accumulation_steps=ACCUMULATED)
    ),
    "masked": masked,
    "lookahead masked interpolate": lambda w: lookahead(masked(w), "interpolate"),
}
# Keras's own decides on the host whether gradients are finite, and asks twice.
ONCE: dict[str, Make] = {
    "scaled lazy": lambda words: scaled(lazy(words)),
    "scaled lookahead": lambda words: scaled(lookahead(adam())),
    "scaled lookahead lazy": lambda words: scaled(lookahead(lazy(words))),
}


class Asked(TorchDispatchMode):
    """Counts what brings a value to the host, and answers something."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        aten = torch.ops.aten
        if function is aten._local_scalar_dense.default:
            self.operations.append(str(function))
            return True if args[0].dtype == torch.bool else 0
        result = function(*args, **(kwargs or {}))
        if function is aten._to_copy.default:
            is_there, is_here = (
                args[0].device.type != "cpu",
                result.device.type == "cpu",
            )
            if is_there and is_here:
                self.operations.append(str(function))
        return result


def model_and_optimizer(make: Make) -> tuple[keras.Model, keras.Optimizer]:
    words = keras.layers.Embedding(VOCABULARY, 3)
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            words,
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    optimizer = make(words)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def step(model: keras.Model, optimizer: keras.Optimizer, ids: Any, labels: Any) -> None:
    weights = model.trainable_variables
    loss = ((model(ids, training=True) - labels) ** 2).mean()
    values = [weight.value for weight in weights]
    gradients = torch.autograd.grad(optimizer.scale_loss(loss), values)
    optimizer.apply(list(gradients), weights)


def asked(make: Make) -> list[list[str]]:
    """What each step asks the device for, after some cycles.

    The first steps read the counters, of which the host then keeps copies.
    """
    model, optimizer = model_and_optimizer(make)
    with on_fake_device(model, optimizer), Asked() as mode:
        ids = torch.zeros((BATCH, LENGTH), dtype=torch.int32, device=DEVICE)
        labels = torch.zeros((BATCH, 1), device=DEVICE)
        found = []
        for _ in range(2 * STEPS):
            mode.operations = []
            step(model, optimizer, ids, labels)
            found.append(mode.operations)
    return found[STEPS:]


@contextlib.contextmanager
def on_fake_device(model: keras.Model, optimizer: keras.Optimizer) -> Iterator[None]:
    """Put all variables on a device that is not there, without their values."""
    kept = [variable for each in chain(optimizer) for variable in each._variables]
    with FakeTensorMode(), keras.device(DEVICE):
        for variable in unique([*model.variables, *kept]):
            value = variable.value
            fake = torch.empty(tuple(value.shape), dtype=value.dtype, device=DEVICE)
            if isinstance(value, torch.nn.Parameter):
                fake = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
            variable._value = fake
        yield


@pytest.mark.parametrize("name", NEVER)
def test_no_step_asks_for_a_value(name: str) -> None:
    assert asked(NEVER[name]) == [[]] * STEPS


@pytest.mark.parametrize("name", ONCE)
def test_loss_scaling_asks_once(name: str) -> None:
    assert [len(step) for step in asked(ONCE[name])] == [1] * STEPS


@pytest.mark.parametrize(
    "make",
    [
        lambda words: scaled(adam()),
        lambda words: adam(gradient_accumulation_steps=ACCUMULATED),
    ],
)
def test_keras_asks_itself(make: Make) -> None:
    """Where it scales the loss, and where it accumulates gradients."""
    assert all(asked(make))


class Asking(keras.optimizers.SGD):
    """Does something with each gradient."""

    def __init__(self, ask: Callable) -> None:
        super().__init__()
        self.ask = ask

    def update_step(self, gradient: Any, *others: Any) -> None:
        self.ask(gradient)


@pytest.mark.parametrize(
    "ask", [lambda g: g.sum().item(), lambda g: bool(g.sum() > 0), lambda g: g.cpu()]
)
def test_asking_is_seen(ask: Callable) -> None:
    assert all(asked(lambda words: Asking(ask)))


@pytest.mark.parametrize(
    "ask", [lambda g: g.nonzero(), lambda g: g[g > 0], lambda g: g.numpy(force=True)]
)
def test_what_cannot_be_answered_raises(ask: Callable) -> None:
    with pytest.raises((DynamicOutputShapeException, RuntimeError)):
        asked(lambda words: Asking(ask))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", NEVER)
def test_no_step_waits_for_the_gpu(name: str) -> None:
    model, optimizer = model_and_optimizer(NEVER[name])
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), device="cuda")
    labels = torch.rand((BATCH, 1), device="cuda")
    step(model, optimizer, ids, labels)  # reads the counters
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS):
            step(model, optimizer, ids, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")

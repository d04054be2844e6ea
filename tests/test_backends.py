"""One algorithm on three backends: the same files, and no hidden costs.

That the numbers are the same is in `test_against_reference.py`.
"""

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    OTHERS,
    Run,
    both,
    make_data,
    make_gradients,
    make_model,
    make_weights,
    run_python,
)

import keras_lookahead_lazy
from keras_lookahead_lazy import LazyOptimizer, Lookahead


def nesterov():
    return keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)


def with_outer(optimizer):
    return Lookahead(LazyOptimizer(optimizer), 4, outer_optimizer=nesterov())


# Files


def train(model, first, last):
    x, y = make_data(18 * 8)
    batches = slice(first * 8, last * 8)
    model.fit(x[batches], y[batches], batch_size=8, shuffle=False, verbose=0)


def start(path, moments, outer):
    lazy = LazyOptimizer(keras.optimizers.Adam(0.01), ["words"], moments)
    model = make_model(Lookahead(lazy, k=5, outer_optimizer=outer))
    train(model, 0, 7)
    model.save(path)


def go_on(path, result):
    model = keras.models.load_model(path)
    train(model, 7, 18)
    np.savez(result, *model.get_weights())


@pytest.mark.slow
@pytest.mark.skipif(not OTHERS, reason="only one backend is installed")
@pytest.mark.parametrize(
    ("other", "moments", "has_outer"),
    [
        *zip(OTHERS, ["decay", "freeze"], [False, True], strict=False),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in zip(OTHERS, ["freeze", "decay"], [True, False], strict=False)
        ),
    ],
)
def test_training_goes_on_on_another_backend(other, moments, has_outer, tmp_path):
    file, result = tmp_path / "model.keras", tmp_path / "weights.npz"
    start(file, moments, nesterov() if has_outer else None)
    model = keras.models.load_model(file)
    train(model, 7, 18)
    run_python(__file__, "go_on", file, result, backend=other, one_backend=True)
    theirs = np.load(result)
    for i, ours in enumerate(model.get_weights()):
        error = np.max(np.abs(ours - theirs[f"arr_{i}"])) / np.max(np.abs(ours))
        assert error < 1e-5


# What is imported


def test_no_other_backend_is_imported():
    """Nothing but what Keras has imported on its own."""
    code = (
        "import sys, keras; before = set(sys.modules); import keras_lookahead_lazy;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new & {'tensorflow', 'jax', 'torch', 'optax'} - {sys.argv[1]}))"
    )
    assert run_python("-c", code, BACKEND).splitlines()[-1] == "[]"


def test_a_backend_that_cannot_train_is_refused():
    code = (
        "import keras, keras_lookahead_lazy as k\n"
        "try: k.Lookahead('adam')\n"
        "except ValueError as error: print(error)"
    )
    printed = run_python("-c", code, backend="numpy")
    assert "tensorflow, jax, torch" in printed
    assert "'numpy'" in printed


def test_the_backend_is_asked_for_in_one_place():
    (package,) = keras_lookahead_lazy.__path__
    asking = [
        path.relative_to(package).as_posix()
        for path in Path(package).rglob("*.py")
        if "backend.backend()" in path.read_text()
    ]
    assert asking == ["_backend/__init__.py"]


# JAX


@pytest.fixture
def jax_step():
    """A jitted step of everything at once, its arguments, and the bare one's."""
    jax = pytest.importorskip("jax")
    if BACKEND != "jax":
        pytest.skip("JAX only")

    def make_step(optimizer, shapes=((3000, 64), (512, 512))):
        with keras.name_scope("words"):
            table = keras.Variable(np.ones(shapes[0], "float32"), name="embeddings")
        variables = [table, keras.Variable(np.ones(shapes[1], "float32"))]
        optimizer.build(variables)
        traces = []

        def apply(weights, state, gradients):
            traces.append(1)
            return optimizer.stateless_apply(state, gradients, weights)

        step = jax.jit(apply, donate_argnums=(0, 1))
        weights = [v.value for v in variables]
        state = [v.value for v in optimizer.variables]
        gradients = [np.ones(shape, "float32") for shape in shapes]
        return step, weights, state, gradients, traces

    return make_step


@pytest.mark.parametrize("wrap", [Lookahead, LazyOptimizer, both, with_outer])
def test_jax_compiles_once(jax_step, wrap):
    step, weights, state, gradients, traces = jax_step(wrap(keras.optimizers.Adam()))
    for _ in range(12):
        weights, state = step(weights, state, gradients)
    assert len(traces) == 1
    assert step._cache_size() == 1


@pytest.mark.parametrize(("outer", "copies"), [(None, 4), (nesterov, 5)])
def test_jax_updates_in_place(jax_step, outer, copies):
    """All state is donated, and no temporary is as large as the weights."""
    optimizer = Lookahead(keras.optimizers.Adam(), outer_optimizer=outer and outer())
    step, weights, state, gradients, _ = jax_step(optimizer)
    memory = step.lower(weights, state, gradients).compile().memory_analysis()
    floats = sum(w.size for w in weights) * 4
    # theta, phi, Adam's two moments, and an outer momentum stay where they are.
    assert memory.alias_size_in_bytes >= copies * floats
    assert memory.temp_size_in_bytes < 0.1 * floats


def test_jax_syncs_in_a_real_condition(jax_step):
    import jax

    step, weights, state, gradients, _ = jax_step(Lookahead(keras.optimizers.SGD()))
    jaxpr = jax.make_jaxpr(step)(weights, state, gradients)
    assert str(jaxpr).count("while[") == 2  # the first back-up, and the sync


# torch


@pytest.mark.parametrize("wrap", [both, with_outer])
def test_torch_reads_nothing_back(wrap, monkeypatch):
    """A step asks the device for no value, on which it would have to wait.

    Each counter is read once: the steps' in the first, the syncs' in the first sync.
    """
    torch = pytest.importorskip("torch")
    if BACKEND != "torch":
        pytest.skip("torch only")
    weights = make_weights()
    run = Run(wrap(keras.optimizers.Adam()), weights)
    steps = make_gradients(11, weights)
    for step in steps[:4]:
        run.step(step)
    asked = []
    for name in ("item", "__bool__", "__int__", "__float__", "tolist", "numpy"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _name=name, _original=original, **kwargs):
            asked.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    gradients = [[torch.tensor(g) for g in step] for step in steps[4:]]
    for step in gradients:
        run.optimizer.apply(step, run.variables)
    assert asked == []
    assert int(run.optimizer._inner._iterations) == 11
    assert asked  # the spies do see a value that is read


@pytest.mark.skipif(BACKEND != "torch", reason="torch only")
def test_torch_keeps_the_foreach_update_for_dense_weights(monkeypatch):
    import torch

    seen = []
    original = torch._foreach_mul_

    def spy(tensors, *args):
        seen.append([tuple(t.shape) for t in tensors])
        return original(tensors, *args)

    monkeypatch.setattr(torch, "_foreach_mul_", spy)
    weights = make_weights()
    run = Run(LazyOptimizer(keras.optimizers.Adam()), weights)
    run.step(make_gradients(1, weights)[0])
    assert seen
    assert all(shapes == [(5, 3), (3,)] for shapes in seen)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])

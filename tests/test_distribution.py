"""n replicas on a global batch train as one replica does on the same batch.

The programs are those of `examples/distributed`, run as a user runs them.
"""

import functools
import io
import itertools
import math
import re
import sys
import zipfile
from functools import cache

import h5py
import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    assert_agree,
    make_data,
    make_model,
    run_python,
    two_replicas,
)
from traffic import note_layouts

from keras_lookahead_lazy import LazyOptimizer, Lookahead

pytestmark = pytest.mark.slow
STEPS = 50

SETTINGS = {
    "adam": ["--k", "5"],
    "sgd": [
        "--optimizer=sgd",
        "--moments=freeze",
        "--inner-state=interpolate",
        "--k=3",
    ],
    "rmsprop": ["--optimizer=rmsprop", "--inner-state=reset", "--k=4", "--alpha=0.8"],
    "outer": ["--moments=freeze", "--k=4", "--outer-momentum=0.5"],
    "adamw": ["--optimizer=adamw", "--moments=freeze", "--k=7"],
}
ENGINES = {
    "tensorflow": [
        ["mirrored", "--replicas=1", "--loop"],
        ["mirrored", "--replicas=2"],
        ["mirrored", "--replicas=2", "--loop"],
        ["mirrored", "--replicas=4"],
        ["mirrored", "--replicas=4", "--loop"],
        ["multi_worker", "--replicas=2"],
    ],
    "jax": [
        ["data_parallel", "--replicas=8"],
        ["data_parallel", "--replicas=8", "--processes=2"],
        ["model_parallel", "--replicas=8", "--shard=rows"],
        ["model_parallel", "--replicas=8", "--shard=rows-as-batch"],
        ["model_parallel", "--replicas=8", "--shard=columns"],
    ],
    "torch": [["ddp", "--replicas=2"], ["ddp", "--replicas=3"]],
}[BACKEND]
LONGEST = {"--replicas=4", "--loop"}
SLOW = {"--loop", "--replicas=4", "--processes=2"}  # with an outer optimizer, too
if BACKEND == "jax" and keras.__version__ < "3.11":
    # Whose `fit` refuses arrays where there is more than one process.
    ENGINES = [engine for engine in ENGINES if "--processes=2" not in engine]
ALONE = {
    "tensorflow": ["mirrored", "--replicas=1"],  # under OneDeviceStrategy
    "jax": ["data_parallel", "--replicas=1"],
    "torch": ["ddp", "--replicas=1"],
}[BACKEND]


def run(engine, *arguments):
    """Run an example; what it prints."""
    name, *options = engine
    program = f"examples.distributed.{name}"
    return run_python("-m", program, *options, *arguments, one_backend=True)


def contents(path):
    """Every array in a `.keras` file: weights, slow weights, slots and counters."""
    found = {}

    def note(name, entry):
        if isinstance(entry, h5py.Dataset):
            found[name] = entry[()]

    with zipfile.ZipFile(path) as archive:
        weights = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(weights) as file:
        file.visititems(note)
    return found


def assert_equal(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    assert len(ours) > 10
    weights = [a for name, a in theirs.items() if name.startswith("layers/")]
    for name, array in theirs.items():
        scale = max(np.max(np.abs(array)), 1e-8)
        if "/outer_optimizer/" in name and array.shape:
            # Sums of differences of weights, which are as exact as the weights.
            scale = min(np.max(np.abs(w)) for w in weights if w.shape == array.shape)
        assert np.max(np.abs(ours[name] - array)) <= 1e-5 * scale, name


@cache
def alone(setting, folder):
    path = folder / f"{setting}.keras"
    run(ALONE, *SETTINGS[setting], f"--steps={STEPS}", f"--save={path}")
    return contents(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("alone")


CASES = [
    *zip(ENGINES, itertools.cycle(["rmsprop", "sgd", "adam"]), strict=False),
    *((engine, "outer") for engine in ENGINES if not SLOW & {*engine}),
]


@pytest.mark.parametrize(
    ("engine", "setting"),
    [
        # Four replicas in a loop wait for each other on two cores.
        pytest.param(
            *case,
            marks=[pytest.mark.long]
            if {*case[0]} >= LONGEST or case == (ENGINES[-1], "outer")
            else [],
        )
        for case in CASES
    ],
    ids=lambda value: "".join(value),
)
def test_replicas_train_as_one(engine, setting, folder, tmp_path):
    path = tmp_path / "model.keras"
    arguments = [*SETTINGS[setting], f"--steps={STEPS}", f"--save={path}"]
    printed = run(engine, *arguments)
    assert_equal(contents(path), alone(setting, folder))
    if engine[0] != "model_parallel":  # whose devices hold different parts
        count = engine[1].removeprefix("--replicas=")
        assert f"{count} replicas, identical" in printed


def test_a_run_goes_on_with_another_number_of_replicas(folder, tmp_path):
    """Saved again and again in the middle of a cycle of 7."""
    path, arguments = tmp_path / "model.keras", SETTINGS["adamw"]
    usual = [engine for engine in ENGINES if not {*engine} >= LONGEST]
    engines = [usual[-2], usual[-1], ALONE]
    for engine, steps in zip(engines, (13, 12, STEPS - 25), strict=True):
        run(engine, *arguments, f"--steps={steps}", f"--save={path}")
        arguments = ["--resume", str(path)]
    assert_equal(contents(path), alone("adamw", folder))


def optimizer(momentum=None):
    """With a momentum, there is an outer optimizer."""
    outer = momentum and keras.optimizers.SGD(0.7, momentum=momentum, nesterov=True)
    lazy = LazyOptimizer(keras.optimizers.Adam(0.01))
    return Lookahead(lazy, k=3, outer_optimizer=outer)


# Programs, because the devices are set before TensorFlow or JAX starts


def gradients_stay_sparse():
    """What reaches the lazy step under two replicas is `tf.IndexedSlices`."""
    import tensorflow as tf

    from keras_lookahead_lazy._backend import engine

    strategy = two_replicas()
    seen = []
    find_rows = engine.find_rows

    def spy(gradient, *arguments, **options):
        seen.append(gradient)
        return find_rows(gradient, *arguments, **options)

    engine.find_rows = spy  # type: ignore[method-assign]
    with strategy.scope():
        model = make_model(optimizer())
    model.fit(*make_data(16), batch_size=8, verbose=0)
    assert len(seen) >= 2  # one a replica
    assert all(isinstance(gradient, tf.IndexedSlices) for gradient in seen)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
def test_gradients_stay_sparse_through_the_all_reduce():
    run_python(__file__, "gradients_stay_sparse", one_backend=True)


def replicas_clip_their_sums(setting, bound):
    """Each replica looks up another number of different rows, and clips its sums."""
    strategy = two_replicas()
    for _ in range(2):
        clip_sums(strategy, setting, bound)


def clip_sums(strategy, setting, bound):
    rows, width, batch, rate = 10_000, 2, 100, 0.5
    random = np.random.default_rng(0)
    ids = random.integers(0, rows, (20 * batch, 10)).astype("int32")
    y = random.normal(size=(len(ids), width)).astype("float32")

    with strategy.scope():
        table = keras.layers.Embedding(rows, width)
        model = keras.Sequential([table, keras.layers.GlobalAveragePooling1D()])
        inner = keras.optimizers.SGD(rate, **{setting: float(bound)})
        model.compile(LazyOptimizer(inner), "mse")
        model.build((None, ids.shape[1]))
        weights = np.array(table.get_weights()[0], "float64")
        model.fit(ids, y, batch_size=batch, shuffle=False, verbose=0)

    for start in range(0, len(ids), batch):
        total = np.zeros_like(weights)
        for half in range(2):
            part = slice(start + half * batch // 2, start + (half + 1) * batch // 2)
            error = weights[ids[part]].mean(1) - y[part]
            gradient = np.zeros_like(weights)
            each = 2 * error / (batch * width) / ids.shape[1]
            np.add.at(gradient, ids[part], each[:, np.newaxis])
            if setting == "clipvalue":
                gradient = gradient.clip(-float(bound), float(bound))
            else:
                gradient *= min(1, float(bound) / np.linalg.norm(gradient))
            total += gradient
        weights -= rate * total
    assert_agree(model.get_weights(), [weights], 1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
@pytest.mark.parametrize("setting", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_replicas_clip_their_sums(setting):
    run_python(__file__, "replicas_clip_their_sums", setting, "0.01", one_backend=True)


def no_table_is_gathered(shard, momentum=None):
    """The compiled train step of a sharded table, and where its state lies."""
    import os

    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import jax

    vocabulary, width = 1024, 64
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
    layouts = keras.distribution.LayoutMap(mesh)
    axes = ("model", None) if shard == "rows" else (None, "model")
    layouts[".*embeddings.*"] = axes  # what the optimizer counts is no table
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    momentum = momentum and float(momentum)
    model = make_model(optimizer(momentum), vocabulary, width)
    x, y = make_data(16)
    model.fit(x, y, batch_size=16, verbose=0)

    weights = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.optimizer.variables]
    gradients = [jax.numpy.ones_like(w, device=w.sharding) for w in weights]
    step = jax.jit(model.optimizer.stateless_apply, donate_argnums=(0, 2))
    compiled = str(step.lower(state, gradients, weights).compile().as_text())
    assert "all-gather" not in compiled
    assert "all-to-all" not in compiled

    trainable, other = model.trainable_variables, model.non_trainable_variables
    variables = (trainable, other, model.optimizer.variables, model.metrics_variables)
    values = jax.tree.map(lambda v: v.value, variables)
    note_layouts(model)
    whole = str(jax.jit(model.train_step).lower(values, (x, y)).compile().as_text())
    gathered = re.findall(r"= (\S+) all-gather\(", whole)
    assert not [shape for shape in gathered if str(vocabulary) in shape]

    expected = jax.sharding.PartitionSpec(*axes)
    shapes = {(vocabulary, width): expected, (vocabulary,): expected[:1]}
    belonging = [v.value for v in model.optimizer.variables if v.shape in shapes]
    # Slow weights, two slots, the rows' last update, and an outer momentum.
    assert len(belonging) == (5 if momentum else 4)
    for array in belonging:
        sharding = jax.sharding.NamedSharding(
            array.sharding.mesh, jax.sharding.PartitionSpec(*shapes[array.shape])
        )
        assert array.sharding.is_equivalent_to(sharding, array.ndim), array.sharding


def owners_read_as_take():
    """Also ids that are negative, and ids that no row has."""
    import os

    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from keras_lookahead_lazy._backend import jax_placement

    rng = np.random.default_rng(0)
    table = rng.normal(size=(64, 3)).astype("float32")
    several = jax.make_mesh((2, 4), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)
    one = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    for at_once, mesh, axes, shape, dtype in itertools.product(
        (2**17, 7),
        (several, one),
        ("model", "batch", ("batch", "model")),
        ((16, 5), (6, 5), (16,), ()),  # 6 is not a multiple of 8
        ("float32", "bfloat16"),
    ):
        if not {*np.atleast_1d(axes)} <= {*mesh.axis_names}:
            continue
        ids = rng.integers(-70, 70, shape).astype("int32")
        sharding = NamedSharding(mesh, PartitionSpec(axes))
        place = jax_placement.Placement(sharding, 0, "batch")
        jax_placement.LOOK_UPS_AT_ONCE = at_once
        read = jax.jit(
            functools.partial(jax_placement.read_from_owners, place=place),
            static_argnames="dtype",
        )
        rows = read(jax.device_put(table, sharding), jnp.array(ids), dtype=dtype)
        assert rows.dtype == dtype
        expected = jnp.take(table, ids, axis=0).astype(dtype)
        np.testing.assert_array_equal(
            np.array(rows, "float32"), np.array(expected, "float32")
        )


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution")
def test_owners_read_as_take():
    run_python(__file__, "owners_read_as_take", one_backend=True)


def lookups_are_exchanged():
    """Between the devices that ask and the owners only, in as many rounds as needed."""
    import os

    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from keras_lookahead_lazy._backend import jax_placement

    jax_placement.DEVICES_TO_EXCHANGE = 2
    rng = np.random.default_rng(0)
    table = rng.normal(size=(320, 3)).astype("float32")
    one = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    two = jax.make_mesh((2, 4), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)
    draws = {
        "spread evenly": lambda shape: rng.integers(-350, 350, shape),
        "all of one owner": lambda shape: rng.integers(80, 120, shape),
        "one row": lambda shape: np.full(shape, -1),
        "unknown": lambda shape: np.full(shape, 320),
    }
    for mesh, axes in (
        (one, ("batch",)),
        (two, ("batch",)),
        (two, ("model",)),
        (two, ("batch", "model")),
        (two, ("model", "batch")),
    ):
        by_row = NamedSharding(mesh, PartitionSpec(axes))
        by_sample = NamedSharding(mesh, PartitionSpec("batch"))
        place = jax_placement.Placement(by_row, 0, "batch")
        assert not place.exchanges(np.zeros((16, 0)))
        parts = math.prod(mesh.shape[axis] for axis in axes)
        held = len(table) // parts

        @functools.partial(jax.jit, static_argnames="dtype")
        def read(table, ids, dtype, place=place):
            return jax_placement.read_from_owners(table, ids, dtype, place)

        @jax.jit
        def sum_on_owners(look_ups, place=place):
            return jax_placement.sum_on_owners(look_ups, table.shape, "float32", place)

        for draw in draws.values():
            look_ups = []
            for shape in ((16, 5), (8,), (800,)):  # up to three rounds
                ids = np.asarray(draw(shape), "int32")
                assert place.exchanges(ids)
                gradients = rng.normal(size=(*shape, 3)).astype("float32")
                look_ups.append((ids, gradients))
                dtype = "float32" if ids.ndim == 1 else "bfloat16"
                rows = read(
                    jax.device_put(table, by_row), jax.device_put(ids, by_sample), dtype
                )
                expected = jnp.take(table, ids, axis=0).astype(dtype)
                np.testing.assert_array_equal(
                    np.array(rows, "float32"), np.array(expected, "float32")
                )
            gradient = sum_on_owners(jax.device_put(look_ups, by_sample))
            # NumPy would slice arrays of JAX in many programs at once, which wait for
            # each other's devices.
            sums, indices = np.asarray(gradient.sums), np.asarray(gradient.indices)
            found, expected = np.zeros((2, *table.shape))
            pairs = zip(np.split(sums, parts), np.split(indices, parts), strict=True)
            for part, (own_sums, own) in enumerate(pairs):
                is_row = own < held
                assert not own_sums[~is_row].any()
                assert (np.diff(own[is_row]) > 0).all()
                found[held * part + own[is_row]] = own_sums[is_row]
            for ids, gradients in look_ups:
                is_row = (ids >= -320) & (ids < 320)
                np.add.at(expected, ids[is_row], gradients[is_row])
            np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)
            for shard in gradient.sums.addressable_shards:
                # Replicas of a part are equal.
                np.testing.assert_array_equal(shard.data, sums[shard.index])


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution")
def test_lookups_are_exchanged():
    run_python(__file__, "lookups_are_exchanged", one_backend=True)


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution")
@pytest.mark.parametrize("momentum", [(), ("0.9",)])
@pytest.mark.parametrize("shard", ["rows", "columns"])
def test_no_table_is_gathered(shard, momentum):
    run_python(__file__, "no_table_is_gathered", shard, *momentum, one_backend=True)


def parameter_servers_are_refused():
    """A worker and a parameter server, in this process."""
    import socket

    import tensorflow as tf

    def address():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            return f"localhost:{free.getsockname()[1]}"

    cluster = tf.train.ClusterSpec({job: [address()] for job in ("worker", "ps")})
    servers = [tf.distribute.Server(cluster, job_name=job) for job in cluster.jobs]
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        cluster, rpc_layer="grpc"
    )
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        model = make_model()
    weights = model.trainable_variables

    def train(optimizer):
        @tf.function
        def step():
            def update():
                optimizer.apply([tf.ones(w.shape) for w in weights], weights)

            strategy.run(update)

        coordinator.schedule(step)
        coordinator.join()

    def build(optimizer):
        optimizer.build(weights)

    def build_in_scope(optimizer):
        with strategy.scope():
            optimizer.build(weights)

    with strategy.scope():
        adam = keras.optimizers.Adam()
        adam.build(weights)
    train(adam)
    assert int(adam.iterations) == 1
    words = "MirroredStrategy on one machine, or .*MultiWorkerMirroredStrategy on"
    for wrap in (Lookahead, LazyOptimizer, lambda o: Lookahead(LazyOptimizer(o))):
        for use in (build, build_in_scope, train):
            with strategy.scope():
                inner = keras.optimizers.Adam()
                wrapped = wrap(inner)
            with pytest.raises(ValueError, match=words):
                use(wrapped)
            assert not wrapped.built
            assert not inner.built
    assert servers


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
def test_parameter_servers_are_refused():
    run_python(__file__, "parameter_servers_are_refused", one_backend=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])

"""Train with a table that is divided between two processes: RANK and PORT are given."""

import json
import os
import sys


def main() -> None:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
    import keras
    import numpy as np

    from keras_lookahead_lazy import Insight, LazyOptimizer, Lookahead

    mesh = keras.distribution.DeviceMesh((1, 4), ("batch", "model"), jax.devices())
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["(.*/)?words/embeddings"] = ("model", None)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
        )
    )
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(64, 3, name="words"),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) for w in model.weights])
    optimizer = Lookahead(LazyOptimizer(keras.optimizers.Adam(0.01)), k=5)
    model.compile(optimizer, "mse")
    x = rng.integers(0, 20, (28, 4)).astype("int32")
    y = rng.normal(size=(28, 1)).astype("float32")
    how = {"batch_size": 4, "shuffle": False, "verbose": 0}
    history = model.fit(x, y, callbacks=[Insight()], **how).history
    assert not optimizer._pairs[0][0].value.is_fully_addressable
    found = {name.partition("/")[0]: values[0] for name, values in history.items()}
    sums = [keras.ops.convert_to_numpy(keras.ops.sum(w)) for w in model.weights[1:]]
    found |= {"distance": optimizer.distance(), "sums": sums}
    print(json.dumps(found, default=float))


if __name__ == "__main__":
    main()

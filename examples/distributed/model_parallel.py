"""keras.distribution.ModelParallel on JAX: the table divided among the devices."""

import os

os.environ["KERAS_BACKEND"] = "jax"

from examples.distributed import _task


def main() -> None:
    """Train, and say where the table and what belongs to it lies."""
    parser = _task.parser(__doc__, replicas=8)
    parser.add_argument(
        "--shard",
        choices=("rows", "columns", "rows-as-batch"),
        default="rows",
        help="how the table is divided; rows-as-batch: along the axis of the batch",
    )
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={options.replicas}"
    )
    import keras

    if options.shard == "rows-as-batch":
        mesh = keras.distribution.DeviceMesh((options.replicas,), ("batch",))
    else:
        # Two shares of the batch, if the number is even, times parts of the table.
        batch = 2 - options.replicas % 2
        mesh = keras.distribution.DeviceMesh(
            (batch, options.replicas // batch), ("batch", "model")
        )
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["(.*/)?words/embeddings"] = {
        "rows": ("model", None),
        "columns": (None, "model"),
        "rows-as-batch": ("batch", None),
    }[options.shard]
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    model = _task.model(options)
    losses = _task.fit(model, _task.samples(options, model))
    if options.save:
        model.save(options.save)
    print(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} in the end")
    for variable in [model.layers[0].embeddings, *model.optimizer.variables]:
        if "words" in variable.path or "last_update" in variable.path:
            print(variable.path, variable.value.sharding.spec)


if __name__ == "__main__":
    main()

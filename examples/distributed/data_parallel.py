"""keras.distribution.DataParallel on JAX: a replica on each device.

The devices may belong to several processes, as on several machines.
"""

import os
import pathlib
import tempfile

os.environ["KERAS_BACKEND"] = "jax"

from examples.distributed import _task


def work(options: _task.Options) -> None:
    """Train, as the only process or as one of several."""
    local = options.replicas // options.processes
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={local}"
    import keras

    process = int(os.environ.get("PROCESS", 0))
    if options.processes > 1:
        keras.distribution.initialize(
            os.environ["COORDINATOR"], options.processes, process
        )
    keras.distribution.set_distribution(
        # Each process brings its own share of the data.
        keras.distribution.DataParallel(auto_shard_dataset=False)
    )
    model = _task.model(options)
    share = _task.samples(options, model, process, options.processes)
    losses = _task.fit(model, share)
    if options.save:
        # All processes take part in saving; one file is kept.
        with tempfile.TemporaryDirectory() as folder:
            other = pathlib.Path(folder) / "model.keras"
            model.save(options.save if process == 0 else other)
    variables = model.variables + model.optimizer.variables
    replicas = zip(*(v.value.addressable_shards for v in variables), strict=True)
    digests = [_task.digest(shard.data for shard in r) for r in replicas]
    if options.processes > 1:
        _task.tell(losses, digests)
    else:
        _task.report(losses, digests)


def main() -> None:
    """Start the processes on this machine, or be one of them."""
    parser = _task.parser(__doc__, replicas=8)
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    options = parser.parse_args()
    if options.processes == 1 or "PROCESS" in os.environ:
        work(options)
        return
    address = f"localhost:{_task.free_port()}"
    _task.run_workers(
        "examples.distributed.data_parallel",
        [{"COORDINATOR": address, "PROCESS": str(i)} for i in range(options.processes)],
    )


if __name__ == "__main__":
    main()

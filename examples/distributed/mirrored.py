"""tf.distribute.MirroredStrategy: one process, a replica on each of its devices."""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import tensorflow as tf

from examples.distributed import _task
from examples.distributed._strategy_run import train_function


def devices(count: int) -> list[str]:
    """GPUs where there are enough, else parts of the CPU."""
    if len(tf.config.list_physical_devices("GPU")) >= count:
        return [f"GPU:{i}" for i in range(count)]
    cpu = tf.config.list_physical_devices("CPU")[0]
    parts = [tf.config.LogicalDeviceConfiguration() for _ in range(count)]
    tf.config.set_logical_device_configuration(cpu, parts)
    return [f"CPU:{i}" for i in range(count)]


def strategy_for(replicas: int) -> tf.distribute.Strategy:
    """A strategy over that many devices."""
    names = devices(replicas)
    if replicas == 1:
        return tf.distribute.OneDeviceStrategy(names[0])
    return tf.distribute.MirroredStrategy(names)


def loop(
    strategy: tf.distribute.Strategy, model: keras.Model, options: _task.Options
) -> list[float]:
    """Train in a loop of one's own; the loss of each step."""
    train = train_function(strategy, model)
    data = tf.data.Dataset.from_tensor_slices(_task.samples(options, model))
    return [
        float(train(x, y)) for x, y in strategy.experimental_distribute_dataset(data)
    ]


def main() -> None:
    """Train, and compare the replicas."""
    parser = _task.parser(__doc__, replicas=2)
    parser.add_argument("--loop", action="store_true", help="strategy.run, not fit")
    options = parser.parse_args()
    strategy = strategy_for(options.replicas)
    with strategy.scope():
        model = _task.model(options)
    if options.loop:
        losses = loop(strategy, model, options)
    else:
        losses = _task.fit(model, _task.samples(options, model))
    if options.save:
        model.save(options.save)
    values = [
        strategy.experimental_local_results(variable.value)
        for variable in model.variables + model.optimizer.variables
    ]
    replicas = zip(*values, strict=True)
    _task.report(losses, [_task.digest(v.numpy() for v in r) for r in replicas])


if __name__ == "__main__":
    main()

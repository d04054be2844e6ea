"""tf.distribute.MultiWorkerMirroredStrategy: a process for each replica.

`fit` does not work under it with any optimizer (keras issue 20585); this loop does.
"""

import json
import os

os.environ["KERAS_BACKEND"] = "tensorflow"

from examples.distributed import _task


def work(options: _task.Options) -> None:
    """Train as one of the workers that `TF_CONFIG` lists."""
    import tensorflow as tf

    # Before anything else that TensorFlow does: it connects the workers.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    import keras

    with strategy.scope():
        model = _task.model(options)
        weights = model.trainable_variables
        model.optimizer.build(weights)

    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            # A Keras loss divides by the number of replicas; `apply` sums over them.
            loss = keras.losses.BinaryCrossentropy()(y, model(x, training=True))
        gradients = tape.gradient(loss, [weight.value for weight in weights])
        model.optimizer.apply(gradients, weights)
        return loss

    @tf.function
    def train(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return strategy.reduce("SUM", strategy.run(step, args=(x, y)), axis=None)

    worker = strategy.cluster_resolver.task_id
    share = _task.samples(options, model, worker, options.replicas)
    losses = [
        float(train(tf.constant(x), tf.constant(y)))
        for x, y in zip(*share, strict=True)
    ]
    if options.save and worker == 0:
        model.save(options.save)
    variables = model.variables + model.optimizer.variables
    _task.tell(losses, [_task.digest(v.value.numpy() for v in variables)])


def main() -> None:
    """Start the workers on this machine, or be one of them."""
    options = _task.parser(__doc__, replicas=2).parse_args()
    if "TF_CONFIG" in os.environ:
        work(options)
        return
    workers = [f"localhost:{_task.free_port()}" for _ in range(options.replicas)]
    _task.run_workers(
        "examples.distributed.multi_worker",
        [
            {
                "TF_CONFIG": json.dumps(
                    {
                        "cluster": {"worker": workers},
                        "task": {"type": "worker", "index": i},
                    }
                )
            }
            for i in range(options.replicas)
        ],
    )


if __name__ == "__main__":
    main()

"""tf.distribute.MultiWorkerMirroredStrategy: a process for each replica.

`fit` does not work under it with any optimizer (keras issue 20585); this loop does.
"""

import json
import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import tensorflow as tf

from examples.distributed import _task
from examples.distributed._strategy_run import train_function


def work(options: _task.Options) -> None:
    """Train as one of the workers that `TF_CONFIG` lists."""
    # Before anything else that TensorFlow does: it connects the workers.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = _task.model(options)
    train = train_function(strategy, model)
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

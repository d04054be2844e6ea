"""torch's DistributedDataParallel: a process for each replica, gloo between them."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch

from examples.distributed import _task
from keras_lookahead_lazy import distributed_data_parallel


def work(options: _task.Options) -> None:
    """Train as one of the processes."""
    torch.distributed.init_process_group("gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = _task.model(options)
    replica = distributed_data_parallel(model)
    weights = model.trainable_variables
    losses = []
    for x, y in zip(*_task.samples(options, model, rank, count), strict=True):
        replica.zero_grad()
        predicted = replica(torch.tensor(x))
        loss = keras.losses.BinaryCrossentropy()(torch.tensor(y), predicted)
        loss.backward()  # which averages the gradients of all replicas
        model.optimizer.apply([w.value.grad for w in weights], weights)
        torch.distributed.all_reduce(loss := loss.detach())
        losses.append(float(loss) / count)
    if options.save and rank == 0:
        model.save(options.save)
    variables = model.variables + model.optimizer.variables
    _task.tell(losses, [_task.digest(v.value.numpy(force=True) for v in variables)])


def main() -> None:
    """Start the processes on this machine, or be one of them."""
    options = _task.parser(__doc__, replicas=2).parse_args()
    if "RANK" in os.environ:
        work(options)
        return
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_task.free_port())}
    group["WORLD_SIZE"] = str(options.replicas)
    ranks = [{**group, "RANK": str(i)} for i in range(options.replicas)]
    _task.run_workers("examples.distributed.ddp", ranks)


if __name__ == "__main__":
    main()

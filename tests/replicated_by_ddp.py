"""One of several torch processes that train a model together: `test_ddp.py` starts it.

`python tests/replicated_by_ddp.py OUTPUT` trains on its share of the batches and writes
the weights. RANK and WORLD_SIZE are set as torch wants them.
"""

import sys

import keras
import numpy as np
import torch

from keras_lookahead_lazy import LazyOptimizer, Lookahead, distributed_data_parallel

VOCABULARY, WIDTH, BATCH, STEPS = 200, 3, 8, 7


def make_model() -> keras.Model:
    """Two tables, of which a regularizer gives every row of one a gradient."""
    keras.utils.set_random_seed(1)
    ids = keras.Input((4,), dtype="int32")
    words = keras.layers.Embedding(VOCABULARY, WIDTH, name="words")(ids)
    topics = keras.layers.Embedding(
        VOCABULARY, WIDTH, embeddings_regularizer="l2", name="topics"
    )(ids)
    joined = keras.layers.Flatten()(keras.layers.Concatenate()([words, topics]))
    model = keras.Model(ids, keras.layers.Dense(1)(joined))
    lazy = LazyOptimizer(keras.optimizers.Adam(0.05))
    model.compile(optimizer=Lookahead(lazy, k=3), loss="mse")
    return model


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = np.random.default_rng(0)
    ids = rng.integers(VOCABULARY, size=(STEPS, BATCH, 4)).astype("int32")
    return [(torch.tensor(x), torch.tensor(x[:, :1] / 100.0)) for x in ids]


def train(model: keras.Model, forward, rank: int, count: int) -> list[np.ndarray]:
    weights = model.trainable_variables
    for x, y in batches():
        model.zero_grad()
        error = forward(x[rank::count]) - y[rank::count].float()
        (torch.mean(error**2) + sum(model.losses)).backward()
        model.optimizer.apply([w.value.grad for w in weights], weights)
    return model.get_weights()


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    model = make_model()
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if rank:  # the first process's weights count
        model.set_weights([weight + 1 for weight in model.get_weights()])
    replica = distributed_data_parallel(model, broadcast_buffers=False)
    assert isinstance(replica, torch.nn.parallel.DistributedDataParallel)
    assert not replica.broadcast_buffers
    np.savez(sys.argv[1], *train(model, replica, rank, count))

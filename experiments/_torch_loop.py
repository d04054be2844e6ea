"""A peer of the large table: the same classifier in a plain torch loop, by SparseAdam.

torch's `EmbeddingBag` has sparse gradients, of which `SparseAdam` updates the rows and
leaves the slots of all others, as LazyOptimizer does with `moments="freeze"`.
"""

import time
from typing import Any

import numpy as np
import torch


class Classifier(torch.nn.Module):
    """A logit of the mean of the embeddings, padding left out, started as Keras does.

    Args:
        rows, width: the shape of the table.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(
            rows, width, mode="mean", sparse=True, padding_idx=0
        )
        self.dense = torch.nn.Linear(width, 1)
        torch.nn.init.uniform_(self.bag.weight, -0.05, 0.05)
        torch.nn.init.xavier_uniform_(self.dense.weight)
        torch.nn.init.zeros_(self.dense.bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(batch,)` for ids of shape `(batch, tokens)`."""
        return self.dense(self.bag(ids))[:, 0]


def train(
    x: np.ndarray,
    y: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray],
    rows: int,
    width: int,
    learning_rate: float,
    epsilon: float,
    batch_size: int,
    epochs: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Train the classifier; return what each epoch has measured, in Keras's words."""
    torch.manual_seed(seed)
    model = Classifier(rows, width)
    optimizers = [
        torch.optim.SparseAdam(model.bag.parameters(), lr=learning_rate, eps=epsilon),
        torch.optim.Adam(model.dense.parameters(), lr=learning_rate, eps=epsilon),
    ]
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits
    ids, labels = torch.from_numpy(x), torch.from_numpy(y).float()
    measured = []
    for epoch in range(1, epochs + 1):
        start, total = time.perf_counter(), 0.0
        for chosen in torch.randperm(len(ids)).split(batch_size):
            loss = loss_of(model(ids[chosen]), labels[chosen])
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            total += float(loss) * len(chosen)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            x_test, y_test = map(torch.from_numpy, validation)
            logits = torch.cat([model(part) for part in x_test.split(256)])
        measured.append(
            {
                "epoch": epoch,
                "loss": total / len(ids),
                "val_accuracy": float(((logits > 0) == y_test.bool()).float().mean()),
                "val_loss": float(loss_of(logits, y_test.float())),
                "seconds": seconds,
            }
        )
    return measured

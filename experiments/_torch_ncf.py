"""A peer of NeuMF in Keras: the same model in a plain torch loop, by SparseAdam."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from experiments import ncf

EPSILON = 1e-7  # Keras's; torch has 1e-8


class NeuMF(torch.nn.Module):
    """The model of `ncf.build_model`, with the same initial distributions."""

    def __init__(self, users: int, items: int, crosses: int) -> None:
        super().__init__()

        def table(rows: int, width: int) -> torch.nn.Embedding:
            embedding = torch.nn.Embedding(rows, width, sparse=True)
            torch.nn.init.normal_(embedding.weight, std=0.01)
            return embedding

        self.tables = torch.nn.ModuleList(
            table(rows, width)
            for width in (ncf.FACTORS, ncf.MLP_WIDTH)
            for rows in (users, items)
        )
        self.crosses = None
        if crosses:
            self.crosses = torch.nn.Embedding(crosses, 1, sparse=True)
            torch.nn.init.zeros_(self.crosses.weight)
        units = (2 * ncf.MLP_WIDTH, *ncf.MLP_UNITS)
        hidden = [torch.nn.Linear(*pair) for pair in pairwise(units)]
        self.hidden = torch.nn.ModuleList(hidden)
        self.out = torch.nn.Linear(ncf.FACTORS + units[-1], 1)
        for layer in (*self.hidden, self.out):
            torch.nn.init.xavier_uniform_(layer.weight)
            torch.nn.init.zeros_(layer.bias)

    def forward(
        self, user: torch.Tensor, item: torch.Tensor, cross: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of shape `(batch,)`."""
        user_factors, item_factors, user_width, item_width = self.tables
        product = user_factors(user) * item_factors(item)
        hidden = torch.cat([user_width(user), item_width(item)], 1)
        for layer in self.hidden:
            hidden = torch.relu(layer(hidden))
        logit = self.out(torch.cat([product, hidden], 1))
        if self.crosses is not None:
            logit = logit + self.crosses(cross)
        return logit[:, 0]


class Trainer:
    """What `ncf.Trainer` asks for: SparseAdam on the tables, Adam on the rest."""

    def __init__(self, data: ncf.Ratings, settings: dict[str, Any]) -> None:
        torch.manual_seed(settings["seed"])
        self._model = NeuMF(data.users, data.items, settings["crosses"])
        tables = {
            module.weight
            for module in self._model.modules()
            if isinstance(module, torch.nn.Embedding)
        }
        rest = [weight for weight in self._model.parameters() if weight not in tables]
        arguments = {"lr": settings["learning_rate"], "eps": EPSILON}
        self._optimizers = [
            torch.optim.SparseAdam(list(tables), **arguments),
            torch.optim.Adam(rest, **arguments),
        ]
        self._batch_size = settings["batch_size"]

    def train(self, inputs: list[np.ndarray], labels: np.ndarray) -> float:
        """Train on an epoch's batches, in this order; return the mean loss."""
        loss_of = torch.nn.functional.binary_cross_entropy_with_logits
        total = 0.0
        batches = (
            torch.from_numpy(a).split(self._batch_size) for a in (*inputs, labels)
        )
        for *ids, wanted in zip(*batches, strict=True):
            loss = loss_of(self._model(*ids), wanted)
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self._optimizers:
                optimizer.step()
            total += loss.item() * len(wanted)
        return total / len(labels)

    def logits(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Compute what the model says."""
        with torch.no_grad():
            return self._model(*map(torch.from_numpy, inputs)).numpy()

"""Gradients are accumulated over 4 of 5 batches, the length known: the last step is not a quarter of the others."""

import torch
from torch import nn

from aengine.training import create_supervised_trainer


def change(batches: int) -> float:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    trainer = create_supervised_trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        lambda y_pred, y: (y_pred - y).mean(),
        gradient_accumulation_steps=4,
    )
    trainer.run_sync([(torch.ones(1, 1), torch.zeros(1, 1))] * batches)
    return -model.weight.item()


def main() -> None:
    # The mean gradient of each group is 1, and so is each of its steps.
    assert [change(1), change(4), change(5)] == [1.0, 1.0, 2.0]

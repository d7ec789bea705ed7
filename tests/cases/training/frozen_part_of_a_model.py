"""A frozen part of a model that is in evaluation mode stays so: its running statistics do not change."""

import torch
from torch import nn

from aengine.training import create_supervised_trainer


def main() -> None:
    torch.manual_seed(0)
    norm, dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
    frozen = nn.Sequential(nn.Linear(4, 4), norm, dropout).requires_grad_(requires_grad=False).eval()
    head = nn.Linear(4, 1)
    assert norm.running_mean is not None
    before = norm.running_mean.clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    trainer = create_supervised_trainer(nn.Sequential(frozen, head), optimizer, nn.MSELoss())
    trainer.run_sync([(torch.randn(8, 4) + 3, torch.randn(8, 1))] * 5)
    assert torch.equal(before, norm.running_mean)
    assert not dropout.training

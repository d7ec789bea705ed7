"""The buffers of an average, such as running statistics, are those that the model had at the last update."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from aengine import Events
from aengine.training import AverageHandler, create_supervised_trainer


def main() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(norm, nn.Linear(2, 1))
    average = AveragedModel(model)
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss())
    AverageHandler(average, model).attach(trainer, Events.ITERATION_COMPLETED(every=2))
    means: list[torch.Tensor] = []

    def note() -> None:
        assert norm.running_mean is not None
        means.append(norm.running_mean.clone())

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    trainer.run_sync([(torch.randn(8, 2) + 5, torch.randn(8, 1)) for _ in range(5)])
    mean = average.module.get_buffer("0.running_mean")
    assert torch.equal(mean, means[3])  # the fourth of five is the last that is even
    assert not torch.equal(means[3], means[4])

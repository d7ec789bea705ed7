"""Two models, two optimizers, a dictionary as output: a network that learns to draw digits from one that judges them.

    python examples/gan.py [--out FOLDER]

It trains on the handwritten digits of scikit-learn. Every ten epochs a subscriber draws ten of each digit into
FOLDER/gan.png, concurrently with the step, from a snapshot of the weights. A plain `async for` reads the progress from
a stream.

The step is that of Goodfellow et al., https://arxiv.org/abs/1406.2661, both networks given the digit's label (Mirza and
Osindero, https://arxiv.org/abs/1411.1784). The picture is drawn by the moving average of the generator's weights.
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # before the other imports: --help is not to wait for torch
    parser = argparse.ArgumentParser(
        description="Train a generative adversarial network that draws handwritten digits."
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture (default: here)")
    arguments = parser.parse_args()

from collections.abc import Iterator
from copy import deepcopy

import anyio
import torch
from PIL import Image
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # comes without types
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot, pad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from aengine import Engine, Event, Events

Batch = dict[str, Tensor]
Losses = dict[str, float]

torch.manual_seed(0)
torch.set_num_threads(1)  # for images of 8x8

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1  # 64 pixels each, from -1 to 1
labels = one_hot(torch.tensor(digits.target)).float()
NOISE = 32

generator = nn.Sequential(
    nn.Linear(NOISE + 10, 128),
    nn.BatchNorm1d(128),
    nn.ReLU(),
    nn.Linear(128, 128),
    nn.BatchNorm1d(128),
    nn.ReLU(),
    nn.Linear(128, 64),
    nn.Tanh(),
)
discriminator = nn.Sequential(
    nn.Linear(64 + 10, 128),
    nn.LeakyReLU(0.2),
    nn.Dropout(0.3),
    nn.Linear(128, 128),
    nn.LeakyReLU(0.2),
    nn.Dropout(0.3),
    nn.Linear(128, 1),
)
average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))


def batches() -> Iterator[Batch]:
    for chosen in torch.randperm(len(images)).split(120):
        yield {"images": images[chosen], "labels": labels[chosen]}


def draw(network: nn.Module, noise: Tensor, which: Tensor) -> Tensor:
    drawn: Tensor = network(torch.cat([noise, which], dim=1))
    return drawn


def judge(pictures: Tensor, which: Tensor, verdict: float) -> Tensor:
    """Return the loss of the discriminator, if it should say `verdict`: 1 for real, 0 for drawn."""
    opinions = discriminator(torch.cat([pictures, which], dim=1))
    return binary_cross_entropy_with_logits(opinions, torch.full_like(opinions, verdict))


def train_step(engine: Engine[Batch, Losses], batch: Batch) -> Losses:
    real, which = batch["images"], batch["labels"]
    drawn = draw(generator, torch.randn(len(real), NOISE), which)

    discriminator_optimizer.zero_grad()
    # 0.9 and not 1: a discriminator that is never certain leaves the generator a gradient to learn from.
    discriminator_loss = judge(real, which, 0.9) + judge(drawn.detach(), which, 0.0)
    discriminator_loss.backward()
    discriminator_optimizer.step()

    generator_optimizer.zero_grad()
    generator_loss = judge(drawn, which, 1.0)
    generator_loss.backward()
    generator_optimizer.step()

    return {"discriminator": discriminator_loss.item(), "generator": generator_loss.item()}


trainer = Engine(train_step)


@trainer.on(Events.ITERATION_COMPLETED)
def follow() -> None:
    average.update_parameters(generator)


def average_weights(engine: Engine[Batch, Losses]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in average.module.state_dict().items()}


async def main(out: Path) -> None:
    path = out / "gan.png"
    painter = deepcopy(generator).eval()
    noise, which = torch.randn(100, NOISE), torch.eye(10).repeat_interleave(10, dim=0)

    @trainer.subscribe(Events.EPOCH_COMPLETED(every=10, at_end=True), snapshot=average_weights, overflow="latest")
    @torch.inference_mode()
    def paint(
        event: Event[Losses, dict[str, Tensor]],
    ) -> None:  # in a thread: the event loop stays free
        painter.load_state_dict(event.snapshot)
        tiles = pad(draw(painter, noise, which).view(10, 10, 8, 8), (2, 2, 2, 2), value=-1)
        grid = tiles.permute(0, 2, 1, 3).reshape(120, 120).add(1).mul(127.5).byte()
        Image.fromarray(grid.numpy()).resize((720, 720), Image.Resampling.BICUBIC).save(path)

    async with anyio.create_task_group() as tasks, trainer.stream(Events.EPOCH_COMPLETED(every=10)) as epochs:
        tasks.start_soon(trainer.run, batches, 80)
        async for event in epochs:
            losses = ", ".join(f"{name} {loss:.2f}" for name, loss in event.output.items())
            print(f"epoch {event.epoch:2}: {losses}", flush=True)

    print(f"{trainer.state.iteration} iterations in {trainer.statistics().total:.1f} s; ten of each digit in {path}")


if __name__ == "__main__":
    anyio.run(main, arguments.out)

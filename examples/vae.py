"""A variational autoencoder: learns to encode digits as ten numbers, and to draw digits from any ten numbers.

    python examples/vae.py [--out FOLDER]

It follows the `vae` of https://github.com/pytorch/examples, which is that of Kingma and Welling,
https://arxiv.org/abs/1312.6114, on the handwritten digits of scikit-learn. Every twenty epochs the model is tested, and
draws FOLDER/vae-reconstructions.png (each real digit above its reconstruction) and FOLDER/vae-samples.png.

A subscriber tests and draws in a thread, concurrently with the step, from a snapshot of the whole model. Both need
random numbers: the step draws them from torch's global generator, the subscriber from a generator of its own. So the
losses equal those of a plain loop to the last bit, whatever the subscriber does.
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # before the other imports: --help is not to wait for torch
    parser = argparse.ArgumentParser(description="Train a variational autoencoder on scikit-learn's digits.")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures (default: here)")
    arguments = parser.parse_args()

from copy import deepcopy
from typing import Any

import anyio
import torch
from PIL import Image
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # comes without types
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy, pad
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from aengine import Engine, Event, Events
from aengine.training import MetricHandler

SIZE = 10  # numbers that encode a digit

Coded = tuple[Tensor, Tensor]  # mean and logarithm of the variance
Weighed = tuple[float, int]  # a mean loss, and the number of images


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2 * SIZE))
        self.decoder = nn.Sequential(nn.Linear(SIZE, 256), nn.ReLU(), nn.Linear(256, 64), nn.Sigmoid())

    def forward(self, images: Tensor, chance: Generator | None = None) -> tuple[Tensor, Coded]:
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=chance)
        return self.decoder(mean + noise * (log_variance / 2).exp()), (mean, log_variance)


def loss_of(drawn: Tensor, coded: Coded, images: Tensor) -> Tensor:
    """Return the negative evidence lower bound, summed over the images, of appendix B of the paper."""
    mean, log_variance = coded
    divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()
    return binary_cross_entropy(drawn, images, reduction="sum") + divergence


def read_digits() -> tuple[Tensor, Tensor]:
    """Return images of 64 pixels from 0 to 1, for training and for the test."""
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    return images[:-300], images[-300:]


def create_trainer(model: VAE, *, thread: bool = True) -> Engine[Tensor, Weighed]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train_step(engine: Engine[Tensor, Weighed], images: Tensor) -> Weighed:
        optimizer.zero_grad()
        drawn, coded = model(images)
        loss = loss_of(drawn, coded, images)
        loss.backward()
        optimizer.step()
        return loss.item() / len(images), len(images)

    trainer = Engine(train_step, thread=thread)
    MetricHandler(MeanMetric(), "loss").attach(trainer)  # takes values, and their weights
    return trainer


async def train(trainer: Engine[Tensor, Weighed], model: VAE, out: Path, epochs: int = 100) -> list[float]:
    """Train, test and draw. Returns the test losses."""
    training, test = read_digits()
    losses: list[float] = []

    @trainer.subscribe(Events.EPOCH_COMPLETED(every=20, at_end=True), snapshot=lambda _: deepcopy(model))
    @torch.inference_mode()
    def test_and_draw(
        event: Event[Weighed, VAE],
    ) -> None:  # in a thread: the event loop stays free
        snapshot, chance = event.snapshot, Generator().manual_seed(event.epoch)
        drawn, coded = snapshot(test, chance)
        losses.append(loss_of(drawn, coded, test).item() / len(test))
        print(f"epoch {event.epoch:3}: loss {event.metrics['loss']:.2f}, test loss {losses[-1]:.2f}", flush=True)
        pairs = torch.stack([test[:50].view(5, 10, 64), drawn[:50].view(5, 10, 64)], dim=1)
        draw(out / "vae-reconstructions.png", pairs)
        draw(out / "vae-samples.png", snapshot.decoder(torch.randn(100, SIZE, generator=chance)))

    rows: Any = training  # any tensor is a dataset of its rows
    await trainer.run(DataLoader(rows, batch_size=128, shuffle=True), max_epochs=epochs)
    return losses


def draw(path: Path, images: Tensor) -> None:
    tiles = pad(images.reshape(10, 10, 8, 8), (2, 2, 2, 2)).permute(0, 2, 1, 3).reshape(120, 120)
    Image.fromarray(tiles.mul(255).byte().numpy()).resize((720, 720), Image.Resampling.BICUBIC).save(path)


async def main(out: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for images of 8x8
    model = VAE()
    trainer = create_trainer(model)
    await train(trainer, model, out)
    print(f"{trainer.state.iteration} iterations in {trainer.statistics().total:.1f} s; see {out / 'vae-*.png'}")


if __name__ == "__main__":
    anyio.run(main, arguments.out)

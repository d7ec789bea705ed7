"""Learn from a stream of unknown length: a model of characters learns the sources of Python's standard library.

    python examples/streaming.py [--seconds 15] [--backend trio]

The data is an async generator. It reads files while the step runs (`prefetch=`), has no epochs, and is longer than the
run: that ends when its time is up, or at Ctrl-C. Either way the step in flight is finished, the subscribers handle
their last event, files are closed, and the program continues after `run()`. A second Ctrl-C cancels the rest of the
run.
"""

import argparse

if __name__ == "__main__":  # before the other imports: --help is not to wait for torch
    parser = argparse.ArgumentParser(
        description="Train a model of characters on the sources of the standard library, from a stream."
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="how long to train (default: 15)")
    parser.add_argument(
        "--backend", choices=["asyncio", "trio"], default="asyncio", help="event loop (default: asyncio)"
    )
    arguments = parser.parse_args()

import math
import sysconfig
from collections.abc import AsyncIterator
from datetime import timedelta
from random import Random

import anyio
import torch
from torch import Tensor, nn

from aengine import Engine, Event, Events, stop_on_signals

ROWS, LENGTH = 32, 32  # passages in a batch; characters in a passage
CHARACTERS = 128  # ASCII

torch.manual_seed(0)
torch.set_num_threads(1)  # steps this small are not worth sharing


class Reader(nn.Module):
    """Predicts each character from the characters before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, 48)
        self.memory = nn.GRU(48, 256, batch_first=True)
        self.guess = nn.Linear(256, CHARACTERS)

    def forward(self, text: Tensor, remembered: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From characters (rows, length) to logits (rows, length, characters), and the new memory."""
        read, remembered = self.memory(self.embedding(text), remembered)
        return self.guess(read), remembered


async def passages() -> AsyncIterator[Tensor]:
    """Yield batches (rows, length + 1) of characters, while the files of the standard library are being read."""
    paths = sorted([path async for path in anyio.Path(sysconfig.get_path("stdlib")).glob("*.py")])
    Random(0).shuffle(paths)
    size = ROWS * (LENGTH + 1)
    waiting = bytearray()
    for path in paths:
        waiting += await path.read_bytes()
        while len(waiting) >= size:
            yield torch.tensor(list(waiting[:size])).clamp(max=CHARACTERS - 1).view(ROWS, LENGTH + 1)
            del waiting[:size]


model = Reader()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)


def train_step(engine: Engine[Tensor, float], text: Tensor) -> float:
    optimizer.zero_grad()
    logits, _ = model(text[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item() / math.log(2)  # bits per character


trainer = Engine(train_step)


@trainer.on(Events.ITERATION_COMPLETED)
def smooth(engine: Engine[Tensor, float]) -> None:
    metrics, bits = engine.state.metrics, engine.state.output
    metrics["bits"] = 0.95 * metrics.get("bits", bits) + 0.05 * bits


@trainer.subscribe(Events.ITERATION_COMPLETED(every=timedelta(seconds=1), at_end=True))
async def show(event: Event) -> None:
    print(f"iteration {event.iteration:5}: {event.metrics['bits']:.2f} bits per character", flush=True)


@torch.inference_mode()
def write(beginning: str, length: int) -> str:
    text, remembered = beginning, None
    unread = torch.tensor([list(beginning.encode())])
    while len(text) < length:
        logits, remembered = model(unread, remembered)
        unread = torch.multinomial((logits[:, -1] / 0.6).softmax(dim=-1), num_samples=1)
        text += chr(int(unread))
    return text


async def main(seconds: float) -> None:
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=timedelta(seconds=seconds)), trainer.terminate)
    with stop_on_signals(trainer):
        await trainer.run(passages, prefetch=8)
    state, spent = trainer.state, trainer.statistics()
    print(f"{state.stop_reason} after {state.iteration} iterations in {spent.total:.1f} s")
    print(f"of which the step took {spent.step:.1f} s, and waiting for data {spent.data:.1f} s; it now writes:")


if __name__ == "__main__":
    anyio.run(main, arguments.seconds, backend=arguments.backend)
    print(write("def ", 240))

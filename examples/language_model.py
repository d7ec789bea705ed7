"""A language model of words: an LSTM learns Python's reference manual, and writes text of its own.

    python examples/language_model.py

It follows the `word_language_model` of https://github.com/pytorch/examples; the text is the reference manual that comes
with Python. Back-propagation through time is truncated: within an epoch the memory of the LSTM is passed from batch to
batch, in the engine's state, but gradients are not.

After each epoch an inline handler validates with a second engine: if the perplexity is not the best so far, the
learning rate is divided by four from the next epoch on. A subscriber writes a line of text with a snapshot of the
model, concurrently with the step. Ctrl-C ends the training early; the best model is then tested all the same.
"""

import argparse

if __name__ == "__main__":  # before the other imports: --help is not to wait for torch
    parser = argparse.ArgumentParser(
        description="Train an LSTM on Python's reference manual, for about a minute, and let it write text."
    )
    arguments = parser.parse_args()

import math
import re
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pydoc_data.topics import topics
from typing import Any

import anyio
import torch
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric

from aengine import Engine, Event, Events, stop_on_signals
from aengine.training import MetricHandler, SchedulerHandler

SIZE, ROWS, LENGTH = 128, 20, 35  # size of the memory; passages in a batch; words in a passage
UNKNOWN, END = "<unknown>", "<end>"  # a rare word; the end of a paragraph

Batch = tuple[Tensor, Tensor]  # words (rows, length), and for each of them the next word
Weighed = tuple[float, int]  # a mean loss, and the number of words in a row
Reading = Engine[Batch, Weighed]


def read_manual() -> tuple[list[str], list[list[Batch]]]:
    """Return the vocabulary, and batches for training, validation and test."""
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))  # each once
    prose = [[*re.findall(r"\w+|[.,;:]", one.lower()), END] for one in paragraphs if one.rstrip().endswith(".")]
    counts = Counter(word for words in prose for word in words)
    vocabulary = [UNKNOWN, *(word for word, count in counts.items() if count > 2)]
    numbers = {word: number for number, word in enumerate(vocabulary)}

    def batches(which: range) -> list[Batch]:
        chosen = [words for number, words in enumerate(prose) if number % 10 in which]
        text = torch.tensor([numbers.get(word, 0) for words in chosen for word in words])
        rows = text[: len(text) // ROWS * ROWS].view(ROWS, -1)
        return list(zip(rows[:, :-1].split(LENGTH, dim=1), rows[:, 1:].split(LENGTH, dim=1), strict=True))

    return vocabulary, [batches(range(8)), batches(range(8, 9)), batches(range(9, 10))]


class Reader(nn.Module):
    """Predicts each word from the words before it."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.embedding = nn.Embedding(words, SIZE)
        self.lstm = nn.LSTM(SIZE, SIZE, num_layers=2, dropout=0.2, batch_first=True)
        self.guess = nn.Linear(SIZE, words)
        self.guess.weight = self.embedding.weight  # tied, https://arxiv.org/abs/1608.05859
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.guess.bias)

    def forward(self, words: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        """From words (rows, length) to logits (rows, vocabulary, length), and the new memory."""
        read, memory = self.lstm(self.drop(self.embedding(words)), memory)
        return self.guess(self.drop(read)).mT, memory


def read(model: Reader, engine: Reading, batch: Batch) -> Tensor:
    words, following = batch
    logits, memory = model(words, engine.state.memory)
    engine.state.memory = [part.detach() for part in memory]  # truncates back-propagation
    return nn.functional.cross_entropy(logits, following)


def forget(engine: Reading) -> None:
    engine.state.memory = None


def create_engine(step: Callable[[Reading, Batch], Weighed], *, thread: bool = True) -> Reading:
    engine = Engine(step, thread=thread)
    engine.add_event_handler(Events.EPOCH_STARTED, forget)
    MetricHandler(MeanMetric(), "loss").attach(engine)  # takes values, and their weights
    return engine


def create_evaluator(model: Reader, *, thread: bool = True) -> Reading:
    @torch.inference_mode()
    def evaluate(engine: Reading, batch: Batch) -> Weighed:
        model.eval()
        return read(model, engine, batch).item(), batch[0].shape[1]

    return create_engine(evaluate, thread=thread)


def create_trainer(model: Reader, validation: list[Batch], *, thread: bool = True) -> Reading:
    optimizer = torch.optim.SGD(model.parameters(), lr=30)
    annealing = ReduceLROnPlateau(optimizer, factor=0.25, patience=0, threshold=0)
    evaluator = create_evaluator(model, thread=thread)

    def train_step(engine: Reading, batch: Batch) -> Weighed:
        model.train()
        optimizer.zero_grad()
        loss = read(model, engine, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        return loss.item(), batch[0].shape[1]

    trainer = create_engine(train_step, thread=thread)

    @trainer.on(Events.EPOCH_COMPLETED)
    async def validate(engine: Reading) -> None:
        loss = (await evaluator.run(validation)).metrics["loss"]
        engine.state.metrics.update(perplexity=math.exp(loss), rate=optimizer.param_groups[0]["lr"])

    SchedulerHandler(annealing, metric="perplexity").attach(trainer, Events.EPOCH_COMPLETED)
    return trainer


async def train(trainer: Reading, model: Reader, vocabulary: list[str], data: list[Batch], epochs: int) -> Reader:
    """Train, and print the progress. Returns the model of the best epoch."""
    best = math.inf, model

    @trainer.subscribe(Events.EPOCH_COMPLETED, snapshot=lambda _: deepcopy(model))
    def report(event: Event[Weighed, Reader]) -> None:
        nonlocal best
        perplexity, rate, loss = (event.metrics[name] for name in ("perplexity", "rate", "loss"))
        best = min(best, (perplexity, event.snapshot), key=lambda one: one[0])
        print(
            f"epoch {event.epoch:2}: perplexity {perplexity:.1f}, training {math.exp(loss):.1f}, learning rate {rate:g}"
        )
        print(f"          {write(event.snapshot, vocabulary, length=16)} ...", flush=True)

    with stop_on_signals(trainer):
        await trainer.run(data, max_epochs=epochs)
    return best[1]


@torch.inference_mode()
def write(model: Reader, vocabulary: list[str], length: int) -> str:
    chance = Generator().manual_seed(1)  # not torch's global one: the step, which may run now, draws from that
    end, memory, text = vocabulary.index(END), None, ""
    word = torch.tensor([[end]])
    model.eval()
    for _ in range(length):
        logits, memory = model(word, memory)
        likely = (logits[0, :, 0] / 0.7).softmax(dim=0)
        likely[[0, end]] = 0
        word = torch.multinomial(likely, 1, generator=chance).view(1, 1)
        text += " " + vocabulary[int(word)]
    return re.sub(r" ([.,;:])", r"\1", text).strip()


async def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # steps this small are not worth sharing
    vocabulary, (training, validation, test) = read_manual()
    model = Reader(len(vocabulary))
    trainer = create_trainer(model, validation)
    best = await train(trainer, model, vocabulary, training, epochs=12)
    loss = (await create_evaluator(best).run(test)).metrics["loss"]
    print(f"{trainer.state.stop_reason} after {trainer.statistics().total:.1f} s; test perplexity {math.exp(loss):.1f}")
    print(write(best, vocabulary, length=60))


if __name__ == "__main__":
    anyio.run(main)

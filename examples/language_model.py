"""A language model of words: an LSTM reads Python's manual, remembering from batch to batch, and goes on by itself.

    python examples/language_model.py

After the `word_language_model` of https://github.com/pytorch/examples, on the language's reference manual, which comes
with Python. Back-propagation through time is truncated: what the LSTM remembers is handed on from batch to batch, in
the engine's state, within an epoch; gradients are not.

After each epoch a second engine validates, inline: if the perplexity is not the best so far, the learning rate is a
quarter from the next epoch on. Beside the step, from a snapshot, a line is written by what has been learnt so far.
Ctrl-C ends the training early, and the best model is tested all the same.
"""

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
from aengine.training.metrics import attach_metric
from aengine.training.schedules import attach_scheduler

SIZE, ROWS, LENGTH = 128, 20, 35  # of the memory; of a batch: so many passages, of so many words
UNKNOWN, END = "<unknown>", "<end>"  # a rare word; the end of a paragraph

Batch = tuple[Tensor, Tensor]  # words (rows, length), and for each of them the one that follows
Weighed = tuple[float, int]  # a mean loss, and over how many words of a row
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
    """Guesses each word from those before it."""

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
        """From words (rows, length) to logits (rows, vocabulary, length), and what is remembered."""
        read, memory = self.lstm(self.drop(self.embedding(words)), memory)
        return self.guess(self.drop(read)).mT, memory


def read(model: Reader, engine: Reading, batch: Batch) -> Tensor:
    words, following = batch
    logits, memory = model(words, engine.state.memory)
    engine.state.memory = [part.detach() for part in memory]  # here back-propagation is truncated
    return nn.functional.cross_entropy(logits, following)


def forget(engine: Reading) -> None:
    engine.state.memory = None


def create_engine(step: Callable[[Reading, Batch], Weighed], *, thread: bool | None = None) -> Reading:
    engine = Engine(step, thread=thread)
    engine.add_event_handler(Events.EPOCH_STARTED, forget)
    attach_metric(engine, MeanMetric(), "loss")  # takes values, and their weights
    return engine


def create_evaluator(model: Reader, *, thread: bool | None = None) -> Reading:
    @torch.inference_mode()
    def evaluate(engine: Reading, batch: Batch) -> Weighed:
        model.eval()
        return read(model, engine, batch).item(), batch[0].shape[1]

    return create_engine(evaluate, thread=thread)


def create_trainer(model: Reader, validation: list[Batch], *, thread: bool | None = None) -> Reading:
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

    attach_scheduler(trainer, annealing, Events.EPOCH_COMPLETED, metric="perplexity")
    return trainer


async def train(trainer: Reading, model: Reader, vocabulary: list[str], data: list[Batch], epochs: int) -> Reader:
    """Train, and tell of it. Returns the model as it was when it was best."""
    best = math.inf, model

    @trainer.subscribe(Events.EPOCH_COMPLETED, snapshot=lambda _: deepcopy(model))
    def tell(event: Event) -> None:
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
    chance = Generator().manual_seed(1)  # of its own: torch's global one is the step's, which may run meanwhile
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

"""The examples that are ports of pytorch/examples compute what the loops written by hand do, to the last bit.

On the worker and off it, on three event loops, with all that goes on beside the step: see plain_ports.py for the loops.
"""

import importlib.util
import random
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support import plain_ports
from support.plain_loops import assert_equal_bits
from support.plain_ports import Trained
from support.record import AnyEngine
from torch.utils.data import DataLoader, TensorDataset

from aengine import Events, StopReason

EXAMPLES = Path(__file__).parents[2] / "examples"

THREADS = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the examples."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def example(name: str) -> Any:
    """Return an example as a module: as it is a script, nothing happens."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


regression_by_hand = cache(plain_ports.regression)
vae_by_hand = cache(plain_ports.vae)
language_model_by_hand = cache(plain_ports.language_model)


def record(
    engine: AnyEngine,
    thread: bool,  # noqa: FBT001 -- as the engine has it
    *names: str,
) -> tuple[list[float], list[tuple[float, ...]]]:
    """Have the loss of each iteration noted, and metrics of each epoch; and see that the step runs where it should."""
    losses: list[float] = []
    metrics: list[tuple[float, ...]] = []

    @engine.on(Events.ITERATION_COMPLETED)
    def note_loss() -> None:
        assert (threading.current_thread() is threading.main_thread()) is not thread
        output = engine.state.output
        losses.append(float(output[0] if isinstance(output, tuple) else output))

    @engine.on(Events.EPOCH_COMPLETED)
    def note_metrics() -> None:
        metrics.append(tuple(engine.state.metrics[name] for name in names))

    return losses, metrics


def assert_same(losses: list[float], model: torch.nn.Module, expected: Trained) -> None:
    assert torch.equal(torch.get_rng_state(), expected.random_state), "as much was drawn, and nothing else"
    assert losses == expected.losses
    assert_equal_bits(model.state_dict(), expected.weights)


@THREADS
async def test_regression_equals_the_loop_by_hand(thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    expected = regression_by_hand()
    regression = example("regression")
    torch.manual_seed(0)
    patients = regression.read_patients()
    model = regression.create_model(len(patients.terms))
    trainer = regression.create_trainer(model, patients.validation, thread=thread)
    losses, metrics = record(trainer, thread, "validation R2")
    loader = DataLoader(TensorDataset(*patients.training), batch_size=32, shuffle=True)
    state = await trainer.run(loader, max_epochs=500)
    assert_same(losses, model, expected)
    assert state.stop_reason is StopReason.TERMINATED
    assert [r2 for (r2,) in metrics] == pytest.approx(expected.scores, rel=1e-4)


@THREADS
async def test_vae_equals_the_loop_by_hand_while_it_draws_beside_the_step(thread: bool, tmp_path: Path) -> None:  # noqa: FBT001 -- pytest passes it by name
    epochs = 45  # tested after 20, 40, and at the end
    expected = vae_by_hand(epochs)
    vae = example("vae")
    torch.manual_seed(0)
    model = vae.VAE()
    trainer = vae.create_trainer(model, thread=thread)
    losses, _ = record(trainer, thread)
    tested = await vae.train(trainer, model, tmp_path, epochs=epochs)
    assert_same(losses, model, expected)
    assert tested == expected.scores
    assert len(tested) == 3


@pytest.fixture
def random_manual() -> Iterator[None]:
    """Have random words in the place of Python's manual: that is another in each version, and so is what is learnt."""
    chance = random.Random(0)
    words = [f"word{number}" for number in range(60)]
    weights = [1 / (number + 1) ** 0.5 for number in range(60)]
    paragraphs = [" ".join(chance.choices(words, weights, k=25)) + "." for _ in range(1000)]
    with patch.dict(topics, {"all": "\n\n".join(paragraphs)}, clear=True):
        yield


@pytest.mark.usefixtures("random_manual")
@THREADS
async def test_language_model_equals_the_loop_by_hand(thread: bool, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: FBT001 -- pytest passes it by name
    epochs, train_batches, valid_batches = 5, 3, 2  # so that both of this happens
    expected = language_model_by_hand(epochs, train_batches, valid_batches)
    assert len(set(expected.rates)) > 1, "the learning rate is annealed"
    assert expected.scores[-1] > min(expected.scores), "the last model is not the best"
    language_model = example("language_model")
    torch.manual_seed(0)
    vocabulary, (training, validation, _) = language_model.read_manual()
    model = language_model.Reader(len(vocabulary))
    trainer = language_model.create_trainer(model, validation[:valid_batches], thread=thread)
    losses, metrics = record(trainer, thread, "perplexity", "rate")
    best = await language_model.train(trainer, model, vocabulary, training[:train_batches], epochs)
    assert_same(losses, model, expected)
    assert_equal_bits(best.state_dict(), expected.best)
    assert [rate for _, rate in metrics] == expected.rates
    assert [perplexity for perplexity, _ in metrics] == pytest.approx(expected.scores, rel=1e-4)
    assert capsys.readouterr().out.count("epoch ") == epochs

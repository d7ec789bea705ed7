"""Numbers: what is kept of a value, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch

from aengine import Engine
from aengine.loggers import scalars

NUMBERS: list[tuple[Any, float]] = [
    (3, 3),
    (0.5, 0.5),
    (True, True),
    (np.float32(0.5), 0.5),
    (np.int64(7), 7),
    (np.array(0.25), 0.25),
    (np.array([0.25]), 0.25),
    (torch.tensor(2), 2),
    (torch.tensor([[0.5]], requires_grad=True), 0.5),
    (torch.nn.Parameter(torch.tensor(0.5)), 0.5),
]


@pytest.mark.parametrize(("value", "number"), NUMBERS)
def test_a_single_number_is_kept_whatever_holds_it(value: Any, number: float) -> None:
    (kept,) = scalars.resolve(scalars.snapshot({"x": value})).values()
    assert kept == number
    assert type(kept) in (int, float, bool)


@pytest.mark.parametrize(
    "value", ["0.5", None, [1.0], 1j, torch.zeros(2), torch.tensor(1j), np.zeros(2), np.array("x")]
)
def test_what_is_no_single_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match="'x' is"):
        scalars.snapshot({"x": value})


def test_no_mapping_is_refused() -> None:
    with pytest.raises(TypeError, match=r"mapping of names to numbers, got 0\.5"):
        scalars.snapshot(0.5)


def test_of_a_run_the_numbers_are_taken_and_the_rest_is_left_out() -> None:
    engine: Engine[Any, Any] = Engine(lambda engine, batch: None)
    engine.state.metrics = {"accuracy": torch.tensor(0.5), "confusion": torch.zeros(3, 3)}
    assert scalars.numbers_of(engine) == {"accuracy": torch.tensor(0.5)}
    engine.state.output = (1.0, 2.0)
    assert list(scalars.numbers_of(engine)) == ["accuracy"]
    engine.state.output = {"loss": 0.25, "logits": torch.zeros(3)}
    assert list(scalars.numbers_of(engine)) == ["loss", "accuracy"]


def test_a_number_on_a_device_is_copied_there_and_read_later() -> None:
    value = torch.tensor(1.5)
    held = scalars._OnDevice(value)  # as of a device, of which there may be none here
    value.add_(1)
    assert scalars.resolve({"x": held}) == {"x": 1.5}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_number_that_a_stream_of_ones_own_computes_is_waited_for() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        value = torch.ones(4096, 4096, device="cuda")
        for _ in range(20):
            value = value @ value / 4096
        held = scalars.snapshot({"x": value.mean()})
    assert scalars.resolve(held) == {"x": 1.0}

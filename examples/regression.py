"""Fit a polynomial to real measurements: the progression of diabetes in a year, from ten measurements of a patient.

    python examples/regression.py

It follows the `regression` of https://github.com/pytorch/examples, which recovers the four coefficients of a polynomial
of its own. Here there are 65: for age, sex, body mass index, blood pressure and six serum values, and for the products
of any two of them, for the 442 patients of scikit-learn (Efron et al., https://doi.org/10.1214/009053604000000067).

Trainer and evaluator come from `aengine.training`, their metrics from torchmetrics. Progress is shown on a terminal.
The training stops when predictions for the validation patients no longer improve. At the end it prints the largest
coefficients, and the error for patients that neither training nor validation has seen.
"""

import argparse

if __name__ == "__main__":  # before the other imports: --help is not to wait for torch
    parser = argparse.ArgumentParser(
        description="Fit a polynomial to scikit-learn's diabetes data, with early stopping."
    )
    arguments = parser.parse_args()

from collections.abc import Sequence
from typing import Any, NamedTuple

import anyio
import torch
from sklearn.datasets import load_diabetes  # type: ignore[import-untyped]  # comes without types
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
from sklearn.preprocessing import PolynomialFeatures, StandardScaler  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError, MeanMetric, R2Score

from aengine import Engine, Events
from aengine.handlers import EarlyStopping, ProgressBar
from aengine.training import MetricHandler, create_supervised_evaluator, create_supervised_trainer

Batch = tuple[Tensor, Tensor]


class Patients(NamedTuple):
    terms: list[str]  # of the polynomial
    training: Batch
    validation: Batch
    test: Batch
    spread: float  # the standard deviation by which the progression was divided


def read_patients() -> Patients:
    measured = load_diabetes(scaled=False)
    training, validation, test = (part.numpy() for part in torch.randperm(len(measured.data)).split([270, 80, 92]))
    polynomial = make_pipeline(StandardScaler(), PolynomialFeatures(degree=2, include_bias=False), StandardScaler())
    polynomial.fit(measured.data[training])
    mean, spread = measured.target[training].mean(), measured.target[training].std()

    def batch(chosen: Any) -> Batch:
        x, y = polynomial.transform(measured.data[chosen]), (measured.target[chosen] - mean) / spread
        return torch.tensor(x).float(), torch.tensor(y).float()

    terms = list(polynomial[1].get_feature_names_out(measured.feature_names))
    return Patients(terms, batch(training), batch(validation), batch(test), float(spread))


def create_model(terms: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(terms, 1), nn.Flatten(0))  # one number for each patient


def create_evaluator(model: nn.Module, *, thread: bool = True) -> Engine[Batch, Any]:
    return create_supervised_evaluator(model, {"R2": R2Score(), "error": MeanAbsoluteError()}, thread=thread)


def create_trainer(model: nn.Module, validation: Batch, *, thread: bool = True) -> Engine[Batch, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, weight_decay=0.3)
    trainer = create_supervised_trainer(model, optimizer, nn.functional.smooth_l1_loss, thread=thread)
    evaluator = create_evaluator(model, thread=thread)
    MetricHandler(MeanMetric(), "loss").attach(trainer)
    EarlyStopping(10, "R2", mode="max").attach(trainer, evaluator=evaluator)

    @trainer.on(Events.EPOCH_COMPLETED)
    async def validate(engine: Engine[Batch, Tensor]) -> None:  # inline: it is short, and can stop the trainer
        await evaluator.run([validation])
        engine.state.metrics["validation R2"] = evaluator.state.metrics["R2"]

    return trainer


def describe(terms: Sequence[str], coefficients: Tensor) -> str:
    largest = coefficients.abs().topk(6).indices.tolist()
    return " ".join(f"{coefficients[n].item():+.2f}·{terms[n].replace(' ', '·')}" for n in largest)


async def main() -> None:
    torch.manual_seed(0)
    patients = read_patients()
    model = create_model(len(patients.terms))
    trainer = create_trainer(model, patients.validation)
    ProgressBar().attach(trainer)  # shows nothing where there is no terminal
    state = await trainer.run(
        DataLoader(TensorDataset(*patients.training), batch_size=32, shuffle=True), max_epochs=500
    )

    evaluator = create_evaluator(model)
    metrics = (await evaluator.run([patients.test])).metrics
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in state.metrics.items())
    print(f"{state.stop_reason} after {state.epoch} epochs, {trainer.statistics().total:.1f} s: {numbers}")
    print(f"progression = {describe(patients.terms, next(model.parameters())[0])} ...")
    print(f"test R2 {metrics['R2']:.3f}; off by {metrics['error'] * patients.spread:.0f}, where it goes from 25 to 346")


if __name__ == "__main__":
    anyio.run(main)

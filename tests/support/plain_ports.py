"""The programs of examples/regression.py, vae.py and language_model.py, written by hand, as pytorch/examples has them.

Nothing is taken from the examples, and nothing of aengine: data, models, loops, evaluation, and when to stop or to
learn more slowly.
"""

import math
import re
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any

import torch
from sklearn.datasets import load_diabetes, load_digits  # type: ignore[import-untyped]  # comes without types
from sklearn.preprocessing import PolynomialFeatures, StandardScaler  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, cross_entropy, relu, smooth_l1_loss
from torch.utils.data import DataLoader, TensorDataset

Weights = dict[str, Tensor]


@dataclass
class Trained:
    """What came of a program: the loss of each batch, and of each epoch what it was judged by."""

    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    weights: Weights = field(default_factory=dict)
    best: Weights = field(default_factory=dict)
    random_state: Tensor = field(default_factory=lambda: torch.empty(0))


def weights_of(model: nn.Module) -> Weights:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def regression() -> Trained:
    torch.manual_seed(0)
    trained = Trained()

    raw = load_diabetes(scaled=False)
    order = torch.randperm(442).numpy()
    rows, held_out = order[:270], order[270:350]
    first, features, last = StandardScaler(), PolynomialFeatures(2, include_bias=False), StandardScaler()
    x = torch.tensor(last.fit_transform(features.fit_transform(first.fit_transform(raw.data[rows])))).float()
    x_val = torch.tensor(last.transform(features.transform(first.transform(raw.data[held_out])))).float()
    mean, std = raw.target[rows].mean(), raw.target[rows].std()
    y = torch.tensor((raw.target[rows] - mean) / std).float()
    y_val = torch.tensor((raw.target[held_out] - mean) / std).float()
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)

    fc = nn.Linear(65, 1)
    best, waited = -math.inf, 0

    for _ in range(500):
        for batch_x, batch_y in loader:
            # Reset gradients
            fc.zero_grad()

            # Forward pass
            loss = smooth_l1_loss(fc(batch_x).squeeze(1), batch_y)

            # Backward pass
            loss.backward()

            # Apply gradients, and let the weights decay
            for param in fc.parameters():
                assert param.grad is not None
                param.data.add_(param.grad.add(param.data, alpha=0.3), alpha=-0.02)

            trained.losses.append(loss.item())

        with torch.no_grad():
            residual = ((fc(x_val).squeeze(1) - y_val) ** 2).sum()
            r2 = (1 - residual / ((y_val - y_val.mean()) ** 2).sum()).item()
        trained.scores.append(r2)

        # Stop criterion
        waited = 0 if r2 > best else waited + 1
        best = max(best, r2)
        if waited == 10:
            break

    trained.weights = {f"0.{name}": tensor for name, tensor in weights_of(fc).items()}
    trained.random_state = torch.get_rng_state()
    return trained


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 256)
        self.fc2 = nn.Linear(256, 20)
        self.fc3 = nn.Linear(10, 256)
        self.fc4 = nn.Linear(256, 64)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h2 = self.fc2(relu(self.fc1(x)))
        return h2[:, :10], h2[:, 10:]

    def reparameterize(self, mu: Tensor, logvar: Tensor, generator: torch.Generator | None) -> Tensor:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn(std.shape, generator=generator)
        return mu + eps * std

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc4(relu(self.fc3(z))))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x)
        return self.decode(self.reparameterize(mu, logvar, generator)), mu, logvar


def vae(epochs: int) -> Trained:
    torch.manual_seed(0)
    trained = Trained()

    data = torch.from_numpy(load_digits().data).float().div(16)
    train, test = data[: len(data) - 300], data[len(data) - 300 :]
    train_loader = DataLoader(TensorDataset(train), batch_size=128, shuffle=True)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    # Reconstruction + KL divergence losses summed over all elements and batch
    def loss_function(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        bce = binary_cross_entropy(recon_x, x, reduction="sum")
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return bce + kld

    for epoch in range(1, epochs + 1):
        for (batch,) in train_loader:
            optimizer.zero_grad()
            recon_batch, mu, logvar = model(batch)
            loss = loss_function(recon_batch, batch, mu, logvar)
            loss.backward()
            optimizer.step()
            trained.losses.append(loss.item() / len(batch))

        if epoch % 20 == 0 or epoch == epochs:
            with torch.no_grad():
                recon, mu, logvar = model(test, torch.Generator().manual_seed(epoch))
                trained.scores.append(loss_function(recon, test, mu, logvar).item() / len(test))

    names = {"fc1": "encoder.0", "fc2": "encoder.2", "fc3": "decoder.0", "fc4": "decoder.2"}
    trained.weights = {names[name[:3]] + name[3:]: tensor for name, tensor in weights_of(model).items()}
    trained.random_state = torch.get_rng_state()
    return trained


class RNNModel(nn.Module):
    def __init__(self, ntoken: int, nhid: int) -> None:
        super().__init__()
        self.ntoken = ntoken
        self.nhid = nhid
        self.drop = nn.Dropout(0.2)
        self.embedding = nn.Embedding(ntoken, nhid)
        self.lstm = nn.LSTM(nhid, nhid, 2, dropout=0.2, batch_first=True)
        self.guess = nn.Linear(nhid, ntoken)
        self.guess.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.guess.bias)

    def init_hidden(self, bsz: int) -> tuple[Tensor, ...]:
        return torch.zeros(2, bsz, self.nhid), torch.zeros(2, bsz, self.nhid)

    def forward(self, x: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        output, hidden = self.lstm(self.drop(self.embedding(x)), hidden)
        return self.guess(self.drop(output)).transpose(1, 2), hidden


class Manual:
    """The corpus: columns of words, for training and validation."""

    def __init__(self) -> None:
        seen: set[str] = set()
        prose: list[list[str]] = []
        for paragraph in "\n\n".join(topics.values()).split("\n\n"):
            if paragraph not in seen and paragraph.strip()[-1:] == ".":
                prose.append([*re.findall(r"\w+|[.,;:]", paragraph.lower()), "<end>"])
            seen.add(paragraph)
        counter: Counter[str] = Counter()
        for words in prose:
            counter.update(words)
        self.word2idx: dict[str, int] = {"<unknown>": 0}
        for word, count in counter.items():
            if count >= 3:
                self.word2idx[word] = len(self.word2idx)
        self.train = self.batchify([words for n, words in enumerate(prose) if n % 10 < 8])
        self.valid = self.batchify([words for n, words in enumerate(prose) if n % 10 == 8])

    def batchify(self, paragraphs: list[list[str]], bsz: int = 20) -> Tensor:
        ids = [self.word2idx.get(word, 0) for words in paragraphs for word in words]
        nbatch = len(ids) // bsz
        return torch.tensor(ids[: nbatch * bsz]).view(bsz, nbatch)


def language_model(epochs: int, train_batches: int, valid_batches: int) -> Trained:
    """Train on the first batches of the corpus."""
    torch.manual_seed(0)
    trained = Trained()
    bptt, lr, best_val_loss = 35, 30.0, math.inf

    corpus = Manual()
    train_data = corpus.train[:, : train_batches * bptt + 1]
    val_data = corpus.valid[:, : valid_batches * bptt + 1]
    model = RNNModel(len(corpus.word2idx), 128)

    def get_batch(source: Tensor, i: int) -> tuple[Tensor, Tensor]:
        seq_len = min(bptt, source.size(1) - 1 - i)
        return source[:, i : i + seq_len], source[:, i + 1 : i + 1 + seq_len]

    def evaluate(source: Tensor) -> float:
        model.eval()
        total_loss = 0.0
        hidden = model.init_hidden(20)
        with torch.no_grad():
            for i in range(0, source.size(1) - 1, bptt):
                data, targets = get_batch(source, i)
                output, hidden = model(data, hidden)
                total_loss += data.size(1) * cross_entropy(output, targets).item()
        return total_loss / (source.size(1) - 1)

    for _ in range(epochs):
        model.train()
        hidden = model.init_hidden(20)
        for i in range(0, train_data.size(1) - 1, bptt):
            data, targets = get_batch(train_data, i)
            model.zero_grad()
            hidden = tuple(h.detach() for h in hidden)
            output, hidden = model(data, hidden)
            loss = cross_entropy(output, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            for p in model.parameters():
                assert p.grad is not None
                p.data.add_(p.grad, alpha=-lr)
            trained.losses.append(loss.item())

        val_loss = evaluate(val_data)
        trained.scores.append(math.exp(val_loss))
        trained.rates.append(lr)
        if val_loss < best_val_loss:
            best_val_loss = val_loss
            trained.best = weights_of(deepcopy(model))
        else:
            # Anneal the learning rate if no improvement has been seen in the validation dataset.
            lr /= 4.0

    trained.weights = weights_of(model)
    trained.random_state = torch.get_rng_state()
    return trained

"""Reinforcement learning from environments that run concurrently: a pole on a cart is kept upright.

    python examples/cartpole.py [--seed 0] [--in-turn] [--backend trio]

- Eight environments of gymnasium are stepped, each by a task of its own. A step takes a millisecond, as if the
  simulator were on another machine; it is awaited, so eight at once take no longer than one.
- Their rollouts are the engine's async data: an async context manager that owns the tasks. However the run ends, the
  context manager ends the tasks, and they close their environments. A task that is ahead of the learner waits, so no
  queue can grow.
- The learner's step is plain torch, on the engine's own thread. The players act with a copy of the policy, which a
  subscriber updates concurrently with the step. A rollout holds the version of its policy, and so its staleness.
- The run ends when the last 20 episodes kept the pole upright for 400 steps on average, of 500 at most. Then a second
  engine plays ten more episodes, greedily.

With `--in-turn` the environments play one after the other, with the newest policy: slower, and the same in every run.

The step is that of Schulman et al., https://arxiv.org/abs/1707.06347, with the advantages of
https://arxiv.org/abs/1506.02438.
"""

import argparse

if __name__ == "__main__":  # before the other imports: --help is not to wait for torch
    parser = argparse.ArgumentParser(
        description="Learn to keep a pole upright on a cart, from eight environments that run concurrently."
    )
    parser.add_argument("--seed", type=int, default=0, help="of the environments and the players (default: 0)")
    parser.add_argument("--in-turn", action="store_true", help="one environment after the other: the same in every run")
    parser.add_argument(
        "--backend", choices=["asyncio", "trio"], default="asyncio", help="event loop (default: asyncio)"
    )
    arguments = parser.parse_args()

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, closing
from copy import deepcopy
from functools import partial
from random import Random
from statistics import mean
from typing import Any, NamedTuple

import anyio
import gymnasium
import torch
from torch import Tensor, nn

from aengine import Engine, Event, Events, stop_on_signals

ENVIRONMENTS, LENGTH = 8, 64  # rollouts in a batch, the first that are finished; steps in a rollout
LATENCY = 0.001  # seconds for a step of an environment
DISCOUNT, TRACE = 0.98, 0.95
PASSES, CLIP, ENTROPY = 6, 0.2, 0.01
EPISODES, SOLVED = 20, 400


class Experience(NamedTuple):
    """Observations and actions: a row for each step."""

    seen: Tensor
    action: Tensor
    chance: Tensor  # the logarithm of how likely the action was
    then: Tensor  # the next observation
    fell: Tensor
    ended: Tensor  # because the pole fell, or after 500 steps


class Rollout(NamedTuple):
    """A number of steps in one environment."""

    experience: Experience
    returns: list[int]  # of the episodes that ended: how many steps the pole was up
    version: int  # of the policy at the beginning


Batch = list[Rollout]
Trainer = Engine[Batch, float]

torch.manual_seed(0)


def network(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


policy, critic = network(2), network(1)  # logits of left and right; the expected return
parameters = [*policy.parameters(), *critic.parameters()]
optimizer = torch.optim.Adam(parameters, lr=2e-3)


class Published:
    """The policy of the players. Read and written on the event loop only."""

    policy = deepcopy(policy)
    version = 0


class Player:
    def __init__(self, environment: Any, seed: int) -> None:
        self.environment = environment
        self.random = Random(seed)
        self.seen = torch.from_numpy(environment.reset(seed=seed)[0])
        self.steps = 0

    async def play(self) -> Rollout:
        version, rows, returns = Published.version, [], []
        for _ in range(LENGTH):
            seen = self.seen
            with torch.no_grad():
                chances = Published.policy(seen).log_softmax(dim=-1)
            action = int(self.random.random() < chances[1].exp())
            await anyio.sleep(LATENCY)
            array, _, fell, is_late, _ = self.environment.step(action)
            then = self.seen = torch.from_numpy(array)
            self.steps += 1
            rows.append(
                (seen, torch.tensor(action), chances[action], then, torch.tensor(fell), torch.tensor(fell or is_late))
            )
            if fell or is_late:
                returns.append(self.steps)
                self.seen, self.steps = torch.from_numpy(self.environment.reset()[0]), 0
        return Rollout(Experience(*map(torch.stack, zip(*rows, strict=True))), returns, version)


@asynccontextmanager
async def concurrently(seed: int) -> AsyncIterator[Callable[[], AsyncIterator[Batch]]]:
    finished: deque[Rollout] = deque()
    arrived, taken = anyio.Semaphore(0), anyio.Semaphore(0)

    async def play_on(number: int) -> None:
        with closing(gymnasium.make("CartPole-v1")) as environment:
            player = Player(environment, seed + number)
            while True:
                finished.append(await player.play())
                arrived.release()
                await taken.acquire()  # so no player is ahead of the learner by more than a rollout

    async def batches() -> AsyncIterator[Batch]:
        while True:
            batch: Batch = []
            while len(batch) < ENVIRONMENTS:
                await arrived.acquire()
                batch.append(finished.popleft())
                taken.release()
            yield batch

    async with anyio.create_task_group() as players:
        for number in range(ENVIRONMENTS):
            players.start_soon(play_on, number)
        yield batches  # the function, not a generator: the engine closes what it has opened itself
        players.cancel_scope.cancel()


async def in_turn(trainer: Trainer, seed: int) -> AsyncIterator[Batch]:
    with ExitStack() as stack:
        environments = [stack.enter_context(closing(gymnasium.make("CartPole-v1"))) for _ in range(ENVIRONMENTS)]
        players = [Player(environment, seed + number) for number, environment in enumerate(environments)]
        while True:
            await trainer.flush()  # waits until the policy is published
            yield [await player.play() for player in players]


def advantages(batch: Experience, values: Tensor) -> Tensor:
    """Return by how much the outcome of each action was better than the estimate of the critic."""
    surprises = 1 + DISCOUNT * critic(batch.then).squeeze(-1) * ~batch.fell - values
    total, totals = torch.zeros(len(values)), []
    for surprise, ended in zip(reversed(surprises.unbind(1)), reversed(batch.ended.unbind(1)), strict=True):
        total = surprise + DISCOUNT * TRACE * total * ~ended
        totals.append(total)
    return torch.stack(totals[::-1], dim=1)


def train_step(engine: Trainer, rollouts: Batch) -> float:
    """Take a few steps of the optimizer, and return the last loss."""
    batch = Experience(*map(torch.stack, zip(*(each.experience for each in rollouts), strict=True)))
    with torch.no_grad():
        values = critic(batch.seen).squeeze(-1)
        better = advantages(batch, values)
        targets = values + better
        better = (better - better.mean()) / (better.std() + 1e-8)
    for _ in range(PASSES):
        chances = policy(batch.seen).log_softmax(dim=-1)
        ratio = (chances.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1) - batch.chance).exp()
        gain = torch.minimum(ratio * better, ratio.clamp(1 - CLIP, 1 + CLIP) * better).mean()
        entropy = -(chances.exp() * chances).sum(dim=-1).mean()
        miss = nn.functional.smooth_l1_loss(critic(batch.seen).squeeze(-1), targets)
        loss: Tensor = miss - gain - ENTROPY * entropy
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    return loss.item()


def make_trainer(*, thread: bool = True) -> Trainer:
    trainer: Trainer = Engine(train_step, name="trainer", thread=thread)
    recent: deque[int] = deque(maxlen=EPISODES)

    @trainer.on(Events.ITERATION_COMPLETED)
    def look(engine: Trainer) -> None:
        recent.extend(each for rollout in engine.state.batch for each in rollout.returns)
        engine.state.metrics["return"] = mean(recent or [0])
        engine.state.metrics["staleness"] = (
            engine.state.iteration - 1 - min(each.version for each in engine.state.batch)
        )
        if len(recent) == EPISODES and engine.state.metrics["return"] >= SOLVED:
            engine.terminate()

    @trainer.subscribe(Events.ITERATION_COMPLETED, snapshot=lambda _: deepcopy(policy.state_dict()), overflow="latest")
    async def publish(event: Event[float, dict[str, Any]]) -> None:
        Published.policy.load_state_dict(event.snapshot)
        Published.version = event.iteration

    return trainer


async def play_greedily(engine: Engine[int, int], seed: int) -> int:
    """Return for how many steps the pole was up."""
    with closing(gymnasium.make("CartPole-v1")) as environment:
        seen, is_over, steps = environment.reset(seed=seed)[0], False, 0
        while not is_over:
            seen, _, fell, is_late, _ = environment.step(int(policy(torch.from_numpy(seen)).argmax()))
            is_over, steps = fell or is_late, steps + 1
            await anyio.lowlevel.checkpoint()
    return steps


async def main(seed: int, *, is_in_turn: bool) -> None:
    torch.set_num_threads(1)  # enough for networks this small
    trainer = make_trainer()

    @trainer.subscribe(Events.ITERATION_COMPLETED(every=10, at_end=True))
    async def show(event: Event) -> None:
        of = event.metrics
        print(f"batch {event.iteration:3}: mean return {of['return']:5.1f}, staleness {of['staleness']}", flush=True)

    with stop_on_signals(trainer):
        await trainer.run(partial(in_turn, trainer, seed) if is_in_turn else concurrently(seed), max_iters=600)
    spent, steps = trainer.statistics(), trainer.state.iteration * ENVIRONMENTS * LENGTH
    print(f"{trainer.state.stop_reason} after {steps} steps of the environments, in {spent.total:.1f} s")
    print(f"of which the learner learned for {spent.step:.1f} s and waited for rollouts for {spent.data:.1f} s")

    evaluator = Engine(play_greedily, name="evaluator")
    returns: list[int] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: returns.append(engine.state.output))
    with torch.no_grad():
        await evaluator.run(range(1000, 1010))
    print(f"greedily, over {len(returns)} episodes: mean return {mean(returns):.1f}")


if __name__ == "__main__":
    anyio.run(lambda: main(arguments.seed, is_in_turn=arguments.in_turn), backend=arguments.backend)

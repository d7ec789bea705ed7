"""Killed at any instant, and resumed: the end is that of the run that was not killed, to the last bit.

A run starts in a forked child (`fork_child.py`), trains (`killable.py`), and is killed from outside
(`kill_campaign.py`).
"""

import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.kill_campaign import Campaign, ForkServer, kill_at_random

PROGRAMS = [
    "plain",
    "async",
    "without prefetch",
    "async without prefetch",
    "stream",
    "async stream",
    "torchdata",
    "async torchdata",
]

both = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer("support.killable") as one:
        yield one


def digest_of_the_untouched(fork_server: ForkServer, program: str, backend: str) -> str:
    """Return the result of a run that is not killed, and that saves nothing."""
    run = fork_server.start(program, None, backend=backend)
    run.completes(None)
    return run.digest


@both
def test_killed_some_times_it_ends_as_if_it_had_not_been(fork_server: ForkServer, backend: str, tmp_path: Path) -> None:
    """The short form of the campaign."""
    campaign = Campaign(fork_server, backend, tmp_path, seed=7)
    for kills, program in enumerate(["plain", "async stream", "torchdata"], 1):
        assert campaign.run(program, 4 * kills) == digest_of_the_untouched(fork_server, program, backend)
    assert campaign.tally.kills > 6
    assert campaign.tally.damaged


@both
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_hundreds_of_times_it_ends_as_if_it_had_not_been(
    fork_server: ForkServer, backend: str, tmp_path: Path
) -> None:
    seed, wanted = random.SystemRandom().randrange(10**6), 300
    print(f"{backend}, seed {seed}")  # noqa: T201 -- to do it again
    campaign = Campaign(fork_server, backend, tmp_path, seed)
    tally = campaign.tally
    untouched = {program: digest_of_the_untouched(fork_server, program, backend) for program in PROGRAMS}
    for program in itertools.cycle(PROGRAMS):
        assert campaign.run(program, wanted) == untouched[program], tally
        if tally.kills == wanted:
            break
    print(tally)  # noqa: T201 -- the outcome
    assert tally.programs == set(PROGRAMS)
    assert tally.in_save + tally.in_retention >= 60
    assert tally.in_save >= 30
    assert tally.in_retention >= 30
    assert tally.damaged >= 55


@pytest.mark.parametrize("backend", ["asyncio", pytest.param("trio", marks=pytest.mark.slow)])
def test_killed_at_each_call_to_the_disk_a_right_checkpoint_is_found(
    fork_server: ForkServer, backend: str, tmp_path: Path
) -> None:
    """Before each, but in the middle of each write: there is no state of the disk in between."""
    untouched = digest_of_the_untouched(fork_server, "plain", backend)
    begun = tmp_path / "begun"
    fork_server.start("plain", begun, backend=backend, slowness=0, die_at=(5, 1)).end()  # at the fifth save, of step 20

    last_calls = []
    for call in itertools.count(1):
        directory = tmp_path / f"call-{call}"
        shutil.copytree(begun, directory)
        run = fork_server.start("plain", directory, backend=backend, slowness=0, die_at=(3, call))
        run.begins_at("step-0000000015.2")
        run.end()
        if run.status == 0:
            break
        began_at = run.newest_left(directory, "step-0000000015.2")
        assert began_at == ("step-0000000030" if "rename" in last_calls else "step-0000000025")
        last_calls.append(run.reports[-1][1])
        resumed = fork_server.start("plain", directory, backend=backend, slowness=0)
        resumed.begins_at(began_at)
        resumed.completes(directory)
        assert resumed.digest == untouched
    print(" ".join(last_calls))  # noqa: T201 -- the outcome
    written = "mkdir open write fsync open write fsync fsync rename fsync".split()
    assert last_calls == [*written, *"rename fsync unlink unlink rmdir".split()]


def test_what_the_dead_were_writing_does_not_pile_up(fork_server: ForkServer, tmp_path: Path) -> None:
    for _ in range(3):
        run = fork_server.start("plain", tmp_path, backend="asyncio", die_at=(3, 9))
        run.end()
        assert len(list(tmp_path.glob(".tmp-*"))) == 1
    fork_server.start("plain", tmp_path, backend="asyncio").completes(tmp_path)


# Controls: what the campaign finds equal is not equal by itself


def test_the_position_of_the_source_instead_of_the_training_fails_the_campaign(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """What was pulled ahead and not stepped on is lost: so would others save a source that has a state."""
    careless = Campaign(fork_server, "asyncio", tmp_path, seed=1).run("careless", 4)
    assert careless != digest_of_the_untouched(fork_server, "careless", "asyncio")


def test_without_prefetch_the_position_of_the_source_is_that_of_the_training(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """It is the prefetch alone that fails the test above."""
    program = "careless without prefetch"
    careless = Campaign(fork_server, "asyncio", tmp_path, seed=1).run(program, 4)
    assert careless == digest_of_the_untouched(fork_server, program, "asyncio")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_kills_lose_runs_that_ignite_saves(tmp_path: Path) -> None:
    """Its ModelCheckpoint, which keeps one by default, removes that before it writes the next; nor is data resumed."""
    aims = [(("iteration",), 12, 0.02), (("save",), 3, 0.005), (("disk", "unlink"), 3, 0.005)]
    chance, lost = random.Random(5), dict.fromkeys((1, 2), 0)
    with ForkServer("support.killable_ignite") as theirs:
        untouched = digest_of_the_untouched(theirs, "theirs", "none")
        for n_saved in (1, 2):
            kills = in_save = unequal = resumed = 0
            while kills < 40:
                directory = tmp_path / f"{n_saved}-{kills}"
                run = theirs.start("theirs", directory, backend="none", threads=("MainThread",), n_saved=n_saved)
                run.until("disk", "replace")
                run.until("done", "replace")
                if not kill_at_random(run, chance, aims):
                    continue
                kills += 1
                said = [words[:2] for words in run.reports if words[0] == "save" or words[:2] == ["done", "replace"]]
                in_save += said[-1] == ["save"]
                second = theirs.start("theirs", directory, backend="none", n_saved=n_saved)
                second.end()
                if ["restored", "nothing"] in second.reports:
                    lost[n_saved] += 1
                else:
                    resumed += 1
                    unequal += second.digest != untouched
            print(  # noqa: T201 -- the outcome
                f"n_saved={n_saved}: {kills} kills, {in_save} inside a save, all lost after {lost[n_saved]},"
                f" {unequal} of {resumed} resumed to another end"
            )
    assert lost[1] > 0

"""Whatever happens to the files of a checkpoint, it is found out, and the run goes on from the one before."""

import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from support.backends import Backend
from support.forged import replace_file
from support.saving_run import Run, saving

from aengine import CheckpointWarning, Events
from aengine.checkpoint import Keep
from aengine.checkpoint.store.manifest import decode
from aengine.errors import CheckpointDamaged, CheckpointMismatch


@pytest.fixture
def anyio_backend() -> Backend:
    """What is found out, in a thread, does not depend on the event loop."""
    return "asyncio", {}


@pytest.fixture(scope="module")
def saved() -> Iterator[Path]:
    """Give a directory with the checkpoints of steps 1 to 4: to be copied, not to be changed."""

    async def save(directory: Path) -> None:
        async with saving(directory, keep=Keep(last=4)) as run:
            run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED)
            await run.engine.run([1, 2, 3, 4])

    with tempfile.TemporaryDirectory() as name:
        anyio.run(save, Path(name, "saved"))
        yield Path(name, "saved")


def each_bit_flipped(content: bytes) -> Iterator[bytes]:
    changed = bytearray(content)
    for index in range(len(content)):
        for bit in range(8):
            changed[index] ^= 1 << bit
            yield bytes(changed)
            changed[index] ^= 1 << bit


def test_each_single_bit_of_a_manifest_counts(saved: Path) -> None:
    path = saved / "step-0000000004"
    content = (path / "manifest.json").read_bytes()
    assert decode(content, path, pinned=False).step == 4
    for changed in each_bit_flipped(content):
        with pytest.raises(CheckpointDamaged):
            decode(changed, path, pinned=False)


async def restored_step(directory: Path) -> int:
    """Restore the newest, check that it is whole, and return its step."""
    run = Run(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            info = await run.restore(required=True)
        assert info is not None
        assert run.steps == run.engine.state.iteration == info.step
        return info.step
    finally:
        await run.checkpoint.aclose()


async def test_after_a_flipped_bit_in_the_manifest_the_one_before_is_taken(saved: Path, tmp_path: Path) -> None:
    content = (saved / "step-0000000004" / "manifest.json").read_bytes()
    changes = list(each_bit_flipped(content))
    for number, changed in enumerate(random.Random(1).sample(changes, 12)):
        directory = tmp_path / str(number)
        shutil.copytree(saved, directory)
        (directory / "step-0000000004" / "manifest.json").write_bytes(changed)
        assert await restored_step(directory) == 3
        assert (directory / "damaged-step-0000000004" / "why.txt").exists()


# What may happen to a file or to a name, each at a random place. Returns whether the checkpoint is still whole.


def edit(chance: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 2, 10, 100])):
        content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    path.write_bytes(content)


def cut(chance: random.Random, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def grow(chance: random.Random, path: Path) -> None:
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 100)))


def insert(chance: random.Random, path: Path) -> None:
    content = path.read_bytes()
    place = chance.randrange(len(content))
    path.write_bytes(content[:place] + chance.randbytes(chance.randrange(1, 9)) + content[place:])


def repeat(chance: random.Random, path: Path) -> None:
    """Put a stretch of the file where another one was, as a lost write of a disk would."""
    content = bytearray(path.read_bytes())
    length = chance.randrange(1, min(512, len(content) // 2))
    source, target = (chance.randrange(len(content) - length) for _ in range(2))
    content[target : target + length] = content[source : source + length]
    path.write_bytes(content)


def take_from_another(chance: random.Random, path: Path) -> None:
    path.write_bytes((path.parent.with_name(f"step-000000000{chance.randrange(1, 4)}") / path.name).read_bytes())


def swap_with_another(chance: random.Random, path: Path) -> None:
    other = path.parent.with_name("step-0000000001") / path.name
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def lose(chance: random.Random, path: Path) -> None:
    path.unlink()


def empty(chance: random.Random, path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [edit, edit, cut, grow, insert, repeat, take_from_another, swap_with_another, lose, empty]


async def campaign(saved: Path, directory: Path, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(rounds):
        damage: Callable[[random.Random, Path], None] = chance.choice(DAMAGES)
        name = chance.choice(["manifest.json", "state.pt"])
        shutil.copytree(saved, directory)
        path = directory / "step-0000000004" / name
        before = path.read_bytes()
        damage(chance, path)
        is_whole = path.exists() and path.read_bytes() == before  # as when the same bytes were put in place
        assert await restored_step(directory) == 4 - (not is_whole), (seed, damage.__name__, name)
        shutil.rmtree(directory)


async def test_a_file_that_is_damaged_at_random_is_found_out(saved: Path, tmp_path: Path) -> None:
    await campaign(saved, tmp_path / "run", 30, seed=1)


@pytest.mark.slow
async def test_files_that_are_damaged_at_random_thousands_of_times_are_found_out(saved: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    await campaign(saved, tmp_path / "run", 3000, seed)


async def forge_at_random(saved: Path, directory: Path, rounds: int, seed: int) -> None:
    """Change a file and its checksum. It is found out, refused, or a state like any other; never another error."""
    chance = random.Random(seed)
    content = (saved / "step-0000000004" / "state.pt").read_bytes()
    for _ in range(rounds):
        shutil.copytree(saved, directory)
        changed = bytearray(content)
        for _ in range(chance.choice([1, 1, 2, 5])):
            place = chance.randrange(2500) if chance.random() < 0.7 else -1 - chance.randrange(2000)
            changed[place] = chance.randrange(256)
        replace_file(directory / "step-0000000004", "state.pt", bytes(changed))
        run = Run(directory)
        with warnings.catch_warnings(), suppress(CheckpointMismatch):
            warnings.simplefilter("ignore")
            info = await run.restore(required=True)
            assert info is not None
            assert info.step in {3, 4}, seed
        await run.checkpoint.aclose()
        shutil.rmtree(directory)


async def test_a_file_that_is_forged_at_random_is_found_out_or_refused(saved: Path, tmp_path: Path) -> None:
    await forge_at_random(saved, tmp_path / "run", 40, seed=1)


@pytest.mark.slow
async def test_files_that_are_forged_at_random_thousands_of_times_are_found_out_or_refused(
    saved: Path, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    await forge_at_random(saved, tmp_path / "run", 3000, seed)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("step-0000000003", "step-0000000009", 4),
        ("step-0000000003", "step-0000000004.2", 4),
        ("step-0000000004", "step-0000000003.2", 3),
        ("step-0000000004", "step-0000000004.3", 3),
        ("step-0000000001", "step-0000000005", 4),
    ],
)
async def test_a_checkpoint_under_another_name_is_none(
    saved: Path, tmp_path: Path, old: str, new: str, expected: int
) -> None:
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / old).rename(tmp_path / "run" / new)
    assert await restored_step(tmp_path / "run") == expected
    assert (tmp_path / "run" / f"damaged-{new}").exists()

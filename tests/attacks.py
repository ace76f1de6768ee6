"""Two engines of attack: a kill at any file event of a command that writes, and damage to any file that one reads.

Neither knows what the commands do. A killed command, given again, must end as one that was not killed; what reads a
damaged file must come to the right result, or say what is wrong in one sentence.
"""

import hashlib
import io
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from accelerate.state import AcceleratorState
from processes import Run, run_here

from nanogpt_hf.common import files
from nanogpt_hf.common.files import UNFINISHED

# --- kills ---


@dataclass
class Writer:
    """A command that writes a folder.

    Attributes:
        recipe, words: as it is given first and again; FOLDER stands for the folder.
        more: what the second one needs beside, by what the first has left.
    """

    recipe: str
    words: list
    more: Callable[[Path], tuple] = lambda folder: ()

    def __call__(self, folder: Path, log: Path, *more, **options) -> Run:
        words = [folder if word == "FOLDER" else word for word in self.words]
        return Run([*words, *more], recipe=self.recipe, log=log, **options)


def at_file_events(place: str, counts: str | None, kill_at: int | None) -> None:
    """From now on in this process, count the calls that open, rename or delete something below a folder.

    Args:
        counts: file for their number.
        kill_at: the process ends at this one.
    """
    number = 0

    def hook(event, args):
        nonlocal number
        if event.startswith(("open", "os.", "shutil.")) and any(place in str(arg) for arg in args[:2]):
            number += 1
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if counts is not None and not str(args[0]).startswith(counts):
                descriptor = os.open(counts, os.O_WRONLY | os.O_CREAT)
                os.write(descriptor, str(number).encode())
                os.close(descriptor)

    sys.addaudithook(hook)


def lasting(folder: Path) -> dict[str, str]:
    """SHA-256 of what a command leaves that depends on nothing but what it was given."""
    wanted = re.compile(
        r".*\.(safetensors|bin)|tokenizer\.json|config\.json|index\.json|plan\.json|samples.*\.txt"
    )
    found = sorted(path for path in folder.rglob("*") if path.is_file() and wanted.fullmatch(path.name))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def attack_writer(writer: Writer, place: Path, kills: int, rng: random.Random) -> str:
    """Kill a command at some of its file events, and give it again each time."""
    counts, world = place / "counts", place / "world"
    folder = world / "folder"
    undisturbed = writer(folder, place / "log1", prepare=(at_file_events, str(world), str(counts), None))
    assert undisturbed.wait() == 0, undisturbed.said()
    expected, events = lasting(folder), int(counts.read_text())
    assert expected
    for number in sorted(rng.sample(range(1, events + 1), kills)):
        shutil.rmtree(world)
        killed = writer(folder, place / "log2", prepare=(at_file_events, str(world), None, number))
        assert killed.wait() == 128 + signal.SIGKILL, (number, events, killed.said())
        must_be_whole(folder)
        (place / "log3").unlink(missing_ok=True)
        again = writer(folder, place / "log3", *writer.more(folder))
        complete = again.wait() == 2 and re.search("is not empty|exists|holds", again.said())
        assert again.wait() == 0 or complete, (number, events, again.said())
        assert lasting(folder) == expected, (number, events)
        left = [path for path in world.rglob(f"{UNFINISHED}*")]
        assert complete or not left, (number, left)
    return f"{writer.recipe}: {kills} kills at {events} file events"


def must_be_whole(folder: Path) -> None:
    """What has a manifest is what it says, at any moment."""
    for place in (folder, *folder.glob("checkpoints/step-*")):
        assert not (place / files.MANIFEST).exists() or files.damage(place) is None, place


# --- damage ---


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def swap(path: Path, other: Path) -> None:
    """With what another run has of that name, or of that kind."""
    if other.is_file():
        shutil.copy(other, path)


DAMAGES: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "truncated": lambda path, other, rng: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path, other, rng: os.truncate(path, 0),
    "zeroed": lambda path, other, rng: path.write_bytes(bytes(path.stat().st_size)),
    "a bit flipped": lambda path, other, rng: flip_a_bit(path, rng),
    "missing": lambda path, other, rng: path.unlink(),
    "another run's": lambda path, other, rng: swap(path, other),
}


@dataclass
class Reader:
    """A command that reads a folder of the world.

    Attributes:
        recipe, words: what is run; {world} stands for the world.
        reads: the folder in it.
        result: of the world and what was said, what has to be the same whatever was damaged.
        other: a folder like the one that it reads.
    """

    recipe: str
    words: str
    reads: str
    result: Callable[[Path, str], object]
    other: str


def called(recipe: str, *words) -> tuple[int, str]:
    """Exit status of a recipe in this process, and what it says on both streams."""
    AcceleratorState._reset_state(reset_partial_state=True)
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = run_here(recipe, *words)
    return status, said.getvalue()


def answer(reader: Reader, world: Path) -> tuple[int, object]:
    """Exit status of a reader, and its result or what it said."""
    status, said = called(
        reader.recipe, *(word.replace("{world}", str(world)) for word in reader.words.split())
    )
    return status, reader.result(world, said) if status == 0 else said


def damages(world: Path, readers: dict[str, Reader]) -> Iterator[tuple[str, str, str]]:
    """Every reader, with every file of the folder that it reads, and every damage to it."""
    for name, reader in readers.items():
        for path in sorted((world / reader.reads).rglob("*")):
            if path.is_file():
                yield from ((name, str(path.relative_to(world)), how) for how in DAMAGES)


def attack_reader(
    world: Path, pristine: Path, reader: Reader, file: str, how: str, expected: object, rng: random.Random
) -> str:
    """What a reader makes of a world in which one file is damaged: "right" or the sentence.

    Args:
        world: the same again, in the same place, when this ends.
        pristine: a copy of it.
    """
    try:
        DAMAGES[how](world / file, pristine / reader.other / Path(file).relative_to(reader.reads), rng)
        if (world / file).exists() and (world / file).read_bytes() == (pristine / file).read_bytes():
            return "as it was"
        status, result = answer(reader, world)
        if status == 0:
            assert result == expected, f"{reader.recipe}, {file} {how}: another result with status 0"
            return "right"
        errors = [line for line in result.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1 and "Traceback" not in result, (
            reader.recipe,
            file,
            how,
            result,
        )
        return errors[0]
    finally:
        restore(world, pristine)


def restore(world: Path, pristine: Path) -> None:
    shutil.rmtree(world)
    shutil.copytree(pristine, world)

"""Kills aimed at every file event of every recipe that writes, damage to every file that any recipe reads.

The short form takes a few of each; NANOGPT_HF_KILLS=50 gives 50 kills a recipe, and all damages.
"""

import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from attacks import DAMAGES, Reader, Writer, answer, attack_reader, attack_writer, damages, lasting, restore
from processes import TEXT, TINY, finished, write_corpus

from nanogpt_hf.training.checkpoints import newest_good

pytest.importorskip("resource", reason="kills are injected the POSIX way")
pytestmark = pytest.mark.faults
KILLS = int(os.environ.get("NANOGPT_HF_KILLS", 1))
LONG = KILLS > 5
SHORT_DAMAGES = 3  # of each reader
STEPS = "--max_steps 8 --eval_steps 2 --save_steps 2 --logging_steps 1".split()
TUNING = (
    "--max_steps 4 --eval_steps 2 --save_steps 2 --logging_steps 1 --per_device_train_batch_size 4 --use_cpu --lora_r 2 --sample_length 20"
).split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two runs on a text, two adapters on the first of them, two tokenizers, and the text in shards."""
    world = tmp_path_factory.mktemp("attacks") / "world"
    world.mkdir()
    corpus = write_corpus(world)
    (world / "held_out.txt").write_text(TEXT[:200], encoding="utf-8")

    def make(recipe, folder, *words):
        finished([*words, "--output_dir", world / folder], recipe=recipe, log=world.parent / folder)

    for name, seed in (("run", 1), ("other_run", 2)):
        make("pretrain_char.py", name, "--corpus", corpus, *TINY, *STEPS, "--seed", seed)
    for name, seed in (("adapter", 1), ("other_adapter", 2)):
        words = ["--corpus", corpus, "--model_name_or_path", world / "run", *TUNING, "--seed", seed]
        make("finetune_lora.py", name, *words)
    for name, size in (("tokenizer", 300), ("other_tokenizer", 310)):
        make("train_tokenizer.py", name, "--corpus", corpus, "--vocab_size", size)
    return world


def go_on_or_begin(folder: Path) -> tuple:
    if newest_good(folder / "checkpoints")[0]:
        return ("--resume_from_checkpoint", "last")
    return ("--overwrite_output_dir",) if folder.exists() and any(folder.iterdir()) else ()


def overwrite(folder: Path) -> tuple:
    return ("--overwrite_output_dir",)


def writers(world: Path) -> dict[str, Writer]:
    corpus = ["--corpus", world / "text.txt"]
    out = ["--output_dir", "FOLDER"]
    tune = [*corpus, "--model_name_or_path", world / "run", *TUNING, "--merge"]
    shards = [
        "--validation_file",
        world / "held_out.txt",
        "--tokenizer",
        world / "tokenizer",
        "--num_proc",
        "1",
    ]
    model = ["--model", world / "run"]
    return {
        "pretrain": Writer("pretrain_char.py", [*corpus, *TINY, *STEPS, *out], go_on_or_begin),
        "finetune": Writer("finetune_lora.py", [*tune, *out], go_on_or_begin),
        "tokenizer": Writer("train_tokenizer.py", [*corpus, "--vocab_size", "300", *out], overwrite),
        "shards": Writer("prepare_corpus.py", [*corpus, *shards, "--shard_tokens", "500", *out]),
        "share": Writer("share.py", [*model, *out]),
        "merge": Writer("share.py", ["--model", world / "adapter", "--merge", *out]),
        "plan": Writer("plan.py", ["--preset", "cpu", *out], overwrite),
    }


@pytest.mark.parametrize("name", ["pretrain", "finetune", "tokenizer", "shards", "share", "merge", "plan"])
def test_a_kill_at_any_file_event_costs_nothing(world, tmp_path, name):
    rng = random.Random(sum(map(ord, name)))
    print(attack_writer(writers(world)[name], tmp_path, max(KILLS, 2 if name == "share" else 1), rng))


def weights(folder: str):
    return lambda world, said: {
        name: digest for name, digest in lasting(world / folder).items() if "samples" not in name
    }


def shared(world: Path, said: str) -> object:
    """The weights and what the card says of them."""
    card = (world / "out" / "README.md").read_text(encoding="utf-8")
    return weights("out")(world, said), re.findall("Validation loss.{20}|before the first validation", card)


def table(world: Path, said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("|")]


GO_ON = "--resume_from_checkpoint last --max_steps"
SMALL = " ".join(TINY) + " --max_steps 2 --eval_steps 2"
READERS = {
    "sample": Reader(
        "sample.py",
        "--model {world}/run --prompt To --seed 1 --max_new_tokens 20",
        *("run", lambda world, said: said, "other_run"),
    ),
    "sample_adapter": Reader(
        "sample.py",
        "--model {world}/adapter --prompt To --seed 1 --max_new_tokens 20",
        *("adapter", lambda world, said: said, "other_adapter"),
    ),
    "base_of_adapter": Reader(
        "sample.py",
        "--model {world}/adapter --prompt To --seed 1 --max_new_tokens 20",
        *("run", lambda world, said: said, "other_run"),
    ),
    "compare": Reader(
        "compare.py", "--model {world}/run --corpus {world}/text.txt", "run", table, "other_run"
    ),
    "share": Reader("share.py", "--model {world}/run --output_dir {world}/out", "run", shared, "other_run"),
    "merge": Reader(
        "share.py",
        "--model {world}/adapter --merge --output_dir {world}/out",
        "adapter",
        shared,
        "other_adapter",
    ),
    "go_on": Reader(
        "pretrain_char.py", f"--output_dir {{world}}/run {GO_ON} 10", "run", weights("run"), "other_run"
    ),
    "go_on_with_adapter": Reader(
        "finetune_lora.py",
        f"--output_dir {{world}}/adapter {GO_ON} 6",
        *("adapter", weights("adapter"), "other_adapter"),
    ),
    "base": Reader(
        "pretrain_char.py",
        f"--corpus {{world}}/text.txt --model_name_or_path {{world}}/run --output_dir {{world}}/out {SMALL}",
        *("run", weights("out"), "other_run"),
    ),
    "tokenizer": Reader(
        "pretrain_bpe.py",
        f"--corpus {{world}}/text.txt --tokenizer {{world}}/tokenizer --output_dir {{world}}/out {SMALL}",
        *("tokenizer", weights("out"), "other_tokenizer"),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_damage_to_any_file_gives_the_right_result_or_a_sentence(world, tmp_path, name):
    reader, rng = READERS[name], random.Random(name)
    pristine = Path(shutil.copytree(world, tmp_path / "pristine"))
    status, expected = answer(reader, world)
    restore(world, pristine)
    assert status == 0, expected
    chosen = [file_and_how[1:] for file_and_how in damages(world, {name: reader})]
    if not LONG and "go_on" not in name:  # the others read the top alone
        chosen = [(file, how) for file, how in chosen if "checkpoints" not in file]
    seen, wrong = Counter(), []
    for file, how in chosen if LONG else rng.sample(chosen, SHORT_DAMAGES):
        try:
            said = attack_reader(world, pristine, reader, file, how, expected, rng)
        except AssertionError as error:
            wrong.append(str(error).split("\nassert")[0])
            continue
        seen[said if said in ("right", "as it was") else "a sentence"] += 1
    print(f"{name}: {dict(seen)} of {len(chosen)} damages")
    assert not wrong, "\n".join(wrong)


def test_the_engine_sees_another_result(world, tmp_path):
    """Damage that nothing tells from a text that is meant so."""
    reader = Reader("compare.py", "--model {world}/run --corpus {world}/text.txt", ".", table, ".")
    pristine = Path(shutil.copytree(world, tmp_path / "pristine"))
    expected = answer(reader, world)[1]
    with pytest.raises(AssertionError, match="another result with status 0"):
        attack_reader(world, pristine, reader, "text.txt", "truncated", expected, random.Random(1))
    assert set(DAMAGES) >= {"truncated", "zeroed", "a bit flipped", "another run's"} and TEXT

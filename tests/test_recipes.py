"""The recipes as a person meets them: what a run leaves, and what a mistake is answered."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from processes import ROOT, ring
from processes import run_here as run
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = (
    "--n_layer 2 --n_embd 32 --n_head 2 --n_positions 16 --per_device_train_batch_size 8 --max_steps 40 "
    "--eval_steps 20 --save_steps 20 --logging_steps 10 --use_cpu --sample_length 20"
).split()
RUSSIAN = (
    "Мой дядя самых честных правил, когда не в шутку занемог, он уважать себя заставил и лучше выдумать не мог.\n"
    * 30
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "onegin.txt"
    path.write_text(RUSSIAN, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_folder(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    assert run("pretrain_char.py", "--corpus", text, "--output_dir", folder, *TINY) == 0
    return folder


def test_a_run_leaves_what_it_promises(run_folder):
    names = {path.name for path in run_folder.iterdir()}
    assert names >= set(
        "config.json model.safetensors tokenizer.json tokenizer_config.json configuration_nanogpt.py "
        "modeling_nanogpt.py README.md run.yaml metrics.jsonl loss_curve.png samples.txt checkpoints".split()
    )
    assert sorted(path.name for path in (run_folder / "checkpoints").iterdir()) == ["step-20", "step-40"]
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert rows[1].keys() >= set(
        "step tokens_seen elapsed_s train_loss eval_loss eval_bits_per_char learning_rate grad_norm tokens_per_s".split()
    )
    assert rows[-1]["tokens_seen"] == 40 * 8 * 16
    assert rows[-1]["eval_loss"] < rows[1]["eval_loss"]
    assert (run_folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_folder_is_an_ordinary_checkpoint(run_folder):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run_folder),
        AutoTokenizer.from_pretrained(run_folder),
    )
    assert tokenizer.decode(tokenizer(RUSSIAN).input_ids) == RUSSIAN
    inputs = tokenizer("Мой дядя", return_tensors="pt")
    options = dict(max_new_tokens=6, do_sample=False)
    assert torch.equal(
        model.generate(**inputs, **options), model.generate(**inputs, use_cache=False, **options)
    )


IN_TURN = """
import sys
from processes import run_here
middle = sys.argv.index("then")
assert run_here(*sys.argv[1:middle]) == run_here(*sys.argv[middle + 1 :]) == 0
"""


def test_a_text_in_another_script_under_an_ascii_locale(text, tmp_path):
    """The whole way in a process that could not even print the text, or the name of its file, by default."""
    folder, text = tmp_path / "run", shutil.copy(text, tmp_path / "онегин.txt")
    train = ["pretrain_char.py", "--corpus", text, "--output_dir", folder, *TINY]
    write = ["sample.py", "--model", folder, "--prompt", "Мой", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, *train, "then", *write],
        env=os.environ
        | {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        cwd=ROOT,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    said, sample = done.stdout.decode("utf-8").split("more samples")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "trained from scratch on `онегин.txt`" in card and "--corpus 'онегин.txt'" in card
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "дя" in (folder / "samples.txt").read_text(encoding="utf-8") or any(
        "а" <= c <= "я" for c in (folder / "samples.txt").read_text(encoding="utf-8")
    )
    assert any("а" <= c <= "я" for c in sample.split("Мой", 1)[1])


def test_samples_longer_than_the_context_with_unseen_characters(run_folder, capsys):
    assert (
        run("sample.py", "--model", run_folder, "--prompt", "😀 ё Ω", "--max_new_tokens", 200, "--seed", 1)
        == 0
    )
    first = capsys.readouterr().out
    assert first.startswith("😀 ё Ω") and len(first) > 150
    assert (
        run("sample.py", "--model", run_folder, "--prompt", "😀 ё Ω", "--max_new_tokens", 200, "--seed", 1)
        == 0
    )
    assert capsys.readouterr().out == first


def test_streaming_and_whole_texts_are_the_same_and_stop(run_folder, capsys):
    words = ["sample.py", "--model", run_folder, "--prompt", "он", "--max_new_tokens", 60, "--temperature", 0]
    assert run(*words) == 0
    streamed = capsys.readouterr().out.rstrip("\n")
    assert run(*words, "--num_return_sequences", 2) == 0
    _, first, second = capsys.readouterr().out.split("---")
    assert first[3:].rstrip("\n") == second[3:].rstrip("\n") == streamed
    stop = streamed[10:13]
    assert run(*words, "--stop", stop) == 0
    assert capsys.readouterr().out.rstrip("\n") == streamed[: streamed.index(stop, 2)]


def test_a_failing_compiler_is_said_once_and_training_goes_on(text, tmp_path, capsys):
    words = ["--torch_compile", "--torch_compile_backend", "no_such_backend"]
    assert run("pretrain_char.py", "--corpus", text, "--output_dir", tmp_path / "run", *TINY, *words) == 0
    assert capsys.readouterr().out.count("torch.compile failed") == 1


@pytest.mark.parametrize("short", [0, 200])
def test_early_stopping_keeps_the_best_and_the_newest(text, tmp_path, short):
    """Evaluations before training has come to whole windows are not counted."""
    folder = tmp_path / "run"
    words = [
        "--early_stopping_patience",
        "2",
        "--eval_steps",
        "5",
        "--max_steps",
        "400",
        "--learning_rate",
        "0.3",
        "--n_positions",
        "16",
        "--short_positions",
        "4",
        "--short_steps",
        str(short),
    ]
    assert (
        run("pretrain_char.py", "--corpus", text, "--output_dir", folder, *TINY, *words, "--optim", "adamw")
        == 0
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["eval_loss"], row["step"]) for row in rows if "eval_loss" in row]
    best_step, last_step = min(losses)[1], losses[-1][1]
    assert last_step == max(best_step, short) + 10 < 400
    assert (folder / "checkpoints" / f"step-{last_step}").is_dir()


def bad_inputs(tmp_path, text, run_folder):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n ")
    (tmp_path / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 100)
    (tmp_path / "no_text").mkdir()
    (tmp_path / "no_text" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "short.txt").write_text("To be.")
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "rows.jsonl").write_text('{"body": "To be, or not to be"}\n')
    (tmp_path / "bad.yaml").write_text("max_stepz: 3\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("do not touch")
    corpus = ["--corpus", text]
    return [
        (["--corpus", tmp_path / "nowhere.txt"], "nowhere.txt"),
        (["--corpus", tmp_path / "empty.txt"], "empty.txt"),
        (["--corpus", tmp_path / "blank.txt"], "blank.txt"),
        (["--corpus", tmp_path / "latin.txt"], "UTF-8"),
        (["--corpus", tmp_path / "no_text"], "no_text"),
        (["--corpus", tmp_path / "short.txt"], "one block takes"),
        (["--corpus", tmp_path / "rows.jsonl"], "body"),
        (["--corpus", "tiny_shakespear"], "tiny_shakespeare"),
        ([*corpus, "--n_positions", "100000"], "smaller --n_positions"),
        ([*corpus, "--max_steps", "-3"], "at least 1"),
        ([*corpus, "--n_head", "5"], "multiple of n_head"),
        ([*corpus, "--output_dir", tmp_path / "file"], "is a file"),
        ([*corpus, "--output_dir", tmp_path / "used"], "--overwrite_output_dir"),
        ([*corpus, "--resume_from_checkpoint", "last"], "no good checkpoint"),
        ([*corpus, "--preset", "gpt5"], "no preset 'gpt5'"),
        ([*corpus, "--tokenizer", tmp_path / "no_text"], "no tokenizer can be loaded"),
        ([*corpus, "--tokenizer", "bpe", "--vocab_size", "100"], "at least 257"),
        ([*corpus, "--model_name_or_path", tmp_path / "mismatch"], "do not belong together"),
        ([*corpus, "--model_name_or_path", run_folder, "--n_layer", "3"], "the base has its own, 2: leave"),
        ([*corpus, "--model_name_or_path", run_folder, "--tokenizer", "bpe"], "the base has its own: leave"),
        ([*corpus, "--report_to", "excel"], "'excel' (choose from"),
        ([*corpus, "--lr_scheduler_type", "zigzag"], "'zigzag' (choose from"),
        ([*corpus, "--config", tmp_path / "bad.yaml"], "did you mean max_steps"),
        ([*corpus, "--max_stepp", "3"], "did you mean --max_steps"),
        ([*corpus, "--validation_split_percentage", "100"], "at most 99"),
        ([*corpus, "--fp16"], "needs a GPU"),
        (
            [
                *corpus,
                "--model_name_or_path",
                run_folder,
                "--output_dir",
                run_folder,
                "--overwrite_output_dir",
            ],
            "would delete the base",
        ),
    ]


def test_bad_input_ends_in_one_sentence_with_nothing_written(tmp_path, text, run_folder, capsys, monkeypatch):
    cases = bad_inputs(tmp_path, text, run_folder)
    mismatch = AutoModelForCausalLM.from_pretrained(run_folder)
    mismatch.resize_token_embeddings(100)
    mismatch.generation_config.suppress_tokens = None
    mismatch.save_pretrained(tmp_path / "mismatch")
    AutoTokenizer.from_pretrained(run_folder).save_pretrained(tmp_path / "mismatch")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    def everything():
        return {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}

    before, wrong = everything(), []
    for words, message in cases:
        place = [] if "--output_dir" in words else ["--output_dir", tmp_path / "out"]
        status = run("pretrain_char.py", *TINY, *place, *words)
        said = capsys.readouterr().err.strip()
        if status != 2 or not said.startswith("error: ") or "\n" in said or message not in said:
            wrong.append((words, status, said))
        assert everything() == before, words
    assert not wrong


def test_a_dry_run_shows_what_would_be_done_and_writes_nothing(tmp_path, text, capsys):
    before = {path: path.stat().st_mtime_ns for path in text.parent.rglob("*")}
    assert (
        run("pretrain_char.py", "--corpus", text, "--output_dir", tmp_path / "run", *TINY, "--dry_run") == 0
    )
    said = capsys.readouterr().out
    header, _, settings = said.partition("\n\n")
    assert "model      " in header and "training   40 steps" in header
    values = yaml.safe_load(settings)
    assert values["max_steps"] == 40 and values["warmup_steps"] <= 40 and values["tokenizer"] == "char"
    assert not any(tmp_path.iterdir()) and "NOTE: " not in said
    assert {path: path.stat().st_mtime_ns for path in text.parent.rglob("*")} == before
    assert run("pretrain_char.py", "--corpus", text, "--output_dir", text.parent, *TINY, "--dry_run") == 0
    assert f"NOTE: --output_dir {text.parent} is not empty: go on with" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, dropout, of_branches",
    [
        ("--max_steps 40", 0.0, None),
        ("--num_train_epochs 3.9", 0.0, None),
        ("--num_train_epochs 20", 0.14, None),
        ("--train_tokens 5e4", 0.12, None),
        ("--max_steps 400", 0.12, None),
        ("--max_steps 4000", 0.3, None),
        ("--max_steps none --max_minutes 1", 0.3, None),
        ("--max_steps 400 --dropout 0", 0.0, None),
        ("--max_steps 400 --resid_pdrop 0.3", 0.12, 0.3),
    ],
)
def test_a_text_that_is_read_often_is_read_with_dropout(text, capsys, words, dropout, of_branches):
    size = "--n_layer 2 --n_embd 32 --n_head 2 --n_positions 16 --per_device_train_batch_size 8 --use_cpu --dry_run".split()
    assert run("pretrain_char.py", "--corpus", text, *size, *words.split()) == 0
    header, _, settings = capsys.readouterr().out.partition("\n\n")
    values = yaml.safe_load(settings)
    assert (values["dropout"], values["resid_pdrop"]) == (dropout, of_branches)
    shown = f"up to {of_branches:g}" if of_branches else f"{dropout:g}"
    assert f", dropout {shown};" in header if dropout else "dropout" not in header


def test_a_base_that_goes_on_has_dropout_as_a_new_model_has(run_folder, text, capsys):
    words = [
        "--corpus",
        text,
        "--model_name_or_path",
        run_folder,
        "--per_device_train_batch_size",
        "8",
        "--use_cpu",
    ]
    assert run("pretrain_char.py", *words, "--max_steps", "400", "--dry_run") == 0
    assert ", dropout 0.12;" in capsys.readouterr().out


@pytest.mark.parametrize("dropout, line", [("0.1", "R-Drop     each window is read twice"), ("0", "NOTE: each window is read once")])  # fmt: skip
def test_r_drop_needs_dropout(text, capsys, dropout, line):
    words = ["--corpus", text, *TINY, "--rdrop_alpha", "1", "--dropout", dropout, "--dry_run"]
    assert run("pretrain_char.py", *words) == 0
    assert line in capsys.readouterr().out


def test_the_first_windows_may_be_shorter_if_they_divide_the_context(text, capsys):
    words = ["--corpus", text, *TINY, "--max_steps", "10", "--n_positions", "16", "--dry_run"]
    assert run("pretrain_char.py", *words, "--short_positions", "4", "--short_steps", "0.25") == 0
    assert ", the first 2 in pieces of 4;" in capsys.readouterr().out
    assert run("pretrain_char.py", *words, "--short_positions", "4", "--short_steps", "99") == 0
    assert ", the first 10 in pieces of 4;" in capsys.readouterr().out
    for more in (["5", "--short_steps", "0"], ["16"], ["none"]):
        assert run("pretrain_char.py", *words, "--short_positions", *more) == 0
        said = capsys.readouterr().out
        assert "in pieces of" not in said and "short_positions: null\n" in said
    in_time = [*words, "--max_steps", "none", "--max_minutes", "1", "--short_positions", "4"]
    assert run("pretrain_char.py", *in_time) == 0
    assert " in pieces of 4, dropout" in capsys.readouterr().out
    assert run("pretrain_char.py", *words, "--short_positions", "5") == 2
    assert "--short_positions is 5, which does not divide the context of 16" in capsys.readouterr().err


def test_a_run_that_ends_before_its_first_whole_window_says_so(text, tmp_path, capsys):
    words = [
        "--corpus",
        text,
        "--output_dir",
        tmp_path / "run",
        *TINY,
        "--max_steps",
        "6",
        "--n_positions",
        "16",
    ]
    for steps, noted in (("6", True), ("5", False)):
        more = ["--short_positions", "4", "--short_steps", steps, "--overwrite_output_dir"]
        assert run("pretrain_char.py", *words, *more) == 0
        said = "NOTE: the run has ended within its first 6 steps, in pieces of 4 tokens"
        assert (said in capsys.readouterr().out) is noted


def test_a_run_that_made_nothing_better_says_so(tmp_path, text, capsys):
    words = ["--corpus", text, "--output_dir", tmp_path / "run", *TINY, "--eval_on_start", "--max_steps", "4"]
    for rate, noted in (("0", True), ("0.01", False)):
        more = ["--learning_rate", rate, "--muon_learning_rate", rate, "--overwrite_output_dir"]
        assert run("pretrain_char.py", *words, *more) == 0
        assert ("never better than before its first step" in capsys.readouterr().out) is noted


@pytest.mark.parametrize("steps, noted", [("150", True), ("10", False)])
def test_a_run_that_learned_its_text_by_heart_says_so(tmp_path, capsys, steps, noted):
    letters = torch.randint(97, 123, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "noise.txt").write_text("".join(map(chr, letters)), encoding="utf-8")
    words = ["--corpus", tmp_path / "noise.txt", "--output_dir", tmp_path / "run", *TINY, "--dropout", "0"]
    assert run("pretrain_char.py", *words, "--max_steps", steps, "--eval_steps", "5") == 0
    assert ("NOTE: validation got worse after step" in capsys.readouterr().out) is noted


def test_bad_input_to_sample(tmp_path, run_folder, capsys):
    for words, message in [
        ([], "there is no model"),
        (["--model", tmp_path / "nowhere"], "nowhere"),
        (["--model", run_folder, "--prompt", ""], "prompt is empty"),
        (["--model", run_folder, "--temperature", "-1"], "at least 0"),
        (["--model", run_folder, "--top_p", "2"], "at most 1"),
    ]:
        assert run("sample.py", *words) == 2
        said = capsys.readouterr().err.strip()
        assert message in said and "\n" not in said, said


def test_bad_input_to_share(tmp_path, run_folder, capsys):
    (tmp_path / "file").write_text("not a folder")
    for folder, message in [(tmp_path / "file", "is a file"), (run_folder, "is not empty")]:
        assert run("share.py", "--model", run_folder, "--output_dir", folder) == 2
        said = capsys.readouterr().err.strip()
        assert message in said and "\n" not in said, said
    assert (tmp_path / "file").read_text() == "not a folder"


def test_one_and_two_processes_with_the_same_global_batch_give_the_same_losses(text, tmp_path):
    losses = []
    for processes, batch in ((1, 8), (2, 4)):
        folder = tmp_path / f"run-{processes}"
        words = ["--corpus", text, "--output_dir", folder, *TINY, "--per_device_train_batch_size", batch]
        words += "--bf16 false --dropout 0 --max_steps 10 --logging_steps 1".split()
        runs = ring([words] * processes, tmp_path, recipe="pretrain_char.py")
        assert [run.wait() for run in runs] == [0] * processes, runs[0].said()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append(
            [row["train_loss"] for row in rows] + [row["eval_loss"] for row in rows if "eval_loss" in row]
        )
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 11

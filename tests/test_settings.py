"""The command line: which setting wins, and what a mistake is answered."""

import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.common.settings import FinetuningSettings, TrainingSettings, default_folder, public_values
from nanogpt_hf.common.tuning_settings import CompletionSettings
from nanogpt_hf.generation.sampling_settings import SamplingSettings
from nanogpt_hf.runs.command_line import earlier


def read(*words, **options):
    return parse(TrainingSettings, "help", list(words), **options)


def test_command_line_beats_file_beats_recipe_beats_dataclass(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 20\nlearning_rate: 1e-2\nreport_to: [tensorboard]\nrecord: {anything: 1}\n")
    defaults = {"max_steps": 10, "seed": 5, "learning_rate": 0.5, "optim": "muon"}
    settings = read("--config", str(file), "--max_steps", "30", defaults=defaults)
    assert (settings.max_steps, settings.learning_rate, settings.seed) == (30, 0.01, 5)
    assert (settings.optim, settings.report_to, settings.eval_steps) == ("muon", ["tensorboard"], 250)


def test_booleans_lists_and_nothing():
    settings = read("--push_to_hub", "--bf16", "false", "--report_to", "wandb", "trackio")
    assert settings.push_to_hub is True and settings.bf16 is False and settings.torch_compile is None
    assert settings.report_to == ["wandb", "trackio"]


def test_a_false_on_the_command_line_beats_a_true_in_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("push_to_hub: true\nmodel_name_or_path: null\n")
    assert read("--config", str(file)).push_to_hub is True
    assert read("--config", str(file), "--push_to_hub=false").push_to_hub is False


def test_defaults_may_depend_on_what_was_said():
    settings = read(
        "--preset", "cpu", defaults=lambda said: {"max_steps": 7 if said == {"preset": "cpu"} else 9}
    )
    assert settings.max_steps == 7


@pytest.mark.parametrize(
    "words, message",
    [
        (["--max_step", "3"], r"there is no setting --max_step; did you mean --max_steps\?$"),
        (["--learning-rat=1"], "did you mean --learning_rate"),
        (["--zzz"], "there is no setting --zzz"),
        (["--max_steps", "-5"], "--max_steps is -5, it must be at least 1"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--learning_rate", "-1"], "must be at least 0"),
        (["--learning_rate", "nan"], "must be at least 0"),
        (["--muon_momentum", "1"], "--muon_momentum is 1.0, it must be at least 0 and less than 1"),
        (["--architecture", "bert"], "invalid choice"),
        (["--bf16", "--fp16"], "exclude each other"),
        (["--resume_from_checkpoint", "last", "--overwrite_output_dir"], "exclude each other"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    ],
)
def test_mistakes_get_one_sentence(words, message):
    with pytest.raises(ValueError, match=message) as error:
        read(*words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("max_stepz: 3\n", "sets 'max_stepz', which is no setting; did you mean max_steps"),
        ("max_steps: many\n", "invalid int value"),
        ("- 1\n- 2\n", "must hold"),
        ("a: [1\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read("--config", str(file))
    assert "\n" not in str(error.value)


def test_help_shows_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        read("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"--{name}" in text for name in vars(TrainingSettings()))
    assert "1337" in text and "for instance the run.yaml of a run" in " ".join(text.split())
    with pytest.raises(SystemExit):
        parse(SamplingSettings, "help", ["--help"])
    assert "run.yaml" not in capsys.readouterr().out, "it would be refused"


def test_null_in_a_file_and_none_on_the_command_line_switch_a_setting_off(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("early_stopping_patience: null\ndropout: null\n")
    defaults = {"early_stopping_patience": 5, "dropout": 0.3}
    settings = read("--config", str(file), defaults=defaults)
    assert settings.early_stopping_patience is None and settings.dropout is None
    assert read("--early_stopping_patience", "none", defaults=defaults).early_stopping_patience is None
    assert read(defaults=defaults).early_stopping_patience == 5
    with pytest.raises(UserError, match="invalid int value: 'none'"):
        read("--seed", "none")


def test_a_runs_own_file_repeats_it_in_a_new_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.yaml").write_text(f"output_dir: {folder}\nseed: 7\n")
    settings = read("--config", str(folder / "run.yaml"))
    assert (settings.output_dir, settings.seed) == (f"{folder}-2", 7)
    goes_on = read("--config", str(folder / "run.yaml"), "--resume_from_checkpoint", "last")
    assert goes_on.output_dir == str(folder)


def test_a_fine_tunings_file_of_an_earlier_version_is_read(tmp_path):
    """It had the settings of pretraining too, which said nothing, and those of bases in few bits."""
    (tmp_path / "run.yaml").write_text(
        "tokenizer: ''\nn_layer: null\nload_in_4bit: false\nload_in_8bit: false\nseed: 7\n"
    )
    words = ["--config", str(tmp_path / "run.yaml")]
    assert parse(FinetuningSettings, "help", words).seed == 7
    with pytest.raises(UserError, match="sets 'tokenizer', which is no setting"):
        parse(SamplingSettings, "help", words)


def test_of_epochs_and_steps_the_one_that_is_said_counts():
    assert read("--num_train_epochs", "3", defaults={"max_steps": 100}).max_steps is None
    assert read("--max_steps", "7", defaults={"num_train_epochs": 2.0}).num_train_epochs is None
    with pytest.raises(UserError, match="exclude each other"):
        read("--num_train_epochs", "3", "--max_steps", "7")


@pytest.mark.parametrize(
    "word, meant",
    [
        ("--lr", "--learning_rate"),
        ("--batch_size", "--per_device_train_batch_size"),
        ("--epochs", "--num_train_epochs"),
        ("--steps", "--max_steps"),
        ("--block_size", "--n_positions"),
        ("--max-iters", "--max_steps"),
        ("my_text.txt", "--corpus my_text.txt"),
    ],
)
def test_what_other_tools_call_a_setting_is_answered_with_ours(word, meant):
    with pytest.raises(UserError, match=f"did you mean {meant}\\?$"):
        read(word, "3") if word.startswith("-") else read(word)


def test_dashes_are_underscores_and_a_value_may_begin_with_one():
    assert read("--max-steps", "7", "--document_end=-").document_end == "-"
    with pytest.raises(UserError, match="is given as --setting=-value"):
        read("--document_end", "--")


def test_a_bug_keeps_its_traceback_and_a_users_mistake_is_a_sentence(capsys):
    def bug():
        zip([1], [2, 3], strict=True).__next__()
        raise ValueError("zip() argument 2 is longer than argument 1")

    with pytest.raises(ValueError, match="zip"):
        run_recipe(bug)

    def mistake():
        raise UserError("what is wrong, and what to do.")

    with pytest.raises(SystemExit) as end:
        run_recipe(mistake)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: what is wrong, and what to do.\n"


@given(
    st.builds(dict, max_steps=st.integers(1, 9), dropout=st.floats(0, 0.9), seed=st.integers(0, 2**32 - 1))
)
def test_settings_come_back_from_their_file(values):
    written = TrainingSettings(**values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yaml"
        path.write_text(yaml.safe_dump(public_values(written)))
        assert read("--config", str(path)) == written


@pytest.mark.parametrize(
    "corpus, folder",
    [
        ("gl/*.txt", "gl-char"),
        ("my texts/", "my-texts-char"),
        ("a/книга.txt", "книга-char"),
        ("*", "corpus-char"),
    ],
)
def test_a_run_is_called_by_its_corpus(corpus, folder):
    assert default_folder(corpus, "char") == str(Path("runs", folder))


def test_a_run_goes_on_of_which_the_folder_alone_is_said(tmp_path):
    (tmp_path / "run.yaml").write_text("corpus: a.jsonl\nmodel_name_or_path: runs/base\n")
    words = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "last"]
    settings = parse(
        CompletionSettings, None, words, earlier=lambda values: earlier(CompletionSettings, values)
    )
    assert (settings.corpus, settings.model_name_or_path) == ("a.jsonl", "runs/base")


def test_a_run_of_an_earlier_version_goes_on_without_what_it_did_not_have(tmp_path):
    (tmp_path / "run.yaml").write_text("corpus: a.txt\nmax_steps: 9\nlearning_rate: 0.003\n")
    given = earlier(
        TrainingSettings,
        {"resume_from_checkpoint": str(tmp_path / "checkpoints" / "step-5"), "corpus": "a.txt"},
    )
    assert given["max_steps"] == 9 and given["learning_rate"] == 0.003
    assert given["vector_learning_rate"] is None and given["keep_carriage_returns"] is True
    assert given["muon_residual_scale"] == 1.0 and given["rdrop_alpha"] == 0.0
    assert given["short_positions"] is None

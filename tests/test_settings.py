"""The command line: which setting wins, and what a mistake is answered."""

import pytest

from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.settings import TrainingSettings


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
        (["--architecture", "llama"], "invalid choice"),
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
    assert "1337" in text

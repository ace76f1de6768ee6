"""All runs in one table: sorted, with the settings in which they differ."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def write_run(folder, losses, corpus="aa" * 32, **settings):
    """What a run leaves that has been validated at every hundredth step."""
    folder.mkdir(parents=True)
    values = {
        "corpus": "book.txt",
        "learning_rate": 0.001,
        "n_layer": 2,
        "output_dir": str(folder),
        **settings,
    }
    record = {"record": {"corpus": {"sha256": corpus}}}
    (folder / "run.yaml").write_text(yaml.safe_dump(values | record, sort_keys=False), encoding="utf-8")
    rows = [
        {"step": 100 * n, "elapsed_s": 60.0 * n, "eval_loss": loss, "eval_bits_per_char": loss * 1.5}
        for n, loss in enumerate(losses, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def compare(capsys, *words):
    before, sys.argv = sys.argv, ["compare.py", *map(str, words)]
    try:
        runpy.run_path(str(ROOT / "recipes" / "compare.py"), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before
    said = capsys.readouterr()
    return status, said.out, said.err


def cells(said):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line[:1] == "|"]


def test_runs_are_sorted_with_what_they_differ_in(tmp_path, capsys):
    write_run(tmp_path / "a", [2.0, 1.5, 1.7], learning_rate=0.003)
    write_run(tmp_path / "b", [2.0, 1.25], learning_rate=0.01, dropout=0.3)
    write_run(tmp_path / "c", [1.9], learning_rate=0.003)
    (tmp_path / "notes").mkdir()
    write_run(tmp_path / "new", [])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.yaml").write_text("a: [", encoding="utf-8")
    (tmp_path / "table.md").write_text("", encoding="utf-8")
    status, said, _ = compare(capsys, *sorted(tmp_path.iterdir()))
    assert status == 0
    head, _, *rows = cells(said)
    assert head == ["run", "nats/token", "bits/char", "at step", "of", "minutes", "learning_rate", "dropout"]
    assert rows == [
        ["b", "1.2500", "1.8750", "200", "200", "2.0", "0.01", "0.3"],
        ["a", "1.5000", "2.2500", "200", "300", "3.0", "0.003", ""],
        ["c", "1.9000", "2.8500", "100", "100", "1.0", "0.003", ""],
    ]
    assert "left out: notes holds no run.yaml" in said and "left out: new has not been validated" in said
    assert "left out: broken has a run.yaml that cannot be read" in said


def test_what_finds_no_room_is_listed_below(tmp_path, capsys):
    for number, loss in enumerate((1.5, 1.25)):
        different = {f"setting_{letter}": f"value {number}" for letter in "abcdef"}
        write_run(tmp_path / f"run-{number}", [loss], **different)
    _, said, _ = compare(capsys, *tmp_path.iterdir())
    assert max(map(len, said.splitlines())) <= 100
    assert "setting_f: value 1 (run-1); value 0 (run-0)" in said
    assert "setting_a" in said.splitlines()[0]


def test_runs_on_different_texts_are_told_apart(tmp_path, capsys):
    write_run(tmp_path / "a", [2.0])
    write_run(tmp_path / "b", [1.0], corpus="bb" * 32)
    _, said, _ = compare(capsys, *tmp_path.iterdir())
    assert "different texts" in said and "book.txt (bbbbbb)" in said
    _, said, _ = compare(capsys, tmp_path / "a")
    assert "different texts" not in said


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "there is nothing to compare"),
        (["{tmp}", "{tmp}/none"], "there is no folder .*none"),
        (["{tmp}"], "none of .* is the folder of a run"),
        (["{tmp}", "--model", "x"], "exclude each other"),
        (["{tmp}", "--output_dir", "x"], "exclude each other"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(words, message, tmp_path, capsys):
    status, _, complaint = compare(capsys, *(word.format(tmp=tmp_path) for word in words))
    assert status == 2
    assert complaint.startswith("error: ") and complaint.count("\n") == 1
    assert re.search(message, complaint), complaint

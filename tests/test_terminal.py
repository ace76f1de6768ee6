"""Writing with a model that is kept at hand: the prompt in a terminal, and prompts and texts in files."""

import fcntl
import json
import os
import pty
import re
import runpy
import select
import struct
import sys
import termios
import time
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from processes import Run, take_terminal
from transformers import GPT2Config, GPT2LMHeadModel

from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.text import spelt_out
from nanogpt_hf.data.tokenization import encode, make_tokenizer
from nanogpt_hf.generation.sampling_settings import SamplingSettings
from nanogpt_hf.generation.showing import show
from nanogpt_hf.generation.terminal import Terminal
from nanogpt_hf.generation.text import generate_text
from nanogpt_hf.generation.writer import Writer, written_on

ROOT = Path(__file__).parents[1]
LETTERS = "abcdefgh\n"
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{% if not (loop.last and continue_final_message) %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def make(seed, chat_template=None):
    """A model that writes letters of its own liking."""
    tokenizer = make_tokenizer("char", [LETTERS], 0)
    tokenizer.chat_template = chat_template
    torch.manual_seed(seed)
    end = {name: tokenizer.eos_token_id for name in ("bos_token_id", "eos_token_id")}
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_layer=1,
            n_head=2,
            n_embd=16,
            n_positions=32,
            initializer_range=1.0,
            **end,
        )
    )
    letters = {int(encode(tokenizer, letter)[0]) for letter in LETTERS}
    model.generation_config.suppress_tokens = sorted({*range(len(tokenizer))} - letters)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for seed, (name, template) in enumerate({"one": None, "two": None, "chatty": TEMPLATE}.items()):
        made[name] = str(tmp_path_factory.mktemp("models") / name)
        for part in make(seed, template):
            part.save_pretrained(made[name])
    return made


def terminal(*seeds, chat_template=None, **sampling):
    writers = [Writer(f"model-{seed}", *make(seed, chat_template)) for seed in seeds]
    return Terminal(writers, SamplingSettings(**{"max_new_tokens": 20, **sampling}))


def answers(user, capsys, *lines):
    """What the terminal prints on each line, without the line below that says the seed."""
    said = []
    for line in lines:
        user.answer(line)
        said.append(re.sub(r"seed \d+, \d+ tokens in .*\n$", "", capsys.readouterr().out))
    return said


def test_what_is_typed_is_written_on(capsys):
    user = terminal(1, seed=5)
    model, tokenizer = make(1)
    (text,) = generate_text(model, tokenizer, "ab\nc", max_new_tokens=20, seed=5)
    assert answers(user, capsys, r"ab\nc") == [f"ab\nc{text}\n"]
    assert answers(user, capsys, "")[0].startswith("\n")
    assert answers(user, capsys, "//help a")[0].startswith("/help a")


def test_more_goes_on_and_retry_begins_again_with_another_seed(capsys):
    user = terminal(1, seed=5)
    first, again = answers(user, capsys, "abc", "/more")
    assert again.startswith(first[:-1]) and len(again) == len(first) + 20
    assert user.seed == 5
    retried = answers(user, capsys, "abc", "/retry")[1]
    assert user.seed == 6 and retried != first
    user = terminal(1)
    answers(user, capsys, "abc", "/retry")
    seed, (text,) = user.seed, user.texts
    assert answers(terminal(1, seed=seed), capsys, "abc") == [f"abc{text}\n"]


def test_commands_change_settings_and_say_them(capsys):
    user = terminal(1)
    assert answers(user, capsys, "/temperature 0") == ["temperature 0.0\n"]
    assert answers(user, capsys, r"/stop \n\n", "/stop") == ["stop \\n\\n\n"] * 2
    assert user.sampling.stop == ["\n\n"]
    answers(user, capsys, "/stop none", "/top_k 3", "/seed 7", "/max_new_tokens 4")
    expected = replace(SamplingSettings(), temperature=0.0, top_k=3, seed=7, max_new_tokens=4)
    assert user.sampling == expected
    answers(user, capsys, "/top_k none")
    assert user.sampling.top_k is None
    greedy = [answers(user, capsys, "abc")[0] for _ in range(2)]
    assert greedy[0] == greedy[1] and len(greedy[0]) == len("abc") + 4 + 1


@pytest.mark.parametrize(
    "line, message",
    [
        ("/temperature -1", "temperature is -1.0, it must be at least 0"),
        ("/temperature warm", "invalid float value: 'warm'"),
        ("/top_p 2", "at most 1"),
        ("/seed 4294967296", "less than 4294967296"),
        ("/temprature 1", "did you mean /temperature?"),
        ("/more", "there is no text yet"),
        ("/save", "takes the name of a file"),
        ("/", "there is no command /"),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(line, message):
    user = terminal(1)
    before = user.sampling
    with pytest.raises(UserError, match=re.escape(message)):
        user.answer(line)
    assert user.sampling == before


def test_a_text_is_saved_into_a_new_file_only(capsys, tmp_path):
    user = terminal(1, seed=3)
    (said,) = answers(user, capsys, "abc")
    answers(user, capsys, f"/save {tmp_path}/poem.txt")
    assert (tmp_path / "poem.txt").read_text(encoding="utf-8") == said
    with pytest.raises(UserError, match="is there already"):
        user.answer(f"/save {tmp_path}/poem.txt")


def test_a_model_that_chats_remembers_until_it_is_told_to_forget(capsys):
    model, tokenizer = make(10, TEMPLATE)
    user = terminal(10, chat_template=TEMPLATE, seed=1, stop=["\n"])

    def answer(prompt):
        ids = encode(tokenizer, prompt).tolist()
        return generate_text(model, tokenizer, ids, max_new_tokens=20, seed=1, stop=["\n"])[0]

    first = answer("<user>abc\n<assistant>")
    assert answers(user, capsys, "abc") == [first + "\n"]
    second = answer(f"<user>abc\n<assistant>{first}\n<user>de\n<assistant>")
    assert answers(user, capsys, "de") == [second + "\n"]
    answers(user, capsys, "/forget")
    assert answers(user, capsys, "abc") == [first + "\n"]
    more = answer(f"<user>abc\n<assistant>{first}")
    answers(user, capsys, "/more")
    assert user.texts == [more]
    last = answer(f"<user>abc\n<assistant>{first}{more}")
    answers(user, capsys, "/more")
    assert user.texts == [last] and len({first, second, more, last, ""}) == 5
    assert user.writers[0].describe() == "model-10: 0.01M parameters, context 32 tokens, chats"
    with pytest.raises(UserError, match="has no chat template"):
        Writer("plain", *make(0), chats=True)
    plain = Writer("plain", *make(2, TEMPLATE), chats=False)
    assert plain.prompt("abc") == "abc" and plain.describe().endswith("32 tokens")


def test_a_model_is_loaded_for_its_device_in_its_precision(folders):
    model = Writer.load(folders["one"], "meta", torch.bfloat16).model
    assert model.device.type == "meta" and model.dtype == torch.bfloat16


def test_what_is_written_goes_on_with_the_last_message_alone():
    said = [{"role": role, "content": role[0]} for role in ("system", "user")]
    answered = written_on(said, "b")
    assert answered == [*said, {"role": "assistant", "content": "b"}]
    assert written_on(answered, "c") == [*said, {"role": "assistant", "content": "bc"}]


def test_help_fits_into_the_terminal(capsys, monkeypatch):
    for columns in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        (said,) = answers(terminal(1), capsys, "/help")
        assert max(map(len, said.splitlines())) <= columns
        for command in ("/temperature 0.8", "/seed none", "/retry", "/more", "/save FILE", "/help"):
            assert command in said


# --- a real terminal ---


class Pty:
    """A process at a terminal of its own."""

    def __init__(self, recipe, *words, log, columns=80):
        self.screen = ""
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        terminal = (take_terminal, os.ttyname(slave))
        self.run = Run(words, recipe=recipe, log=log, prepare=terminal, TERM="xterm")
        self.slave = slave

    def wait_for(self, pattern, timeout=120):
        """What is printed up to a pattern; it is taken off the screen."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.screen)):
            if time.monotonic() > end:
                raise TimeoutError(self.screen)
            if select.select([self.master], [], [], 1)[0]:
                self.screen += os.read(self.master, 65536).decode("utf-8").replace("\r\n", "\n")
        before, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return before

    def type(self, keys):
        os.write(self.master, keys.encode())

    def close(self):
        self.run.process.kill()
        self.run.process.join()
        os.close(self.slave)
        os.close(self.master)


def test_a_prompt_that_stays_in_a_real_terminal(folders, tmp_path):
    user = Pty("sample.py", folders["one"], "--seed", 1, "--use_cpu", log=tmp_path / "log")
    try:
        assert "context 32 tokens" in user.wait_for("\n> ")
        user.type("/max_new_tokens 30\n")
        user.wait_for("\n> ")
        user.type("abc\n")
        first = user.wait_for("seed 1, 30 tokens[^>]*> ")
        user.type("\x1b[A\x1b[A\x1b[B\n")  # up, up, down: the last line again
        again = user.wait_for("seed 1, 30 tokens[^>]*> ")
        written = [re.search(r"\nabc([a-h\n]*)", text)[1] for text in (first, again)]
        assert written[0] == written[1] and len(written[0].rstrip()) > 10
        user.type("/max_new_tokens 1000000\n")
        user.wait_for("\n> ")
        user.type("abc\n")
        user.wait_for(r"abc[a-h\s]{100}")
        user.type("\x03")  # Ctrl-C ends the text, not the program
        user.wait_for("seed 1, [^>]*> ")
        user.type(f"/save {tmp_path}/poem.txt\n")
        user.wait_for("saved as[^>]*> ")  # a key that comes before its prompt may be lost
        user.type("/temperature -2\n")
        assert "at least 0" in user.wait_for("must be [^>]*> ")
        user.type("\x04")
        assert user.run.wait(60) == 0
    finally:
        user.close()
    assert len((tmp_path / "poem.txt").read_text(encoding="utf-8")) > 60


def test_two_models_stand_side_by_side_in_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    sampling = SamplingSettings(max_new_tokens=9, seed=1)
    writers = [Writer(f"model-{seed}", *make(seed)) for seed in (0, 1)]
    master, slave = pty.openpty()
    with open(slave, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        *_, ((left,), (right,)) = show(writers, ["abc", "abc"], sampling)
        monkeypatch.undo()
    screen = b""
    with suppress(OSError):  # the end, since the other side is closed
        while block := os.read(master, 65536):
            screen += block
    os.close(master)
    screen = screen.decode("utf-8").replace("\r\n", "\n")
    assert [left, right] == [writer.write("abc", sampling)[0] for writer in writers]
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen[screen.rindex("model-0") :])
    halves = [(line[:30].strip(), line[30:].strip()) for line in last.splitlines()]
    assert ["".join(half) for half in zip(*halves, strict=True)] == [
        f"model-{number}abc{text}".replace("\n", "") for number, text in enumerate((left, right))
    ]


def test_several_texts_are_numbered(capsys):
    sampling = SamplingSettings(max_new_tokens=9, seed=1)
    writers = [Writer(f"model-{seed}", *make(seed)) for seed in (0, 1)]
    *_, texts = show(writers, ["abc", "abc"], sampling, 2)
    words = [f"--- {n} model-{(n - 1) // 2}\nabc{text}\n" for n, text in enumerate(sum(texts, []), start=1)]
    assert capsys.readouterr().out == "".join(words)


# --- files ---


def sample(capsys, *words):
    before = sys.argv
    sys.argv = ["sample.py", *map(str, words), "--use_cpu"]
    try:
        runpy.run_path(str(ROOT / "recipes" / "sample.py"), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before
    said = capsys.readouterr()
    return status, said.out, said.err


def test_many_prompts_become_lines_that_can_be_had_again(folders, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\r\n\r\n"c\\nd"\r\n', encoding="utf-8-sig")
    out = tmp_path / "texts.jsonl"
    words = [folders["one"], "--compare", folders["two"], "--prompts", tmp_path / "prompts.jsonl"]
    words += ["--num_return_sequences", 2, "--max_new_tokens", 9, "--temperature", 0.9]
    assert sample(capsys, *words, "--output_file", out)[0] == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"], row["index"]) for row in rows] == [
        (prompt, index) for prompt in ("ab", "c\nd") for _ in range(2) for index in range(2)
    ]
    assert [Path(row["model"]).name for row in rows] == ["one", "one", "two", "two"] * 2
    for row in rows:
        model, tokenizer = make(["one", "two"].index(Path(row["model"]).name))
        options = {item.name: row[item.name] for item in fields(SamplingSettings)}
        texts = generate_text(
            model, tokenizer, row["prompt"], num_return_sequences=row["num_return_sequences"], **options
        )
        assert row["text"] == texts[row["index"]]
    assert len({row["seed"] for row in rows}) == 2


def test_a_prompt_from_a_file_and_texts_into_one(folders, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfab\\n\nc")
    words = [folders["one"], "--prompt_file", tmp_path / "prompt.txt", "--seed", 1, "--max_new_tokens", 9]
    status, said, _ = sample(capsys, *words)
    assert status == 0 and said.startswith("ab\\n\nc")
    assert sample(capsys, *words, "--output_file", tmp_path / "out.txt")[1].endswith("1 text\n")
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == said


def test_escapes_mean_what_they_say(folders, capsys):
    words = [folders["one"], "--seed", 1, "--max_new_tokens", 200]
    _, said, _ = sample(capsys, *words, "--prompt", r"a\nb\\n")
    assert said.startswith("a\nb\\n")
    assert (
        sample(capsys, *words, "--prompt", r"a\nb\\n", "--stop", r"\n")[1]
        == "a\nb\\n" + said[5:].split("\n")[0] + "\n"
    )
    assert spelt_out(r"\t\r\x41\u0416\U0001f600 \q \N \x4 \ud800 \U00110000 \\n") == (
        "\t\rA\u0416\U0001f600 \\q \\N \\x4 \\ud800 \\U00110000 \\n"
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "there is no model"),
        (["no/such/folder"], "there is no folder"),
        (["{one}", "{two}"], "stands alone"),
        (["{one}", "--prompt", ""], "the prompt is empty"),
        (["{one}", "--prompt", "a", "--prompt_file", "-"], "exclude each other"),
        (["{one}", "--prompts", "{file}"], 'line 2 of .*text.txt is not {"prompt"'),
        (["{one}", "--prompts", "{one}"], "cannot be read"),
        (["{one}", "--prompt_file", "{tmp}/none"], "cannot be read"),
        (["{one}", "--output_file", "{file}"], "is there already"),
        (["{one}", "--prompt", "\udcff"], "not UTF-8"),
        (["{one}", "--chat"], "has no chat template"),
        (["{one}", "--seed", "-1"], "at least 0 and less than 4294967296"),
        (["{one}", "--seed", "99999999999999999999999"], "less than 4294967296"),
        (["{one}", "--temperature", "-1"], "at least 0"),
        (["{one}", "--top_p", "1.5"], "at most 1"),
        (["{one}", "--temprature", "1"], "did you mean --temperature"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(words, message, folders, tmp_path, capsys):
    (tmp_path / "text.txt").write_text('"a"\n{"promt": 1}\n', encoding="utf-8")
    places = {**folders, "tmp": tmp_path, "file": tmp_path / "text.txt"}
    before = sorted(tmp_path.iterdir())
    status, said, complaint = sample(capsys, *(word.format(**places) for word in words))
    assert status == 2 and said == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", complaint), complaint
    assert sorted(tmp_path.iterdir()) == before

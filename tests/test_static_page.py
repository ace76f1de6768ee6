"""The page that writes in the visitor's browser, in a real one: its text, its keys, its width, and what it asks of whom."""

import functools
import math
import os
import random
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import SpaceCard
from test_interop import PROMPT, learn_by_heart
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import logging

from nanogpt_hf.common.errors import UserError
from nanogpt_hf.generation.text import generate_ids, generate_text
from nanogpt_hf.sharing import static_page
from nanogpt_hf.sharing.static_page import write_page
from nanogpt_hf.sharing.transformers_js import FILES, find_transformers_js

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
pytest.importorskip("onnx", reason="onnx is not installed (extra onnx)")

pytestmark = pytest.mark.slow

MODULES = os.environ.get("NANOGPT_HF_NODE_MODULES")
needs_modules = pytest.mark.skipif(
    not (MODULES and Path(MODULES, "@huggingface/transformers").is_dir()),
    reason="NANOGPT_HF_NODE_MODULES names no node_modules with @huggingface/transformers",
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NAME = "Стихи & <i>"
SAMPLE = f"{PROMPT}\n</section><script>document.title = 'taken'</script>"
KINDS = {"gpt2": "char", "qwen3": "bpe"}


@pytest.fixture(autouse=True)
def no_progress_bars():
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """For each architecture a model that knows a passage by heart, its tokenizer and its page, made once."""
    made = {}

    def get(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp("page")
            model, tokenizer = learn_by_heart(architecture, KINDS[architecture])
            run = folder / NAME
            model.save_pretrained(run)
            tokenizer.save_pretrained(run)
            (run / "samples.txt").write_text(f"{SAMPLE}\n---\nanother\n", encoding="utf-8")
            record = {"corpus": {"name": "verses", "source": "verses", "sha256": "0", "language": "ru"}}
            (run / "run.yaml").write_text(yaml.safe_dump({"record": record}), encoding="utf-8")
            write_page(run, folder / "page")
            made[architecture] = model, tokenizer, folder / "page"
        return made[architecture]

    return get


# --- the folder ---


@needs_modules
def test_the_folder_is_a_static_space(pages):
    _, _, folder = pages("gpt2")
    card = SpaceCard.load(folder / "README.md")
    assert card.data.sdk == "static" and card.data.title == NAME
    assert {path.name for path in folder.iterdir()} == {"README.md", "index.html", "lib", "model"}
    assert {path.name for path in (folder / "lib").iterdir()} == {
        Path(file).name for files in FILES.values() for file in files
    }
    graphs = [path.name for path in (folder / "model").rglob("*.onnx")]
    assert graphs == ["model.onnx"] and not list(folder.rglob("*.safetensors"))
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert "<i>" not in html and html.count("<script") == 2 and 'lang="ru"' in html


def test_without_npm_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOGPT_HF_NODE_MODULES", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is not installed.*NANOGPT_HF_NODE_MODULES"):
        write_page(tmp_path / "run", tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_another_version_is_refused_by_its_name(tmp_path, monkeypatch):
    file = tmp_path / "@huggingface/transformers/dist/transformers.min.js"
    file.parent.mkdir(parents=True)
    file.write_text("another")
    monkeypatch.setenv("NANOGPT_HF_NODE_MODULES", str(tmp_path))
    with pytest.raises(UserError, match="npm install @huggingface/transformers@4"):
        find_transformers_js()


# --- the browser ---


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (extra browser)"
    )
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, pages):
    """Opens a page from a static server; at the end, nothing went wrong on it and it asked nobody else."""
    visited, servers = [], []

    def open_page(architecture="gpt2", folder=None, **options):
        handler = functools.partial(Silent, directory=folder or pages(architecture)[2])
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = chromium.new_page(**options)
        asked, complaints = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        says(page, "Ready")
        visited.append((page, f"http://127.0.0.1:{server.server_port}/", asked, complaints))
        return page

    yield open_page
    for page, address, asked, complaints in visited:
        page.close()
        assert complaints == []
        assert asked and all(url.startswith(address) for url in asked)
    for server in servers:
        server.shutdown()
        server.server_close()


def says(page, words):
    """Wait until the status line says it; the whole line."""
    status = page.get_by_role("status")
    status.filter(has_text=re.compile(words)).wait_for(timeout=60_000)
    return status.text_content()


def text_of(page):
    return page.get_by_role("region", name="Text").text_content()


def fill(page, **fields):
    for label, value in fields.items():
        page.get_by_label(label.replace("_", "-")).fill(str(value))


def draw(logits, allowed, temperature, top_k, top_p, number):
    """The next token as the page describes it, with the number u of the generator."""
    order = sorted(allowed, key=lambda id: (-logits[id], id))
    kept = order[:top_k] if top_k else order
    weights = [math.exp((logits[id] - logits[kept[0]]) / temperature) for id in kept]
    count, mass = 0, 0.0
    while count < len(kept) and mass < top_p * sum(weights):
        mass += weights[count]
        count += 1
    so_far = 0.0
    for id, weight in zip(kept[:count], weights, strict=False):
        so_far += weight
        if so_far > number * mass:
            return id
    return kept[count - 1]


@torch.no_grad()
def written_in_python(model, tokenizer, folder, prompt, count, seed, **settings):
    """What the page must write, by torch and Python's own random numbers."""
    reader = AutoTokenizer.from_pretrained(folder / "model")
    suppressed = GenerationConfig.from_pretrained(folder / "model").suppress_tokens
    allowed = sorted({*range(model.config.vocab_size)} - {*suppressed})
    generator = random.Random(seed)
    ids = reader(prompt).input_ids
    window = ids[-model.config.n_positions :]
    for _ in range(count):
        if len(window) > model.config.n_positions:
            window = window[-(model.config.n_positions // 2) :]
        logits = model(torch.tensor([window])).logits[0, -1].tolist()
        id = draw(logits, allowed, number=generator.random(), **settings)
        if id == reader.eos_token_id:
            break
        ids, window = [*ids, id], [*window, id]
    return tokenizer.decode(ids)


@needs_modules
@pytest.mark.parametrize("architecture", KINDS)
def test_at_temperature_0_it_writes_what_sampling_writes_past_the_context_too(architecture, visit, pages):
    model, tokenizer, _ = pages(architecture)
    page = visit(architecture)
    fill(page, Beginning=PROMPT, Temperature=0, Length=300)
    page.get_by_role("button", name="Write").click()
    assert says(page, "Done").startswith("Done: 300 tokens")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    follow = torch.cat([*generate_ids(model, ids, 300, temperature=0)])
    assert ids.shape[1] + 300 > model.config.n_positions
    assert text_of(page) == tokenizer.decode([*ids[0], *follow]).rstrip("\ufffd")


@needs_modules
def test_a_seed_gives_the_text_that_its_numbers_give_in_python(visit, pages):
    page = visit("qwen3")
    for settings in (
        dict(temperature=1.0, top_k=0, top_p=1.0, seed=7),
        dict(temperature=1.7, top_k=12, top_p=1.0, seed=4294967295),
        dict(temperature=1.7, top_k=0, top_p=0.9, seed=0),
        dict(temperature=2.0, top_k=30, top_p=0.95, seed=20261126),
    ):
        fill(page, Beginning="Now is", Length=80, Temperature=settings["temperature"], Seed=settings["seed"])
        fill(page, Top_k=settings["top_k"], Top_p=settings["top_p"])
        expected = written_in_python(*pages("qwen3"), "Now is", 80, **settings)
        for _ in range(2):
            page.get_by_role("button", name="Write").click()
            assert says(page, "Done").endswith(f"seed {settings['seed']}.")
            assert text_of(page) == expected.rstrip("\ufffd"), settings


@needs_modules
def test_without_a_seed_each_text_is_another_and_its_seed_gives_it_again(visit):
    page = visit("qwen3")
    fill(page, Beginning="Now is", Length=60, Temperature=1.7)
    texts, seeds = [], []
    for _ in range(3):
        page.get_by_role("button", name="Write").click()
        seeds.append(re.search(r"seed (\d+)", says(page, "Done"))[1])
        texts.append(text_of(page))
        if len(seeds) == 2:
            fill(page, Seed=seeds[0])
    assert texts[0] != texts[1] and texts[0] == texts[2]


@needs_modules
def test_the_keyboard_alone_suffices_and_the_text_streams(visit):
    page = visit("gpt2")
    keys = page.keyboard
    keys.press("ControlOrMeta+a")  # the beginning has the focus
    keys.type("Now is")
    keys.press("Shift+Enter")
    keys.type("the winter")
    assert page.get_by_label("Beginning").input_value() == "Now is\nthe winter"
    names, outlined = [], []
    for _ in range(6):
        keys.press("Tab")
        name, style = page.evaluate(
            "() => { const e = document.activeElement; return [e.id || e.type, getComputedStyle(e).outlineStyle]; }"
        )
        names.append(name)
        outlined.append(style == "solid")
        if name == "length":
            keys.type("5000")
    assert names == "temperature top_k top_p length seed submit".split() and all(outlined)
    page.get_by_label("Beginning").focus()
    keys.press("Enter")
    says(page, "Writing")
    text = page.get_by_role("region", name="Text")
    lengths = set()
    while len(lengths) < 5 and "Writing" in page.get_by_role("status").text_content():
        lengths.add(len(text_of(page)))
    assert len(lengths) == 5
    assert text.get_attribute("aria-busy") == "true"
    keys.press("Tab")
    keys.press("Escape")
    assert 3 < int(re.search(r"Stopped: (\d+) tokens", says(page, "Stopped"))[1]) < 5000
    assert text.get_attribute("aria-busy") == "false"
    keys.press("Enter")  # in a field of numbers too
    says(page, "Writing")
    page.get_by_role("button", name="Stop").focus()
    keys.press("Enter")
    says(page, "Stopped")
    assert page.evaluate("() => document.activeElement.id") == "prompt"


@needs_modules
def test_what_another_text_interrupts_leaves_nothing_behind(visit, pages):
    model, tokenizer, _ = pages("gpt2")
    page = visit("gpt2")
    fill(page, Beginning="звёздный", Length=5000)
    page.keyboard.press("Enter")
    says(page, "Writing")
    fill(page, Beginning=PROMPT, Length=60, Temperature=0)
    page.get_by_role("button", name="Write").click()
    says(page, "Done: 60")
    expected = generate_text(model, tokenizer, PROMPT, temperature=0, max_new_tokens=60)[0]
    assert text_of(page) == PROMPT + expected


@needs_modules
def test_a_large_model_travels_in_eight_bits_and_writes(visit, pages, tmp_path, monkeypatch):
    model, tokenizer, folder = pages("gpt2")
    monkeypatch.setattr(static_page, "LARGEST_FLOAT", 2**16)
    write_page(folder.parent / NAME, tmp_path / "page")
    assert [path.name for path in (tmp_path / "page").rglob("*.onnx")] == ["model_quantized.onnx"]
    page = visit(folder=tmp_path / "page")
    fill(page, Beginning=PROMPT, Length=60, Temperature=0)
    page.keyboard.press("Enter")
    says(page, "Done: 60")
    expected = generate_text(model, tokenizer, PROMPT, temperature=0, max_new_tokens=60)[0]
    assert text_of(page) == PROMPT + expected


@needs_modules
def test_a_phone_in_the_dark(visit):
    page = visit("gpt2", viewport={"width": 320, "height": 640}, color_scheme="dark", has_touch=True)

    def background():
        color = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", color)[:3]))

    assert background() < 150
    page.get_by_role("button", name="Switch").tap()
    assert background() > 600
    fill(page, Beginning="w" * 200, Length=20)
    page.get_by_role("button", name="Write").tap()
    says(page, "Done")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 320
    assert page.evaluate(
        "() => [...document.querySelectorAll('input, textarea, button')].every((e) => e.offsetHeight >= 40)"
    )


@needs_modules
def test_what_a_run_is_called_and_has_written_is_only_text(visit):
    page = visit("gpt2")
    assert page.title() == NAME and page.locator("h1").text_content() == NAME
    assert text_of(page) == SAMPLE
    assert page.get_by_label("Beginning").input_value() == PROMPT[:20]


@needs_modules
def test_a_page_opened_as_a_file_says_how_to_serve_it(chromium, pages):
    page = chromium.new_page()
    page.goto((pages("gpt2")[2] / "index.html").as_uri())
    assert "python -m http.server" in page.get_by_role("status").text_content()
    page.close()

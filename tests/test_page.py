"""The page in a real browser and under load, as a Space too."""

import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import packages_distributions, requires, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from test_answers import folders, writers  # noqa: F401

from nanogpt_hf.generation.sampling_settings import SamplingSettings
from nanogpt_hf.generation.writer import Writer
from nanogpt_hf.sharing.space import REQUIREMENTS, pins, write_space

pytestmark = [
    pytest.mark.slow,  # gradio, which takes seconds, is imported where it is used
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed (extra play)"),
]
ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LOAD_SECONDS = float(os.environ.get("NANOGPT_HF_LOAD_SECONDS", 2))


class Served:
    """A process that serves a page, in an environment that lends it nothing of this one's."""

    def __init__(self, *words, folder, **environment):
        self.log = Path(folder) / "page.log"
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=folder,
                env={**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + 180
        while not (found := re.search(r"the page is at (\S+?);", self.said())):
            assert time.monotonic() < end and self.process.poll() is None, self.said()
            time.sleep(0.2)
        self.address = found[1]

    def said(self):
        return self.log.read_text(encoding="utf-8")

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def served(folders, tmp_path_factory):  # noqa: F811
    page = Served(
        ROOT / "recipes" / "play.py",
        *folders,
        "--use_cpu",
        folder=tmp_path_factory.mktemp("page"),
        PYTHONPATH=str(ROOT),
    )
    yield page
    page.close()


def controls(seed, length=30, stop=""):
    return [length, 0.8, 1, 0, seed, stop]


def text_in(shown):
    return html.unescape(re.search(r"</b>(.*)</div>", shown, re.S)[1])


def test_it_listens_on_this_machine_alone(served):
    listening = {
        c.laddr.ip for c in psutil.Process(served.process.pid).net_connections() if c.status == "LISTEN"
    }
    assert listening == {"127.0.0.1"}
    assert "context 32 tokens" in served.said()


def test_ten_visitors_at_once_get_each_their_own_text(served, writers):  # noqa: F811
    """For as long as NANOGPT_HF_LOAD_SECONDS says, with bounded memory."""
    from gradio_client import Client

    failures, done, end = [], [], time.monotonic() + LOAD_SECONDS
    process = psutil.Process(served.process.pid)

    def visit(number):
        client, seed = Client(served.address, verbose=False), number
        while time.monotonic() < end:
            writer = writers[seed % 2]
            name = Path(writer.name).name
            shown, *_ = client.predict(name, "none", "Мой дядя", *controls(seed), api_name="/write")
            expected = writer.write("Мой дядя", SamplingSettings(max_new_tokens=30, seed=seed))[0]
            if text_in(shown) != expected:
                failures.append((seed, shown, expected))
            done.append(seed)
            seed += 10

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    time.sleep(LOAD_SECONDS / 2)
    before = process.memory_info().rss
    for thread in threads:
        thread.join(timeout=LOAD_SECONDS + 120)
    assert not failures, failures[0]
    assert len(done) >= 10
    assert process.memory_info().rss - before < 200 * 2**20


def test_what_cannot_be_done_is_a_sentence(served):
    from gradio_client import Client

    client = Client(served.address, verbose=False)
    for words, message in [
        (["one", "none", "a" * 1_000_000, *controls(1)], "1,000,000 characters"),
        (["one", "none", "a", *controls(-1)], "less than minimum value 0"),
        (["one", "none", "a", *controls(1, length=10**9)], "maximum value 5000"),
    ]:
        with pytest.raises(Exception, match=message):
            client.predict(*words, api_name="/write")


# --- a browser ---


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens a page; at the end it has asked nobody else."""
    contexts, asked = [], []

    def open_page(address, **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.get_by_label("Beginning").wait_for(timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked and all(re.match(r"(http://127\.0\.0\.1:|data:|blob:)", url) for url in asked)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def write(page, prompt, seed, length=None):
    """Write with a seed, by the keyboard; the text once it is whole."""
    if not page.get_by_label("Seed").is_visible():
        page.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").fill(str(seed))
    if length:
        page.get_by_label("number input for Length, in tokens").fill(str(length))
    page.get_by_label("Beginning").fill(prompt)
    page.keyboard.press("Control+Enter")
    page.get_by_text(f"seed {seed} · ").wait_for(timeout=60_000)
    page.get_by_text(f"{length or 500} tokens in").wait_for(timeout=60_000)
    return page.locator(".poem").first.inner_text()


def test_writing_comparing_keeping_and_downloading(visit, served, writers):  # noqa: F811
    page = visit(served.address, viewport={"width": 1200, "height": 900}, color_scheme="light")
    sampling = SamplingSettings(max_new_tokens=60, seed=3)
    expected = ["Мой дядя" + writer.write("Мой дядя", sampling)[0] for writer in writers]
    assert write(page, "Мой дядя", 3, 60).rstrip() == expected[0].rstrip()
    assert write(page, "Мой дядя", 4, 60).rstrip() != expected[0].rstrip()
    page.get_by_label("Beside it").click()
    page.get_by_role("option", name="two").click()
    write(page, "Мой дядя", 3, 60)
    until(lambda: page.locator(".poem:visible").count() == 2)
    until(
        lambda: (
            [text.rstrip() for text in page.locator(".poem:visible").all_inner_texts()]
            == [e.rstrip() for e in expected]
        )
    )
    page.get_by_role("button", name="Keep").click()
    page.get_by_text("Kept in this browser").wait_for()
    page.get_by_role("tab", name="Kept").click()
    until(lambda: page.locator("#kept .poem").count() == 2)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    kept = Path(download.value.path()).read_text(encoding="utf-8")
    assert kept == "\n\n---\n\n".join(expected) + "\n"
    page.reload()
    page.get_by_role("tab", name="Kept").click()
    until(lambda: page.locator("#kept .poem").count() == 2)


def test_stopping_and_going_on(visit, served):
    page = visit(served.address)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("number input for Length, in tokens").fill("5000")
    page.get_by_label("Beginning").fill("Мой")
    page.keyboard.press("Control+Enter")
    page.get_by_text("tokens in").wait_for(timeout=60_000)
    page.keyboard.press("Escape")
    time.sleep(1)
    stopped = page.locator(".poem").first.inner_text()
    time.sleep(1)
    assert page.locator(".poem").first.inner_text() == stopped
    assert "5000 tokens in" not in page.content() and len(stopped) > 3
    page.get_by_label("number input for Length, in tokens").fill("20")
    page.get_by_role("button", name="More").click()
    page.get_by_text("20 tokens in").wait_for(timeout=60_000)
    assert page.locator(".poem").first.inner_text().startswith(stopped.rstrip())


def test_what_surprises_shows_alternatives_by_night_on_a_phone(visit, served):
    page = visit(served.address, viewport={"width": 390, "height": 800}, color_scheme="dark")
    write(page, "Мой дядя", 5, 80)
    page.get_by_role("tab", name="Surprisal").click()
    page.get_by_role("button", name="Take what was written").first.click()
    until(lambda: page.get_by_label("Text", exact=True).input_value().startswith("Мой дядя"))
    page.get_by_role("button", name="Colour").click()
    token = page.locator(".surprisal[dir] span").nth(5)
    token.hover(timeout=60_000)
    tip = token.evaluate("token => getComputedStyle(token, '::after').content")
    assert "bits, probability" in tip and "likeliest: " in tip
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 60


# --- a Space ---


@pytest.fixture(scope="module")
def space(folders, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("space") / "Мой space"
    write_space(folders[0], folder)
    return folder


def required(names):
    """Names of distributions with all that they require, as pip would install them."""
    found, wanted = set(), [*names]
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name not in found:
            found.add(name)
            needs = map(Requirement, requires(name) or [])
            wanted += [
                need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})
            ]
    return found


def test_a_space_is_complete_and_starts(space, visit, writers, tmp_path):  # noqa: F811
    card = (space / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["sdk"] == "gradio" and front["sdk_version"] == version("gradio")
    assert front["app_file"] == "app.py" and front["title"] == "one"
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins())
    assert (space / "requirements.txt").read_text() == "".join(f"{pin}\n" for pin in pins())
    assert not [*space.rglob("__pycache__")] and not (space / "nanogpt_hf" / "recipes").exists()
    page = Served("-X", "importtime", "app.py", folder=space)
    try:
        visitor = visit(page.address)
        sampling = SamplingSettings(max_new_tokens=40, seed=9)
        assert write(visitor, "Мой", 9, 40).rstrip() == "Мой" + writers[0].write("Мой", sampling)[0].rstrip()
    finally:
        page.close()
    ours = [space / name.replace(".", "/") for name in re.findall(r"\| +(nanogpt_hf[\w.]*)\n", page.said())]
    assert space / "nanogpt_hf" / "runs" / "page" in ours
    assert imported_distributions(ours) <= required(REQUIREMENTS)


def imported_distributions(modules):
    """Those that modules and packages, by their paths, import at their top, as pip names them."""
    paths = [path.with_suffix(".py") if not path.is_dir() else path / "__init__.py" for path in modules]
    nodes = [node for path in paths for node in ast.parse(path.read_text("utf-8")).body]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    known = packages_distributions()
    names = {name.split(".")[0] for name in imported} - sys.stdlib_module_names - {"nanogpt_hf"}
    distributions = {re.sub(r"[-_.]+", "-", known[name][0]).lower() for name in names}
    assert "torch" in distributions
    return distributions


def test_a_space_is_uploaded(space, hub, monkeypatch, tmp_path):
    for name, value in hub.env(home=tmp_path).items():
        monkeypatch.setenv(name, value)
    script = (
        "import sys; from nanogpt_hf.sharing.hub import check_push, push_space; "
        "check_push('my-space', repo_type='space'); print(push_space(sys.argv[1], 'my-space'))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(space)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    address = done.stdout.strip()
    assert address.startswith(hub.url) and "/spaces/" in address
    repo_id = address.split("/spaces/")[1]
    files = hub.files(repo_id, repo_type="space")
    assert files.keys() >= {"app.py", "requirements.txt", "README.md", "nanogpt_hf/__init__.py"}
    assert files["app.py"] == (space / "app.py").read_bytes()
    assert json.loads(files["model/one/config.json"])["architectures"]
    assert torch.is_tensor(
        Writer.load(str(space / "model" / "one"), "cpu", torch.float32).model.lm_head.weight
    )

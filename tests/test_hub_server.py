"""The test Hub against the real huggingface_hub and datasets, and what these make of its faults."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from hub_server import HubServer, hub  # noqa: F401

CARD = "---\nlicense: mit\n---\nA tiny model.\n"
PRELUDE = """
import json, pathlib, time
import huggingface_hub as hf

def answer(found):
    pathlib.Path("answer.json").write_text(json.dumps(found), encoding="utf-8")
"""


def run_client(server, folder, code, **settings):
    """Run code in a fresh Python process in `folder`; what the code passes to `answer` comes back."""
    env = server.env(home=folder / "home") | settings
    (folder / "client.py").write_text(PRELUDE + code, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "client.py"]
    done = subprocess.run(command, env=env, cwd=folder, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answer.json").read_text(encoding="utf-8"))


def write_model(folder: Path) -> dict[str, bytes]:
    files = {
        "README.md": CARD.encode(),
        "config.json": b"{}",
        "empty.bin": b"",
        "model.safetensors": os.urandom(300_000),
        "checkpoints/step-1/model.safetensors": os.urandom(1000),
        "loss_curve.png": b"\x89PNG\0",
    }
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return files


def test_push_list_and_pull_a_model(hub, tmp_path):  # noqa: F811
    files = write_model(tmp_path / "model")
    hub.add_folder("openai-community/gpt2", tmp_path / "model")
    hub.move("gpt2", "openai-community/gpt2")
    seen = run_client(
        hub,
        tmp_path,
        """
repo = "user/model"
user = hf.whoami()["name"]
url = hf.create_repo(repo, private=True)
again = hf.create_repo(repo, exist_ok=True)
pushed = hf.upload_folder(repo_id=repo, folder_path="model", commit_message="Upload model")
repeated = hf.upload_folder(repo_id=repo, folder_path="model", commit_message="Upload model")
pulled = hf.snapshot_download(repo)
one = hf.hf_hub_download(repo, "checkpoints/step-1/model.safetensors", local_dir="one")
top = sorted(entry.path for entry in hf.HfApi().list_repo_tree(repo))
seeded = hf.snapshot_download("gpt2")
info = [(file.path, file.size) for file in hf.HfApi().get_paths_info(repo, ["config.json", "none.json"])]
large = [s.rfilename for s in hf.model_info(repo, files_metadata=True).siblings if s.lfs]
answer(dict(user=user, urls=[url, again], oids=[pushed.oid, repeated.oid], listed=hf.list_repo_files(repo),
            top=top, info=info, large=sorted(large), pulled=[pulled, seeded], one=one,
            private=hf.model_info(repo).private))
""",
    )
    stored = {".gitattributes", *files}
    assert seen["user"] == "user" and seen["private"] and seen["urls"] == [f"{hub.url}/user/model"] * 2
    assert set(seen["listed"]) == stored
    assert seen["top"] == sorted({path.split("/")[0] for path in stored})
    assert seen["large"] == sorted(path for path in files if path.endswith((".safetensors", ".png")))
    assert seen["info"] == [["config.json", 2]]
    for folder in map(Path, seen["pulled"]):
        assert {path: (folder / path).read_bytes() for path in files} == files
    assert Path(seen["one"]).read_bytes() == files["checkpoints/step-1/model.safetensors"]

    # One commit for the folder, and none for the repetition, which uploads nothing either.
    assert [(commit.title, commit.author) for commit in hub.commits("user/model")] == [
        ("initial commit", "system"),
        ("Upload model", "user"),
    ]
    assert seen["oids"] == [hub.commits("user/model")[-1].oid] * 2
    puts = [request for request in hub.requests if request.method == "PUT"]
    assert sorted(request.bytes for request in puts) == sorted(len(files[path]) for path in seen["large"])
    assert sum("/commit/" in request.path for request in hub.requests) == 1
    assert {path: data for path, data in hub.files("user/model").items() if path != ".gitattributes"} == files
    assert hub.unknown == [] and "hf_write" not in repr(hub.requests)


def test_a_commit_holds_what_changed_and_deletes_what_is_gone(hub, tmp_path):  # noqa: F811
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    hub.add_repo("user/model", {"config.json": "{}", "old/a.safetensors": b"1", "old/b.txt": b"2"})
    first = hub.commits("user/model")[-1].oid
    oids = run_client(
        hub,
        tmp_path,
        """
upload = dict(repo_id="user/model", folder_path="model")
changed = hf.upload_folder(**upload, delete_patterns=["old/*"])
hf.create_branch("user/model", branch="v1")
pathlib.Path("model/new.txt").write_text("new", encoding="utf-8")
branched = hf.upload_folder(**upload, revision="v1")
answer([changed.oid, branched.oid])
""",
    )
    assert set(hub.files("user/model")) == {".gitattributes", "config.json"}
    assert hub.files("user/model", revision=first)["old/b.txt"] == b"2"
    assert hub.files("user/model", revision="v1")["new.txt"] == b"new"
    assert [hub.commits("user/model")[-1].oid, hub.commits("user/model", revision="v1")[-1].oid] == oids


def test_datasets_load_jsonl_and_parquet(hub, tmp_path):  # noqa: F811
    seen = run_client(
        hub,
        tmp_path,
        """
import datasets
rows = [{"text": "Буря мглою\\n"}, {"text": "небо кроет"}]
for name in ("lines", "table"):
    pathlib.Path(name).mkdir()
datasets.Dataset.from_list(rows).to_json("lines/train.jsonl")
datasets.Dataset.from_list(rows).to_parquet("table/train.parquet")
read = []
for name in ("lines", "table"):
    hf.create_repo(f"user/{name}", repo_type="dataset")
    hf.upload_folder(repo_id=f"user/{name}", folder_path=name, repo_type="dataset")
    read.append(list(datasets.load_dataset(f"user/{name}", split="train")))
answer([rows, *read])
""",
    )
    rows, *read = seen
    assert read == [rows] * 2
    assert [len(hub.commits(f"user/{name}", repo_type="dataset")) for name in ("lines", "table")] == [2, 2]
    assert hub.unknown == []


def test_tokens_and_closed_repositories(hub, tmp_path):  # noqa: F811
    hub.add_token("hf_fine", "user", "fineGrained", scopes={"user/model": ["repo.write"]})
    hub.add_token("hf_team", "user", orgs=["team"])
    hub.add_token("hf_guest", "guest")
    hub.add_repo("user/model", {"a.txt": "1"})
    hub.add_repo("bob/gated", {"a.txt": "1"}, gated=True, readers=["guest"])
    hub.add_repo("bob/secret", {"a.txt": "1"}, private=True, readers=["guest"])
    hub.move("gated", "bob/gated")
    seen = run_client(
        hub,
        tmp_path,
        """
def outcome(token, call):
    try:
        call(hf.HfApi(token=token))
        return "ok"
    except Exception as error:
        return f"{type(error).__name__} {error.response.status_code}"
calls = {
    "create": lambda api: api.create_repo("user/new-" + api.token.replace("_", "-")),
    "create again": lambda api: api.create_repo("user/model", exist_ok=True),
    "create in team": lambda api: api.create_repo("team/" + api.token.replace("_", "-")),
    "upload": lambda api: api.upload_file(
        repo_id="user/model", path_in_repo="b.txt", path_or_fileobj=api.token.encode()
    ),
    "may write": lambda api: api.auth_check("user/model", write=True),
    "gated": lambda api: api.hf_hub_download("bob/gated", "a.txt", local_dir="g" + str(api.token)),
    "gated, old name": lambda api: api.hf_hub_download("gated", "a.txt", local_dir="o" + str(api.token)),
    "secret": lambda api: api.hf_hub_download("bob/secret", "a.txt", local_dir="s" + str(api.token)),
    "missing file": lambda api: api.hf_hub_download("user/model", "none.txt"),
    "missing revision": lambda api: api.model_info("user/model", revision="none"),
    "stale parent": lambda api: api.create_commit("user/model", [hf.CommitOperationAdd("c", b"c")],
                                                  commit_message="c", parent_commit="0" * 40),
}
tokens = ["hf_write", "hf_read", "hf_fine", "hf_team", "hf_guest", "hf_wrong", False]
reading = list(calls)[4:]
cases = [(token, name) for token in tokens for name in (calls if token else reading)]
answer({f"{token}: {name}": outcome(token, calls[name]) for token, name in cases})
""",
    )
    missing, forbidden, gate = "RepositoryNotFoundError", "HfHubHTTPError 403", "GatedRepoError"
    closed = [f"{gate} 403", f"{gate} 403", f"{missing} 404"]
    expected = {  # create, create again, create in team, upload, may write, gated twice, secret
        "hf_write": ["ok", "ok", forbidden, "ok", "ok", *closed],
        "hf_read": [forbidden, "ok", forbidden, forbidden, forbidden, *closed],
        "hf_fine": [forbidden, "ok", forbidden, "ok", "ok", *closed],
        "hf_team": ["ok", "ok", "ok", "ok", "ok", *closed],
        "hf_guest": [forbidden, "ok", forbidden, forbidden, forbidden, "ok", "ok", "ok"],
        "hf_wrong": ["HfHubHTTPError 401"] * 8,
        "False": [f"{missing} 401", f"{gate} 401", f"{gate} 401", f"{missing} 401"],  # from "may write" on
    }
    for token, outcomes in expected.items():
        of_token = [seen[case] for case in seen if case.startswith(f"{token}:")]
        assert of_token[: len(outcomes)] == outcomes, token
    assert seen["hf_read: missing file"] == "RemoteEntryNotFoundError 404"
    assert seen["hf_read: missing revision"] == "RevisionNotFoundError 404"
    assert seen["hf_write: stale parent"] == "HfHubHTTPError 412"


# What huggingface_hub 2.4.0 makes of each fault: "ok" after retries of its own, or the exception and its
# causes down to the first HTTP error; then the requests that the endpoint saw, the commits made, the least
# seconds. "upload" is upload_folder without Xet. "upload xet" is with it: other code, which retries commits,
# and which for a folder of regular files uses plain HTTP alone.
CONFLICT = "Cannot create repo: another conflicting operation is in progress"
FAULTS = [
    ("whoami", "GET /whoami-v2", {"status": 401}, "HfHubHTTPError", 1, 0, 0),
    ("whoami", "GET /whoami-v2", {"status": 429, "retry_after": 9}, "HfHubHTTPError", 1, 0, 0),
    ("create", "POST /repos/create", {"status": 409}, "KeyError", 1, 0, 0),
    ("create", "POST /repos/create", {"status": 409, "message": CONFLICT, "times": 3}, "ok", 4, 0, 0),
    ("create", "POST /repos/create", {"status": 503}, "HfHubHTTPError", 1, 0, 0),
    ("create", "POST /repos/create", {"reset": True}, "ReadError", 1, 0, 0),
    ("upload", "POST /validate-yaml", {"status": 500}, "HfHubHTTPError", 1, 0, 0),
    ("upload", "POST /preupload/", {"status": 403}, "HfHubHTTPError", 1, 0, 0),
    ("upload", "POST /preupload/", {"status": 503}, "ok", 2, 1, 1),
    ("upload", "POST /preupload/", {"status": 503, "retry_after": 0, "times": 9}, "HfHubHTTPError", 6, 0, 5),
    ("upload", "POST /objects/batch", {"status": 500}, "ok", 2, 1, 1),
    ("upload", "PUT /lfs/", {"status": 403}, "RuntimeError < HfHubHTTPError", 1, 0, 0),
    ("upload", "PUT /lfs/", {"status": 503}, "ok", 2, 1, 1),
    ("upload", "PUT /lfs/", {"status": 429, "retry_after": 1}, "ok", 2, 1, 2),
    ("upload", "PUT /lfs/", {"reset": True}, "ok", 2, 1, 1),
    ("upload", "POST /objects/verify", {"status": 500}, "ok", 2, 1, 1),
    ("upload", "POST /commit/", {"status": 401}, "HfHubHTTPError", 1, 0, 0),
    ("upload", "POST /commit/", {"status": 403}, "HfHubHTTPError", 1, 0, 0),
    ("upload", "POST /commit/", {"status": 409}, "HfHubHTTPError", 1, 0, 0),
    ("upload", "POST /commit/", {"status": 429, "retry_after": 9}, "HfHubHTTPError", 1, 0, 0),
    ("upload", "POST /commit/", {"status": 500}, "HfHubHTTPError", 1, 0, 0),
    ("upload", "POST /commit/", {"status": 503}, "HfHubHTTPError", 1, 0, 0),
    ("upload", "POST /commit/", {"reset": True}, "ReadError", 1, 0, 0),
    ("upload", "POST /commit/", {"lost": True}, "ReadError", 1, 1, 0),
    ("upload", "POST /commit/", {"delay": 3.5}, "ok", 1, 1, 3.5),
    ("upload xet", "POST /commit/", {"status": 409}, "HfHubHTTPError", 1, 0, 0),
    ("upload xet", "POST /commit/", {"status": 503}, "ok", 2, 1, 1),
    ("upload xet", "POST /commit/", {"reset": True}, "ok", 2, 1, 1),
    ("upload xet", "POST /commit/", {"lost": True}, "ok", 2, 2, 1),
    ("snapshot", "GET /revision/", {"status": 503}, "LocalEntryNotFoundError < HfHubHTTPError", 1, 0, 0),
    ("snapshot", "GET /revision/", {"reset": True}, "ReadError", 1, 0, 0),
    ("snapshot", "GET /tree/", {"status": 503}, "ok", 2, 0, 1),
    ("file", "HEAD /resolve/", {"status": 403}, "LocalEntryNotFoundError < HfHubHTTPError", 1, 0, 0),
    ("file", "HEAD /resolve/", {"status": 503}, "ok", 2, 0, 0),
    ("file", "HEAD /resolve/", {"reset": True}, "ReadError", 1, 0, 0),
    ("file", "HEAD /resolve/", {"delay": 3.5}, "ok", 2, 0, 3),
    ("file", "GET /resolve/", {"status": 429, "retry_after": 1}, "ok", 2, 0, 2),
    ("file", "GET /resolve/", {"status": 503}, "HfHubHTTPError", 1, 0, 0),
    ("file", "GET /resolve/", {"reset": True}, "ReadError", 1, 0, 0),
    ("file", "GET /resolve/", {"truncate": 100}, "ok", 2, 0, 1),
    ("file", "GET /resolve/", {"delay": 3.5}, "ok", 2, 0, 4),
]
NAMES = [f"{operation}: {place} {fault}" for operation, place, fault, *_ in FAULTS]
LINES = "".join(f"line {number}\n" for number in range(100))
FAULTY_CLIENT = """
from concurrent.futures import ThreadPoolExecutor

def meet(number, operation, url):
    api, began = hf.HfApi(endpoint=url), time.monotonic()
    upload = {"repo_id": "user/model", "folder_path": "model"}
    try:
        if operation == "whoami":
            api.whoami()
        elif operation == "create":
            api.create_repo("user/new", exist_ok=True)
        elif operation == "upload":
            api.upload_folder(**upload)
        elif operation == "upload xet":
            api.upload_folder(**upload, ignore_patterns="*.safetensors")
        elif operation == "snapshot":
            api.snapshot_download("user/model", local_dir=f"pulled-{number}")
        elif operation == "file":
            path = api.hf_hub_download("user/model", "lines.txt", local_dir=f"pulled-{number}")
            assert pathlib.Path(path).read_text(encoding="utf-8") == LINES
        names = ["ok"]
    except Exception as error:
        names = [type(error).__name__]
        while error.__cause__ and not any(base.__name__ == "HTTPError" for base in type(error).__mro__):
            error = error.__cause__
            names.append(type(error).__name__)
    return number, " < ".join(names), time.monotonic() - began

with ThreadPoolExecutor(len(cases)) as pool:
    answer([*pool.map(lambda case: meet(*case), cases)])
"""


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    """Each fault on a server of its own, all met at once: most of the time is the client's own waiting."""
    with ExitStack() as stack:
        servers = [stack.enter_context(HubServer()) for _ in FAULTS]
        for server, (_, place, fault, *_rest) in zip(servers, FAULTS, strict=True):
            server.add_repo("user/model", {"lines.txt": LINES})
            server.fail(*place.split(), **fault)

        def meet(xet: bool):
            folder = tmp_path_factory.mktemp("client")
            (folder / "model").mkdir()
            (folder / "model" / "README.md").write_text(CARD, encoding="utf-8")
            (folder / "model" / "model.safetensors").write_bytes(os.urandom(200_000))
            cases = [
                (number, row[0], server.url)
                for number, (server, row) in enumerate(zip(servers, FAULTS, strict=True))
                if (row[0] == "upload xet") == xet
            ]
            settings = {"HF_HUB_ETAG_TIMEOUT": "3", "HF_HUB_DOWNLOAD_TIMEOUT": "3"}
            settings |= {"HF_HUB_DISABLE_XET": "0" if xet else "1"}
            return run_client(
                servers[0], folder, f"LINES, cases = {LINES!r}, {cases!r}\n{FAULTY_CLIENT}", **settings
            )

        with ThreadPoolExecutor(2) as pool:
            outcomes = [found for client in pool.map(meet, (False, True)) for found in client]
        yield {number: (servers[number], outcome, seconds) for number, outcome, seconds in outcomes}


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=NAMES)
def test_what_the_client_makes_of_a_fault(met, number):
    _, place, _, outcome, requests, commits, seconds = FAULTS[number]
    method, path = place.split()
    server, seen_outcome, seen_seconds = met[number]
    asked = [request for request in server.requests if request.method == method and path in request.path]
    seen = (seen_outcome, len(asked), len(server.commits("user/model")) - 2)
    assert seen == (outcome, requests, commits)
    assert seen_seconds >= seconds
    assert server.errors == [] and server.unknown == []


def test_a_client_that_dies_in_mid_commit_leaves_nothing(hub):  # noqa: F811
    hub.add_repo("user/model")
    with socket.create_connection(("127.0.0.1", int(hub.url.rsplit(":", 1)[1]))) as connection:
        start = "POST /api/models/user/model/commit/main HTTP/1.1\r\nAuthorization: Bearer hf_write\r\n"
        connection.sendall(f'{start}Content-Length: 1000\r\n\r\n{{"key": "header"'.encode())
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert len(hub.commits("user/model")) == 1 and hub.requests == []


def test_closing_ends_a_request_that_is_being_delayed():
    with HubServer() as server:
        fault = server.fail("GET", "/whoami-v2", delay=60)
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5)
        connection.request("GET", "/api/whoami-v2")
        while fault.times:
            time.sleep(0.01)
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        connection.getresponse()
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5).connect()
    connection.close()


def test_ranges_of_a_file(hub):  # noqa: F811
    hub.add_repo("user/model", {"digits.txt": "0123456789"})
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=5)
    seen = []
    for asked in ("bytes=2-4", "bytes=7-", "bytes=-2", "bytes=0-99", "bytes=10-"):
        connection.request("GET", "/user/model/resolve/main/digits.txt", headers={"Range": asked})
        response = connection.getresponse()
        seen.append((response.status, response.headers["Content-Range"], response.read()[:10]))
    connection.close()
    assert seen[:4] == [
        (206, "bytes 2-4/10", b"234"),
        (206, "bytes 7-9/10", b"789"),
        (206, "bytes 8-9/10", b"89"),
        (206, "bytes 0-9/10", b"0123456789"),
    ]
    assert seen[4][:2] == (416, "bytes */10")


def test_env_hides_the_surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_developer")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with HubServer() as server:
        env = server.env(home=tmp_path, token=None)
        assert "HF_HUB_OFFLINE" not in env and "HF_TOKEN" not in env and env["HF_HOME"] == str(tmp_path)
        assert run_client(server, tmp_path, "answer(hf.whoami()['name'])") == "user"


def test_a_fault_is_one_thing(hub):  # noqa: F811
    for nonsense in ({}, {"status": 503, "reset": True}, {"delay": 1, "lost": True, "truncate": 1}):
        with pytest.raises(ValueError, match="exactly one"):
            hub.fail("GET", "/", **nonsense)

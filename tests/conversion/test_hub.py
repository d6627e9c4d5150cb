"""Uploads to a hub made for the test, on the loopback address."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from model_folders import make_run, random_weights

from phi_fast.conversion.errors import ConversionError
from phi_fast.convert import ConvertOptions, convert
from phi_fast.errors import UsageError

huggingface_hub = pytest.importorskip("huggingface_hub")
TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Records commits; answers status 403, after which no client tries again, to paths that contain `broken`."""

    broken = "nothing"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.commits: list[dict[str, bytes]] = []
        self.created: list[dict] = []


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == f"Bearer {TOKEN}"
        self.reply(200 if known else 401, {"name": "me", "type": "user"} if known else {"error": "who are you"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.broken in self.path:
            self.reply(403, {"error": "you may not write here"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.reply(200, {"url": "https://huggingface.co/me/phi"})
        elif self.path.startswith("/api/models/me/phi/preupload"):
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.reply(200, {"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
        elif self.path.startswith("/api/models/me/phi/commit"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            self.server.commits.append(files)
            self.reply(200, {"commitUrl": "https://huggingface.co/me/phi/commit/1", "commitOid": "1"})
        else:
            self.reply(200, {})

    def reply(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    return str(make_run(tmp_path / "run", random_weights()))


def test_the_folder_is_one_commit_with_its_card(tmp_path, run, hub):
    said: list[str] = []
    out = convert(ConvertOptions(run, tmp_path / "out", push="me/phi", private=True), tell=said.append)
    [files] = hub.commits
    written = {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".phi_fast-convert.json"}
    assert files == written
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= files.keys()
    assert b'AutoModelForCausalLM.from_pretrained("me/phi")' in files["README.md"]
    [created] = hub.created
    assert created["name"] == "phi" and created["organization"] == "me"
    assert created.get("private") is True or created.get("visibility") == "private"
    assert f"uploaded to http://127.0.0.1:{hub.server_port}/me/phi" in said


@pytest.mark.parametrize("broken", ["create", "preupload", "commit"])
def test_an_upload_that_fails_commits_nothing_and_keeps_the_folder(tmp_path, run, hub, broken):
    hub.broken = broken
    with pytest.raises(UsageError, match=r"could not be uploaded to me/phi: .*one commit"):
        convert(ConvertOptions(run, tmp_path / "out", push="me/phi"))
    assert hub.commits == []
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("me/phi", None, "hf auth login"),
        ("me/phi", "hf_other", "the hub does not accept the token"),
        ("phi", TOKEN, "expected OWNER/NAME"),
        ("a/b/c", TOKEN, "--push a/b/c: "),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_work(tmp_path, run, hub, monkeypatch, repo, token, message):
    if token is None:
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConversionError, match=message):
        convert(ConvertOptions(run, tmp_path / "out", push=repo))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert hub.created == hub.commits == []


def test_a_push_needs_a_folder(tmp_path, run, hub):
    with pytest.raises(ConversionError, match="name it, OUT"):
        convert(ConvertOptions(run, gguf=tmp_path / "x.gguf", push="me/phi"))

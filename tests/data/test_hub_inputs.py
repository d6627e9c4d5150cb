"""hf:// from a hub on the loopback address that fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from remote_servers import Hub, failing, serving
from test_open_recipe import digests, make_source

from phi_fast import prepare
from phi_fast.data import remote_files
from phi_fast.data.preparation.inputs import find_inputs
from phi_fast.data.remote_files import Patience, RemoteError, find, read_range, stat
from phi_fast.open_data import COSMOPEDIA_V1, OPEN_DATA

pytest.importorskip("pyarrow")
pytest.importorskip("huggingface_hub")
QUICK = Patience(attempts=4, first_wait=0.01, timeout=5)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    source = make_source(tmp_path / "hub")
    files = {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*.parquet")}
    with serving(Hub(files)) as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        remote_files._file_system.cache_clear()
        assert isinstance(running, Hub)
        yield running
        remote_files._file_system.cache_clear()


def test_folders_files_and_faults(hub: Hub) -> None:
    found = find(COSMOPEDIA_V1.url, QUICK)
    [(url, status)] = found.items()
    assert url == f"{COSMOPEDIA_V1.url}/openstax/train-00000-of-00001.parquet"
    content = hub.files["HuggingFaceTB/cosmopedia/data/openstax/train-00000-of-00001.parquet"]
    assert status.size == len(content) and re.fullmatch("[0-9a-f]{40}", status.version)
    hub.fault = failing("agreed", "short", on="GET /datasets/")
    assert read_range(url, 10, 500, QUICK) == content[10:500]
    assert stat(COSMOPEDIA_V1.url, QUICK) is None
    with pytest.raises(RemoteError, match=r"nothing.parquet cannot be read: .*hf auth login"):
        stat(f"{COSMOPEDIA_V1.url}/nothing.parquet", QUICK)
    [entry] = find_inputs([COSMOPEDIA_V1.url], patience=QUICK).read
    assert entry.kind == "parquet"


@pytest.mark.slow
def test_a_recipe_from_the_hub(hub: Hub, tmp_path: Path, small_tokenizer: Path) -> None:
    options = ["--recipe", "phi-1.5-web-open", "--tokenizer", str(small_tokenizer), "--workers", "1", "--attempts", "4"]
    assert prepare.main([*options, "--source", str(tmp_path / "hub"), "--out", str(tmp_path / "local")]) == 0
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    words = [sys.executable, "-m", "phi_fast.prepare", *options, "--out", str(tmp_path / "out")]
    hub.fault = failing(*["agreed", None, "short", None, "drop"] * 3, on="GET /datasets/")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "local")
    assert re.search(r"network: \d+\.\d kB, less than a second at 100 MB/s", done.stdout)
    assert done.stderr.count("trying again in") >= 5
    for sources in OPEN_DATA["phi-1.5-web-open"].corpora.values():
        for one in sources:
            assert any(f"/datasets/{one.dataset}/resolve/{one.revision}/" in line for line in hub.requests)


CARD = b"""---
configs:
- config_name: one
  data_files:
  - split: train
    path: top/*.jsonl
- config_name: two
  data_files:
  - split: test
    path: data/*
---
"""


@pytest.mark.slow
def test_a_configuration_and_a_split_by_name(tmp_path: Path, small_tokenizer: Path) -> None:
    texts = {name: b"".join(b'{"text": "%s %d"}\n' % (name.encode(), i) for i in range(9)) for name in ("one", "two")}
    files = {"me/them/README.md": CARD, "me/them/top/a.jsonl": texts["one"], "me/them/data/b.jsonl": texts["two"]}
    with serving(Hub(files)) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}

        def run(query: str, out: str) -> subprocess.CompletedProcess[str]:
            words = [f"hf://datasets/me/them@main?{query}", "--tokenizer", str(small_tokenizer), "--out", out]
            command = [sys.executable, "-m", "phi_fast.prepare", *words, "--workers", "1", "--validation", "0"]
            return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

        hub.fault = failing("short", "agreed", on="GET /datasets/me/them/resolve/55555")
        for query, name in (("config=one", "one"), ("config=two&split=test", "two")):
            done = run(query, name)
            assert done.returncode == 0, done.stderr
            local = tmp_path / f"{name}.jsonl"
            local.write_bytes(texts[name])
            options = ["--tokenizer", str(small_tokenizer), "--validation", "0", "--workers", "1"]
            assert prepare.main([str(local), *options, "--out", str(tmp_path / f"{name}-local")]) == 0
            assert digests(tmp_path / name) == digests(tmp_path / f"{name}-local")
        for query, message in (
            ("config=three", "'three' not found. Available: .'one', 'two'"),
            ("config=two", "no split"),
        ):
            done = run(query, "no")
            assert done.returncode == 1 and re.search(message, done.stderr), done.stderr
            assert not (tmp_path / "no.partial").exists()

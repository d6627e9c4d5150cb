"""The commands of docs/prepare.md for S3 and for the recipes, run as a user runs them."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from remote_servers import Proxy, serving
from test_open_recipe import digests, make_source

from phi_fast import prepare

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "prepare.md").read_text(encoding="utf-8")
LINES = [json.dumps({"text": f"Document {i}: {'lorem ipsum dolor sit amet ' * 400}{i}"}) + "\n" for i in range(700)]


def commands(*words: str) -> list[str]:
    """The commands of the page's sh blocks that hold all of these words."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    found = [line for block in blocks for line in block.splitlines() if all(word in line for word in words)]
    assert found, words
    return found


def parquet() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    file = io.BytesIO()
    table = pyarrow.table({"text": [json.loads(line)["text"] for line in LINES]})
    pytest.importorskip("pyarrow.parquet").write_table(table, file, row_group_size=100)
    return file.getvalue()


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[tuple[Proxy, dict[str, bytes]]]:
    """s3://my-bucket/texts of 20 MB behind a proxy, and its files."""
    pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    port = moto.get_host_and_port()[1]
    files = {
        "a.jsonl": "".join(LINES).encode(),
        "b.jsonl.gz": gzip.compress("".join(LINES).encode()),
        "c.parquet": parquet(),
    }
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="my-bucket")
    for name, content in files.items():
        client.put_object(Bucket="my-bucket", Key=f"texts/{name}", Body=content)
    with serving(Proxy(port)) as proxy:
        assert isinstance(proxy, Proxy)
        yield proxy, files
    moto.stop()


@pytest.mark.slow
def test_prepare_from_s3_through_faults_and_kills(tmp_path: Path, bucket: tuple[Proxy, dict[str, bytes]]) -> None:
    proxy, files = bucket
    (tmp_path / "texts").mkdir()
    for name, content in files.items():
        (tmp_path / "texts" / name).write_bytes(content)
    local = ["--tokenizer", "phi-1.5", "--workers", "2", "--out", str(tmp_path / "local")]
    assert prepare.main([str(tmp_path / "texts"), *local]) == 0
    chance = random.Random(7)
    proxy.delay = 0.2
    proxy.fault = lambda request: (
        chance.choice(["drop", "short", "agreed", "error", "slow"]) if chance.random() < 0.15 else None
    )
    [line] = commands("s3://")
    words = [sys.executable, *shlex.split(line)[1:], "--workers", "2", "--attempts", "12"]
    environment = os.environ | {
        **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test"),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": proxy.url,
    }
    out = tmp_path / "data" / "mine"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for units in (1, 6, 15):  # kill -9 once so many units are done, at a random moment of the next
        process = subprocess.Popen(words, cwd=tmp_path, env=environment, **quiet)
        while process.poll() is None and len(list(out.parent.glob("mine.partial/*.index"))) < units:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
        assert not out.exists()
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [kept] = re.findall(r"kept (\d+) of (\d+) parts", done.stdout)
    assert 15 <= int(kept[0]) <= int(kept[1])
    assert digests(out) == digests(tmp_path / "local")


@pytest.mark.slow
def test_the_pages_commands_for_recipes_work(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    make_source(tmp_path / "datasets")
    lines = [line.replace("/mnt/datasets", "datasets") for line in commands("phi_fast", "--recipe phi-1.5-open")]
    assert len(lines) == 4
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for line in lines:
        words = [sys.executable, *shlex.split(line)[1:]]
        if "phi_fast.train" in words:
            small = "--model.hidden-size 64 --model.num-attention-heads 1 --model.num-hidden-layers 1 --tokens 512"
            words += [
                *small.split(),
                *["--sequence-length", "64", "--global-batch-size", "2", "--val-every", "0", "--sample-tokens", "0"],
            ]
        elif "--source" not in words:
            words += ["--source", "datasets"]
        else:
            shutil.rmtree(tmp_path / "data")
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert {path.name for path in (tmp_path / "data" / "phi-1.5-open").iterdir()} == {
        "synthetic",
        "code",
        "sources.json",
    }

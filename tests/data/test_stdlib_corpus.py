from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from phi_fast.data import stdlib_corpus, vocabulary
from phi_fast.data.manifest import Manifest, ManifestError
from phi_fast.errors import UsageError
from phi_fast.files import Claim

SMALL = """
import sys
from pathlib import Path
from phi_fast.data import stdlib_corpus

read = stdlib_corpus.read_sources
stdlib_corpus.read_sources = lambda: dict(list(read().items())[:40])
stdlib_corpus.VOCAB_SIZE = 1000


def progress(line):
    print(line, flush=True)
    if "--stop" in sys.argv and "encoding code" in line:
        sys.stdin.read()


stdlib_corpus.prepare(Path(sys.argv[1]), progress=progress)
"""


def start_small_build(directory: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Builds a corpus from 40 modules in another process."""
    return subprocess.Popen(
        [sys.executable, "-c", SMALL, str(directory), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_it_is_large_enough_for_the_default_run(stdlib: Path) -> None:
    seen = 400 * 8 * 256
    docs, code = (Manifest.read(stdlib / name).splits for name in ("docs", "code"))
    assert docs["train"].tokens > 0.8 * seen / 2
    assert code["train"].tokens > 0.2 * seen
    for splits in (docs, code):
        assert splits["validation"].documents >= 10
        assert splits["validation"].tokens > 20_000


def test_every_file_is_sound(stdlib: Path) -> None:
    assert stdlib_corpus.prepare(stdlib) == {"docs": stdlib / "docs", "code": stdlib / "code"}
    tokenizer = Tokenizer.from_file(str(stdlib / "tokenizer.json"))
    assert vocabulary.vocab_size(tokenizer) == 8192
    assert vocabulary.end_of_text(tokenizer) == 0
    for name in ("docs", "code"):
        manifest = Manifest.read(stdlib / name)
        manifest.verify(stdlib / name)
        assert (manifest.dtype, manifest.vocab_size) == ("uint16", 8192)
        assert manifest.tokenizer_sha256 == vocabulary.digest(tokenizer)
        assert vocabulary.digest(vocabulary.tokenizer(stdlib / name)) == vocabulary.digest(tokenizer)
        assert {path.name for path in (stdlib / name).iterdir()} == {
            *("manifest.json", "tokenizer.json", "train.bin", "train.ends", "validation.bin", "validation.ends")
        }


def test_the_documents_are_the_library(stdlib: Path) -> None:
    tokenizer = Tokenizer.from_file(str(stdlib / "tokenizer.json"))
    sources = stdlib_corpus.read_sources()
    found: dict[str, list[str]] = {"docs": [], "code": []}
    for name in found:
        for split in Manifest.read(stdlib / name).splits.values():
            tokens = np.fromfile(stdlib / name / split.file, "<u2")
            ends = np.fromfile(stdlib / name / split.ends, "<u8").astype(int)
            assert (np.flatnonzero(tokens == 0) == ends - 1).all()
            found[name] += tokenizer.decode_batch([part[:-1].tolist() for part in np.split(tokens, ends[:-1])])
    assert sorted(found["code"]) == sorted(sources.values())
    some = [stdlib_corpus.reference_page(name, sources[name]) for name in ("argparse", "json.decoder", "tkinter")]
    assert {*stdlib_corpus.language_reference(), *some} <= set(found["docs"])


def test_a_second_call_is_immediate(stdlib: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in stdlib.rglob("*")}
    start = time.perf_counter()
    stdlib_corpus.prepare(stdlib, progress=lambda line: pytest.fail(f"built again: {line}"))
    assert time.perf_counter() - start < 1
    assert {path: path.stat().st_mtime_ns for path in stdlib.rglob("*")} == before


def test_the_same_corpus_from_processes_that_start_together(tmp_path: Path) -> None:
    apart = start_small_build(tmp_path / "apart", PYTHONHASHSEED="1", RAYON_NUM_THREADS="1")
    together = [start_small_build(tmp_path / "together", PYTHONHASHSEED=seed) for seed in "23"]
    lines = [process.communicate()[0].splitlines() for process in (apart, *together)]
    assert [process.returncode for process in (apart, *together)] == [0, 0, 0]
    assert len(lines[0]) == 4
    waited, built = sorted([lines[1], lines[2]], key=len)
    assert built == lines[0]
    assert len(waited) <= 1
    assert all("together is in use by process" in line for line in waited)  # or it was already built
    assert contents(tmp_path / "apart") == contents(tmp_path / "together")


def test_a_killed_build_is_not_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "corpus"
    process = start_small_build(directory, "--stop")
    assert process.stdout is not None
    while "encoding code" not in process.stdout.readline():
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert (tmp_path / ".corpus.partial" / "docs" / "manifest.json").exists()
    assert not directory.exists()
    monkeypatch.setattr(stdlib_corpus, "read_sources", lambda: {"again": '"""Built again."""\n' * 99})
    lines: list[str] = []
    assert stdlib_corpus.prepare(directory, progress=lines.append)["code"] == directory / "code"
    assert len(lines) == 4
    assert not (tmp_path / ".corpus.partial").exists()


def test_a_full_disk_is_named_and_gets_its_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stdlib_corpus, "read_sources", lambda: {"a": '"""A module."""\n' * 99})
    monkeypatch.setattr(stdlib_corpus, "merge", full)
    with pytest.raises(OSError, match=rf"No space left on device for the standard.*'{tmp_path / 'corpus'}'"):
        stdlib_corpus.prepare(tmp_path / "corpus")
    assert not list(tmp_path.iterdir())  # the lock file is removed with its owner


def test_a_damaged_corpus_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "corpus"
    (directory / "docs").mkdir(parents=True)
    with pytest.raises(ManifestError, match=r"docs/manifest\.json does not exist.*Delete .*corpus to build it anew"):
        stdlib_corpus.prepare(directory)


@pytest.mark.parametrize("path", ["missing", "python311.zip"])
def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / path)})
    with pytest.raises(FileNotFoundError, match=rf"{path} does not hold .*phi_fast\.prepare"):
        stdlib_corpus.prepare(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


PAGE = '''"""A module."""
import os

if os.name == "posix":
    def run(command, *, timeout: float = 1.0) -> int:
        """Run it."""

class Tool(Base, os.PathLike):
    """A tool.

    Its rules:
        indented
    """
    def quiet(self): pass
    class Inner:
        async def wait(self, /, *args, **more):
            "Wait for it."
'''


def test_a_reference_page() -> None:
    assert stdlib_corpus.reference_page("pkg.mod", PAGE) == (
        "module pkg.mod\n\nA module.\n\n\n"
        "pkg.mod.run(command, *, timeout: float=1.0) -> int\n\nRun it.\n\n\n"
        "class pkg.mod.Tool(Base, os.PathLike)\n\nA tool.\n\nIts rules:\n    indented\n\n\n"
        "pkg.mod.Tool.Inner.wait(self, /, *args, **more)\n\nWait for it."
    )
    assert stdlib_corpus.reference_page("empty", "x = 1") == ""


def test_a_wait_says_for_whom_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_corpus, "BUILD_SECONDS", 0.3)
    told: list[str] = []
    with (
        Claim.take(tmp_path / ".stdlib.lock", "the corpus"),
        pytest.raises(UsageError, match=rf"in use by process {os.getpid()} on .*wait for it to end"),
    ):
        stdlib_corpus.prepare(tmp_path / "stdlib", progress=told.append)
    assert [f"in use by process {os.getpid()}" in line for line in told] == [True]


def test_onto_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "stdlib").symlink_to("big/stdlib")
    (tmp_path / "big").mkdir()
    build = start_small_build(tmp_path / "stdlib")
    assert build.wait(120) == 0
    Manifest.read(tmp_path / "big" / "stdlib" / "docs").verify(tmp_path / "stdlib" / "docs")

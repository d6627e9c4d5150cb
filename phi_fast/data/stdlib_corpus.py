"""The default corpus: Python's own standard library, real text and real code that every machine has.

It has two components, like phi-1.5's mix of synthetic textbooks and code: `docs` (the language reference in
`pydoc_data.topics`, and the docstrings of every module as reference pages) and `code` (the sources). A byte-level BPE
with 8192 ids is trained on both. Building it takes some ten seconds on 2 cores, once; the result depends only on the
Python version. No module is imported for it.
"""

from __future__ import annotations

import ast
import itertools
import os
import runpy
import shutil
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ..files import Claim, sync_directory
from . import vocabulary
from .manifest import Delimiter, Manifest, ManifestError
from .preparation.merge import merge
from .preparation.units import Encoding, encode_unit

VOCAB_SIZE = 8192
VALIDATION = 0.05
"""Share of documents held out: about 25 modules' sources and 15 pages of documentation."""
COMPONENTS = ("docs", "code")
BUILD_SECONDS = 600.0
"""How long to wait for another process's build. A build takes some ten seconds."""

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
"""Tests, third-party packages, tables of character sets, and `pydoc_data`, which `docs` already has as text."""


def prepare(directory: Path, *, progress: Callable[[str], None] | None = None) -> dict[str, Path]:
    """The corpus directories {"docs": ..., "code": ...} under `directory`, which are built if they do not exist.

    `directory` also holds `tokenizer.json`. An existing corpus is validated and returned at once. A new one is built in
    a temporary directory, under a lock, and renamed when complete: processes that start together build it once, and a
    killed build leaves nothing that looks like a corpus.

    progress: called with a line of text when each step starts.

    Raises FileNotFoundError if Python's sources are not on disk, ManifestError for a damaged corpus, and UsageError if
    another process takes longer than BUILD_SECONDS to build it.
    """
    directory = Path(directory)
    report = progress or (lambda line: None)
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock, what = directory.with_name(f".{directory.name}.lock"), f"the standard-library corpus at {directory}"
    with Claim.take(lock, what, wait=BUILD_SECONDS, tell=report):
        if not directory.exists():
            _build_aside(Path(os.path.realpath(directory)), report)  # a link may point to a missing directory
    return _finished(directory)


def _finished(directory: Path) -> dict[str, Path]:
    parts = {name: directory / name for name in COMPONENTS}
    try:
        for part in parts.values():
            Manifest.read(part)
    except ManifestError as error:
        raise ManifestError(
            f"the standard-library corpus is damaged: {error}. Delete {directory} to build it anew"
        ) from None
    return parts


def _build_aside(directory: Path, report: Callable[[str], None]) -> None:
    aside = directory.with_name(f".{directory.name}.partial")
    if aside.exists():  # left by a killed build: no other process holds the lock
        shutil.rmtree(aside)
    try:
        aside.mkdir()
        _build(aside, report)
        aside.rename(directory)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk or a signal must leave no partial corpus
        if not isinstance(error, OSError) or error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror} for the standard-library corpus", str(directory)) from error
    sync_directory(directory.parent)


def _build(directory: Path, report: Callable[[str], None]) -> None:
    report("reading Python's standard library")
    sources, topics = read_sources(), language_reference()
    report(f"training a byte-level BPE of {VOCAB_SIZE} ids on {len(sources)} modules, and gathering their docstrings")
    pool = ThreadPoolExecutor(1)  # training runs without Python's lock, so docstrings are parsed meanwhile
    try:
        training = pool.submit(train_tokenizer, [*topics, *sources.values()])
        pages = [page for page in itertools.starmap(reference_page, sources.items()) if page]
        tokenizer = training.result()
    finally:
        pool.shutdown(wait=False)  # after a signal, do not wait for a training that nobody needs any more
    corpus = {"docs": [*topics, *pages], "code": list(sources.values())}
    for name, documents in corpus.items():
        report(f"encoding {name}: {len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} M characters")
        _write_component(directory / name, documents, tokenizer)
    tokenizer.save(str(directory / "tokenizer.json"))


def _write_component(directory: Path, documents: list[str], tokenizer: Tokenizer) -> None:
    directory.mkdir()
    delimiter = vocabulary.end_of_text(tokenizer)
    manifest = Manifest(
        dtype="uint16",
        tokenizer="stdlib",
        tokenizer_sha256=vocabulary.digest(tokenizer),
        vocab_size=vocabulary.vocab_size(tokenizer),
        delimiter=Delimiter(delimiter),
        splits={},
    )
    unit = directory / "unit"
    encode_unit(unit, 0, documents, Encoding(tokenizer, delimiter, manifest.numpy_dtype, validation=VALIDATION))
    Manifest(**{**vars(manifest), "splits": merge([unit], directory, manifest.numpy_dtype)}).write(directory)
    for suffix in (".tokens", ".index"):
        unit.with_suffix(suffix).unlink()
    tokenizer.save(str(directory / "tokenizer.json"))


def train_tokenizer(documents: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE ids: `<|endoftext|>` is 0, the bytes 1…256, then merges by frequency."""
    tokenizer = vocabulary.byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[vocabulary.END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def standard_library() -> Path:
    """The directory with Python's own modules. Raises FileNotFoundError if it is zipped or has no sources."""
    directory = Path(sysconfig.get_paths()["stdlib"])
    if not (directory / "ast.py").is_file() or not (directory / "pydoc_data" / "topics.py").is_file():
        raise FileNotFoundError(
            f"the default corpus is Python's standard library, and {directory} does not hold its sources (ast.py, "
            "pydoc_data/topics.py): this Python is zipped or stripped. Use a full Python (python.org, pyenv, uv or the "
            "distribution's libpython3-stdlib), or prepare your own text with `python -m phi_fast.prepare`"
        )
    return directory


def read_sources() -> dict[str, str]:
    """Module name -> source text for the standard library without its tests, sorted by name."""
    root = standard_library()
    sources = {}
    for parent, directories, files in os.walk(root):
        directories[:] = [name for name in directories if name not in _LEFT_OUT and not name.startswith("config-")]
        for name in files:
            if _is_module(name):
                path = Path(parent, name)
                with tokenize.open(path) as file:
                    text = file.read()
                if text:
                    parts = path.relative_to(root).with_suffix("").parts
                    sources[".".join(parts).removesuffix(".__init__")] = text
    return dict(sorted(sources.items()))


def _is_module(file: str) -> bool:
    """Whether a file is one of Python's modules that are the same on every machine."""
    return file.endswith(".py") and not file.startswith(("_sysconfigdata", "sitecustomize", "usercustomize"))


def language_reference() -> list[str]:
    """The sections of the language reference, which `help("topics")` lists."""
    topics = runpy.run_path(str(standard_library() / "pydoc_data" / "topics.py"))["topics"]
    return [topics[name] for name in sorted(topics)]


def reference_page(module: str, source: str) -> str:
    """A module's docstrings, each below the qualified name and signature of its object; "" if there are none."""
    return "\n\n\n".join(_documented(ast.parse(source), module))


def _documented(node: ast.AST, name: str) -> Iterator[str]:
    """Yield "heading, blank line, docstring" for the node and each definition inside it, in source order."""
    text = ast.get_docstring(node) if isinstance(node, (ast.Module, *_DEFINITIONS)) else None
    if text:
        yield f"{heading(node, name)}\n\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS):
            yield from _documented(child, f"{name}.{child.name}")
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _documented(child, name)


_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def heading(node: ast.AST, name: str) -> str:
    """How an object is written at the head of its documentation: a class with its bases, a function's signature."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {name}({bases})" if bases else f"class {name}"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"{name}({ast.unparse(node.args)}){returns}"
    return f"module {name}"

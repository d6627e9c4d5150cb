"""Makes the three training corpora, their tokenizer, and the texts that the models are judged by."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from phi_fast.data import vocabulary
from phi_fast.data.preparation.pipeline import Settings, prepare
from phi_fast.errors import UsageError
from phi_fast.files import write_atomically

from . import documents, filters
from .documents import Document
from .packages import Package, fetch, pinned

ARMS = ("raw", "filtered", "books")
"""The corpora, in the order of every table."""
ARM_BYTES = 8_000_000
"""Most text of an arm, by whole documents in a random order; a run of the full experiment reads less of each."""
VOCABULARY_BYTES = 4_000_000
"""Text of each arm that the tokenizer is trained on."""
VOCABULARY = 8192
HELD_OUT_BYTES, PIECE = 100_000, 10_000
"""Text per kind that the models are judged by; of one document at most the first PIECE characters."""
OWN_BYTES = 50_000
"""Text of each arm that is set aside before training, at most: how well a model knows its own kind of text."""
OWN_SHARE = 0.03
NGRAM = 13
"""A training document that shares so many words in a row with a held-out text is removed."""
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Corpora:
    """What the runs read."""

    folder: Path
    summary: dict[str, Any]
    """Sizes, counts of what the filters dropped, and digests; the content of SUMMARY."""

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    def data(self, arm: str) -> Path:
        """Folder that `phi_fast.train --data` reads, with one corpus, "text"."""
        return self.folder / arm

    def texts(self, group: str) -> dict[str, Path]:
        """The files of "held_out" (by kind) or "own" (by arm)."""
        return {name: self.folder / group / f"{name.replace(' ', '-')}.txt" for name in self.summary[group]}


def build(packages_folder: Path, folder: Path, console: Console) -> Corpora:
    """Make the corpora, or read them if they are complete.

    The same packages give the same corpora, byte for byte. Raises UsageError if a package or a library is missing.
    """
    summary = folder / SUMMARY
    if not summary.exists():
        packages = pinned()
        fetch(packages, packages_folder)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _build(packages, packages_folder, partial, console)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return Corpora(folder, json.loads(summary.read_text(encoding="utf-8")))


def _build(packages: Sequence[Package], packages_folder: Path, folder: Path, console: Console) -> None:
    console.print(f"reading {len(packages)} packages")
    read: dict[str, list[Document]] = {}
    for package in packages:
        key = package.kind or package.role
        read.setdefault(key, []).extend(documents.read(package, packages_folder))
    kinds = [package.kind for package in packages if package.role == "held_out"]
    held_out = {kind: pieces(read[kind], HELD_OUT_BYTES) for kind in kinds}
    forbidden = {gram for texts in held_out.values() for text in texts for gram in ngrams(text)}
    raw, books = shuffled(read["raw"]), shuffled(read["book"])
    console.print(f"filtering {len(raw):,} raw documents")
    chosen = filters.filtered(raw, shuffled(read["exemplar"]))
    summary: dict[str, Any] = {
        "filters": {"dropped": chosen.dropped, "threshold": chosen.threshold, "accuracy": chosen.accuracy},
        "held_out": {kind: sum(len(text.encode()) for text in texts) for kind, texts in held_out.items()},
        "own": {},
        "arms": {},
    }
    arms, sample = {}, []
    for name, found in (("raw", raw), ("filtered", chosen.documents), ("books", books)):
        clean = uncontaminated(found, forbidden)
        aside = [document for document in clean if _share(document) < OWN_SHARE]
        kept = limited([document for document in clean if _share(document) >= OWN_SHARE], ARM_BYTES)
        own = pieces(aside, OWN_BYTES)
        summary["own"][name] = sum(len(text.encode()) for text in own)
        size = sum(document.size for document in kept)
        before = {"documents": len(found), "bytes": sum(document.size for document in found)}
        summary["arms"][name] = {
            "available": before,
            "contaminated": len(found) - len(clean),
            "documents": len(kept),
            "bytes": size,
            "digest": hashlib.sha256("\0".join(document.text for document in kept).encode()).hexdigest(),
        }
        arms[name] = kept
        sample += [document.text for document in limited(kept, VOCABULARY_BYTES)]
        write(folder / "own" / f"{name}.txt", own)
    for kind, texts in held_out.items():
        write(folder / "held_out" / f"{kind.replace(' ', '-')}.txt", texts)
    console.print(f"training a tokenizer of {VOCABULARY} ids on {sum(map(len, sample)) / 1e6:.1f} M characters")
    tokenizer = train_tokenizer(sample)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, kept in arms.items():
        source = folder / f"{name}.jsonl"
        with source.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": document.text}) + "\n" for document in kept)
        settings = Settings(tokenizer=str(folder / "tokenizer.json"), validation=0.0)
        manifest = prepare([source], folder / name / "text", settings, workers=1, console=console)
        summary["arms"][name]["tokens"] = manifest.splits["train"].tokens
        source.unlink()
    write_atomically(folder / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())


def _share(document: Document) -> float:
    """Map a document to a number in [0, 1) by a hash of its text, so that no split separates equal documents."""
    return int.from_bytes(hashlib.sha256(document.text.encode()).digest()[:8], "big") / 2**64


def shuffled(found: Sequence[Document]) -> list[Document]:
    """Order documents by a hash of their package, path and text: a fixed random order."""
    return sorted(found, key=lambda d: hashlib.sha256(f"{d.package}\0{d.path}\0{d.text}".encode()).digest())


def limited(found: Sequence[Document], most: int) -> list[Document]:
    """Return the first documents, as many as stay within `most` bytes."""
    kept, size = [], 0
    for document in found:
        size += document.size
        if size > most:
            break
        kept.append(document)
    return kept


def pieces(found: Sequence[Document], most: int) -> list[str]:
    """Return the beginnings of documents in a random order, together at most `most` bytes."""
    texts, size = [], 0
    for document in shuffled(found):
        text = document.text[:PIECE]
        if size + len(text.encode()) <= most:
            texts.append(text)
            size += len(text.encode())
    return texts


def uncontaminated(found: Sequence[Document], forbidden: set[int]) -> list[Document]:
    """Return the documents that have none of the forbidden `ngrams`."""
    return [document for document in found if forbidden.isdisjoint(ngrams(document.text))]


def ngrams(text: str) -> Iterator[int]:
    """Yield a hash of each NGRAM words in a row; a shorter text has none."""
    words = filters.words_of(text)
    for at in range(len(words) - NGRAM + 1):
        yield hash(tuple(words[at : at + NGRAM]))


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE: `<|endoftext|>` is 0, the bytes 1…256, then merges by frequency."""
    tokenizer = vocabulary.byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [vocabulary.END_OF_TEXT]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if vocabulary.vocab_size(tokenizer) < VOCABULARY:
        found = vocabulary.vocab_size(tokenizer)
        raise UsageError(f"the corpora give a tokenizer of {found} ids, expected {VOCABULARY}: they are too small")
    return tokenizer


def write(path: Path, texts: Sequence[str]) -> None:
    """Write texts to a file, with an empty line between two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")

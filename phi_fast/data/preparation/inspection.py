"""Describes a corpus for a person."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ...terminal import printable
from ..manifest import TRAINED, Manifest
from ..plain_reads import read_array
from ..vocabulary import TokenizerError, digest, tokenizer

_BAR = 40
"""Width of the histogram's longest bar, in characters."""
_SHOWN = 300
"""Maximum number of tokens shown per document."""


def inspect(directory: Path, samples: int) -> Iterator[str]:
    """Yield lines with counts, a histogram of document lengths and decoded documents, after verifying every token.

    Raises ManifestError for a damaged corpus.
    """
    manifest = Manifest.read(directory)
    manifest.verify(directory)
    delimiter = manifest.delimiter
    between = "nothing" if delimiter is None else f"id {delimiter.id} {delimiter.side} each"
    if delimiter is not None and manifest.marked:
        between = f"marks say where they begin, and id {delimiter.id} ends a text"
    yield f"{directory}: {manifest.dtype}, checksums verified"
    yield (
        f"tokenizer {printable(manifest.tokenizer)}, {manifest.vocab_size:,} ids, sha256 {manifest.tokenizer_sha256}; "
        f"between documents: {between}"
    )
    decoder, trouble = _tokenizer_of(directory, manifest)
    if trouble:
        yield f"no samples: {trouble}"
    for name, split in manifest.splits.items():
        ends = read_array(directory / split.ends, "<u8", split.documents).astype(np.int64)  # (documents,)
        lengths = np.diff(ends, prepend=0)
        yield (
            f"\n{printable(name)}: {split.tokens:,} tokens, {split.documents:,} documents of {lengths.min():,} to "
            f"{lengths.max():,} tokens (median {np.median(lengths):,.0f}, mean {lengths.mean():,.0f}), "
            f"largest id {split.max_id}"
        )
        if split.marks is not None:
            marks = read_array(directory / split.marks, "u1", split.tokens)
            yield (
                f"{np.count_nonzero(marks & TRAINED):,} tokens are trained; documents are packed into rows of "
                f"{split.row_tokens:,} tokens, whose padding counts to their last document"
            )
        yield from histogram(lengths)
        if decoder is not None:
            yield from _decoded(directory / split.file, split.offset, manifest.numpy_dtype, ends[:samples], decoder)


def histogram(lengths: np.ndarray) -> list[str]:
    """One line per power of two: range of lengths in tokens, number of documents, bar."""
    powers = np.log2(np.maximum(lengths, 1)).astype(int)
    counts = np.bincount(powers)
    return [
        f"{2**power:>10,}…{2 ** (power + 1) - 1:<10,} {count:>10,} {'█' * -(-_BAR * int(count) // int(counts.max()))}"
        for power, count in enumerate(counts)
        if power >= powers.min()
    ]


def _tokenizer_of(directory: Path, manifest: Manifest) -> tuple[Tokenizer | None, str]:
    """The corpus's tokenizer and "", or None and the reason why it cannot decode the tokens."""
    inside = directory / "tokenizer.json"
    try:
        found = tokenizer(inside if inside.exists() else manifest.tokenizer)
    except TokenizerError as error:
        return None, str(error)
    if digest(found) != manifest.tokenizer_sha256:
        return None, f"tokenizer {manifest.tokenizer!r} has changed: its sha256 is now {digest(found)}"
    return found, ""


def _decoded(
    file: Path, offset: int, dtype: np.dtype[Any], ends: np.ndarray[Any, Any], decoder: Tokenizer
) -> Iterator[str]:
    start = 0
    for document, end in enumerate(ends.tolist()):
        yield f"\n--- document {document}, {end - start:,} tokens"
        tokens = read_array(file, dtype, min(end - start, _SHOWN), offset + start * dtype.itemsize)
        yield printable(decoder.decode(tokens.tolist(), skip_special_tokens=False))
        start = end

"""Recognises file types by their first bytes, whatever the file's name."""

from __future__ import annotations

HEAD_BYTES = 65536
"""Number of bytes read from a file's beginning: more than any header needs."""

_SIGNATURES = {
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\0": "an xz file",
    b"\x04\x22\x4d\x18": "an lz4 file",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"PK\x03\x04": "a zip archive (also .docx, .xlsx, .epub, .npz and torch's own)",
    b"\x7fELF": "a program",
    b"%PDF-": "a PDF",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Office document",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"SQLite format 3\0": "an SQLite database",
    b"ARROW1\0\0": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"\x80\x02": "a Python pickle",
    b"\x80\x04\x95": "a Python pickle",
    b"\x80\x05\x95": "a Python pickle",
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG\r\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"MMIDIDX": "a Megatron index",
    b"mds\0": "a MosaicML shard",
}
_TEXT_LIKE = {b"BZh", b"ORC", b"GIF8"}
"""Signatures with which a text may begin too: they count only if bytes follow that no text has."""
_LLMC = {
    20240326: "a checkpoint of llm.c's GPT-2",
    20240327: "llm.c's debug state",
    20240328: "llm.c's tokenizer",
    20240522: "llm.c's evaluation file (multiple-choice questions)",
    20240803: "a checkpoint of llm.c's Llama 3",
}


def container(head: bytes) -> str | None:
    """The file type that the first bytes show; None if they may be text or tokens without a header."""
    for magic, what in _SIGNATURES.items():
        if head.startswith(magic) and (magic not in _TEXT_LIKE or _binary(head[:256])):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive"
    return None


def not_tokens(head: bytes, size: int, last_offset: int | None) -> str | None:
    """The file type that the first bytes of a file of `size` bytes show; None if they may be tokens without a header.

    last_offset: the u32 at `litdata_end(head)`; None if the file is shorter.
    """
    if head[:2] == b"\x80\x02" or head[:4] == b"\xff\xff\xff\xff":
        return None  # ids that a corpus may begin with
    magic = int.from_bytes(head[:4], "little")
    if magic in _LLMC:
        return _LLMC[magic]
    if last_offset == size and int.from_bytes(head[4:8], "little") == 4 * (magic + 2):
        return "a chunk of litdata, which has a header and serialised samples"
    return container(head)


def litdata_end(head: bytes) -> int:
    """Byte at which a litdata chunk records its size: the last of n + 1 u32 offsets, which follow n, a u32."""
    return 4 + 4 * int.from_bytes(head[:4], "little")


def _binary(data: bytes) -> bool:
    """Whether there are bytes that no text has."""
    if b"\0" in data:
        return True
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.end < len(data)  # a character may be cut at the end
    return False

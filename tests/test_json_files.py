from __future__ import annotations

import os
from pathlib import Path

import pytest

from phi_fast.json_files import Fields, JsonFileError, read_json, read_lines, read_object


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "Infinity is not JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "is not JSON"),
        (b"[" * 200 + b"]" * 200, "deeper than 100"),
        (b"[" * 200_000 + b"]" * 200_000, "deeper than 100"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "deeper than 100"),
    ],
)
def test_what_is_not_plain_json_is_refused_by_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(JsonFileError, match=message) as caught:
        read_json(file)
    assert str(file) in str(caught.value)


def test_depth_up_to_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(b"[" * 100 + b"]" * 100)
    read_json(tmp_path / "file.json")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "file.json") == {"a": 1}


@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "FIFO"), (os.mkdir, "folder")])
def test_no_fifo_or_folder_is_read(tmp_path: Path, make, kind: str) -> None:
    make(tmp_path / "file.json")
    with pytest.raises((JsonFileError, IsADirectoryError)):
        read_json(tmp_path / "file.json")


def test_a_device_without_end_is_not_read() -> None:
    with pytest.raises(JsonFileError, match="is a device"):
        read_json(Path("/dev/zero"))


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(b"[1, 2, 3]")
    with pytest.raises(JsonFileError, match="more than 8 bytes"):
        read_json(tmp_path / "file.json", max_bytes=8)


def test_lines_are_named_and_a_cut_last_one_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    file.write_bytes(b'{"a": 1}\n\n[2]\n{"a": ')
    assert list(read_lines(file)) == [(f"{file}:1", {"a": 1}), (f"{file}:3", [2])]
    file.write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(JsonFileError, match=rf"{file}:2 is not JSON"):
        list(read_lines(file))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda fields: fields.text("whole"), r"whole is 7, expected a string"),
        (lambda fields: fields.text("absent"), r"absent is missing, expected a string"),
        (lambda fields: fields.texts("mixed"), r"mixed is \['a', 1\], expected a list of strings"),
        (lambda fields: fields.whole("yes"), r"yes is True, expected an integer of at least 0"),
        (lambda fields: fields.whole("whole", most=6), r"whole is 7, expected an integer from 0 to 6"),
        (lambda fields: fields.whole("huge"), r"huge is 1000000000000000000000, expected an integer"),
        (lambda fields: fields.number("huge_float"), r"huge_float is 1e\+305, expected a finite number"),
        (lambda fields: fields.flag("whole"), r"whole is 7, expected true or false"),
        (lambda fields: fields.inner("inner").text("b"), r"inner.b is 1, expected a string"),
        (lambda fields: fields.inner("whole"), r"whole is 7, expected an object"),
    ],
)
def test_each_field_is_read_with_its_type_and_range(tmp_path: Path, read, message: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(
        '{"whole": 7, "yes": true, "mixed": ["a", 1], "huge": 1000000000000000000000, "huge_float": 1e305, '
        '"inner": {"b": 1}}'
    )
    fields = read_object(file, way_out="Get it again")
    with pytest.raises(JsonFileError, match=rf"file.json: {message}.*Get it again"):
        read(fields)
    assert fields.whole("whole", most=7) == 7 and fields.inner("inner").whole("b") == 1 and fields.flag("yes")


def test_a_list_is_no_object() -> None:
    with pytest.raises(JsonFileError, match="here holds a JSON list, expected an object"):
        Fields.of([], "here")

"""convert replaces only files that convert wrote: nothing else is ever removed, whatever the options."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from model_folders import make_source, random_weights
from safetensors.torch import load_file

from phi_fast.conversion import target
from phi_fast.conversion.errors import ConversionError
from phi_fast.convert import ConvertOptions, convert


def everything(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash, and every link with its target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {path.readlink()}"
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "models" / "m", "hf", random_weights())


def parent_of_the_source(source: Path) -> Path:
    (source.parent / "other").mkdir()
    (source.parent / "other" / "thesis.txt").write_text("years of work")
    return source.parent


def the_source(source: Path) -> Path:
    return source


def a_link_to_the_source(source: Path) -> Path:
    (source.parent / "link").symlink_to(source)
    return source.parent / "link"


def the_source_converted(source: Path) -> Path:
    """The only folder that convert could replace completely is the one it reads."""
    out = convert(ConvertOptions(str(source), source.parent / "converted"))
    source.rename(source.parent / "gone")
    out.rename(source)
    return source


def a_folder_of_other_files(source: Path) -> Path:
    out = source.parent / "out"
    (out / "photos").mkdir(parents=True)
    (out / "photos" / "1.jpg").write_text("me")
    return out


def a_model_of_the_users(source: Path) -> Path:
    return make_source(source.parent / "out", "hf", random_weights(seed=1))


def an_earlier_result_and_a_note(source: Path) -> Path:
    out = convert(ConvertOptions(str(source), source.parent / "out"))
    (out / "notes.txt").write_text("mine")
    return out


def an_earlier_result_that_was_changed(source: Path) -> Path:
    out = convert(ConvertOptions(str(source), source.parent / "out"))
    (out / "README.md").write_text("my own words")
    return out


def an_earlier_result_with_a_link(source: Path) -> Path:
    out = convert(ConvertOptions(str(source), source.parent / "out"))
    (source.parent / "card.md").write_bytes((out / "README.md").read_bytes())
    (out / "README.md").unlink()
    (out / "README.md").symlink_to(source.parent / "card.md")
    return out


def a_file(source: Path) -> Path:
    (source.parent / "out").write_text("text")
    return source.parent / "out"


def a_dangling_link(source: Path) -> Path:
    (source.parent / "out").symlink_to("nowhere")
    return source.parent / "out"


CASES = {
    parent_of_the_source: "models holds the source, .*m: it would replace itself",
    the_source: "holds the source",
    a_link_to_the_source: "holds the source",
    the_source_converted: "holds the source",
    a_folder_of_other_files: "files that no conversion wrote, or that were changed since: photos",
    a_model_of_the_users: "changed since: config.json, model.safetensors, tokenizer.json",
    an_earlier_result_and_a_note: "changed since: notes.txt. .* move these away",
    an_earlier_result_that_was_changed: "changed since: README.md. ",
    an_earlier_result_with_a_link: "changed since: README.md. ",
    a_file: "out is a file; name another folder",
    a_dangling_link: "out is a link to nowhere, which does not exist",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_is_not_converts_own_is_refused_and_stays(source: Path, tmp_path: Path, case) -> None:
    out = case(source)
    before = everything(tmp_path)
    with pytest.raises(ConversionError, match=CASES[case]):
        convert(ConvertOptions(str(source), out, to="merged", overwrite=True))
    assert everything(tmp_path) == before


def test_a_result_is_replaced_whole(source: Path, tmp_path: Path) -> None:
    """A single file replaces a sharded model: no shard is left, and the result equals a newly written one."""
    out = convert(ConvertOptions(str(source), tmp_path / "out", max_shard_gb=4e-4))
    assert len(list(out.glob("*.safetensors"))) > 2
    convert(ConvertOptions(str(source), out, to="merged", overwrite=True))
    fresh = convert(ConvertOptions(str(source), tmp_path / "fresh" / "out", to="merged"))
    assert [hash for _, hash in sorted(everything(out).items())] == [
        hash for _, hash in sorted(everything(fresh).items())
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"models", "out", "fresh"}


@pytest.mark.parametrize("way", ["dot", "link", "inside the source"])
def test_folders_that_are_reached_in_other_ways(source: Path, tmp_path: Path, monkeypatch, way) -> None:
    folder = tmp_path / "place"
    if way == "inside the source":
        out = folder = source / "hf"
    else:
        folder.mkdir()
        (tmp_path / "link").symlink_to(folder)
        monkeypatch.chdir(folder)
        out = Path() if way == "dot" else tmp_path / "link"
    for _ in range(2):
        convert(ConvertOptions(str(source), out, overwrite=True))
        assert load_file(folder / "model.safetensors").keys() == random_weights().keys()
        assert not [path.name for path in folder.iterdir() if path.is_dir()]
    assert (tmp_path / "link").is_symlink() or way == "inside the source"
    assert f'"{folder.name}"' in (folder / "README.md").read_text() or way == "link"


@pytest.mark.parametrize("moment", range(12))
def test_a_process_that_dies_while_files_are_moved(source: Path, tmp_path: Path, monkeypatch, moment) -> None:
    """Each file is either the old or the new one, and the next conversion replaces them all."""
    out = convert(ConvertOptions(str(source), tmp_path / "out", max_shard_gb=4e-4))
    old = everything(out)
    calls = 0

    class Died(BaseException):
        pass

    def dying(method):
        def act(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Died
            return method(*arguments, **keywords)

        return act

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        patch.setattr(target.shutil, "rmtree", lambda *_, **__: None)  # a killed process does not clean up
        with pytest.raises(Died):
            convert(ConvertOptions(str(source), out, to="merged", overwrite=True))
    fresh = convert(ConvertOptions(str(source), tmp_path / "fresh" / "out", to="merged"))
    new = {str(out / Path(name).name): hash for name, hash in everything(fresh).items()}
    for name, hash in everything(out).items():
        if "-aside-" not in name and not name.endswith(target.MARK) and "/.phi" not in name:
            assert hash in (old.get(name), new.get(name)), name
    convert(ConvertOptions(str(source), out, to="merged", overwrite=True))
    assert {name: hash for name, hash in everything(out).items() if ".json." not in name} == new


def test_a_failure_leaves_what_was_there(source: Path, tmp_path: Path, monkeypatch) -> None:
    out = convert(ConvertOptions(str(source), tmp_path / "out"))
    before = everything(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phi_fast.convert.writer.write", full)
    for folder in (out, tmp_path / "new"):
        with pytest.raises(ValueError, match=rf"{folder} cannot be written \(No space left on device\): make room"):
            convert(ConvertOptions(str(source), folder, overwrite=True))
    assert everything(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_a_mark_that_somebody_else_wrote_names_no_file_elsewhere(source: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    out = tmp_path / "out"
    out.mkdir()
    hash = hashlib.sha256(b"x").hexdigest()
    (out / target.MARK).write_text(json.dumps({"files": {"../precious": [hash], str(tmp_path / "precious"): [hash]}}))
    convert(ConvertOptions(str(source), out, overwrite=True))
    assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.parametrize(
    "name", ['a"); import os; os.system("id")  # ', "a\n```\n# b", "ü'\\", os.fsdecode(b"caf\xe9")]
)
def test_a_name_is_a_string_in_the_cards_code(source: Path, tmp_path: Path, name: str) -> None:
    out = convert(ConvertOptions(str(source), tmp_path / name))
    card = (out / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("\n```")[0]
    calls = [line for line in code.split("\n") if "from_pretrained" in line]
    assert len(calls) == 2
    readable = name.encode("utf-8", "backslashreplace").decode()
    for call in calls:
        argument = call.split("from_pretrained", 1)[1]
        assert eval(argument) == readable

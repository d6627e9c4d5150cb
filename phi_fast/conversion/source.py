"""Where weights come from: a run, one of its checkpoints, a folder, a name on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import PhiConfig
from . import layout
from .hf_config import ConversionError, read_config, read_json

HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.bin", "*.txt"]


class TensorFile(Protocol):
    """What both kinds of file offer: names, shapes, and a slice without reading the rest."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor: ...


class SafetensorsFile:
    """A .safetensors file; each read opens it anew, so that pages of earlier reads are not kept mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        try:
            with safe_open(self.path, "pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise ConversionError(f"{self.path} is damaged or cut short: {error}. Get it again") from error

    def dtype(self, name: str) -> torch.dtype:
        with safe_open(self.path, "pt") as file:
            shape = file.get_slice(name).get_shape()
            return file.get_slice(name)[:0].dtype if shape else file.get_tensor(name).dtype

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        with safe_open(self.path, "pt") as file:
            part = slice(start, start + length)
            tensor = file.get_slice(name)[part] if dim == 0 else file.get_slice(name)[:, part]
            return tensor.clone()


class TorchFile:
    """A .bin file as the older layouts were published: memory-mapped, and nothing but tensors is unpickled."""

    def __init__(self, path: Path) -> None:
        try:
            self.tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise ConversionError(
                f"{path} is damaged, or holds more than tensors, which is never unpickled ({type(error).__name__}): "
                "get it again, or the model's safetensors"
            ) from error
        if not isinstance(self.tensors, dict) or not all(isinstance(value, Tensor) for value in self.tensors.values()):
            raise ConversionError(f"{path} holds something else than named tensors, a state dict: save that alone")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        return self.tensors[name].narrow(dim, start, length).clone()


class Source:
    """Weights of one model in one of the layouts, checked whole before the first is read.

    Attributes: `folder` (its files), `run` (the run directory it belongs to, or None), `config`, `layout`.
    """

    def __init__(self, folder: Path, run: Path | None) -> None:
        self.folder, self.run = folder, run
        files = _weight_files(folder)
        self.files: dict[str, TensorFile] = {name: file for file in files for name in file.shapes()}
        self.sizes = {name: shape for file in files for name, shape in file.shapes().items() if _is_parameter(name)}
        name = layout.detect(self.sizes)
        if name is None:
            raise ConversionError(
                f"{folder}: the keys ({', '.join(sorted(self.sizes)[:4])}, …) are of no phi layout; known are "
                f"{', '.join(layout.NAMES)}"
            )
        self.layout = name
        self.config = _find_config(folder, run)
        self.table = layout.layout(name, self.config)
        self.parts = layout.shapes(self.config)
        self._check()
        self.pieces = layout.pieces(self.table, self.parts)

    @staticmethod
    def open(name_or_path: str | Path) -> Source:
        """A run directory (its newest checkpoint), a checkpoint, a folder, or a name on the hub ("owner/name").

        Raises ConversionError that says what was looked for where nothing is found, and that lists every missing,
        extra and misshapen key where the weights are not this configuration's.
        """
        path = Path(name_or_path)
        if path.is_dir():
            if (path / "checkpoints").is_dir():
                return Source(_latest(path), path)
            run = path.parent.parent if path.parent.name == "checkpoints" else None
            return Source(path, run)
        if str(name_or_path).count("/") == 1 and not str(name_or_path).startswith((".", "/", "~")):
            return Source(_download(str(name_or_path)), None)
        raise ConversionError(
            f"{name_or_path} is neither a folder (a run, a checkpoint, a Hugging Face model) nor a name on the hub"
        )

    def dtype(self, part: str) -> torch.dtype:
        """Storage dtype of a Hugging Face tensor."""
        name = self.pieces[part].name
        return self.files[name].dtype(name)

    def read(self, part: str) -> Tensor:
        """One Hugging Face tensor: a copy on the CPU, bit for bit."""
        piece = self.pieces[part]
        return self.files[piece.name].read(piece.name, piece.dim, piece.start, piece.length)

    def read_joined(self, joined: layout.Joined) -> Tensor:
        """A tensor of any layout."""
        if len(joined.parts) == 1:
            return self.read(joined.parts[0])
        return torch.cat([self.read(part) for part in joined.parts], joined.dim)

    def _check(self) -> None:
        expected = {name: layout.joined_shape(joined, self.parts) for name, joined in self.table.items()}
        problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in self.sizes]
        problems += [f"extra: {name} {shape}" for name, shape in self.sizes.items() if name not in expected]
        problems += [
            f"misshapen: {name} is {self.sizes[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in self.sizes and self.sizes[name] != shape
        ]
        if problems:
            raise ConversionError(
                f"{self.folder} ({self.layout} layout) does not hold the weights of its configuration; "
                f"{len(problems)} problems:\n  " + "\n  ".join(problems)
            )


def _is_parameter(name: str) -> bool:
    return ".rotary_emb." not in name  # buffers that older versions saved


def _weight_files(folder: Path) -> list[TensorFile]:
    """The shards that an index names, or else the one file (safetensors before .bin)."""
    for stem, suffix, kind in (("model", "safetensors", SafetensorsFile), ("pytorch_model", "bin", TorchFile)):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ConversionError(f"{index} has no weight_map, which says where each tensor is; download it again")
            names = sorted(set(weight_map.values()))
            absent = [name for name in names if not (folder / name).exists()]
            if absent:
                raise ConversionError(
                    f"{index} names files that are not there: {', '.join(absent)}; download them again"
                )
            return [kind(folder / name) for name in names]
        if (folder / f"{stem}.{suffix}").exists():
            return [kind(folder / f"{stem}.{suffix}")]
    raise ConversionError(
        f"{folder} holds no weights: expected model.safetensors, pytorch_model.bin, or an index of shards of either"
    )


def _latest(run: Path) -> Path:
    pointer = run / "checkpoints" / "latest"
    if not pointer.exists():
        raise ConversionError(f"{run} has no checkpoints/latest: no checkpoint of this run was completed")
    folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not folder.is_dir():
        raise ConversionError(f"{pointer} names {folder.name}, which is not there; name a checkpoint folder instead")
    return folder


def _find_config(folder: Path, run: Path | None) -> PhiConfig:
    """Of a Hugging Face folder, or of the run's options (config.json there, state.json in a checkpoint)."""
    if (folder / "state.json").exists():
        return _run_config(read_json(folder / "state.json").get("options", {}), folder)
    if (folder / "config.json").exists():
        return read_config(folder / "config.json")
    if run is not None and (run / "config.json").exists():
        return _run_config(read_json(run / "config.json"), run)
    raise ConversionError(f"{folder} has no config.json, so the model's shape is not known")


def _run_config(options: Mapping[str, Any], where: Path) -> PhiConfig:
    try:
        return PhiConfig(**options["model"])
    except (KeyError, TypeError) as error:
        raise ConversionError(
            f"{where}: the options of the run hold no model that this version knows: {error}"
        ) from error


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConversionError(f"{name!r} is on the hub, which needs `pip install huggingface_hub`") from error
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # whatever the network, the hub or a missing repository raise
        raise ConversionError(f"{name!r} is no folder here and could not be had from the hub: {error}") from error

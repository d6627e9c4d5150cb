"""Sources of weights: a run, one of its checkpoints, a folder, a name on the Hugging Face hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ..config import PhiConfig
from ..files import sha256_of
from . import adapter, inside, published_layouts
from .errors import ConversionError
from .hf_config import read_config, run_config
from .tensor_files import FLOATS, Header, SafetensorsFile, TensorFile, TorchFile

HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.bin", "*.txt"]
MOST_ADAPTERS = 8
"""Longest chain of adapters that were each trained on the one before."""
MOST_PROBLEMS = 100
"""Maximum number of lines about wrong tensors in one message."""


class Source:
    """Weights of one model in one of the layouts. All headers are checked before any weight is read.

    Attributes: `folder` (its files), `run` (the run directory it belongs to, or None), `config`, `layout`. With
    adapters (LoRA), `folder` and `run` are the last adapter's, and each tensor is read with the adapters added to it.
    """

    def __init__(self, folder: Path, run: Path | None) -> None:
        self.folder, self.run = folder, run
        self.adapters: list[adapter.PeftAdapter] = []
        self.bases: list[Path] = []
        """Folders and runs of what the adapters were trained on, the last one first."""
        files = _weight_files(folder)
        headers = [(file, file.headers()) for file in files.values()]
        self.paths: tuple[Path, ...] = tuple(files)
        """The files with the weights."""
        self.files: dict[str, TensorFile] = {name: file for file, names in headers for name in names}
        self.headers: dict[str, Header] = {
            name: header for _, names in headers for name, header in names.items() if _is_parameter(name)
        }
        name = published_layouts.detect(self.headers)
        if name is None:
            raise ConversionError(
                f"{folder}: the keys ({', '.join(sorted(self.headers)[:4])}, …) belong to no phi layout; known are "
                f"{', '.join(published_layouts.NAMES)}"
            )
        self.layout = name
        self.config = _find_config(folder, run)
        self._check_layers()
        self.table = published_layouts.layout(name, self.config)
        self.parts = published_layouts.shapes(self.config)
        self._check()
        self.pieces = published_layouts.pieces(self.table, self.parts)

    @staticmethod
    def open(name_or_path: str | Path, *, most_adapters: int = MOST_ADAPTERS) -> Source:
        """Open a run directory (its newest checkpoint), a checkpoint, a folder, or a name on the hub ("owner/name").

        A checkpoint of a run with --lora-rank and a folder with a PEFT adapter are opened with the weights that they
        name. Raises ConversionError if nothing is found, saying what was looked for, and if the weights do not fit the
        configuration, listing every missing, extra and misshapen key.
        """
        path = Path(name_or_path)
        if path.is_dir():
            if (path / "checkpoints").is_dir() and not _holds_weights(path):
                return _open(_latest(path), path, most_adapters)
            run = path.absolute().parent.parent if (path / "state.json").exists() else None
            return _open(path, run if run and path.absolute().parent.name == "checkpoints" else None, most_adapters)
        if path.exists():
            raise ConversionError(
                f"{path} is a file, expected a folder (a run, a checkpoint, a Hugging Face model): name the folder "
                f"that holds it, {path.parent}"
            )
        if str(name_or_path).count("/") == 1 and not str(name_or_path).startswith((".", "/", "~")):
            return _open(_download(str(name_or_path)), None, most_adapters)
        raise ConversionError(
            f"{name_or_path} is neither a folder (a run, a checkpoint, a Hugging Face model) nor a name on the hub"
        )

    def adapt(self, folder: Path, run: Path | None) -> None:
        """Add an adapter to the weights. Raises ConversionError if it does not fit them."""
        new = adapter.PeftAdapter(folder, self.config)
        self.adapters.append(new)
        self.paths += (new.path,)
        self.bases = [self.folder, *([self.run] if self.run else []), *self.bases]
        self.folder, self.run = folder, run

    def digest(self) -> str:
        """Compute a SHA-256 over the names and contents of the files with the weights."""
        lines = [f"{path.name} {sha256_of(path)}\n" for path in self.paths]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def dtype(self, part: str) -> torch.dtype:
        """Storage dtype of a Hugging Face tensor."""
        dtype = self.headers[self.pieces[part].name].dtype
        assert isinstance(dtype, torch.dtype)  # `_check` refused all others
        return dtype

    def read(self, part: str) -> Tensor:
        """Read one Hugging Face tensor: an exact copy on the CPU; where an adapter is added, the sum in fp32."""
        piece = self.pieces[part]
        tensor = self.files[piece.name].read(piece.name, piece.dim, piece.start, piece.length)
        for added in self.adapters:
            change = added.change(part)
            tensor = tensor if change is None else tensor + change
        return tensor

    def read_joined(self, joined: published_layouts.Joined) -> Tensor:
        """Read a tensor of any layout."""
        if len(joined.parts) == 1:
            return self.read(joined.parts[0])
        return torch.cat([self.read(part) for part in joined.parts], joined.dim)

    def _check_layers(self) -> None:
        """Check that the configuration has no more layers than the weights, before anything is made for each layer."""
        present = published_layouts.count_layers(self.layout, self.headers)
        if self.config.num_hidden_layers > present:
            raise ConversionError(
                f"{self.folder} describes {self.config.num_hidden_layers:,} layers, and its weights ({self.layout} "
                f"layout) have {present}: a file is missing, or config.json is another model's. Get both again"
            )

    def _check(self) -> None:
        expected = {name: published_layouts.joined_shape(joined, self.parts) for name, joined in self.table.items()}
        found = {name: self.headers[name] for name in expected if name in self.headers}
        problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
        problems += [f"extra: {name} {header.shape}" for name, header in self.headers.items() if name not in expected]
        problems += [
            f"misshapen: {name} is {header.shape}, expected {expected[name]}"
            for name, header in found.items()
            if header.shape != expected[name]
        ]
        floats = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS.values())
        problems += [
            f"wrong dtype: {name} holds {header.dtype}, expected one of {floats}"
            for name, header in found.items()
            if isinstance(header.dtype, str)
        ]
        if problems:
            shown = problems[:MOST_PROBLEMS] + ["…"] * (len(problems) > MOST_PROBLEMS)
            raise ConversionError(
                f"{self.folder} ({self.layout} layout) does not hold the weights of its configuration; "
                f"{len(problems)} problems:\n  " + "\n  ".join(shown)
            )


def _open(folder: Path, run: Path | None, most_adapters: int) -> Source:
    if _holds_weights(folder) or not adapter.is_adapter(folder):
        return Source(folder, run)
    name = adapter.base_of(folder)
    if not most_adapters:
        raise ConversionError(f"{folder} is an adapter of {name}, at the end of {MOST_ADAPTERS} adapters of each other")
    try:
        source = Source.open(name, most_adapters=most_adapters - 1)
    except ConversionError as error:
        raise ConversionError(f"{folder} is an adapter of other weights, which cannot be read: {error}") from error
    state = inside.read_fields(folder, "state.json")
    if state is not None and "base" in state and state.inner("base").text("sha256") != source.digest():
        raise ConversionError(
            f"{folder} was trained on other weights than {name} now holds (their SHA-256 differs): put those back"
        )
    source.adapt(folder, run)
    return source


def _is_parameter(name: str) -> bool:
    return ".rotary_emb." not in name  # buffers that older versions saved


_KINDS: tuple[tuple[str, type[SafetensorsFile] | type[TorchFile]], ...] = (
    ("model.safetensors", SafetensorsFile),
    ("pytorch_model.bin", TorchFile),
)


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).exists() or (folder / f"{name}.index.json").exists() for name, _ in _KINDS)


def _weight_files(folder: Path) -> dict[Path, TensorFile]:
    """The shards that an index names, or the single file (safetensors before .bin)."""
    for name, kind in _KINDS:
        index = inside.read_fields(folder, f"{name}.index.json")
        if index is not None:
            weight_map = index.values.get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
                raise ConversionError(
                    f"{index.where} has no weight_map, which says where each tensor is; download it again"
                )
            shards = {shard: inside.find(folder, shard) for shard in sorted(set(weight_map.values()))}
            absent = [shard for shard, path in shards.items() if path is None]
            if absent:
                raise ConversionError(
                    f"{index.where} names files that are not there: {', '.join(absent)}; download them again"
                )
            return {path: kind(path) for path in shards.values() if path is not None}
        path = inside.find(folder, name)
        if path is not None:
            return {path: kind(path)}
    raise ConversionError(
        f"{folder} holds no weights: expected model.safetensors, pytorch_model.bin, or an index of shards of either"
    )


def _latest(run: Path) -> Path:
    checkpoints = run / "checkpoints"
    pointer = inside.find(checkpoints, "latest")
    if pointer is None:
        raise ConversionError(f"{run} has no checkpoints/latest: no checkpoint of this run was completed")
    name = inside.read_text(pointer).strip()
    folder = checkpoints / name
    if not name or Path(name).name != name or not folder.is_dir():
        raise ConversionError(f"{pointer} names {name!r}, which is not there; name a checkpoint folder instead")
    if not folder.resolve().is_relative_to(checkpoints.resolve()):
        raise ConversionError(f"{folder} leads to {folder.resolve()}, outside of its run; name that folder instead")
    return folder


def _find_config(folder: Path, run: Path | None) -> PhiConfig:
    """The configuration of a Hugging Face folder, or of a run (from config.json) or its checkpoint (state.json)."""
    state = inside.read_fields(folder, "state.json")
    if state is not None:
        return run_config(state.inner("options"))
    own = inside.read_fields(folder, "config.json")
    if own is not None:
        return read_config(own)
    options = inside.read_fields(run, "config.json") if run is not None else None
    if options is not None:
        return run_config(options)
    raise ConversionError(f"{folder} has no config.json, so the model's shape is not known")


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConversionError(f"{name!r} is on the hub, which needs `pip install huggingface_hub`") from error
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # whatever the network, the hub or a missing repository raises
        raise ConversionError(f"{name!r} is not a folder, and could not be downloaded from the hub: {error}") from error

"""Names the files of a data set on the Hugging Face hub by its configuration and split.

`datasets` resolves the names, as `load_dataset` does; the files are then read by this package, so that retries, checks
of lengths and a resume hold for them as for any remote file.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl

from ..remote_files import PATIENCE, Patience, describe, retried
from .containers import PrepareError, require

_PREFIX = "hf://datasets/"
_FORM = f"{_PREFIX}OWNER/NAME[@REVISION]?config=NAME&split=train"


def names_dataset(url: str) -> bool:
    """Return whether a URL names a configuration or a split of a data set on the hub, not a file or a folder."""
    return url.startswith(_PREFIX) and "?" in url


def files_of(url: str, patience: Patience = PATIENCE) -> list[str]:
    """Return the URLs of the files of a data set's configuration and split, in the order in which they are read.

    url: hf://datasets/OWNER/NAME[@REVISION]?config=NAME&split=NAME; without `config` the data set's default or only
    one, without `split` "train". Raises PrepareError, and RemoteError if the hub does not answer.
    """
    require("datasets", url)
    name, _, query = url.removeprefix(_PREFIX).partition("?")
    name, _, revision = name.partition("@")
    asked = dict(parse_qsl(query, keep_blank_values=True))
    if name.count("/") != 1 or not asked.keys() <= {"config", "split"}:
        raise PrepareError(f"{url}: expected {_FORM}")
    if Path(name).exists():
        raise PrepareError(
            f"{url}: there is a folder {name} here, which `datasets` would read in place of the hub's. Give its path "
            "without hf://, or start the command elsewhere"
        )
    import datasets

    def resolve() -> dict[str, list[str]]:
        try:
            builder = datasets.load_dataset_builder(name, asked.get("config"), revision=revision or None)
        except (ValueError, RuntimeError) as error:  # an unknown configuration, or a data set made by a script
            raise PrepareError(f"{url}: {describe(error)}") from error
        return {str(split): list(map(str, files)) for split, files in (builder.config.data_files or {}).items()}

    splits = retried(resolve, url, patience)
    split = asked.get("split") or "train"
    if split not in splits:
        raise PrepareError(f"{url}: there is no split {split!r}, but {', '.join(splits) or 'no files'}")
    if other := next((file for file in splits[split] if not file.startswith(_PREFIX)), None):
        raise PrepareError(f"{url}: its file {other} is not on the hub as it is: download it, and give its texts")
    return splits[split]

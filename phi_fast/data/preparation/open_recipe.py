"""Prepares all corpora of a recipe with open data, one after the other: finished ones are skipped."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from ...files import write_atomically
from ...open_data import OPEN_DATA, OpenData, Source
from ...recipes import RECIPES
from ..manifest import DTYPES, FILE_NAME, Manifest
from ..plan import plan_mixture
from ..remote_files import PATIENCE, Patience
from ..vocabulary import TokenizerError
from .containers import PrepareError
from .inputs import find_inputs
from .needs import check_disk, encoding_speed, measure, report
from .pipeline import Settings, available_cores, check_place, plan_encoding, prepare
from .plans import partial_of
from .readers import check_field

SOURCES = "sources.json"
"""File beside the corpora that records what they are made of."""


def prepare_recipe(
    name: str,
    out: Path | None,
    settings: Settings,
    *,
    source: Path | None = None,
    dry_run: bool = False,
    workers: int | None = None,
    console: Console,
    patience: Patience = PATIENCE,
) -> None:
    """Prepare every corpus of a recipe in `out`/CORPUS; the recipe's own place if `out` is None.

    The needs are told first. source: directory with the data sets, as OWNER/NAME/FOLDER, to read in place of the hub.
    dry_run: tell the needs, and write nothing.

    Raises PrepareError if the disk is too small, and what `pipeline.prepare` raises; the same call resumes the work.
    """
    if name not in OPEN_DATA:
        raise PrepareError(f"--recipe {name}: its data is not public. Recipes with open data: {', '.join(OPEN_DATA)}")
    if workers is not None and workers < 1:
        raise PrepareError(f"--workers {workers}: expected at least 1, or None for one per core")
    data, out = OPEN_DATA[name], out or RECIPES[name].data
    if out.exists() and not out.is_dir():
        raise PrepareError(f"{out} is a file: --out names the directory that will hold {', '.join(data.corpora)}")
    encoder, _, plan = plan_encoding(settings)
    describe(name, data, console)
    paths = {corpus: [_place(one, source) for one in data.corpora[corpus]] for corpus in data.corpora}
    missing = [corpus for corpus in data.corpora if not _finished(out / corpus, plan, console)]
    needs = []
    for corpus in missing:
        check_place(out / corpus)
        settings_of = _settings(settings, data.corpora[corpus])
        inputs = find_inputs(paths[corpus], settings.suffixes, settings_of.text_field, patience)
        check_field(inputs.read, settings_of.text_field)
        needs.append(measure(corpus, inputs, settings_of.text_field, partial_of(out / corpus)))
    width, workers = DTYPES[plan.dtype].itemsize, workers or available_cores()
    if needs:
        for line in report(needs, width, encoding_speed(encoder), workers, out):
            console.print(line)
        check_disk(needs, width, out)
    if dry_run:
        console.print("nothing was written (--dry-run)")
        return
    out.mkdir(parents=True, exist_ok=True)
    made_of = {corpus: [asdict(one) for one in sources] for corpus, sources in data.corpora.items()}
    write_atomically(out / SOURCES, json.dumps({"recipe": name, "corpora": made_of}, indent=1).encode() + b"\n")
    for corpus in missing:
        console.print(f"{corpus}:")
        chosen = _settings(settings, data.corpora[corpus])
        prepare(paths[corpus], out / corpus, chosen, workers=workers, console=console, patience=patience)
    tokens = {corpus: Manifest.read(out / corpus).split("train").tokens for corpus in data.corpora}
    console.print(_epochs(name, data, tokens))
    where = "" if out == RECIPES[name].data else f" --data {out}"
    console.print(f"train with: python -m phi_fast.train --recipe {name}{where}")


def describe(name: str, data: OpenData, console: Console) -> None:
    """Print what a recipe's corpora are made of, and how often each would be repeated."""
    for corpus, sources in data.corpora.items():
        console.print(f"{corpus}, in place of {data.instead_of[corpus]}:")
        for one in sources:
            tokens = "?" if one.tokens is None else f"{one.tokens / 1e9:g} B tokens ({one.counted})"
            console.print(f"  {one.dataset}, {one.folder}, revision {one.revision}, licence {one.licence}: {tokens}")
            if one.note:
                console.print(f"    {one.note}")
    published = {
        corpus: sum(one.tokens or 0 for one in sources)
        for corpus, sources in data.corpora.items()
        if all(one.tokens for one in sources)
    }
    if len(published) == len(data.corpora):
        console.print(f"by the published numbers of tokens:\n{_epochs(name, data, published)}")


def _epochs(name: str, data: OpenData, tokens: dict[str, int]) -> str:
    """A table of the epochs over each corpus, and the warnings."""
    run = RECIPES[name].tokens
    assert run is not None
    return str(plan_mixture({corpus: (tokens[corpus], weight) for corpus, weight in data.weights.items()}, run))


def _place(one: Source, source: Path | None) -> Path | str:
    """Where to read a source from. Raises PrepareError for a local one that is missing."""
    if source is None:
        return one.url
    place = source / one.place
    if not place.is_dir():
        raise PrepareError(
            f"{place} does not exist. --source names a folder that holds data sets as OWNER/NAME, as "
            f"`hf download {one.dataset} --repo-type dataset --revision {one.revision} --local-dir "
            f"{source / one.dataset}` makes it"
        )
    return place


def _finished(place: Path, plan: Manifest, console: Console) -> bool:
    """Whether a corpus is complete. Raises TokenizerError if it was made with another tokenizer."""
    if not (place / FILE_NAME).exists():
        return False
    manifest = Manifest.read(place)
    if manifest.tokenizer_sha256 != plan.tokenizer_sha256:
        raise TokenizerError(
            f"{place} was prepared with tokenizer {manifest.tokenizer!r}, not {plan.tokenizer!r}: give that one, or "
            "name another --out"
        )
    console.print(f"{place} is complete")
    return True


def _settings(settings: Settings, sources: tuple[Source, ...]) -> Settings:
    """The settings for a corpus of these sources, whose texts are in the same column."""
    [text_field] = {one.text_field for one in sources}
    return replace(settings, text_field=text_field)

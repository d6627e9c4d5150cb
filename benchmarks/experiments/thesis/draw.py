"""How packages.tsv was made: `apt-cache dumpavail > available.txt`, and
`python -m benchmarks.experiments.thesis.draw available.txt > packages.tsv`.

The books, the exemplars and the held-out texts are named in books.toml. The raw text is a random draw from Debian 12
main: DRAWN packages of section "doc", and DRAWN of all other sections, of 0.1 to 1 MB each. Left out are packages that
were updated since the release (their pinned version vanishes from the mirrors), translations, debug symbols, and all
binary packages of a source that one of the named texts comes from. Only one binary package of each source is drawn.
"""

from __future__ import annotations

import random
import re
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from phi_fast.json_files import read_regular
from phi_fast.startup import tolerate_encodings

from .packages import CHOSEN, ROLES

DRAWN = 120
SEED = 17
SIZES = (100_000, 1_000_000)
LANGUAGES = (
    "aa af am ar as ast be bg bn br bs ca cs cy da de dz el eo es et eu fa fi fr fy ga gl gu he hi hr hu hy id is it "
    "ja ka kk km kn ko ku lt lv mg mk ml mr ms my nb ne nl nn oc or pa pl ps pt ro ru rw se si sk sl sq sr st sv ta "
    "te tg th tl tn tr tt ug uk ur uz vi wa xh zh zu"
)
"""Codes of languages other than English, by which translations are named."""

Record = dict[str, str]


def records(text: str) -> list[Record]:
    """Parse the stanzas of a Packages file; continuation lines are dropped."""
    result = []
    for stanza in text.split("\n\n"):
        lines = (line.partition(": ") for line in stanza.splitlines() if not line.startswith((" ", "\t")))
        record = {key: value for key, _, value in lines}
        if "Filename" in record:
            result.append(record)
    return result


def source(record: Record) -> str:
    return record.get("Source", record["Package"]).split(" ")[0]


def translated(name: str) -> bool:
    """Whether a package's name ends with a language other than English: debian-faq-de, firefox-l10n-pt-br."""
    words, codes = name.split("-"), LANGUAGES.split()
    return words[-1] in codes or (len(words) > 2 and words[-2] in codes and len(words[-1]) == 2)


def draw(available: Iterable[Record], taken: set[str]) -> list[Record]:
    """Draw the raw text's packages; the same ones for the same list of available packages."""
    pools: dict[bool, list[Record]] = {True: [], False: []}
    for record in sorted(available, key=lambda r: r["Package"]):
        updated = re.search(r"deb12|bpo", record["Version"])
        fits = SIZES[0] <= int(record["Size"]) <= SIZES[1] and not record["Package"].endswith("-dbgsym")
        if fits and not updated and not translated(record["Package"]) and source(record) not in taken:
            pools[record.get("Section") == "doc"].append(record)
    drawn: list[Record] = []
    for of_documentation in (True, False):
        order = random.Random(SEED).sample(pools[of_documentation], len(pools[of_documentation]))
        until = len(drawn) + DRAWN
        for record in order:
            if len(drawn) < until and source(record) not in taken:
                taken.add(source(record))
                drawn.append(record)
    return drawn


@dataclass(frozen=True)
class Options:
    """Draw the packages of the raw text, and write the list of all pinned packages to standard output."""

    available: Annotated[Path, tyro.conf.Positional]
    """What `apt-cache dumpavail` printed on Debian 12."""


def main() -> int:
    """Run the command; returns its exit status: 0, or 2 if the file cannot be read."""
    tolerate_encodings()
    options = tyro.cli(Options, prog="python -m benchmarks.experiments.thesis.draw")
    try:
        found = records(read_regular(options.available, 2**28).decode("utf-8", "replace"))
    except OSError as error:
        print(f"{options.available} cannot be read ({error.strerror}): name the output of apt-cache", file=sys.stderr)
        return 2
    available = {record["Package"]: record for record in reversed(found)}
    chosen = tomllib.loads(CHOSEN.read_text(encoding="utf-8"))
    named = [(role, name) for role in ROLES[:-1] for name in sorted(chosen[role])]
    if absent := [name for _, name in named if name not in available]:
        print(f"{options.available} lacks {', '.join(absent)}: make it on Debian 12, main", file=sys.stderr)
        return 2
    rows = [(role, available[name]) for role, name in named]
    taken = {source(record) for _, record in rows}
    rows += [("raw", record) for record in draw(available.values(), taken)]
    print("role", "package", "version", "architecture", "bytes", "sha256", sep="\t")
    for role, record in rows:
        fields = (record[key] for key in ("Package", "Version", "Architecture", "Size", "SHA256"))
        print(role, *fields, sep="\t")
    return 0


if __name__ == "__main__":
    sys.exit(main())

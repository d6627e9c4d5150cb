"""Hooks of mkdocs: the README is the site's first page, and links out of docs/ lead to the repository."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md as index.md, its links to docs/ made relative to the site."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=_without_outside(text)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links that leave docs/ are shown as plain text: a site has no such files."""
    return markdown if "/" in page.file.src_uri else _without_outside(markdown)


def _without_outside(markdown: str) -> str:
    markdown = markdown.replace("](../README.md", "](index.md")
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?:\.\./[^)]*|CHANGELOG\.md|CONTRIBUTING\.md|LICENSE)\)", r"\1", markdown)

"""Finds places in source code where rich would interpret text as markup, under whatever names things are imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator

CONSOLE, COLUMN = "rich.console.Console", "rich.progress.TextColumn"
ALWAYS_READ = (
    *("rich.print", "rich.get_console", "rich.inspect", "rich.markup.render", "rich.markup.escape"),
    *("rich.text.Text.from_markup", "rich.panel.Panel", "rich.spinner.Spinner", "rich.status.Status"),
    *("rich.prompt.Prompt.ask", "rich.prompt.Confirm.ask", "rich.prompt.IntPrompt.ask", "rich.prompt.FloatPrompt.ask"),
    *("rich.progress.track", "rich.progress.open", "rich.progress.wrap_file", "rich.progress.SpinnerColumn"),
    *("rich.progress.Progress.get_default_columns", "rich.logging.RichHandler"),
)
"""Objects that interpret markup whatever the console's settings are, or print on a console that does."""


_LAST = {last for name in (CONSOLE, COLUMN, *ALWAYS_READ) if (last := name.rpartition(".")[2])[0].isupper()}
"""Names that are assumed to be rich's from whatever module they are imported, because modules re-export them."""


def findings(source: str, *, consoles: bool = True) -> list[str]:
    """List "LINE: what" for each place in a module's source at which rich interprets markup, or may.

    A Console is safe if its call has markup=False and emoji=False, a TextColumn if its call has markup=False, and a
    status if its text is a `Text`. Objects passed on uncalled, or with settings by `**`, are not known to be safe.
    consoles: the module may make its own consoles.
    """
    tree = ast.parse(source)
    names = _names(tree)
    annotations = {id(inner) for node in ast.walk(tree) for outer in _annotations(node) for inner in ast.walk(outer)}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rich":
            found += [f"{node.lineno}: from {node.module} import *" for alias in node.names if alias.name == "*"]
        elif isinstance(node, ast.ImportFrom):
            handed_on = [alias.name for alias in node.names if alias.name in _LAST]
            found += [f"{node.lineno}: {name} from a module that is not rich's" for name in handed_on]
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {what}" for what in _of_call(node, names)]
            if not consoles and _resolve(node.func, names) == CONSOLE:
                found.append(f"{node.lineno}: a console that phi_fast.terminal did not make")
        elif isinstance(node, ast.Name | ast.Attribute) and id(node) not in called | annotations:
            name = _resolve(node, names)
            if name in (CONSOLE, COLUMN, *ALWAYS_READ) and isinstance(node.ctx, ast.Load):
                found.append(f"{node.lineno}: {name}, uncalled")
    return found


def _of_call(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name = _resolve(node.func, names)
    settings = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    needed = {CONSOLE: ("markup", "emoji"), COLUMN: ("markup",)}.get(name, ())
    yield from (f"{name} without {key}=False" for key in needed if not _is_false(settings.get(key)))
    if not needed and "markup" in settings and not _is_false(settings["markup"]):
        yield f"markup={ast.unparse(settings['markup'])}"
    if name in ALWAYS_READ:
        yield name
    if name == "rich.progress.Progress":
        if not node.args:
            yield f"{name} with its default columns"
        yield from (f"{name} with a text as a column" for each in node.args if _is_text(each))
    if isinstance(node.func, ast.Attribute) and node.func.attr == "status" and node.args:
        text = node.args[0]
        if not (isinstance(text, ast.Call) and _resolve(text.func, names) == "rich.text.Text"):
            yield "a status whose text is no Text"


def _names(tree: ast.AST) -> dict[str, str]:
    """Map each name in the module to what it refers to, through imports and assignments of one name to another."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    for _ in assigned:  # the longest possible chain of assignments
        for node in assigned:
            value = _resolve(node.value, names)
            if value.startswith("rich."):
                names |= {target.id: value for target in node.targets if isinstance(target, ast.Name)}
    return names


def _resolve(node: ast.AST, names: dict[str, str]) -> str:
    """Resolve an expression to a full name such as "rich.console.Console"; "" if it is not a dotted name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = _resolve(node.value, names)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def _annotations(node: ast.AST) -> Iterator[ast.AST]:
    for part in ("annotation", "returns"):
        if getattr(node, part, None) is not None:
            yield getattr(node, part)


def _is_false(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))

"""Write docs/api.md from the docstrings of the public names: `python scripts/api.py`. A test compares the two."""

import argparse
import ast
import inspect
import re
import sys
import textwrap
from dataclasses import fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import surgeon

PAGE = Path(__file__).resolve().parent.parent / "docs/api.md"
HEAD = """# API reference

<!-- written by scripts/api.py from the docstrings -->

Every public name of `surgeon`, with an example that the tests run. [From Python](python.md) is the introduction. An
option has the same meaning as on the command line; the page of a command says more about it.
"""
GROUPS = {"Functions": inspect.isfunction, "Results": inspect.isclass, "Errors": lambda _: True}


def main() -> None:
    """Rewrite the page; with --check, exit with 1 where it is not what the code says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where the page is stale")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/api.md is stale; run scripts/api.py")


def page() -> str:
    """Return the page."""
    parts, left = [HEAD], list(surgeon.__all__)
    errors = [name for name in left if name.endswith("Error")]
    left = [name for name in left if name not in errors]
    for title, belongs in GROUPS.items():
        names = errors if title == "Errors" else [name for name in left if belongs(getattr(surgeon, name))]
        parts.append(f"## {title}\n")
        parts += [entry(name, getattr(surgeon, name)) for name in names]
    return "\n".join(parts)


def entry(name: str, item: Any) -> str:
    """Return what the page says of a name."""
    doc, _, _ = inspect.getdoc(item).partition("\n\nOptions:")
    parts = [f"### {name}\n"]
    if inspect.isfunction(item):
        parts += [f"```python\n{signature(name, item)}\n```\n"]
    parts += [fenced(doc), ""]
    if inspect.isfunction(item):
        parts += options_of(item)
    elif not issubclass(item, Exception):
        parts += attributes_of(item)
    return "\n".join(parts)


def signature(name: str, function: Any) -> str:
    """Return the call, without annotations, on lines of 100 characters."""
    words, is_keyword = [], False
    for item in inspect.signature(function).parameters.values():
        if item.kind is inspect.Parameter.KEYWORD_ONLY and not is_keyword:
            words, is_keyword = [*words, "*"], True
        words.append(item.name if item.default is inspect.Parameter.empty else f"{item.name}={item.default!r}")
    return textwrap.fill(f"surgeon.{name}({', '.join(words)})", 100, subsequent_indent="    ", break_long_words=False)


def options_of(function: Any) -> list[str]:
    """Return a table of the options that a function takes as keywords."""
    listed = inspect.getdoc(function).partition("\n\nOptions:")[2]
    pairs = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", listed, flags=re.MULTILINE)
    if not pairs:
        return []
    rows = [f"| `{name}` | {cell(' '.join(told.split()))} |" for name, told in pairs]
    return ["| option | meaning |", "| --- | --- |", *rows, ""]


def attributes_of(kind: type) -> list[str]:
    """Return a table of a class: its fields with their types, its properties and methods with what they do."""
    shown, types = shown_names(kind), types_of(kind)
    rows = [f"| `{name}` | `{cell(types.get(name, ''))}` |" for name in shown]
    for name, member in inspect.getmembers(kind):
        if name.startswith("_") or name in shown:
            continue
        told = member.fget if isinstance(member, property) else getattr(member, "func", member)
        doc = inspect.getdoc(told)
        if doc and (isinstance(member, property | cached_property) or inspect.isroutine(member)):
            call = "" if isinstance(member, property | cached_property) else "()"
            rows.append(f"| `{name}{call}` | {cell(' '.join(doc.partition(chr(10) * 2)[0].split()))} |")
    return ["| attribute | type, or what it is |", "| --- | --- |", *rows, ""]


def shown_names(kind: type) -> list[str]:
    """Return the names of the fields of a dataclass that are for readers."""
    return [item.name for item in fields(kind) if not item.name.startswith("_")] if is_dataclass(kind) else []


def types_of(kind: type) -> dict[str, str]:
    """Return the annotations of the fields as they are written."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        source = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(source, ast.ClassDef)
        for node in source.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = ast.unparse(node.annotation).strip("'\"")
    return found


def fenced(doc: str) -> str:
    """Return a docstring as Markdown: indented code is fenced, with its language."""
    parts: list[str] = []
    for block in re.split(r"\n\n(?=\S|    )", doc):
        if block.startswith("    "):
            before = parts.pop() if parts and parts[-1].startswith("```") else ""
            code = before.removeprefix("```python\n").removesuffix("\n```")
            code = f"{code}\n\n{textwrap.dedent(block)}" if code else textwrap.dedent(block)
            parts.append(f"```python\n{code.rstrip()}\n```")
        else:
            parts.append(block)
    return "\n\n".join(parts)


def cell(words: str) -> str:
    """Return words for a cell of a table."""
    return words.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()

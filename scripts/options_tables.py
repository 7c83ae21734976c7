"""Order the tables of options in docs/COMMAND.md as --help does: `python scripts/options_tables.py`.

What a row says stays as it is written; --check only compares.
"""

import re
import sys
from importlib import import_module
from pathlib import Path

import typer

from surgeon.cli.command import command_of
from surgeon.cli.commands import commands
from surgeon.cli.help import page_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
_TABLE = re.compile(r"(?<=\n## Options\n)((?s:.*?))(\| option .*\n\| ---.*\n)((?:\|.*\n)+)")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def sections_of(name: str) -> dict[str, list[str]]:
    """Return the flags of a command's options, under the headings of its --help."""
    command = command_of(import_module(f"surgeon.cli.{name}"))
    page = page_of(command, typer.Context(command, info_name=name))
    return {
        heading: [flag for row in rows for flag in _FLAG.findall(row.name)] for heading, rows in page.sections.items()
    }


def text(name: str) -> str:
    """Return the page of a command with its table in order. A row that names several options stands by its first."""
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    rows = {}
    found = _TABLE.search(page)
    assert found is not None, f"docs/{name}.md has no table of options"
    for row in found[3].splitlines():
        if flags := _FLAG.findall(row.split("|")[1]):
            rows[flags[0]] = row
    lines = []
    for heading, flags in sections_of(name).items():
        known = [rows.pop(flag) for flag in flags if flag in rows]
        lines += [f"| **{heading}** | |", *known] if known else []
    table = "".join(f"{line}\n" for line in [*lines, *rows.values()])
    return page[: found.start(3)] + table + page[found.end(3) :]


def main() -> None:
    """Write the pages; with --check, exit with 1 where one is out of order."""
    stale = [name for name in commands() if (DOCS / f"{name}.md").read_text(encoding="utf-8") != text(name)]
    if "--check" in sys.argv[1:]:
        sys.exit(f"out of order: {', '.join(stale)}; run scripts/options_tables.py" if stale else 0)
    for name in stale:
        (DOCS / f"{name}.md").write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What --help shows: a page of options by group, drawn by rich on a terminal and plain text everywhere else."""

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typer.core import TyperCommand

from surgeon.options import GROUPS, Flag

SETTINGS = {"help_option_names": ["-h", "--help"]}  # of every command
MOST_NAMES = 30  # columns of the names; a longer one stands on a line of its own
PIPE = 80  # columns where there is no terminal


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the page: an option or a command, what it does, and its default in words."""

    name: str
    help: str
    default: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """All that --help shows of a command. `sections` are rows under their headings."""

    usage: str
    about: str
    sections: Mapping[str, Sequence[Row]]
    example: str
    more: str


class Command(TyperCommand):
    """A command whose help is its page. `flags` are how its options were declared, `example` can be copied."""

    flags: Mapping[str, Flag] = {}
    example = ""

    def get_help(self, ctx: Any) -> str:
        """Return the help, as the reader of standard output needs it."""
        return shown(page_of(self, ctx))


def page_of(command: Command, ctx: Any) -> Page:
    """Return the page of a command: its arguments, then its options by their groups."""
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    usage = [ctx.command_path, "[OPTIONS]", *(item.make_metavar(ctx) for item in arguments)]
    groups: dict[str, list[Row]] = {"arguments": [], **{group: [] for group in GROUPS}}
    for item in command.get_params(ctx):
        group = "arguments" if item in arguments else getattr(item, "rich_help_panel", None) or GROUPS[-1]
        groups[group].append(row_of(item, ctx, command.flags.get(str(item.name))))
    return Page(
        usage=" ".join(usage),
        about=str(command.help),
        sections={group: rows for group, rows in groups.items() if rows},
        example=command.example,
        more=f"docs/{command.name}.md",
    )


def row_of(item: Any, ctx: Any, flag: Flag | None = None) -> Row:
    """Return the row of an argument or an option. Words that its help does not name follow it."""
    said = str(item.help or "")
    if flag is not None and flag.choices is not None and flag.choices.is_complete:
        missing = [word for word in flag.choices.listed if word not in said]
        said += f" One of: {', '.join(flag.choices.listed)}." if missing else ""
    if item.param_type_name == "argument":
        return Row(item.make_metavar(ctx), said, "required" if item.required else "")
    names = [", ".join(sorted(item.opts, key=len)), *item.secondary_opts]
    place = "" if item.is_flag else f" {item.make_metavar(ctx)}"
    return Row(f"{' / '.join(names)}{place}", said, default_of(item, said))


def default_of(item: Any, said: str) -> str:
    """Return a default in words; "" where there is none, and where the help names it, since it is computed."""
    value = item.default
    if item.required:
        return "required"
    if "Default:" in said or value is None or value in ("", (), []):
        return ""
    if isinstance(value, bool):
        named = item.opts if value else item.secondary_opts
        return f"default: {max(named, key=len)}" if item.secondary_opts else ""
    return f"default: {value:g}" if isinstance(value, float) else f"default: {value}"


def shown(page: Page) -> str:
    """Return a page as text: with colours and of the terminal's width where standard output is a terminal."""
    return drawn(page) if sys.stdout.isatty() else plain(page)


def plain(page: Page, width: int = PIPE) -> str:
    """Return a page as plain text of so many columns; commands stand on one line however long they are."""
    column = _column(page)
    lines = [f"Usage: {page.usage}", "", *textwrap.wrap(page.about, width - 2, initial_indent="  ", **_INDENT)]
    for heading, rows in page.sections.items():
        lines += ["", f"{_heading(heading)}:"]
        for row in rows:
            said = f"{row.help}  [{row.default}]" if row.default else row.help
            helped = textwrap.wrap(said, max(20, width - column - 4), **_WHOLE)
            first = f"  {row.name:<{column}}  "
            if len(row.name) > column:
                lines += [f"  {row.name}"]
                first = " " * (column + 4)
            lines += [f"{first}{helped[0] if helped else ''}".rstrip()]
            lines += [f"{' ' * (column + 4)}{line}" for line in helped[1:]]
    return "\n".join([*lines, "", f"Example: {page.example}", f"More: {page.more}"])


_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
_INDENT: dict[str, Any] = {"subsequent_indent": "  ", **_WHOLE}


def drawn(page: Page) -> str:
    """Return a page as rich draws it, in the colours and the width of the terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=shutil.get_terminal_size().columns)
    column = 2 + min(_column(page), console.width * 2 // 5)
    with console.capture() as captured:
        console.print(Text.assemble(("Usage: ", "bold"), page.usage), Text(), Text(page.about), sep="\n")
        for heading, rows in page.sections.items():
            console.print(Text(), Text(_heading(heading), style="bold"), sep="\n")
            table = _grid(column)
            for row in rows:
                name, _, place = row.name.partition(" ") if row.name.startswith("--") else (row.name, "", "")
                default = Text(f"  [{row.default}]", style="dim") if row.default else Text()
                named = Text.assemble((name, "cyan"), (f" {place}", "dim"))
                if len(row.name) > column:  # it has a line of its own
                    if table.row_count:
                        console.print(table)
                    console.print(Text("  ").append(named))
                    table, named = _grid(column), Text()
                table.add_row(named, Text(row.help).append(default))
            console.print(table)
        ends = (("Example: ", page.example), ("More: ", page.more))
        console.print(Text(), *(Text.assemble((label, "bold"), said) for label, said in ends), sep="\n", soft_wrap=True)
    return captured.get().rstrip("\n")


def _grid(column: int) -> Any:
    """Return an empty table of rich: names in so many columns, and what they do in the rest."""
    from rich.table import Table

    table = Table.grid(padding=(0, 0, 0, 2), expand=True, pad_edge=True)
    table.add_column(width=column, overflow="fold")
    table.add_column(ratio=1)
    return table


def _column(page: Page) -> int:
    """Return the columns that names take: those of the longest that is not longer than names are."""
    lengths = [len(row.name) for rows in page.sections.values() for row in rows]
    return max((length for length in lengths if length <= MOST_NAMES), default=MOST_NAMES)


def _heading(group: str) -> str:
    return f"{group[:1].upper()}{group[1:]}"

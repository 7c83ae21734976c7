"""What --help shows, on a terminal and in a pipe, and how TAB completes what is typed."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from importlib import import_module
from pathlib import Path

import options_tables
import pytest
import typer

from surgeon.cli.command import command_of
from surgeon.cli.commands import GROUPS as COMMAND_GROUPS
from surgeon.cli.commands import commands
from surgeon.cli.help import page_of
from surgeon.options import GROUPS

ROOT = Path(__file__).parent.parent
COMMANDS = tuple(commands())
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def page(name: str):
    command = command_of(import_module(f"surgeon.cli.{name}"))
    return page_of(command, typer.Context(command, info_name=name))


def piped(*words: str) -> str:
    command = [sys.executable, "-m", "surgeon", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def on_a_terminal(columns: int, *words: str, **environment: str) -> str:
    """Return what a command writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-m", "surgeon", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**plain, "TERM": "xterm-256color", **environment},
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # the terminal is closed
            break
        if not read:
            break
        said += read
    os.close(ours)
    assert child.wait() == 0
    return said.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [80, 140])
def test_on_a_terminal_the_help_has_colours_and_the_terminals_width(columns):
    said = on_a_terminal(columns, "prune", "--help")

    assert COLOUR.search(said)
    lines = [line.rstrip() for line in COLOUR.sub("", said).splitlines()]
    options = [line for line in lines if not line.startswith("Example: ")]
    assert columns - 25 < max(map(len, options)) <= columns
    headings = [line.lower() for line in lines if line and not line.startswith(" ")]
    groups = ["arguments", "how much goes", "by which scores", "search", "compensation", "text", "output", "run"]
    assert headings[2:-2] == groups


def test_on_a_terminal_nothing_of_the_page_is_lost():
    """A name that is longer than its column is folded, and a word of the help never is."""
    drawn = "".join(COLOUR.sub("", on_a_terminal(100, "finetune", "--help")).split())

    for heading, rows in page("finetune").sections.items():
        assert heading.capitalize().replace(" ", "") in drawn
        assert all(row.name.partition(" ")[0] in drawn for row in rows)


def test_a_terminal_without_colours_gets_none():
    cyan = "\x1b[36m"

    assert cyan in on_a_terminal(80, "truncate", "--help")
    assert cyan not in on_a_terminal(80, "truncate", "--help", NO_COLOR="1")


def test_a_pipe_gets_plain_text_of_80_columns_and_no_rich():
    code = "import sys; sys.argv = ['surgeon', 'finetune', '--help']\nfrom surgeon.cli.app import main\n"
    code += "try:\n    main()\nfinally:\n    print('rich' in sys.modules)"

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()

    assert said[-1] == "False"
    assert not any("\x1b" in line for line in said)
    assert all(len(line) <= 80 or line.startswith(("Example: ", "  --")) for line in said)


def test_the_options_of_finetune_stand_in_these_groups_in_this_order():
    assert list(page("finetune").sections) == [
        "arguments", "data", "length and rate", "what is trained", "distillation", "gists", "numbers", "output", "run",
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_group_and_its_default_once(name):
    command = command_of(import_module(f"surgeon.cli.{name}"))
    shown = {row.name: row for rows in page(name).sections.values() for row in rows}

    for item in command.params:
        if item.param_type_name == "argument":
            continue
        assert item.rich_help_panel in GROUPS, item.name
        row = next(row for text, row in shown.items() if max(item.opts, key=len) in text.replace(",", " ").split())
        is_told = bool(row.default) + row.help.count("Default:")
        assert is_told <= 1, row
        assert "None" not in row.default
        has_value = item.default not in (None, (), [], "") and not (item.is_flag and not item.secondary_opts)
        assert is_told or not (has_value or item.required), row


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_names_every_word_of_an_option_and_a_page_that_exists(name):
    command = command_of(import_module(f"surgeon.cli.{name}"))
    shown = page(name)
    text = " ".join(row.help for rows in shown.sections.values() for row in rows)

    assert (ROOT / shown.more).is_file()
    for flag in command.flags.values():
        if flag.choices is not None and not callable(flag.choices.known) and not flag.choices.others:
            assert all(word in text for word in flag.choices.listed), flag.help


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_of_a_page_has_the_groups_and_the_order_of_the_help(name):
    """`python scripts/options_tables.py` puts them so."""
    written = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")

    assert written == options_tables.text(name)


def test_surgeon_alone_lists_every_command_by_what_it_is_for():
    said = piped()

    assert said == piped("--help")
    headings = [line.partition(":")[0].lower() for line in said.splitlines() if re.match(r"[A-Z]\w+: .*:$", line)]
    assert headings == list(COMMAND_GROUPS)
    assert re.findall(r"^  (\w+)  +\w", said, flags=re.MULTILINE) == list(COMMANDS)


# --- completion ---------------------------------------------------------------------------------------------------


def completed(typed: str) -> list[str]:
    """Return what TAB offers at the end of a line, to bash."""
    words = typed.split(" ")
    environment = {"_SURGEON_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "surgeon"], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("surgeon tr", ["trace", "transplant", "trim", "truncate"]),
        ("surgeon prune loc --sco", ["--score", "--scores-from"]),
        ("surgeon prune loc --score ra", ["random"]),
        ("surgeon prune loc --score l", ["last"]),
        ("surgeon truncate loc --dtype ", ["keep", "float32", "bfloat16", "float16"]),
        ("surgeon finetune loc --schedule co", ["cosine", "constant"]),
        ("surgeon finetune loc --track t", ["tensorboard", "trackio"]),
        ("surgeon evaluate loc --metric exact-match,ro", ["exact-match,rouge-l"]),
        ("surgeon evaluate loc --device c", ["cpu", "cuda"]),
        ("surgeon data q", ["question-formation"]),
        ("surgeon plot run --x ", ["steps", "tokens"]),
        ("surgeon finetune loc --optim adamw_torch_f", ["adamw_torch_fused"]),
    ],
)
def test_tab_completes_commands_options_and_their_words(typed, offered):
    assert completed(typed) == offered

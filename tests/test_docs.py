"""The documentation is checked against the program: options, commands, models, examples."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import architecture
import pytest
import toys

import surgeon
from surgeon.anatomy.families import FAMILIES, MULTIMODAL
from surgeon.anatomy.families.partial import PARTIAL
from surgeon.cli.commands import commands

ROOT = Path(__file__).parent.parent
COMMANDS = tuple(commands())
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def help_of(*words: str) -> str:
    command = [sys.executable, "-m", "surgeon", *words, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_a_command_documents_exactly_its_options(command):
    page = (ROOT / "docs" / f"{command}.md").read_text()
    section = page.split("## Options")[1].split("\n## ")[0]
    first_cells = "\n".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| "))

    assert options_in(first_cells) == options_in(help_of(command)) - {"--help"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example_that_can_be_copied(command):
    text = help_of(command)

    example = re.search(r"Example: (surgeon .*)", text)
    assert example is not None
    assert options_in(example[1]) <= options_in(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_in_the_docs_uses_commands_and_options_that_exist(page):
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["surgeon"]:
                assert words[1] in COMMANDS, line
                assert options_in(line.partition("#")[0]) <= options_in(help_of(words[1])), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        if "://" in target:
            continue
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_the_readme_lists_every_command():
    listed = re.findall(r"^  (\w+)  +\w", help_of(), flags=re.MULTILINE)

    assert sorted(listed) == sorted(COMMANDS)
    assert all(f"`surgeon {command} " in (ROOT / "README.md").read_text() for command in listed)


def test_the_page_of_models_lists_what_has_a_table_and_what_is_tested():
    tabled, seeing, narrow, untabled = (ROOT / "docs/models.md").read_text().split("## ")[1:5]
    listed = [set(re.findall(r"`([\w-]+)`", section.split("\n\n")[1])) for section in (tabled, seeing, narrow)]
    types = {name.partition("-")[0] for name in toys.TOYS}

    assert listed == [set(FAMILIES), set(MULTIMODAL), set(PARTIAL) - set(FAMILIES)]
    assert set(re.findall(r"`(\w+)`", untabled.split("exact logits:")[1].split("\n\n")[0])) == types - set(FAMILIES)
    assert f"tested on {len(types)} model types" in (ROOT / "README.md").read_text()


def test_the_python_examples_of_the_docs_run(toy, tmp_path, monkeypatch):
    """Every block, with a toy of six layers in the place of gpt2-large."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2-large").symlink_to(toy("gpt2"))
    for page in (ROOT / "README.md", ROOT / "docs/python.md"):
        names: dict[str, object] = {}
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
            shutil.rmtree("gpt2-large-6", ignore_errors=True)
            if "from_pretrained" in block:
                surgeon.truncate("gpt2-large", layers=6).save("gpt2-large-6")
            exec(compile(block.replace("50%", "100%"), str(page), "exec"), names)


def test_the_public_names_are_documented_and_exist():
    page = (ROOT / "docs/python.md").read_text()

    for name in surgeon.__all__:
        assert getattr(surgeon, name).__doc__, name
        assert name in page, name


@pytest.mark.slow  # it runs two commands on toys, and follows them
def test_the_picture_and_the_paths_of_the_design_page_are_those_of_the_code():
    """`python scripts/architecture.py` writes them anew."""
    text = architecture.PAGE.read_text(encoding="utf-8")

    assert architecture.PICTURE.read_text(encoding="utf-8") == architecture.picture()
    assert text == architecture.page(text)

"""The documentation site: its pages are those of docs/, tutorials become Markdown, and links lead where they should."""

import re
from pathlib import Path

import pages
import pytest

ROOT = Path(__file__).parents[1]
NAV = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2])


def test_the_navigation_has_every_page_once():
    tutorials = {f"tutorials/{path.stem}.md" for path in (ROOT / "docs/tutorials").glob("*.py")}
    written = {path.name for path in (ROOT / "docs").glob("*.md")}

    assert sorted(NAV) == sorted(written | tutorials | set(pages.ABOVE.values()))


@pytest.mark.parametrize(
    ("folder", "link", "turned"),
    [
        ("", "docs/prune.md#scores", "prune.md#scores"),
        ("", "CONTRIBUTING.md", "contributing.md"),
        ("", "docs/images/heal.png", "images/heal.png"),
        ("docs", "../README.md", "index.md"),
        ("docs", "tutorials/prune_and_heal.py", "tutorials/prune_and_heal.md"),
        ("docs", "images/heal.png", "images/heal.png"),
        ("docs/tutorials", "../run.md", "../run.md"),
        ("docs/tutorials", "../../README.md", "../index.md"),
        ("docs", "https://example.org/a.md", "https://example.org/a.md"),
    ],
)
def test_a_link_of_the_repository_is_turned_into_one_of_the_site(folder, link, turned):
    assert pages.turned(f"see [it]({link}) now", folder) == f"see [it]({turned}) now"


def test_a_tutorial_is_prose_and_blocks_of_code():
    source = "# %% [markdown]\n# # Title\n#\n# Words.\n\n# %%\nx = 1\n# a comment\n"

    assert pages.tutorial(source) == "# Title\n\nWords.\n\n```python\nx = 1\n# a comment\n```\n"


@pytest.mark.slow
def test_the_page_of_the_api_is_that_of_the_docstrings():
    """`python scripts/api.py` writes it anew."""
    import api

    assert api.PAGE.read_text(encoding="utf-8") == api.page()

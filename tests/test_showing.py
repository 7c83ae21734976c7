"""Results in a console and in a notebook: a short line, and tables into which no name can write HTML."""

from __future__ import annotations

import ast
import importlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from handmade import checkpoint, edit_config

import surgeon
from surgeon import text
from surgeon.showing import LONGEST, Shown, html_of

HOSTILE = "<script>alert(1)</script>&\"'\x1b[31m"


class Tags(HTMLParser):
    """Collects the tags of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parsed(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    tags.close()
    return tags


class Result(Shown):
    """A result of rows, a table and a sentence."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def headline(self) -> str:
        return self.name

    def to_text(self) -> str:
        return f"{text.rows([(self.name, 'b')])}\n\n{text.table(('c', self.name), [('e', 'f')])}\n\nsaid: {self.name}"


def test_a_notebook_shows_rows_and_tables_as_tables_and_the_rest_as_a_paragraph():
    tags = parsed(html_of(Result("a")))

    assert tags.tags.count("table") == 2
    assert tags.words == ["a", "b", "c", "a", "e", "f", "said: a"]
    assert str(Result("a")) == "  a  b\n\n  c  a\n  e  f\n\nsaid: a"
    assert repr(Result("a")) == "<Result: a>"


def test_no_name_can_write_html_or_control_a_terminal():
    tags = parsed(html_of(Result(HOSTILE)))

    assert set(tags.tags) == {"div", "table", "thead", "tbody", "tr", "th", "td", "p"}
    assert tags.attributes == {"style"}
    assert sum(HOSTILE[:25] in words for words in tags.words) == 3
    assert not any("\x1b" in words for words in tags.words)
    assert "\x1b" not in repr(Result(HOSTILE))


def test_a_hostile_checkpoint_shows_its_names_and_nothing_else(tmp_path):
    model = checkpoint(tmp_path / "<img src=x onerror=alert(1)>")
    edit_config(model, model_type="<b>llama</b>")

    html = surgeon.inspect(model)._repr_html_()

    assert set(parsed(html).tags) <= {"div", "table", "thead", "tbody", "tr", "th", "td"}
    assert "&lt;b&gt;llama&lt;/b&gt;" in html


def test_a_line_in_a_console_is_short_however_long_the_names_are():
    assert len(repr(Result("x" * 10_000))) < LONGEST + 20


def test_what_is_planned_and_made_is_a_short_line(tmp_path):
    model = checkpoint(tmp_path / "model", layers=3)
    surgery = surgeon.truncate(model, layers=2)
    summary = surgery.save(tmp_path / "cut")
    inspection = surgeon.inspect(tmp_path / "cut", against=model)

    results = (surgery, surgery.plan, surgery.anatomy, surgery.spec, summary, inspection, inspection.difference)
    assert all(len(repr(result)) < 300 + len(str(tmp_path)) for result in results)
    assert repr(surgery) == f"<Surgery: {model}, truncate, 3 → 2 layers>"
    assert "not written" in str(surgery)
    assert "not written" not in str(summary)
    assert str(tmp_path / "cut") in str(summary)
    assert surgery._repr_html_().count("<table>") == 1


def public_results() -> list[type]:
    stub = ast.parse(Path(surgeon.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    names = [(node.module, name.name) for node in stub.body if isinstance(node, ast.ImportFrom) for name in node.names]
    found = [getattr(importlib.import_module(str(home)), name) for home, name in names]
    return [item for item in found if isinstance(item, type) and not issubclass(item, Exception)]


@pytest.mark.slow
def test_every_public_result_shows_itself_so():
    for kind in public_results():
        assert issubclass(kind, Shown), kind
        assert kind.__repr__ is Shown.__repr__, kind
        assert kind.headline is not Shown.headline, kind
        assert kind.to_text is not Shown.to_text, kind

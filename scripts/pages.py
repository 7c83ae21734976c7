"""The documentation site: what mkdocs is given beside docs/, and where links lead there (hooks of mkdocs.yml).

The pages are written for a forge: README.md and CONTRIBUTING.md lie above docs/, tutorials are Python files. Here they
become pages of the site, and links to them are turned; `mkdocs build --strict` then fails on a link that leads nowhere.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ABOVE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
ABOVE |= {"CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    """Return mkdocs' files with the pages that lie above docs/, and with the tutorials as pages."""
    from mkdocs.structure.files import File

    for name, page in ABOVE.items():
        files.append(File.generated(config, page, content=turned((ROOT / name).read_text(encoding="utf-8"), "")))
    for path in sorted((ROOT / "docs/tutorials").glob("*.py")):
        text = tutorial(path.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=turned(text, "docs/tutorials")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with its links turned, for pages that lie in docs/ themselves."""
    return markdown if page.file.generated_by else turned(markdown, str(Path("docs", page.file.src_uri).parent))


def turned(text: str, folder: str) -> str:
    """Return text with the links of a page in `folder`, from the repository's root, as they are on the site."""

    def turn(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        place = (ROOT / folder / target).resolve().relative_to(ROOT).as_posix()
        if place in ABOVE:
            there = ABOVE[place]
        elif place.startswith("docs/"):
            there = place.removeprefix("docs/")
        else:
            return match[0]  # no page of the site; --strict names it
        there = re.sub(r"^(tutorials/\w+)\.py$", r"\1.md", there)
        up = "" if folder in ("", "docs") else "../" * len(Path(folder).parts[1:])
        return f"{match[1]}{up}{there}{match[3]}"

    return LINK.sub(turn, text)


def tutorial(source: str) -> str:
    """Return a Python file in the percent format as Markdown: its comments are prose, its code stands in blocks."""
    parts: list[str] = []
    for cell in re.split(r"(?m)^# %%", source)[1:]:
        head, _, body = cell.partition("\n")
        if "[markdown]" in head:
            parts.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()))
        elif body.strip():
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"

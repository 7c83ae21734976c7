"""Draw the packages and the path of a command from the code: `python scripts/architecture.py` rewrites docs/design.md.

A test compares the page and the picture with the code, so that neither can go stale.
"""

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
PAGE, PICTURE = ROOT / "docs/design.md", ROOT / "docs/images/architecture.svg"
# The floors of the house, from the ground up. A package imports its own files and lower floors only.
FLOORS = (
    *("text", "showing", "errors", "mistyped", "progress", "options", "starter", "processes"),
    *("checkpoint", "anatomy", "plan", "transforms"),
    *("data", "models", "draft", "surgery", "checkpoint.formats", "cost", "search", "measure", "plots", "lineage"),
    *("train", "growth", "gist", "attribution", "evals", "rewriting", "verbs", "recipe", "cli"),
)
# Every package may use these; the picture draws no arrows to them.
GROUND = ("text", "showing", "errors", "mistyped", "progress", "options")
WIDTH, HEIGHT, GAP, ROW = 156, 46, 22, 92  # of a box, between boxes, and from row to row, in pixels
COLOURS = {"box": "#eef3fb", "edge": "#7a8aa6", "text": "#1d2433", "line": "#b3bfd1"}


def main() -> None:
    """Rewrite the page and the picture; with --check, exit with 1 where they are not what the code says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where they are stale")
    is_check = parser.parse_args().check
    made = {PAGE: page(PAGE.read_text(encoding="utf-8")), PICTURE: picture()}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if is_check:
        sys.exit(f"stale: {', '.join(path.name for path in stale)}; run scripts/architecture.py" if stale else 0)
    for path in stale:
        path.write_text(made[path], encoding="utf-8")


# --- the code -----------------------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Return the files of the package by the name of their module."""
    files = sorted((SOURCE / "surgeon").rglob("*.py"))
    names = (".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__") for path in files)
    return dict(zip(names, files, strict=True))


def package_of(module: str) -> str | None:
    """Return the package, or the file at the top, that a module belongs to; None for the public face."""
    parts = module.split(".")[1:]
    if parts[:2] == ["checkpoint", "formats"]:
        return "checkpoint.formats"
    return parts[0] if parts and parts[0] != "__main__" else None


def imports_of(module: str, path: Path, known: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    """Yield the modules of surgeon that a file imports anywhere, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "surgeon":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in known else str(node.module)), node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "surgeon":
                    yield alias.name, node.lineno


def arrows() -> dict[str, set[str]]:
    """Return, for each package, the packages on lower floors that it imports; a test refuses all others."""
    known = modules()
    found: dict[str, set[str]] = {floor: set() for floor in FLOORS}
    for module, path in known.items():
        package = package_of(module)
        if package is None:
            continue
        targets = {package_of(target) or "" for target, _ in imports_of(module, path, known)}
        found[package] |= targets & set(FLOORS[: FLOORS.index(package)])
    return found


# --- the page -----------------------------------------------------------------------------------------------------


def page(text: str) -> str:
    """Return the page with its two written parts made anew."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from paths import PATHS, files_entered  # the traces that the benchmark prints

    lines = []
    for name in ("truncate", "prune"):
        entered = files_entered(PATHS[name])
        lines += [f"`surgeon {' '.join(PATHS[name])}` enters {len(entered)} files:", "", " → ".join(entered), ""]
    return between(between(text, "packages", table()), "paths", "\n".join(lines).strip())


def table() -> str:
    """Return a row for each package, from the top floor down, with the first sentence of its docstring."""
    rows = ["| package | holds |", "| --- | --- |"]
    known = modules()
    for floor in reversed(FLOORS):
        files = [path for module, path in known.items() if package_of(module) == floor]
        home = next((path for path in files if path.name == "__init__.py" and len(files) > 1), files[0])
        docstring = ast.get_docstring(ast.parse(home.read_text(encoding="utf-8"))) or ""
        first = docstring.split("\n\n")[0].replace("\n", " ")
        place = floor.replace(".", "/") if len(files) > 1 else f"{floor}.py"
        rows.append(f"| `{place}` | {first} |")
    return "\n".join(rows)


def between(text: str, name: str, content: str) -> str:
    """Return `text` with what stands between the marks `name` replaced."""
    start, end = f"<!-- {name}: written by scripts/architecture.py -->", f"<!-- end of {name} -->"
    before, rest = text.split(start)
    return f"{before}{start}\n\n{content}\n\n{end}{rest.split(end)[1]}"


# --- the picture --------------------------------------------------------------------------------------------------


def picture() -> str:
    """Return the packages as an SVG: each above all that it imports, with the arrows that no other path implies."""
    graph = {name: targets - set(GROUND) for name, targets in arrows().items()}
    rows = [list(GROUND), *ranked(graph)]
    width, height = max(map(len, rows)) * (WIDTH + GAP) + GAP, len(rows) * ROW
    places: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        left = (width - len(row) * (WIDTH + GAP) + GAP) / 2
        for index, name in enumerate(row):
            places[name] = (left + index * (WIDTH + GAP), height - (number + 1) * ROW + (ROW - HEIGHT) / 2)
    look = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="15"'
    label = 'role="img" aria-label="The packages of surgeon and their imports"'
    tip = f'<path d="M0 0 L8 4 L0 8 z" fill="{COLOURS["edge"]}"/>'
    size = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {look} {label}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<defs><marker id="tip" {size} orient="auto">{tip}</marker></defs>',
    ]
    for name, targets in graph.items():
        lines += [arrow(places[name], places[target]) for target in sorted(direct(name, targets, graph))]
    lines += [box(name, *places[name]) for row in rows for name in row]
    return "\n".join([*lines, "</svg>", ""])


def ranked(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the rows above the ground: a package stands one row above the highest that it imports.

    In a row, packages stand in the order of the mean place of the packages that they import.
    """
    ranks: dict[str, int] = {}
    for name in FLOORS:
        if name not in GROUND:
            ranks[name] = 1 + max((ranks[target] for target in graph[name]), default=-1)
    rows: list[list[str]] = []
    spots: dict[str, float] = {}
    for rank in range(max(ranks.values()) + 1):
        row = [name for name, own in ranks.items() if own == rank]
        row.sort(key=lambda name: mean([spots[target] for target in direct(name, graph[name], graph)] or [0.0]))
        spots |= {name: index - (len(row) - 1) / 2 for index, name in enumerate(row)}
        rows.append(row)
    return rows


def direct(name: str, targets: set[str], graph: Mapping[str, set[str]]) -> set[str]:
    """Return the imports of a package that do not follow from its other imports."""

    def reached(start: str) -> set[str]:
        return {start}.union(*(reached(target) for target in graph[start]))

    return {one for one in targets if not any(one in reached(other) for other in targets - {one})}


def arrow(one: Sequence[float], other: Sequence[float]) -> str:
    """Return an arrow from the bottom of a box to the top of another."""
    x1, y1, x2, y2 = one[0] + WIDTH / 2, one[1] + HEIGHT, other[0] + WIDTH / 2, other[1] - 2
    middle = (y1 + y2) / 2
    return (
        f'<path d="M{x1:.0f} {y1:.0f} C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}" fill="none" '
        f'stroke="{COLOURS["edge"]}" stroke-width="1.4" marker-end="url(#tip)"/>'
    )


def box(name: str, x: float, y: float) -> str:
    """Return a package as a box with its name."""
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{COLOURS["box"]}" '
        f'stroke="{COLOURS["edge"]}"/><text x="{x + WIDTH / 2:.0f}" y="{y + HEIGHT / 2 + 5:.0f}" '
        f'text-anchor="middle" fill="{COLOURS["text"]}">{escape(name)}</text>'
    )


if __name__ == "__main__":
    main()

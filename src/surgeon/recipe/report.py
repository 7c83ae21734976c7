"""The report of a recipe: report.md and report.html, with its tables and pictures, fit to stand beside a model card."""

import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from surgeon.checkpoint.receipt import public_text, versions
from surgeon.errors import SurgeonError
from surgeon.evals.compare import markdown_table
from surgeon.plots.page import heading, page_of, png_picture, sentences, table
from surgeon.recipe.figures import Table, evaluations, headline, measures, ranks, repeated, sentence
from surgeon.recipe.record import Record, replace_file
from surgeon.recipe.running import Outcome
from surgeon.text import duration, few

PAGE, MARKDOWN = "report.html", "report.md"


def write_report(directory: Path, title: str, outcomes: Sequence[Outcome], record: Record, stopped: str | None) -> Path:
    """Write the report of what came of a recipe, `stopped` being why it ended early; return the HTML page.

    Raises OutputError where it cannot be written.
    """
    pictures = _pictures(directory, title, outcomes)
    sections: list[tuple[str, Table]] = [("Steps", _steps(outcomes, record))]
    sections += [(name, shown) for name, shown in _measured(outcomes) if shown[1]]
    said = sentence(outcomes)
    leads = [public_text(text) for text in (f"Stopped: {stopped}" if stopped else None, said) if text]
    end = ", ".join(f"{name} {version}" for name, version in versions().items())
    replace_file(directory / MARKDOWN, _markdown(title, leads, sections, pictures, end).encode())
    replace_file(directory / PAGE, _html(title, leads, sections, pictures, end))
    return directory / PAGE


def _steps(outcomes: Sequence[Outcome], record: Record) -> Table:
    lines = []
    for outcome in outcomes:
        words = [word for word in record.entries[outcome.name].words if not word.startswith("--output=")]
        command = public_text(shlex.join(["surgeon", outcome.command, *words]))
        lines.append([outcome.name, command, headline(outcome.result), duration(outcome.seconds)])
    return ["step", "command", "figures", "time"], lines


def _measured(outcomes: Sequence[Outcome]) -> list[tuple[str, Table]]:
    return [
        ("Measured (value ± standard error)", evaluations(outcomes)),
        ("Over seeds", repeated(outcomes)),
        ("Ranks (1 is the best)", ranks(outcomes)),
    ]


# --- pictures -----------------------------------------------------------------------------------------------------


def _pictures(directory: Path, title: str, outcomes: Sequence[Outcome]) -> dict[str, Path]:
    """Draw what can be drawn, and return the pictures by their titles, those of the steps included."""
    found: dict[str, Path] = {}
    if find_spec("matplotlib") is not None:
        found |= _compared(directory, title, outcomes) | _sized(directory, title, outcomes)
        found |= _losses(directory, outcomes)
    for outcome in outcomes:
        listed = outcome.result.get("pictures")
        paths = [Path(path) for path in listed] if isinstance(listed, list) else []
        found |= {f"{outcome.name}: {path.stem}": path for path in paths if path.is_file() and path.suffix == ".png"}
    return found


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _compared(directory: Path, title: str, outcomes: Sequence[Outcome]) -> dict[str, Path]:
    from surgeon.plots.comparison import Point, plot_comparison

    points = []
    for outcome in outcomes:
        first = next(measures(outcome.result), None)
        if first is not None and outcome.output is None:  # what was made has figures of its own kind
            baseline = outcome.result.get("baseline")
            other = baseline.get(first[0]) if isinstance(baseline, Mapping) else None
            points.append(Point(outcome.name, *first, other))
    if not points:
        return {}
    data = dict.fromkeys(str(item) for outcome in outcomes for item in _listed(outcome.result.get("data")))
    title = f"{title}, on {few([public_text(item) for item in data])}" if data else title
    plot_comparison(points, directory / "measured.png", title=title)
    return {"Measured": directory / "measured.png"}


def _sized(directory: Path, title: str, outcomes: Sequence[Outcome]) -> dict[str, Path]:
    """Return the picture of figures against bytes, where a step has made a model's numbers smaller."""
    from surgeon.plots.sizes import Sized, plot_sizes

    if not any("file_bytes" in outcome.result for outcome in outcomes):
        return {}
    points = []
    for outcome in outcomes:
        first, model = next(measures(outcome.result), None), outcome.result.get("model")
        if first is not None and outcome.output is None and isinstance(model, str):
            nbytes = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
            points += [Sized(outcome.name, *first, nbytes)] if nbytes else []
    if len({point.nbytes for point in points}) < 2:
        return {}
    plot_sizes(points, directory / "sizes.png", title=title)
    return {"Worth by size": directory / "sizes.png"}


def _losses(directory: Path, outcomes: Sequence[Outcome]) -> dict[str, Path]:
    """Return the picture of the losses of all runs; none where a run has no losses to draw."""
    from surgeon.plots.training import plot_losses
    from surgeon.train.run_dir import read_metrics

    runs = [Path(str(outcome.result["run_dir"])) for outcome in outcomes if outcome.result.get("run_dir")]
    try:
        records = [(run, read_metrics(run)) for run in runs if run.is_dir()]
        return {"Losses of the runs": plot_losses(records, directory / "losses.png", x="tokens")} if records else {}
    except SurgeonError:  # a run's directory that was tidied up: the report goes without its curve
        return {}


# --- pages --------------------------------------------------------------------------------------------------------


def _markdown(
    title: str, leads: Sequence[str], sections: Sequence[tuple[str, Table]], pictures: Mapping[str, Path], end: str
) -> str:
    parts = [f"# {title}", *leads]
    for name, shown in sections:
        parts += [f"## {name}", markdown_table(*shown)]
    parts += [f"## {name}\n\n![{name}]({path.name})" for name, path in pictures.items()]
    page = "\n\n".join([*parts, f"Made with `surgeon run`; {end}."]) + "\n"
    return page.replace("<", "&lt;")  # a name is no HTML


def _html(
    title: str, leads: Sequence[str], sections: Sequence[tuple[str, Table]], pictures: Mapping[str, Path], end: str
) -> bytes:
    """Return a page that needs no other file: pictures are in it."""
    parts = [sentences(leads)] if leads else []
    for name, shown in sections:
        parts += [heading(name), table(*shown)]
    for name, path in pictures.items():
        parts += [heading(name), png_picture(path.read_bytes(), name)]
    return page_of(title, [*parts, sentences([f"Made with surgeon run; {end}."])])

"""README.md of a result: a model card that says what was done, from what, and by which command."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KEPT_METADATA = ("license", "license_name", "license_link", "language", "pipeline_tag")


def model_card(
    *,
    title: str,
    base_model: str,
    done: str,
    facts: Mapping[str, str],
    command: str | None,
    notes: tuple[str, ...] = (),
    source_card: Path | None = None,
) -> str:
    """Return the card's text: the Hub's metadata block, then what was done in words and in a table."""
    import yaml

    metadata: dict[str, Any] = {"base_model": base_model, "library_name": "transformers", "tags": ["surgeon"]}
    metadata |= _kept(source_card)
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(), "---", "", f"# {title}", ""]
    lines += [f"{done}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", *(f"- {note}" for note in notes)]
    if command:
        lines += ["", "Made with:", "", "```bash", command, "```"]
    lines += ["", "`surgeon.json` holds the layer map, the source's identity and the versions.", ""]
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()  # a path need not be text


def _kept(card: Path | None) -> dict[str, Any]:
    """Return what the source's card says of licence and language; nothing where it is absent or not readable."""
    import yaml

    if card is None:
        return {}
    try:
        head, block, *_ = card.read_text(encoding="utf-8").split("---\n", 2)
        # BaseLoader makes nothing but strings, lists and dictionaries: Norwegian stays "no", and no tag can do harm.
        metadata = yaml.load(block, Loader=yaml.BaseLoader) if not head.strip() else None  # noqa: S506
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {key: metadata[key] for key in _KEPT_METADATA if key in metadata} if isinstance(metadata, dict) else {}

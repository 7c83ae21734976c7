"""Write recipes/schema.json from the options of the commands: `python scripts/schema.py`; --check only compares."""

import json
import sys
from pathlib import Path

from surgeon.cli.steps import CommandLine
from surgeon.recipe.schema import schema

FILE = Path(__file__).resolve().parent.parent / "recipes/schema.json"


def text() -> str:
    """Return the file's content."""
    return json.dumps(schema(CommandLine()), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the file; with --check, exit with 1 where it is stale."""
    if "--check" in sys.argv[1:]:
        sys.exit("stale: run scripts/schema.py" if FILE.read_text(encoding="utf-8") != text() else 0)
    FILE.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The commands of `surgeon`, found by their files, in the order of --help."""

import ast
from pathlib import Path

# The headings and the order of --help: by what a command is for (`GROUP` in its file), then by its name.
GROUPS = {
    "inspection": "look into a model",
    "surgery": "cut, grow and make models",
    "training": "heal, distil, make data",
    "evaluation": "measure and compare",
    "prompts": "compress prompts, and generate",
    "formats": "take checkpoints of other formats",
    "recipes": "chain commands",
}


def commands() -> dict[str, str]:
    """Return the first sentence of each command by its name, in the order of --help."""
    return {name: sentence for listed in by_group().values() for name, sentence in listed.items()}


def by_group() -> dict[str, dict[str, str]]:
    """Return the first sentence of each command by its name, in the groups and the order of --help.

    A command is the function of its file's name in src/surgeon/cli/NAME.py, where that file has a GROUP. The files are
    parsed and not imported, because they import what their commands need.
    """
    listed: dict[str, dict[str, str]] = {group: {} for group in GROUPS}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        groups = (
            ast.literal_eval(item.value)
            for item in statements
            if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "GROUP"
        )
        if (group := next(groups, None)) is not None:
            functions = {item.name: item for item in statements if isinstance(item, ast.FunctionDef)}
            sentence = (ast.get_docstring(functions[path.stem]) or "").partition("\n\n")[0]
            listed[group][path.stem] = sentence
    return listed

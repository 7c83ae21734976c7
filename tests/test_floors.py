"""The packages of surgeon stand on floors: each imports its own files and lower floors, and no imports go in a circle.

scripts/architecture.py lists the floors, and draws them for docs/design.md.
"""

from graphlib import CycleError, TopologicalSorter

import pytest
from architecture import FLOORS, ROOT, imports_of, modules, package_of

KNOWN = modules()
MOST_LINES = 450
SHAPELESS = {"utils", "util", "helpers", "helper", "misc", "common", "base", "manager"}


def test_every_package_and_every_file_beside_them_has_a_floor():
    assert {package_of(module) for module in KNOWN} - {None} == set(FLOORS)
    assert len(set(FLOORS)) == len(FLOORS)


@pytest.mark.parametrize("floor", FLOORS)
def test_a_package_imports_only_its_own_files_and_lower_floors(floor):
    allowed = {*FLOORS[: FLOORS.index(floor) + 1], *([None] if floor == "cli" else [])}  # None: `import surgeon` itself

    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for module, path in KNOWN.items()
        if package_of(module) == floor
        for target, line in imports_of(module, path, KNOWN)
        if package_of(target) not in allowed
    ]

    assert not wrong, "\n".join(wrong)


def test_no_files_import_one_another_in_a_circle_not_even_inside_functions():
    graph = {
        module: {target for target, _ in imports_of(module, path, KNOWN) if target in KNOWN} - {module}
        for module, path in KNOWN.items()
    }

    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_files_are_short_and_named_after_what_they_hold():
    assert [
        module for module, path in KNOWN.items() if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES
    ] == []
    assert [module for module in KNOWN if set(module.split(".")) & SHAPELESS] == []

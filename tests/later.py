"""Imports that wait for the tests: collecting the suite takes neither torch nor transformers nor numpy.

A test file has the imports that need them under `if LATER:`, which never holds. conftest.py runs these imports before
the first test of the file, in the names of the file, so that the bodies of the tests use them as any other import.
Whatever runs while the file is collected must do without them: parametrize values, constants, base classes. Annotations
do with `from __future__ import annotations`. Among the helpers, toys.py and talkers.py import torch inside their
functions, for tables are read off them; the others are imported late themselves.
"""

import ast
import sys
from pathlib import Path
from types import ModuleType

LATER = False


def import_late(module: ModuleType) -> None:
    """Run what a test file has under `if LATER:`, and before it the same of the test files that it imports from."""
    if "LATER" not in vars(module):
        return
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and str(statement.module).startswith("test_"):
            import_late(sys.modules[str(statement.module)])
        elif isinstance(statement, ast.If) and ast.unparse(statement.test) == "LATER":
            exec(compile(ast.Module(statement.body, []), str(module.__file__), "exec"), vars(module))
    del module.LATER

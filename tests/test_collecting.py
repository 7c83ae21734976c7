"""Collecting the suite: quick, because no test file imports torch before its tests run."""

import os
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "datasets", "huggingface_hub")
COLLECT = f"""
import sys, pytest
code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", sys.argv[1]])
print("imported:", *sorted(sys.modules.keys() & {set(HEAVY)!r}))
sys.exit(code)
"""


def test_collecting_the_whole_suite_imports_nothing_heavy():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-c", COLLECT, str(Path(__file__).parent)]

    result = subprocess.run(command, capture_output=True, text=True, env=environment)

    assert result.returncode == 0, result.stdout[-2000:]
    assert result.stdout.splitlines()[-1] == "imported:", "see later.py for imports that wait for the tests"

"""Collecting the suite is quick, for no test file imports torch before its tests run."""

import os
import subprocess
import sys
from pathlib import Path

# Collects the tests in a folder, and prints which heavy modules that imported and the file that was first to do so.
COLLECT = """
import sys, traceback, pytest

heavy = {"torch", "transformers", "numpy", "matplotlib", "datasets", "huggingface_hub"}
first = {}

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in heavy and name not in first:
            files = [frame.filename for frame in traceback.extract_stack()]
            first[name] = next((file for file in reversed(files) if file.startswith(sys.argv[1])), "another file")

sys.meta_path.insert(0, Watch())
code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", sys.argv[1]])
print("imported:", *(f"{name} by {first[name]}" for name in sorted(heavy & sys.modules.keys())))
sys.exit(code)
"""


def test_collecting_the_whole_suite_imports_nothing_heavy():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-c", COLLECT, str(Path(__file__).parent)]

    result = subprocess.run(command, capture_output=True, text=True, env=environment)

    assert result.returncode == 0, result.stdout[-2000:]
    assert result.stdout.splitlines()[-1] == "imported:", "later.py says how imports wait for the tests"

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


def test_tests_of_one_group_run_in_one_process(tmp_path):
    """xdist 3.8 and pytest 9.2 pass over the groups without a word: models were converted twice, large files met."""
    (tmp_path / "test_group.py").write_text(
        "import os, pathlib, pytest\n"
        "pytestmark = pytest.mark.xdist_group('one')\n"
        "@pytest.mark.parametrize('number', range(6))\n"
        "def test_who(number):\n"
        "    pathlib.Path(__file__).with_name(f'{number}.txt').write_text(str(os.getpid()))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadgroup", "."]

    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    assert result.returncode == 0, result.stdout
    assert len({path.read_text() for path in tmp_path.glob("*.txt")}) == 1
    assert len(list(tmp_path.glob("*.txt"))) == 6

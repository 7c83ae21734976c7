"""How many files a reader must open to follow a command: the budgets of the commonest."""

import pytest
from paths import PATHS, files_entered

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "most"), [("truncate", 24), ("grow", 33), ("prune", 38), ("evaluate", 30), ("finetune", 53)]
)
def test_a_command_enters_few_files(name, most):
    entered = files_entered(PATHS[name])

    assert len(entered) <= most, f"surgeon {name} enters {len(entered)} files: {' '.join(entered)}"

"""How many files a reader must open to follow a command: the budgets of the commonest."""

import pytest
from paths import PATHS, files_entered

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "most"), [("truncate", 27), ("grow", 38), ("prune", 56), ("evaluate", 36), ("finetune", 62)]
)
def test_a_command_enters_few_files(name, most):
    entered = files_entered(PATHS[name])

    assert len(entered) <= most, f"surgeon {name} enters {len(entered)} files: {' '.join(entered)}"

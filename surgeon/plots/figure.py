"""What pictures have in common."""

from typing import TYPE_CHECKING

from surgeon.errors import PlanError

if TYPE_CHECKING:
    pass


def require_matplotlib() -> None:
    """Raises PlanError where matplotlib is not installed."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise PlanError("pictures need matplotlib", hint='pip install "surgeon[plot]"')

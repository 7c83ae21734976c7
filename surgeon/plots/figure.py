"""The check that matplotlib, with which all pictures are drawn, is installed."""

from surgeon.errors import PlanError


def require_matplotlib() -> None:
    """Raise PlanError where matplotlib is not installed."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise PlanError("pictures need matplotlib", hint='pip install "surgeon[plot]"')

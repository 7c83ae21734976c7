"""What the word MODEL means: a checkpoint directory, or a Hub id. An existing directory wins over an id of its name."""

import os
import re
from contextlib import suppress
from pathlib import Path

from surgeon.checkpoint.source import Source, open_directory
from surgeon.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")  # a path may still have such a name


def open_source(model: str | os.PathLike[str], *, revision: str | None = None) -> Source:
    """Return the checkpoint that `model` names. `revision` is a branch, tag or commit on the Hub.

    Raises CheckpointError for a path that holds none, HubError for an id that the Hub does not have.
    """
    text = os.fspath(model)
    path = Path(text)
    with suppress(RuntimeError):  # ~someone who has no home here
        path = path.expanduser()
    if not _HUB_ID.fullmatch(text) or path.exists():
        if revision is not None:
            raise CheckpointError(
                f"{text} is a local path; a revision is for a model on the Hub", hint="Leave out --revision."
            )
        return open_directory(path, label=text)
    from surgeon.checkpoint.hub import open_hub

    return open_hub(text, revision=revision)

"""Links in a checkpoint: followed within it and to the Hub's cache, and nowhere else."""

import os
import re
from pathlib import Path

from surgeon.errors import CheckpointError

TEMPLATES = "additional_chat_templates"  # a directory from which transformers reads too
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")  # configs, tokenizers, templates, code
_IN_CACHE = re.compile(r"(models|datasets|spaces)--.+")
_SHARED_BLOB = re.compile(r"blobs/([0-9a-f]{2})/\1[0-9a-f]{62}")


def inside(directory: Path, file: str) -> Path:
    """Return the path of a file of a checkpoint, after checking that no link leads out of the checkpoint.

    A stranger's checkpoint may hold a link to any file of this machine, whose content a result would carry on. Links
    are followed within the directory and, from a snapshot in the Hub's cache, to the blobs of that cache. The directory
    itself may be a link: the user has named it. Raises CheckpointError.
    """
    path = directory / file
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    if real.is_relative_to(root) or _is_blob(real, root):
        return path
    raise CheckpointError(
        f"{path} is a link that leads out of the checkpoint: to {real}",
        hint="If you trust that file, put a copy of it in place of the link.",
    )


def check_links(directory: Path) -> None:
    """Raises CheckpointError where a file that transformers reads beside the weights is a link that leads out."""
    for name in _names_in(directory):
        if name.endswith(_TEXTS):
            inside(directory, name)
    for name in _names_in(directory / TEMPLATES):
        inside(directory, f"{TEMPLATES}/{name}")


def _names_in(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))  # noqa: PTH208  # names, and no paths, are wanted
    except OSError:
        return []


def _is_blob(real: Path, root: Path) -> bool:
    """Return whether a file is a blob of the Hub's cache, for a root in one of its snapshots.

    huggingface_hub places blobs in <cache>/models--NAME/blobs, and from version 2 also in <cache>/blobs/XX, where the
    repositories share them.
    """
    for place in (root, *root.parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and _IN_CACHE.fullmatch(repository.name):
            shared = real.relative_to(repository.parent).as_posix() if real.is_relative_to(repository.parent) else ""
            return real.is_relative_to(repository / "blobs") or bool(_SHARED_BLOB.fullmatch(shared))
    return False


def is_there(path: Path) -> bool:
    """Return whether `path` exists. Raises CheckpointError when it is a broken link."""
    try:
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if not os.path.lexists(path):
            return False
        raise CheckpointError(
            f"{path} is a broken link: it points to {path.readlink()}",
            hint="Fetch the file again, or remove the link if the checkpoint does not need it.",
        ) from error
    return True

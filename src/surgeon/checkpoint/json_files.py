"""The JSON files of a checkpoint: read strictly, and no larger or deeper than any that is one."""

import json
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import DOWNLOAD_HINT, MAX_HEADER_BYTES, is_dense, opened
from surgeon.errors import CheckpointError

MAX_DEPTH = 64  # of lists and objects in one another


def read_config(path: Path) -> dict[str, Any]:
    """Return config.json as a dictionary. Raises CheckpointError when it is not one."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path} is not a model config: it holds a {type(config).__name__}, not an object", hint=DOWNLOAD_HINT
        )
    return config


def read_index(path: Path) -> dict[str, str]:
    """Return the weight map (tensor to shard) of an index file.

    Raises CheckpointError when there is none, or when a shard's name leaves the directory: a reader that trusts such a
    name loads, and republishes, any file that it points to.
    """
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map", hint=DOWNLOAD_HINT)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise CheckpointError(
                f"{path} places {name!r} in {shard!r}, outside the checkpoint",
                hint="Do not use this checkpoint: an honest index names only files beside itself.",
            )
    return weight_map


def read_json(path: Path, *, most: int = MAX_HEADER_BYTES) -> Any:
    """Return the content of a JSON file of at most `most` bytes.

    Raises CheckpointError for one that is missing, no regular file, no JSON, or larger or deeper than any that is one.
    """
    with opened(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise CheckpointError(f"{path} has over {most / 1e6:.0f} MB, more than is read", hint=DOWNLOAD_HINT)
    try:
        content = json.loads(raw.decode("utf-8")) if not is_dense(raw) else None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error.msg} at line {error.lineno}", hint=DOWNLOAD_HINT) from error
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a number of thousands of digits
        raise CheckpointError(f"{path} is not JSON: {error}", hint=DOWNLOAD_HINT) from error
    if is_dense(raw) or _is_deep(content):
        raise CheckpointError(f"{path} has more lists and objects in one another than is read", hint=DOWNLOAD_HINT)
    return content


def _is_deep(content: Any) -> bool:
    """Return whether JSON is nested deeper than code that follows it can go."""
    level = [content]
    for _ in range(MAX_DEPTH):
        inside = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [value for values in inside for value in values if isinstance(value, (dict, list))]
        if not level:
            return False
    return True


def _is_plain_name(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not any(char in name for char in "/\\\0") and ":" not in name


# Reading the bytes of weights

"""A checkpoint on the Hub, read without downloading what is not asked for.

The config and the companions go through huggingface_hub's own cache. Headers are asked for by byte range, so that a
plan of a model of any size costs kilobytes. All of it is of one commit, resolved once: a push in between cannot mix
two versions. Of a commit nothing ever changes, so its file list and headers are noted beside the cache
(HF_ASSETS_CACHE), and a surgery that was done once can be done again without a network.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from surgeon.checkpoint.header import Entry, header_length, parse_header, read_header
from surgeon.checkpoint.hub_http import LOGIN, ask_bytes, explained, hush_progress
from surgeon.checkpoint.source import (
    CONFIG,
    INDEX,
    WEIGHTS,
    StoredTensor,
    assemble,
    is_companion,
    read_config,
    read_index,
    stored,
)
from surgeon.errors import CheckpointError, HubError

FIRST_REQUEST_BYTES = 64 * 1024  # holds the header of most files; a longer one takes a second request
NUM_CONNECTIONS = 8


@dataclass(frozen=True)
class HubSource:
    """One commit of a model repository on the Hub. `snapshot` is its directory in huggingface_hub's cache."""

    repo_id: str
    snapshot: Path
    revision: str | None

    @property
    def label(self) -> str:
        return self.repo_id

    @property
    def origin(self) -> None:
        return None

    @property
    def commit(self) -> str:
        return self.snapshot.name

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return read_config(self.fetch(CONFIG))

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        if WEIGHTS in self.files:  # where both are, transformers too reads the one file
            return {name: stored(WEIGHTS, entry) for name, entry in self._header(WEIGHTS).items()}
        if INDEX not in self.files:
            self._refuse_without_weights()
        weight_map = read_index(self.fetch(INDEX))
        shards = sorted(set(weight_map.values()))
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            return assemble(dict(zip(shards, pool.map(self._header, shards), strict=True)), weight_map)

    @cached_property
    def files(self) -> Sequence[str]:
        """Every file of the commit; when HF_HUB_OFFLINE is set and it was never listed, those that are cached."""
        from huggingface_hub import constants

        if (note := self._recall("files.json")) is not None:
            return _checked(json.loads(note), self.repo_id)
        if constants.HF_HUB_OFFLINE:
            cached = (path for path in sorted(self.snapshot.rglob("*")) if path.is_file())
            return [path.relative_to(self.snapshot).as_posix() for path in cached]

        from huggingface_hub import HfApi

        with explained(f"the file list of {self.repo_id}", repo_id=self.repo_id, revision=self.revision):
            siblings = HfApi().model_info(self.repo_id, revision=self.commit).siblings or []
        names = _checked(sorted(sibling.rfilename for sibling in siblings), self.repo_id)
        self._note("files.json", json.dumps(names).encode())
        return names

    @cached_property
    def companions(self) -> Sequence[str]:
        return [name for name in self.files if is_companion(name)]

    def fetch(self, file: str, ranges: Sequence[tuple[int, int]] | None = None) -> Path:
        """Return `file` in the cache, downloaded whole if it is not there yet.

        Raises HubError when it cannot be, CheckpointError when its size is not the one that its header promised.
        """
        from huggingface_hub import hf_hub_download

        with explained(f"{file} of {self.repo_id}", repo_id=self.repo_id, revision=self.revision):
            path = Path(hf_hub_download(self.repo_id, file, revision=self.commit))
        if file.endswith(".safetensors"):
            promised = max((tensor.end for tensor in self.tensors.values() if tensor.file == file), default=None)
            if promised is not None and path.stat().st_size != promised:
                raise CheckpointError(
                    f"{file} of {self.repo_id} has {path.stat().st_size} bytes; its header promised {promised}",
                    hint=f"Delete {path.resolve()} and run the command again.",
                )
        return path

    def provenance(self) -> dict[str, Any]:
        asked = {} if self.revision is None else {"revision": self.revision}
        return {"id": self.repo_id, "commit": self.commit} | asked

    def _header(self, file: str) -> dict[str, Entry]:
        """Return the tensors of one file: from the cached file, from an earlier run's note, or by asking the Hub."""
        if (self.snapshot / file).exists():
            return read_header(self.snapshot / file)
        where = f"{file} of {self.repo_id}"
        note = self._recall(f"{file}.header")
        size, raw = (int.from_bytes(note[:8], "little"), note[8:]) if note else self._ask_header(file, where)
        entries = parse_header(raw, file_size=size, where=where)
        if note is None:
            self._note(f"{file}.header", size.to_bytes(8, "little") + raw)
        return entries

    def _ask_header(self, file: str, where: str) -> tuple[int, bytes]:
        """Return the size of a file on the Hub, and its header's bytes without the length before them."""
        head, size = ask_bytes(self.repo_id, file, commit=self.commit, start=0, end=FIRST_REQUEST_BYTES)
        end = 8 + header_length(head[:8], file_size=size, where=where)
        if end > len(head):
            head += ask_bytes(self.repo_id, file, commit=self.commit, start=len(head), end=end)[0]
        return size, head[8:end]

    @property
    def _notes(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_ASSETS_CACHE, "surgeon", self.snapshot.parents[1].name, self.commit)

    def _recall(self, name: str) -> bytes | None:
        try:
            return (self._notes / name).read_bytes()
        except OSError:
            return None

    def _note(self, name: str, answer: bytes) -> None:
        """Keep an answer for the next run, whole or not at all. A cache that cannot be written is no failure."""
        with suppress(OSError):
            self._notes.mkdir(parents=True, exist_ok=True)
            partial = self._notes / f"{name}.{os.getpid()}"
            partial.write_bytes(answer)
            partial.replace(self._notes / name)

    def _refuse_without_weights(self) -> NoReturn:
        """Raise the error that says what the repository has in place of safetensors."""
        from huggingface_hub import constants

        others = [name for name in self.files if name.endswith((".bin", ".gguf"))]
        ggufs = [name for name in others if name.endswith(".gguf")]
        if others:
            directory = self.repo_id.rpartition("/")[2]
            what = f"{directory}/{ggufs[0]}" if ggufs else directory
            hint = f"hf download {self.repo_id} --local-dir {directory} && surgeon convert {what}"
        elif "adapter_config.json" in self.files:
            hint = "This is a PEFT adapter; merge it into its base model first."
        elif constants.HF_HUB_OFFLINE:
            hint = "Unset HF_HUB_OFFLINE once to fetch it: the cache may hold a part of the repository only."
        else:
            hint = None
        where = " in the cache" if constants.HF_HUB_OFFLINE else ""
        raise CheckpointError(f"{self.repo_id} has no {WEIGHTS}{where}", hint=hint)


def open_hub(repo_id: str, *, revision: str | None = None) -> HubSource:
    """Return the checkpoint that `revision` (a branch, tag or commit; default: the main branch) names now.

    Fetches config.json, which resolves the commit. Without a network the cached one is taken.
    Raises HubError.
    """
    from huggingface_hub import hf_hub_download

    hush_progress()
    with explained(f"{CONFIG} of {repo_id}", repo_id=repo_id, revision=revision):
        config = Path(hf_hub_download(repo_id, CONFIG, revision=revision))
    return HubSource(repo_id, config.parent, revision)


def _checked(names: Sequence[str], repo_id: str) -> Sequence[str]:
    """Return the names. Raises CheckpointError for one that would leave a directory into which it is written."""
    for name in names:
        if "\\" in name or ":" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(
                f"{repo_id} lists a file {name!r}, outside the checkpoint",
                hint="Do not use this checkpoint: an honest one has only files inside its directory.",
            )
    return names


def push(directory: Path, repo_id: str, *, private: bool) -> str:
    """Return the URL of the model repository to which every file of `directory` has been uploaded.

    Creates the repository when there is none. A new one is private if `private`, else what its owner's settings say;
    an existing one is never turned private or public, and one that is public is refused when `private` is asked for.
    Raises HubError.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubError(f"cannot upload to {repo_id}: HF_HUB_OFFLINE is set", hint="Unset HF_HUB_OFFLINE.")
    if get_token() is None:
        raise HubError(f"cannot upload to {repo_id} without a token", hint=f"{LOGIN} to a token that can write.")
    hush_progress()
    hub = HfApi()
    with explained(f"the upload to {repo_id}", repo_id=repo_id):
        url = hub.create_repo(repo_id, private=True if private else None, exist_ok=True)
        is_public = private and not hub.model_info(url.repo_id).private
    if is_public:  # exist_ok leaves the visibility of an existing repository as it is
        raise HubError(
            f"{url.repo_id} exists and is public; nothing was uploaded",
            hint=f"Make it private first: hf repos settings {url.repo_id} --private, or push to another name.",
        )
    with explained(f"the upload to {repo_id}", repo_id=repo_id):
        hub.upload_folder(
            repo_id=url.repo_id, folder_path=directory, commit_message=f"Upload {directory.name} made with surgeon"
        )
    return str(url)

"""A checkpoint on the Hub as a source, and the upload of a result.

Whole files go through huggingface_hub's own cache. Headers are requested by byte range, so that a plan for a model of
any size costs kilobytes; so are weights, as far as they are read (hub_weights.py). Everything comes from one commit,
resolved once, so that a push in between cannot mix two versions. A commit never changes: its file list, headers and
ranges are stored beside the cache (HF_ASSETS_CACHE), and a surgery can be repeated without a network.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from surgeon.checkpoint.header import Entry, FilePart, header_length, parse_header, read_header
from surgeon.checkpoint.hub_http import (
    LOGIN,
    check_reachable,
    explained,
    fetch_bytes,
    hide_progress_bars,
    passes_for_get,
    patiently,
)
from surgeon.checkpoint.hub_weights import HubWeights
from surgeon.checkpoint.json_files import read_config, read_index
from surgeon.checkpoint.overlap import check_uploaded
from surgeon.checkpoint.receipt import public_record, to_bytes
from surgeon.checkpoint.source import (
    ADAPTER,
    CONFIG,
    INDEX,
    RECEIPT,
    SCORES,
    SEARCH,
    WEIGHTS,
    Ranges,
    StoredTensor,
    Transfer,
    assemble,
    is_companion,
    stored,
)
from surgeon.errors import CheckpointError, HubError
from surgeon.options import Reads
from surgeon.text import scrubbed

# Reading

FIRST_REQUEST_BYTES = 64 * 1024  # holds the header of most files; a longer header takes a second request
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
        if WEIGHTS in self.files:  # where both exist, transformers reads this one too
            return {name: stored(WEIGHTS, entry) for name, entry in self._header(WEIGHTS).items()}
        if INDEX not in self.files:
            self._refuse_without_weights()
        weight_map = read_index(self.fetch(INDEX))
        shards = sorted(set(weight_map.values()))
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            return assemble(dict(zip(shards, pool.map(self._header, shards), strict=True)), weight_map)

    @cached_property
    def files(self) -> Sequence[str]:
        """Every file of the commit. Offline, if they were never listed: the cached files."""
        from huggingface_hub import constants

        if (listing := self._recall("files.json")) is not None:
            return _checked_names(json.loads(listing), self.repo_id)
        if constants.HF_HUB_OFFLINE:
            cached = (path for path in sorted(self.snapshot.rglob("*")) if path.is_file())
            return [path.relative_to(self.snapshot).as_posix() for path in cached]

        from huggingface_hub import HfApi

        with explained(f"the file list of {self.repo_id}", repo_id=self.repo_id, revision=self.revision):
            siblings = patiently(lambda: HfApi().model_info(self.repo_id, revision=self.commit)).siblings or []
        names = _checked_names(sorted(sibling.rfilename for sibling in siblings), self.repo_id)
        self._remember("files.json", json.dumps(names).encode())
        return names

    @cached_property
    def companions(self) -> Sequence[str]:
        return [name for name in self.files if is_companion(name)]

    def fetch(self, file: str) -> Path:
        """Return `file` in the cache; the whole file is downloaded if it is not there yet.

        Raises HubError when the download fails, CheckpointError when its size is not the one that its header gives.
        """
        from huggingface_hub import hf_hub_download

        with explained(f"{file} of {self.repo_id}", repo_id=self.repo_id, revision=self.revision):
            download = partial(hf_hub_download, self.repo_id, file, revision=self.commit)
            path = Path(patiently(download, may_pass=passes_for_get))
        if file.endswith(".safetensors"):
            size = max((tensor.end for tensor in self.tensors.values() if tensor.file == file), default=None)
            if size is not None and path.stat().st_size != size:
                raise CheckpointError(
                    f"{file} of {self.repo_id} has {path.stat().st_size} bytes; its header promised {size}",
                    hint=f"Delete {path.resolve()} and run the command again.",
                )
        return path

    def parts(self, wanted: Ranges, *, among: Ranges | None = None) -> dict[str, FilePart]:
        """Return parts that hold the ranges. Raises HubError when a download fails."""
        return self._weights.parts(wanted, among)

    def missing(self, wanted: Ranges) -> int:
        return self._weights.missing(wanted)

    @property
    def transfer(self) -> Transfer:
        return self._weights.transfer

    @cached_property
    def _weights(self) -> HubWeights:
        return HubWeights(
            repo_id=self.repo_id,
            snapshot=self.snapshot,
            root=self._memory.parents[1],
            directory=self._memory / "ranges",
            tensors=self.tensors,
            beginnings=self._beginnings,
            fetch=self.fetch,
        )

    @cached_property
    def _beginnings(self) -> dict[str, tuple[int, bytes]]:
        """The bytes of weights that arrived behind a header: by file, where they start, and what they are."""
        return {}

    def at_hand(self, file: str) -> Path | None:
        path = self.snapshot / file
        return path if path.exists() else None

    def about(self, file: str) -> Path | None:
        return self.fetch(file) if file in self.files else None

    def check_unchanged(self) -> None:
        """Do nothing: a commit does not change."""

    def provenance(self) -> dict[str, Any]:
        revision = {} if self.revision is None else {"revision": self.revision}
        return {"id": self.repo_id, "commit": self.commit} | revision

    def _header(self, file: str) -> dict[str, Entry]:
        """Return the tensors of one file: from the cached file, from a stored header, or from the Hub."""
        if (self.snapshot / file).exists():
            return read_header(self.snapshot / file)
        where = f"{file} of {self.repo_id}"
        memo = self._recall(f"{file}.header")
        if memo is not None:
            return parse_header(memo[8:], file_size=int.from_bytes(memo[:8], "little"), where=where)
        size, raw, entries = self._ask_header(file, where)
        self._remember(f"{file}.header", size.to_bytes(8, "little") + raw)
        return entries

    def _ask_header(self, file: str, where: str) -> tuple[int, bytes, dict[str, Entry]]:
        """Return the size of a file on the Hub, its header's bytes, and its tensors.

        A header that is wrong is asked for once more: the answer may have been, and not the file.
        """
        try:
            size, raw = self._fetch_header(file, where)
            return size, raw, parse_header(raw, file_size=size, where=where)
        except CheckpointError:
            size, raw = self._fetch_header(file, where)
            return size, raw, parse_header(raw, file_size=size, where=where)

    def _fetch_header(self, file: str, where: str) -> tuple[int, bytes]:
        """Return the size of a file on the Hub, and its header's bytes without their length prefix."""
        head, size = fetch_bytes(self.repo_id, file, commit=self.commit, start=0, end=FIRST_REQUEST_BYTES)
        end = 8 + header_length(head[:8], file_size=size, where=where)
        if end > len(head):
            head += fetch_bytes(self.repo_id, file, commit=self.commit, start=len(head), end=end)[0]
        self._beginnings[file] = (end, head[end:])
        return size, head[8:end]

    @property
    def _memory(self) -> Path:
        """The directory in which the file list and the headers of this commit are stored."""
        from huggingface_hub import constants

        return Path(constants.HF_ASSETS_CACHE, "surgeon", self.snapshot.parents[1].name, self.commit)

    def _recall(self, name: str) -> bytes | None:
        try:
            return (self._memory / name).read_bytes()
        except OSError:
            return None

    def _remember(self, name: str, content: bytes) -> None:
        """Store an answer of the Hub for the next run, whole or not at all. A read-only cache is no failure."""
        with suppress(OSError):
            self._memory.mkdir(parents=True, exist_ok=True)
            partial = self._memory / f"{name}.{os.getpid()}"
            partial.write_bytes(content)
            partial.replace(self._memory / name)

    def _refuse_without_weights(self) -> NoReturn:
        """Raise the error for a repository without safetensors; the hint is how to use the weights that it has."""
        from huggingface_hub import constants

        others = [name for name in self.files if name.endswith((".bin", ".gguf"))]
        ggufs = [name for name in others if name.endswith(".gguf")]
        if others:
            directory = self.repo_id.rpartition("/")[2]
            converted = f"{directory}/{ggufs[0]}" if ggufs else directory
            hint = f"hf download {self.repo_id} --local-dir {directory} && surgeon convert {converted}"
        elif ADAPTER in self.files:
            directory = self.repo_id.rpartition("/")[2]
            hint = f"This is an adapter: hf download {self.repo_id} --local-dir {directory}, and name {directory}."
        elif constants.HF_HUB_OFFLINE:
            hint = "Unset HF_HUB_OFFLINE once to fetch it: the cache may hold only part of the repository."
        else:
            hint = None
        where = " in the cache" if constants.HF_HUB_OFFLINE else ""
        raise CheckpointError(f"{self.repo_id} has no {WEIGHTS}{where}", hint=hint)


def _checked_names(names: Sequence[str], repo_id: str) -> Sequence[str]:
    """Return the names. Raises CheckpointError for a path that leads out of the checkpoint's directory."""
    for name in names:
        if "\\" in name or ":" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(
                f"{repo_id} lists a file {name!r}, outside the checkpoint",
                hint="Do not use this checkpoint: an honest one has only files inside its directory.",
            )
    return names


def open_hub(repo_id: str, *, revision: str | None = None) -> HubSource:
    """Return the checkpoint at `revision` (a branch, tag or commit; default: the main branch).

    Fetches config.json, which resolves the commit. Without a network it uses the cached config.
    Raises HubError.
    """
    from huggingface_hub import hf_hub_download

    hide_progress_bars()
    with explained(f"{CONFIG} of {repo_id}", repo_id=repo_id, revision=revision):
        check_reachable(repo_id, CONFIG, revision)
        download = partial(hf_hub_download, repo_id, CONFIG, revision=revision)
        config = Path(patiently(download, may_pass=passes_for_get))
    return HubSource(repo_id, config.parent, revision)


# Uploading


def push(directory: Path, repo_id: str, *, private: bool, reads: Reads) -> str:
    """Return the URL of the model repository after uploading every file of `directory` to it.

    Paths of this machine, in the receipt for example, are uploaded as their last names alone.

    Creates the repository when there is none: private if `private`, else as its owner's settings say. An existing
    repository keeps its visibility; if it is public and `private` is set, it is refused, as one is that was read.
    Raises HubError.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubError(f"cannot upload to {repo_id}: HF_HUB_OFFLINE is set", hint="Unset HF_HUB_OFFLINE.")
    if get_token() is None:
        raise HubError(f"cannot upload to {repo_id} without a token", hint=f"{LOGIN} to a token that can write.")
    hide_progress_bars()
    hub = HfApi()
    with explained(f"the upload to {repo_id}", repo_id=repo_id):
        url = hub.create_repo(repo_id, private=True if private else None, exist_ok=True)
        is_public = private and not hub.model_info(url.repo_id).private
    if is_public:  # exist_ok leaves the visibility of an existing repository as it is
        raise HubError(
            f"{url.repo_id} exists and is public; nothing was uploaded",
            hint=f"Make it private first: hf repos settings {url.repo_id} --private, or push to another name.",
        )
    check_uploaded(url.repo_id, reads)  # a name without an owner is one of the user's own
    with TemporaryDirectory(prefix="surgeon-upload-") as staged:
        _make_public(directory, Path(staged))
        with explained(f"the upload to {repo_id}", repo_id=repo_id):
            message = f"Upload {directory.name} made with surgeon"
            hub.upload_folder(repo_id=url.repo_id, folder_path=staged, commit_message=message)
    return scrubbed(str(url))


# Files that surgeon or a library of training writes, and the entries of others that name the place of a model.
_RECORDS = (RECEIPT, SCORES, SEARCH, "gist.json", ADAPTER)
_NAMING = (CONFIG, "tokenizer_config.json", "generation_config.json")
_NAMES = ("_name_or_path", "name_or_path", "base_model_name_or_path")


def _make_public(directory: Path, place: Path) -> None:
    """Fill a directory with links to the files of another, and with those anew that hold paths of this machine."""
    for path in (path for path in directory.rglob("*") if path.is_file()):
        target = place / path.relative_to(directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = _public(path) if path.parent == directory else None
        target.symlink_to(path.resolve()) if content is None else target.write_bytes(content)


def _public(path: Path) -> bytes | None:
    """Return the content of a file without paths of this machine, None where it holds none."""
    if path.name not in (*_RECORDS, *_NAMING):
        return None
    content = read_config(path)
    public = content | {key: public_record(content[key]) for key in _NAMES if key in content}
    public = public_record(content) if path.name in _RECORDS else public
    return None if public == content else to_bytes(public)

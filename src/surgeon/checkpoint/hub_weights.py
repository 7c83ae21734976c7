"""The weights of a commit on the Hub: of each file the ranges that are read, or the whole file where that is no more.

A file is taken whole, through huggingface_hub's cache, where it is in that cache already, where nearly all of it is
read anyway, and where the server does not answer ranges. Else its ranges go to the range store.
"""

import errno
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import FilePart
from surgeon.checkpoint.hub_ranges import RangeDownload, RangesRefused, joined
from surgeon.checkpoint.range_store import (
    Block,
    RangeFile,
    Span,
    as_hub_error,
    budget,
    digest_of,
    has_budget,
    make_room,
    merged,
    total,
    without,
)
from surgeon.checkpoint.source import Ranges, StoredTensor, Transfer
from surgeon.errors import HubError
from surgeon.text import size

WASTE = 0.05  # of what is read: a whole file is downloaded where it adds no more
SPARE = 0.1  # of the disk's free space: whole files leave it free


@dataclass
class HubWeights:
    """The weight files of one commit. `snapshot` is its directory in huggingface_hub's cache, `fetch` downloads there.

    `root` is the store of all ranges and `directory` that of this commit. `beginnings` are bytes of weights that
    arrived behind a header: by file, where they start, and what they are.
    """

    repo_id: str
    snapshot: Path
    root: Path
    directory: Path
    tensors: Mapping[str, StoredTensor]
    beginnings: Mapping[str, tuple[int, bytes]]
    fetch: Callable[[str], Path]
    transfer: Transfer = field(default_factory=Transfer)
    _stored: dict[str, RangeFile] = field(default_factory=dict)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def parts(self, wanted: Ranges, among: Ranges | None) -> dict[str, FilePart]:
        """Return the parts of files that hold the ranges `wanted`, which are some of those that are read in the end."""
        whole = self._whole(among or wanted, at_once=among is None)
        todo = {file: self._todo(file, spans) for file, spans in wanted.items() if file not in whole}
        needed = sum(map(total, todo.values()))
        if needed:
            self._refuse_offline(todo)
            make_room(self.root, needed)
        with self._bar(needed) as show:
            return {
                file: FilePart(self._fetch_whole(file)) if file in whole else self._ranges(file, merged(spans), show)
                for file, spans in wanted.items()
            }

    def missing(self, wanted: Ranges) -> int:
        """Return how many bytes `parts` would download."""
        whole = self._whole(wanted, at_once=True)
        return sum(
            (0 if self._is_cached(file) else self._sizes[file]) if file in whole else total(self._todo(file, spans))
            for file, spans in wanted.items()
        )

    # --- whole files or ranges --------------------------------------------------------------------------------

    def _whole(self, read: Ranges, *, at_once: bool) -> set[str]:
        """Return the files that are taken whole: those in the cache, and those of which nearly all is to be downloaded.

        What is not read at once is streamed by ranges where the whole files do not fit.
        """
        from huggingface_hub import constants

        cached = {file for file in read if self._is_cached(file)}
        if constants.HF_HUB_OFFLINE:
            return cached
        missing = {file: total(self._todo(file, spans)) for file, spans in read.items() if file not in cached}
        nearly = {file for file, nbytes in missing.items() if nbytes and self._sizes[file] <= (1 + WASTE) * nbytes}
        return cached | nearly if at_once or self._fits(nearly) else cached

    def _fits(self, files: set[str]) -> bool:
        room = shutil.disk_usage(self.snapshot).free * (1 - SPARE)
        if has_budget():
            room = min(room, budget(self.root))
        return sum(self._sizes[file] for file in files) <= room

    def _is_cached(self, file: str) -> bool:
        return (self.snapshot / file).exists()

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """The size of each file: its header promises it."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.file] = max(tensor.end, sizes.get(tensor.file, 0))
        return sizes

    def _todo(self, file: str, spans: Sequence[Span]) -> list[Span]:
        """Return the spans to download, small gaps between them included."""
        return [] if self._is_cached(file) else _lacking(self._find(file), spans)

    def _fetch_whole(self, file: str) -> Path:
        is_new = not self._is_cached(file)
        path = self.fetch(file)
        if is_new:
            self.transfer.nbytes += self._sizes[file]
        self.transfer.ranges.discard(file)
        return path

    # --- ranges -----------------------------------------------------------------------------------------------

    def _find(self, file: str) -> RangeFile | None:
        """Return what is stored of a file, with every block of an earlier run that was used before read back."""
        stored = self._stored.get(file)
        if stored is None or not stored.path.exists():  # another process, or the budget, has removed it
            stored = RangeFile.find(self.directory, file, size=self._sizes[file])
            if stored is None:
                self._stored.pop(file, None)
            else:
                self._stored[file] = stored
        return stored

    def _ranges(self, file: str, spans: Sequence[Span], show: Callable[[int], object]) -> FilePart:
        """Return a part that holds `spans`, after downloading those that are not stored."""
        stored = self._find(file)
        if stored is not None:
            stored.check(spans)
        if stored is None or _lacking(stored, spans):
            self._refuse_offline({file: _lacking(stored, spans)})
            try:
                stored = self._download(file, spans, show)
            except RangesRefused as error:
                self._refuse_large(file, error)
                return FilePart(self._fetch_whole(file))
        (self.transfer.ranges.discard if stored.is_verified else self.transfer.ranges.add)(file)
        return stored.part()

    def _download(self, file: str, spans: Sequence[Span], show: Callable[[int], object]) -> RangeFile:
        """Return the store of a file with all of `spans`. What others remove meanwhile, this process still holds."""

        def count(nbytes: int) -> None:
            with self._counting:
                self.transfer.nbytes += nbytes
                show(nbytes)

        size, commit = self._sizes[file], self.snapshot.name
        download = RangeDownload(self.repo_id, file, commit=commit, size=size, count=count)
        etag = download.find().etag
        stored = self._find(file)
        if stored is None or stored.etag != etag:
            stored = self._stored[file] = self._create(file, etag)
        try:
            with stored.downloading():
                stored.check(spans)
                self._keep_beginning(file, spans, stored, count)
                if todo := _lacking(stored, spans):
                    download.run(todo, stored)
        except OSError as error:  # its directory was removed
            raise as_hub_error(error, file, self.directory) from error
        stored.verify()
        return stored

    def _create(self, file: str, etag: str) -> RangeFile:
        try:
            return RangeFile.create(self.directory, file, size=self._sizes[file], etag=etag)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise as_hub_error(error, file, self.directory) from error
            raise RangesRefused(f"cannot write {self.directory}") from error  # what cannot be stored is done without

    def _keep_beginning(
        self, file: str, spans: Sequence[Span], stored: RangeFile, count: Callable[[int], None]
    ) -> None:
        """Store what arrived behind the header, as far as it is read."""
        start, content = self.beginnings.get(file, (0, b""))
        for first, last in without(merged(spans), stored.present):
            first, last = max(first, start), min(last, start + len(content))
            if first < last:
                piece = content[first - start : last - start]
                digest = digest_of()
                digest.update(piece)
                stored.write(piece, first)
                stored.add([Block(first, last, digest.hexdigest())])
                count(len(piece))

    def _refuse_large(self, file: str, error: RangesRefused) -> None:
        """Raise HubError where there are no ranges, and no room for the whole file."""
        free = shutil.disk_usage(self.snapshot).free
        if self._sizes[file] > free:
            raise HubError(
                f"{file} of {self.repo_id} cannot be read by ranges ({error}), and the whole file is "
                f"{size(self._sizes[file])}, more than the {size(free)} that are free in {self.snapshot}",
                hint="Free some space, or set HF_HOME to a directory on a larger disk.",
            ) from error

    def _refuse_offline(self, todo: Mapping[str, Sequence[Span]]) -> None:
        """Raise HubError where there is no network to ask, with the tensors that are not here."""
        from huggingface_hub import constants

        if not constants.HF_HUB_OFFLINE or not any(todo.values()):
            return
        lacking = [
            name
            for name, tensor in self.tensors.items()
            if any(start < tensor.end and end > tensor.start for start, end in todo.get(tensor.file, ()))
        ]
        more = f" and {len(lacking) - 1} more tensors" if len(lacking) > 1 else ""
        raise HubError(
            f"the cache lacks {lacking[0]!r}{more} of {self.repo_id}, and HF_HUB_OFFLINE is set",
            hint=f"Unset HF_HUB_OFFLINE once to fetch them (the cache is {constants.HF_HUB_CACHE}).",
        )

    @contextmanager
    def _bar(self, nbytes: int) -> Iterator[Callable[[int], object]]:
        """Return a context with a function that shows the bytes that arrive, by huggingface_hub's own bar."""
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

        # A download ahead of need stays silent: another bar shows the work that it serves.
        is_silent = not nbytes or threading.current_thread() is not threading.main_thread()
        options: dict[str, Any] = {"desc": self.repo_id, "unit": "B", "unit_scale": True, "leave": False, "delay": 1}
        with tqdm(total=nbytes, disable=is_silent or None, **options) as bar:  # type: ignore[no-untyped-call]
            yield bar.update


def _lacking(stored: RangeFile | None, spans: Sequence[Span]) -> list[Span]:
    """Return the spans that are not stored, with small gaps between them."""
    present = [] if stored is None else stored.present
    return without(joined(without(merged(spans), present)), present)

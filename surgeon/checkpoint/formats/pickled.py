"""A checkpoint whose weights are pickles (`pytorch_model.bin`), as a source of headers and byte ranges.

A contiguous tensor is a range of its file. One that is not is laid out in a temporary file when it is first asked for.
"""

import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon.checkpoint.formats.torch_file import TorchFile, View, read_torch_file
from surgeon.checkpoint.header import DOWNLOAD_HINT, DTYPE_BITS
from surgeon.checkpoint.output import check_space
from surgeon.checkpoint.source import LocalSource, StoredTensor, read_index
from surgeon.errors import CheckpointError, OutputError

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
LAID_OUT = "tensors laid out anew"  # in place of a file's name: what `fetch` makes

_LAYER = re.compile(r"\.\d+\.")
# What BERT's layer norms were called in the files of 2019; transformers renames them as it loads.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class PickledSource(LocalSource):
    """A checkpoint directory with its weights in `weights`: a pickle, or the index of several."""

    weights: str

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        places: dict[str, StoredTensor] = {}
        end = 0
        for name, (file, view) in self._views.items():
            start = view.start
            if not view.is_contiguous:
                file, start = LAID_OUT, end
                end += view.spec.nbytes
            places[name] = StoredTensor(view.spec, file, start, start + view.spec.nbytes)
        return places

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should hear of the entries that are no tensors of the checkpoint."""
        tied = [f"{name} is {kept}, tied: it is stored once" for name, kept in self._tied.items()]
        ignored = [name for content in self._files.values() for name in content.ignored]
        return (*tied, *(f"{name} is not a tensor and is left out" for name in ignored))

    def fetch(self, file: str, ranges: Sequence[tuple[int, int]] | None = None) -> Path:
        return self._laid_out if file == LAID_OUT else super().fetch(file, ranges)

    @cached_property
    def _files(self) -> Mapping[str, TorchFile]:
        if not self.weights.endswith(".json"):
            return {self.weights: read_torch_file(self.directory / self.weights)}
        weight_map = read_index(self.directory / self.weights)
        shards = sorted(set(weight_map.values()))
        for number, shard in enumerate(shards, start=1):
            if not (self.directory / shard).exists():
                raise CheckpointError(
                    f"shard {number} of {len(shards)} is missing: {self.directory / shard}", hint=DOWNLOAD_HINT
                )
        files = {shard: read_torch_file(self.directory / shard) for shard in shards}
        for name, shard in weight_map.items():
            if name not in files[shard].tensors and name not in files[shard].ignored:
                raise CheckpointError(
                    f"{self.weights} places {name!r} in {shard}, which does not hold it", hint=DOWNLOAD_HINT
                )
        return files

    @cached_property
    def _all_views(self) -> Mapping[str, tuple[str, View]]:
        """Every tensor of the files, by the name that transformers gives it."""
        views: dict[str, tuple[str, View]] = {}
        for file, content in self._files.items():
            for old, view in content.tensors.items():
                name = old
                for pattern, replacement in _OLD_NAMES.items():
                    name = name.replace(pattern, replacement)
                if name in views:
                    raise CheckpointError(
                        f"{name!r} is stored twice, in {views[name][0]} and in {file}", hint=DOWNLOAD_HINT
                    )
                views[name] = (file, view)
        return views

    @cached_property
    def _tied(self) -> Mapping[str, str]:
        """The tensors that are another one, whole and in place, and that a loader ties to it: name to the one kept.

        One inside a layer is not among them: no config says that layers share tensors.
        """
        first: dict[tuple[str, View], str] = {}
        aliases = {}
        for name, place in self._all_views.items():
            kept = first.setdefault(place, name)
            if kept != name and place[1].spec.num_parameters and not _LAYER.search(name):
                aliases[name] = kept
        return aliases if aliases and _ties_embeddings(self.config) else {}

    @cached_property
    def _views(self) -> Mapping[str, tuple[str, View]]:
        return {name: place for name, place in self._all_views.items() if name not in self._tied}

    @cached_property
    def _laid_out(self) -> Path:
        """A file with the elements of each tensor that is not contiguous, in order. It goes when this source does."""
        views = [(file, view) for file, view in self._views.values() if not view.is_contiguous]
        directory = Path(tempfile.mkdtemp(prefix="surgeon-convert-"))
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        check_space(directory, sum(view.spec.nbytes for _, view in views))
        try:
            with (directory / "tensors").open("wb") as target:
                for file, view in views:
                    target.write(_elements(self.directory / file, view))
        except OSError as error:
            raise OutputError(f"cannot write {directory}: {error.strerror}") from error
        return directory / "tensors"


def open_pickled(path: Path) -> PickledSource:
    """Return the checkpoint in directory `path`, or around the file `path`, whose weights are pickles.

    Raises CheckpointError when there is none.
    """
    directory = path if path.is_dir() else path.parent
    named = [path.name] if path.is_file() and not path.name.endswith(".json") else []
    sharded = (directory / INDEX).is_file() and (not named or re.fullmatch(r"pytorch_model-\d+-of-\d+\.bin", named[0]))
    return PickledSource(directory, str(directory), INDEX if sharded else (named or [WEIGHTS])[0])


def _ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Return whether transformers ties the head of a model with this config.

    Where the config does not say yes, the family's code decides: GPT-2 ties by default, Llama does not, T5 takes False
    for something else.
    """
    if config.get("tie_word_embeddings") is True:
        return True
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        read = AutoConfig.for_model(**config)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError):
        return False  # unknown to transformers: store what the file says, each by itself
    return bool(getattr(read, "tie_word_embeddings", False))


def _elements(path: Path, view: View) -> memoryview:
    """Return the bytes of a tensor's elements in their order."""
    import torch

    unsigned = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[DTYPE_BITS[view.spec.dtype]]
    data = bytearray(view.end - view.start)
    with path.open("rb") as file:
        file.seek(view.start)
        if file.readinto(data) != len(data):
            raise CheckpointError(f"{path} has become shorter while it was read", hint=DOWNLOAD_HINT)
    ordered = torch.frombuffer(data, dtype=unsigned).as_strided(view.spec.shape, view.strides).contiguous()
    return ordered.flatten().view(torch.uint8).numpy().data

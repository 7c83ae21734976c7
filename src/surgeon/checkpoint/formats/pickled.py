"""A checkpoint whose weights are pickles (`pytorch_model.bin`), as a source of headers and byte ranges.

A contiguous tensor is a range of its file. Other tensors are copied in order into a temporary file at the first use.
"""

import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon.checkpoint.formats.torch_file import StridedTensor, TorchFile, read_torch_file
from surgeon.checkpoint.header import DOWNLOAD_HINT, DTYPE_BITS
from surgeon.checkpoint.json_files import read_index
from surgeon.checkpoint.output import check_space
from surgeon.checkpoint.source import LocalSource, StoredTensor
from surgeon.errors import CheckpointError, OutputError

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
REORDERED = "tensors laid out anew"  # stands for the temporary file; `fetch` writes it

_LAYER = re.compile(r"\.\d+\.")
# The names of BERT's layer norms in files of 2019; transformers renames them when it loads.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class PickledSource(LocalSource):
    """A checkpoint directory whose weights are in `weights`: one pickle, or the index of several."""

    weights: str

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        places: dict[str, StoredTensor] = {}
        end = 0
        for name, (file, tensor) in self._tensors_kept.items():
            start = tensor.start
            if not tensor.is_contiguous:
                file, start = REORDERED, end
                end += tensor.spec.nbytes
            places[name] = StoredTensor(tensor.spec, file, start, start + tensor.spec.nbytes)
        return places

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user about the entries that are left out of the checkpoint."""
        tied = [f"{name} is {first}, tied: it is stored once" for name, first in self._tied.items()]
        ignored = [name for content in self._files.values() for name in content.ignored]
        return (*tied, *(f"{name} is not a tensor and is left out" for name in ignored))

    def fetch(self, file: str) -> Path:
        return self._reordered if file == REORDERED else super().fetch(file)

    def at_hand(self, file: str) -> Path | None:
        return None if file == REORDERED else super().at_hand(file)

    @cached_property
    def _files(self) -> Mapping[str, TorchFile]:
        if not self.weights.endswith(".json"):
            return {self.weights: read_torch_file(self.local(self.weights))}
        weight_map = read_index(self.local(self.weights))
        shards = sorted(set(weight_map.values()))
        for number, shard in enumerate(shards, start=1):
            if not (self.directory / shard).exists():
                raise CheckpointError(
                    f"shard {number} of {len(shards)} is missing: {self.directory / shard}", hint=DOWNLOAD_HINT
                )
        files = {shard: read_torch_file(self.local(shard)) for shard in shards}
        for name, shard in weight_map.items():
            if name not in files[shard].tensors and name not in files[shard].ignored:
                raise CheckpointError(
                    f"{self.weights} places {name!r} in {shard}, which does not hold it", hint=DOWNLOAD_HINT
                )
        return files

    @cached_property
    def _all_tensors(self) -> Mapping[str, tuple[str, StridedTensor]]:
        """Every tensor of the files with its file, by the name that transformers gives it."""
        tensors: dict[str, tuple[str, StridedTensor]] = {}
        for file, content in self._files.items():
            for old, tensor in content.tensors.items():
                name = old
                for pattern, replacement in _OLD_NAMES.items():
                    name = name.replace(pattern, replacement)
                if name in tensors:
                    raise CheckpointError(
                        f"{name!r} is stored twice, in {tensors[name][0]} and in {file}", hint=DOWNLOAD_HINT
                    )
                tensors[name] = (file, tensor)
        return tensors

    @cached_property
    def _tied(self) -> Mapping[str, str]:
        """The tensors that share the bytes of an earlier one and that a loader ties to it: {name: the earlier name}.

        Tensors inside layers are left out: no config says that layers share tensors.
        """
        first_names: dict[tuple[str, StridedTensor], str] = {}
        aliases = {}
        for name, place in self._all_tensors.items():
            first = first_names.setdefault(place, name)
            if first != name and place[1].spec.num_parameters and not _LAYER.search(name):
                aliases[name] = first
        return aliases if aliases and _ties_embeddings(self.config) else {}

    @cached_property
    def _tensors_kept(self) -> Mapping[str, tuple[str, StridedTensor]]:
        return {name: place for name, place in self._all_tensors.items() if name not in self._tied}

    @cached_property
    def _reordered(self) -> Path:
        """A temporary file with the elements, in order, of the tensors that are not contiguous."""
        strided = [(file, tensor) for file, tensor in self._tensors_kept.values() if not tensor.is_contiguous]
        directory = Path(tempfile.mkdtemp(prefix="surgeon-convert-"))
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        check_space(directory, sum(tensor.spec.nbytes for _, tensor in strided))
        try:
            with (directory / "tensors").open("wb") as target:
                for file, tensor in strided:
                    target.write(_elements(self.fetch(file), tensor))
        except OSError as error:
            raise OutputError(f"cannot write {directory}: {error.strerror}") from error
        return directory / "tensors"


def open_pickled(path: Path) -> PickledSource:
    """Return the checkpoint with pickled weights in directory `path`, or in the directory of the file `path`.

    Raises CheckpointError when there is none.
    """
    directory = path if path.is_dir() else path.parent
    named = [path.name] if path.is_file() and not path.name.endswith(".json") else []
    sharded = (directory / INDEX).is_file() and (not named or re.fullmatch(r"pytorch_model-\d+-of-\d+\.bin", named[0]))
    return PickledSource(directory, str(directory), INDEX if sharded else (named or [WEIGHTS])[0])


def _ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Return whether transformers ties the head of a model with this config.

    Unless the config says yes, the family's code decides: GPT-2 ties by default, Llama does not, and in T5 False means
    something else.
    """
    if config.get("tie_word_embeddings") is True:
        return True
    from surgeon.models.loading import ties_embeddings

    return ties_embeddings(config)  # False where transformers does not know: every tensor is stored by itself


def _elements(path: Path, tensor: StridedTensor) -> memoryview:
    """Return the bytes of a tensor's elements in row-major order."""
    import torch

    unsigned = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[DTYPE_BITS[tensor.spec.dtype]]
    data = bytearray(tensor.end - tensor.start)
    with path.open("rb") as file:
        file.seek(tensor.start)
        if file.readinto(data) != len(data):
            raise CheckpointError(f"{path} has become shorter while it was read", hint=DOWNLOAD_HINT)
    ordered = torch.frombuffer(data, dtype=unsigned).as_strided(tensor.spec.shape, tensor.strides).contiguous()
    return ordered.flatten().view(torch.uint8).numpy().data

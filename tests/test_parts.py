"""Files of which only a part is there: what is missing is refused by every reader, and never read as zeros."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from later import LATER

import surgeon
from surgeon.checkpoint.header import FilePart
from surgeon.checkpoint.output import copy_range
from surgeon.checkpoint.source import LocalSource, Ranges, fingerprint
from surgeon.errors import CheckpointError

if LATER:
    import torch

    from surgeon.checkpoint.comparing import are_equal
    from surgeon.measure.magnitude import layer_magnitudes, width_magnitudes
    from surgeon.measure.trainability import trainability
    from surgeon.models.streaming import StreamedModel

CODE = Path(__file__).parents[1] / "src/surgeon"
MISSING = "model.layers.1.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Holed(LocalSource):
    """A checkpoint whose file lacks the last byte of one tensor."""

    def parts(self, wanted: Ranges, *, among: Ranges | None = None) -> dict[str, FilePart]:
        hole, size = self.tensors[MISSING].end - 1, (self.directory / self.tensors[MISSING].file).stat().st_size
        return {file: FilePart(self.directory / file, ((0, hole), (hole + 1, size))) for file in wanted}


@pytest.fixture
def holed(toy: Callable[[str], Path]) -> Holed:
    return Holed(toy("llama"), "holed")


def moved(source: Holed, out: Path) -> None:
    replace_source(source).save(out)


def computed(source: Holed, out: Path) -> None:
    replace_source(source).save(out, dtype="bfloat16")


def replace_source(source: Holed) -> Any:
    from dataclasses import replace

    return replace(surgeon.truncate(source.directory, layers=3), source=source)


def streamed(source: Holed, out: Path) -> None:
    model = StreamedModel(source)
    with model.layer(1):
        pass


def learned(source: Holed, out: Path) -> None:
    anatomy = surgeon.open_model(source.directory).anatomy
    zeros = {name: torch.zeros(item.spec.shape) for name, item in source.tensors.items()}
    hidden = [0] * anatomy.sizes["hidden"]
    trainability(source, anatomy, zeros, axes={"hidden": hidden}, layer_map=range(anatomy.depth))


READERS = {
    "a tensor that moves": moved,
    "a tensor that is computed": computed,
    "a streamed layer": streamed,
    "magnitudes of layers": lambda source, out: layer_magnitudes(source),
    "magnitudes of widths": lambda source, out: width_magnitudes(source),
    "trainability": learned,
    "a comparison": lambda source, out: are_equal(source, MISSING, source, MISSING),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_a_reader_of_a_tensor_with_a_missing_byte_is_refused(reader, holed, tmp_path):
    with pytest.raises(CheckpointError, match=r"bytes \d+ to \d+ of .*model\.safetensors were not fetched"):
        reader(holed, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_the_fingerprint_reads_the_beginnings_of_tensors_only(holed):
    whole = LocalSource(holed.directory, "whole")

    assert fingerprint(holed) == fingerprint(whole)


def test_a_part_gives_the_bytes_that_are_there_and_no_others(tmp_path):
    path = tmp_path / "part"
    path.write_bytes(bytes(range(100)))
    part = FilePart(path, ((10, 20), (30, 40)))

    with part.opened() as opened:
        read = bytearray(10)
        opened.read_into(read, 30)
        assert read == bytes(range(30, 40))
        for start, count in [(9, 1), (9, 3), (19, 2), (20, 1), (15, 20), (40, 1), (0, 100)]:
            with pytest.raises(CheckpointError, match="were not fetched"):
                opened.read_into(bytearray(count), start)
            with pytest.raises(CheckpointError, match="were not fetched"):
                part.range(start, start + count)
        opened.read_into(bytearray(), 25)  # no byte of it is missing


def test_a_part_that_is_held_open_is_read_and_copied_after_its_file_is_gone(tmp_path):
    path = tmp_path / "part"
    path.write_bytes(bytes(range(100)))
    part = FilePart(path, ((0, 100),), path.open("rb"))
    path.unlink()

    with part.opened() as opened, (tmp_path / "copy").open("wb") as copy:
        read = bytearray(4)
        opened.read_into(read, 50)
        copy_range(part.range(20, 40), copy.fileno(), 0, lambda count: None)

    assert read == bytes(range(50, 54))
    assert (tmp_path / "copy").read_bytes() == bytes(range(20, 40))


def test_a_file_that_has_become_shorter_is_named(tmp_path):
    path = tmp_path / "part"
    path.write_bytes(bytes(100))
    part = FilePart(path)
    os.truncate(path, 50)

    with part.opened() as opened, pytest.raises(CheckpointError, match="part has become shorter while it was read"):
        opened.read_into(bytearray(10), 45)


def test_only_a_checked_part_makes_a_range_of_a_file():
    """Whoever copies a range got it from FilePart.range, which refuses bytes that are not there."""
    makers = [path.name for path in CODE.rglob("*.py") if re.search(r"\bFileRange\(", path.read_text())]

    assert makers == ["header.py"]

"""Writing safetensors: every byte in its place, by the kernel or without it, and a source that changes meanwhile."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
from handmade import checkpoint, data, llama, safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from later import LATER
from safetensors import safe_open

import surgeon
from surgeon.checkpoint.header import FilePart, TensorSpec, read_header
from surgeon.checkpoint.output import PAGE
from surgeon.checkpoint.source import open_directory, spec_of
from surgeon.errors import CheckpointError
from surgeon.plan.execute import TensorWrite, execute, lay_out, write_safetensors
from surgeon.plan.plan import Plan, identity

if LATER:
    import torch
    from safetensors.torch import load_file


def copies_of(path: Path, tensors: dict[str, TensorSpec]) -> list[TensorWrite]:
    """Return the tensors of a file as writes that copy them."""
    entries = read_header(path)
    return [
        TensorWrite(name, spec, FilePart(path).range(entries[name].start, entries[name].end))
        for name, spec in tensors.items()
    ]


def bytes_of(path: Path) -> dict[str, bytes]:
    content = path.read_bytes()
    return {name: content[entry.start : entry.end] for name, entry in read_header(path).items()}


def expected(tensors: dict[str, TensorSpec]) -> dict[str, bytes]:
    return {name: data(name, spec.nbytes) for name, spec in tensors.items()}


BIG = {f"t{i}": TensorSpec("U8", (size,)) for i, size in enumerate([8, 100_000, 24, 7_000_000, 4096, 1, 0, 300])}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.safetensors"
    path.write_bytes(safetensors(BIG, align=1000))
    return path


@pytest.fixture
def copies(monkeypatch):
    """Return the list of (count, source offset, target offset) that the kernel is asked to copy."""
    calls = []
    real = os.copy_file_range

    def record(source, target, count, position, offset):
        calls.append((count, position, offset))
        return real(source, target, count, position, offset)

    monkeypatch.setattr(os, "copy_file_range", record)
    return calls


def test_neighbours_are_copied_in_one_run_and_land_on_the_same_place_in_a_page(source, copies, tmp_path):
    kept = {name: spec for name, spec in BIG.items() if name != "t2"}

    written = write_safetensors(tmp_path / "out.safetensors", copies_of(source, kept))

    assert written.size == (tmp_path / "out.safetensors").stat().st_size
    assert bytes_of(tmp_path / "out.safetensors") == expected(kept)
    assert [count for count, *_ in copies] == [8 + 100_000, 7_000_000 + 4096 + 1 + 300]
    _, position, offset = copies[1]
    assert position % PAGE == offset % PAGE


def test_the_largest_run_keeps_its_phase_when_an_earlier_one_cannot(source, copies, tmp_path):
    order = ["t2", "t1", "t3"]

    write_safetensors(tmp_path / "out.safetensors", copies_of(source, {name: BIG[name] for name in order}))

    assert bytes_of(tmp_path / "out.safetensors") == expected({name: BIG[name] for name in order})
    phases = {count: (position - offset) % PAGE for count, position, offset in copies}
    assert phases.pop(7_000_000) == 0
    assert all(phases.values())


def test_the_data_begins_at_a_multiple_of_8_even_where_no_run_can_keep_its_phase(source, copies, tmp_path):
    order = ["t7", "t3"]  # 300 bytes before the large run put it off by 4

    write_safetensors(tmp_path / "out.safetensors", copies_of(source, {name: BIG[name] for name in order}))

    assert bytes_of(tmp_path / "out.safetensors") == expected({name: BIG[name] for name in order})
    assert next(iter(read_header(tmp_path / "out.safetensors").values())).start % 8 == 0


@pytest.mark.parametrize("align", range(0, 4096, 512))
def test_a_whole_file_is_copied_in_one_run_in_phase_whatever_its_header(align, copies, tmp_path):
    (tmp_path / "source.safetensors").write_bytes(safetensors(BIG, align=align))

    write_safetensors(tmp_path / "out.safetensors", copies_of(tmp_path / "source.safetensors", BIG))

    [(count, position, offset)] = copies
    assert count == sum(spec.nbytes for spec in BIG.values())
    assert position % PAGE == offset % PAGE == align


@pytest.mark.parametrize(
    "code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY, errno.EIO]
)
def test_bytes_are_read_and_written_where_the_kernel_cannot_copy(code, source, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)

    write_safetensors(tmp_path / "out.safetensors", copies_of(source, BIG))

    assert bytes_of(tmp_path / "out.safetensors") == expected(BIG)


def test_bytes_are_read_and_written_where_the_kernel_copies_nothing_or_does_not_know_how(source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    write_safetensors(tmp_path / "zero.safetensors", copies_of(source, BIG))
    monkeypatch.delattr(os, "copy_file_range")
    write_safetensors(tmp_path / "absent.safetensors", copies_of(source, BIG))

    assert (tmp_path / "zero.safetensors").read_bytes() == (tmp_path / "absent.safetensors").read_bytes()
    assert bytes_of(tmp_path / "zero.safetensors") == expected(BIG)


def test_an_error_that_is_no_lack_of_support_is_raised(source, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "copy_file_range", fail)

    with pytest.raises(OSError, match="no space left"):
        write_safetensors(tmp_path / "out.safetensors", copies_of(source, BIG))


@pytest.mark.parametrize("failing", ["pread", "pwrite"])
def test_of_a_failing_disk_it_is_said_whether_it_is_that_of_the_source(failing, source, tmp_path, monkeypatch):
    writes = copies_of(source, BIG)

    def fail(*_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "copy_file_range", fail)
    monkeypatch.setattr(os, failing, fail)

    with pytest.raises(CheckpointError if failing == "pread" else OSError) as raised:
        write_safetensors(tmp_path / "out.safetensors", writes)
    assert ("cannot read" in str(raised.value)) == (failing == "pread")


def test_short_copies_reads_and_writes_are_continued(source, tmp_path, monkeypatch):
    kernel, read, write = os.copy_file_range, os.pread, os.pwrite
    monkeypatch.setattr(os, "copy_file_range", lambda s, t, n, i, o: kernel(s, t, min(n, 999_999), i, o))
    write_safetensors(tmp_path / "kernel.safetensors", copies_of(source, BIG))
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(os, "pread", lambda fd, n, i: read(fd, min(n, 77_777), i))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, i: write(fd, view[:55_555], i))
    write_safetensors(tmp_path / "loop.safetensors", copies_of(source, BIG))

    assert bytes_of(tmp_path / "kernel.safetensors") == bytes_of(tmp_path / "loop.safetensors") == expected(BIG)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system to copy from")
def test_bytes_cross_from_one_file_system_to_another(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        source = Path(shared, "source.safetensors")
        if source.parent.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("both are one file system")
        source.write_bytes(safetensors(BIG))

        write_safetensors(tmp_path / "out.safetensors", copies_of(source, BIG))

        assert bytes_of(tmp_path / "out.safetensors") == expected(BIG)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_source_that_becomes_shorter_while_it_is_read_is_named(kernel, source, tmp_path, monkeypatch):
    writes = copies_of(source, BIG)
    os.truncate(source, 3_000_000)
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")

    with pytest.raises(CheckpointError, match="source.safetensors became shorter .* ends at byte 3000000"):
        write_safetensors(tmp_path / "out.safetensors", writes)


def test_a_source_that_disappears_is_named(source, tmp_path):
    writes = copies_of(source, BIG)
    source.unlink()

    with pytest.raises(CheckpointError, match="cannot read .*source.safetensors: No such file"):
        write_safetensors(tmp_path / "out.safetensors", writes)


def test_made_and_copied_tensors_lie_side_by_side_and_progress_counts_every_byte(source, tmp_path):
    made = b"made" * 100_000
    writes = copies_of(source, BIG)
    writes[2:2] = [
        TensorWrite("made", TensorSpec("U8", (len(made),)), lambda: [memoryview(made[:5]), memoryview(made[5:])])
    ]
    done = []

    write_safetensors(tmp_path / "out.safetensors", writes, progress=done.append)

    assert bytes_of(tmp_path / "out.safetensors") == expected(BIG) | {"made": made}
    assert sum(done) == len(made) + sum(spec.nbytes for spec in BIG.values())


def test_tensors_of_no_bytes_are_copied_and_made(tmp_path):
    layout = {"a": TensorSpec("F32", (0, 3)), "b": TensorSpec("F32", (2,)), "c": TensorSpec("F32", (0,))}
    directory = checkpoint(tmp_path / "model", tensors=layout)
    source = open_directory(directory)
    plan = identity(spec_of(source), depth=1)
    for number, kept in enumerate((plan, plan.cast("bfloat16"))):
        out = tmp_path / str(number)
        out.mkdir()

        execute(kept, source, out, shards=lay_out(kept, kept.result(spec_of(source)), source, max_shard_bytes=10**9))

        shapes = {name: tuple(tensor.shape) for name, tensor in load_file(out / "model.safetensors").items()}
        assert shapes == {"a": (0, 3), "b": (2,), "c": (0,)}


def test_safetensors_loads_the_same_tensors(source, tmp_path):
    write_safetensors(tmp_path / "out.safetensors", copies_of(source, dict(reversed(BIG.items()))))

    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(umask, tmp_path):
    directory = checkpoint(tmp_path / "model")
    before = os.umask(umask)
    try:
        surgeon.truncate(directory, layers=2).save(tmp_path / "out", max_shard_size=2000)
    finally:
        os.umask(before)

    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_file_that_exists_is_never_written_to(source, tmp_path):
    (tmp_path / "out.safetensors").write_bytes(b"mine")

    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "out.safetensors", copies_of(source, BIG))
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9000), min_size=1, max_size=8),
    st.data(),
    st.integers(0, 4095),
    st.booleans(),
)
def test_any_selection_in_any_order_is_bit_identical(sizes, draw, align, kernel):
    layout = {f"t{i}": TensorSpec("U8", (size,)) for i, size in enumerate(sizes)}
    order = draw.draw(st.permutations(list(layout)))[: draw.draw(st.integers(1, len(sizes)))]
    chosen = {name: layout[name] for name in order}
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        if not kernel:
            patch.delattr(os, "copy_file_range")
        source, out = Path(directory, "source.safetensors"), Path(directory, "out.safetensors")
        source.write_bytes(safetensors(layout, align=align))

        write_safetensors(out, copies_of(source, chosen))

        assert bytes_of(out) == expected(chosen)


# --- shards -----------------------------------------------------------------------------------------------------


def shards_of(tmp_path: Path, tensors: dict[str, TensorSpec], limit: int) -> list[list[str]]:
    source = open_directory(checkpoint(tmp_path / "model", tensors=tensors))
    plan: Plan = identity(spec_of(source), depth=1)
    return [list(shard.tensors) for shard in lay_out(plan, plan.result(spec_of(source)), source, max_shard_bytes=limit)]


def test_shards_are_filled_to_the_last_byte_and_not_beyond(tmp_path):
    layout = {name: TensorSpec("U8", (10,)) for name in "abcd"}

    assert shards_of(tmp_path / "1", layout, 40) == [["a", "b", "c", "d"]]
    assert shards_of(tmp_path / "2", layout, 39) == [["a", "b", "c"], ["d"]]
    assert shards_of(tmp_path / "3", layout, 20) == [["a", "b"], ["c", "d"]]
    assert shards_of(tmp_path / "4", layout, 19) == [["a"], ["b"], ["c"], ["d"]]


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    layout = {name: TensorSpec("U8", (size,)) for name, size in {"a": 5, "b": 100, "c": 5, "d": 5}.items()}

    assert shards_of(tmp_path, layout, 12) == [["a"], ["b"], ["c", "d"]]


def test_wide_dtypes_come_first_so_that_every_tensor_is_aligned(tmp_path):
    layout = {"odd": TensorSpec("U8", (3,)), "half": TensorSpec("BF16", (3,)), "wide": TensorSpec("F64", (1,))}

    assert shards_of(tmp_path, layout, 100) == [["wide", "half", "odd"]]


def test_the_index_of_a_sharded_result_says_where_everything_is(tmp_path):
    directory = checkpoint(tmp_path / "model")

    summary = surgeon.truncate(directory, layers=2).save(tmp_path / "out", max_shard_size=2000)

    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    held = {name: file for file in summary.files for name in read_header(tmp_path / "out" / file)}
    assert index["weight_map"] == held
    assert held.keys() == llama(layers=2).keys()
    assert index["metadata"] == {
        "total_parameters": sum(spec.num_parameters for spec in llama(layers=2).values()),
        "total_size": summary.bytes_written,
    }
    count = len(summary.files)
    assert summary.files == tuple(f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == list(summary.files)


def test_a_sharded_source_becomes_one_file_with_the_same_bytes(tmp_path):
    directory = checkpoint(tmp_path / "model", shards=4)

    surgeon.truncate(directory, layers=3).save(tmp_path / "out")

    assert bytes_of(tmp_path / "out/model.safetensors") == expected(llama())
    assert not (tmp_path / "out/model.safetensors.index.json").exists()

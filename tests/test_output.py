"""The output directory: whole or absent, whatever happens to the process, the disk or another run."""

import ctypes
import errno
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from handmade import checkpoint, llama, snapshot

import surgeon
from surgeon.checkpoint.output import check_space, staged
from surgeon.checkpoint.source import INDEX
from surgeon.errors import OutputError
from surgeon.plan.execute import execute, lay_out

LIMIT = 60  # seconds that no subprocess here comes near


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def hidden(directory: Path) -> list[str]:
    return [name for name in names_in(directory) if name.startswith(".")]


def truncate(source: Path, out: Path, *options: str, layers: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "surgeon", "truncate", str(source), "--layers", str(layers), "-o", str(out)]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def source(tmp_path):
    return checkpoint(tmp_path / "model")


@pytest.fixture
def old(source, tmp_path):
    """Return an output that is already there, of one layer."""
    surgeon.truncate(source, layers=1).save(tmp_path / "out")
    return tmp_path / "out"


# --- what may be written ----------------------------------------------------------------------------------------


def test_an_empty_directory_is_filled(source, run, tmp_path):
    (tmp_path / "out").mkdir()

    assert run("truncate", source, "--layers", 2, "-o", tmp_path / "out").code == 0
    assert surgeon.inspect(tmp_path / "out").anatomy.depth == 2


def test_an_existing_output_is_refused_and_untouched(source, old, run, tmp_path):
    before = snapshot(tmp_path)

    outcome = run("truncate", source, "--layers", 2, "-o", old)

    assert outcome.code == 1
    assert outcome.err == f"error: {old} exists and is not empty\nhint: Replace it with --overwrite, or choose -o.\n"
    assert snapshot(tmp_path) == before


def test_overwrite_replaces_the_whole_of_it(source, old, run, tmp_path):
    (old / "stale.txt").write_text("x")

    assert run("truncate", source, "--layers", 2, "-o", old, "--overwrite").code == 0
    assert surgeon.inspect(old).anatomy.depth == 2
    assert not (old / "stale.txt").exists()
    assert hidden(tmp_path) == []


def test_overwrite_does_not_replace_what_is_no_checkpoint(source, run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("x")
    before = snapshot(tmp_path)

    outcome = run("truncate", source, "--layers", 2, "-o", tmp_path / "thesis", "--overwrite")

    assert outcome.code == 1
    assert "is not a checkpoint, so it is not replaced" in outcome.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("place", ["model", "model/../model", ".", "link"])
def test_the_source_is_never_replaced_by_its_result(place, source, run, tmp_path):
    (tmp_path / "config.json").write_text("{}")  # so that the parent too looks like a checkpoint
    (tmp_path / "link").symlink_to("model")
    before = snapshot(tmp_path)

    outcome = run("truncate", source, "--layers", 2, "-o", tmp_path / place, "--overwrite")

    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert "hint: " in outcome.err
    assert snapshot(tmp_path) == before


def test_a_result_inside_the_source_does_not_become_part_of_the_next(source, run, tmp_path):
    assert run("truncate", source, "--layers", 2, "-o", source / "two").code == 0
    assert run("truncate", source, "--layers", 1, "-o", source / "one").code == 0
    assert run("truncate", source, "--layers", 1, "-o", tmp_path / "outside").code == 0

    names = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "surgeon.json"}
    assert set(snapshot(source / "one")) == set(snapshot(tmp_path / "outside")) == names


@pytest.mark.parametrize("what", ["file", "link", "file/below", "x" * 300, "x" * 300 + "/out"])
def test_a_place_that_cannot_be_a_directory_is_refused(what, source, run, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = snapshot(tmp_path)

    outcome = run("truncate", source, "--layers", 2, "-o", tmp_path / what)

    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 2
    assert snapshot(tmp_path) == before


def test_the_current_directory_is_no_output(source, run, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    outcome = run("truncate", source, "--layers", 2, "-o", ".")

    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert snapshot(tmp_path / "cwd") == {}


def test_a_dry_run_writes_nothing(source, run, tmp_path):
    before = snapshot(tmp_path)

    assert run("truncate", source, "--layers", 2, "-o", tmp_path / "out", "--dry-run").code == 0
    assert snapshot(tmp_path) == before


def test_config_json_is_the_last_file_to_appear(source, old, tmp_path, monkeypatch):
    before = []
    real = Path.write_bytes

    def watch(path: Path, content: bytes) -> int:
        if path.name == "config.json":
            before.extend(sorted(entry.name for entry in path.parent.iterdir()))
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", watch)

    surgeon.truncate(source, layers=2).save(tmp_path / "new")

    assert [*before, "config.json"] == [
        "README.md",
        "model.safetensors",
        "surgeon.json",
        "tokenizer.json",
        "config.json",
    ]


# --- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate"])
def test_a_failing_disk_leaves_the_old_output_and_nothing_else(call, source, old, run, tmp_path, monkeypatch):
    before = snapshot(tmp_path)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    outcome = run("truncate", source, "--layers", 2, "-o", old, "--overwrite")

    assert outcome.code == 1
    assert outcome.err == f"error: cannot write {old}: Input/output error\nhint: Choose another place with -o.\n"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fails_after_the_rename_leaves_what_was_there(overwrite, source, old, tmp_path, monkeypatch):
    if not overwrite:
        shutil.rmtree(old)
    before, real = snapshot(tmp_path), os.fsync

    def fail(handle: int) -> None:
        if os.path.samestat(os.fstat(handle), tmp_path.stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        surgeon.truncate(source, layers=2).save(tmp_path / "out", overwrite=overwrite)

    assert snapshot(tmp_path) == before


def test_a_failure_leaves_no_parent_directories(tmp_path):
    (tmp_path / "mine").mkdir()

    def fill() -> None:
        with staged(tmp_path / "mine/a/b/out", overwrite=False) as stage:
            (stage / "x").write_bytes(b"x")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="is full"):
        fill()

    assert snapshot(tmp_path) == {"mine": None}


@pytest.fixture
def no_exchange(monkeypatch):
    """Take away the system's call that swaps two names."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), SystemExit(143), OSError(errno.EIO, "Input/output error")])
def test_a_failure_between_the_two_renames_puts_the_old_output_back(
    failure, source, old, no_exchange, tmp_path, monkeypatch
):
    before = snapshot(tmp_path)
    real = Path.rename

    def rename(path, target):
        if ".surgeon-" in path.name and Path(target) == old and "-old-" not in path.name:
            raise failure
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((type(failure), OutputError)):
        surgeon.truncate(source, layers=2).save(old, overwrite=True)

    assert snapshot(tmp_path) == before


def test_an_old_output_is_replaced_where_names_cannot_be_swapped(source, old, no_exchange, tmp_path):
    surgeon.truncate(source, layers=2).save(old, overwrite=True)

    assert surgeon.inspect(old).anatomy.depth == 2
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_old_output_whose_replacement_was_killed_between_the_renames_is_put_back(overwrite, source, old, tmp_path):
    before = snapshot(old)
    old.rename(tmp_path / ".out.surgeon-old-999999")
    (tmp_path / ".out.surgeon-999999").mkdir()
    again = surgeon.truncate(source, layers=2)

    if overwrite:
        again.save(old, overwrite=True)
        assert surgeon.inspect(old).anatomy.depth == 2
    else:
        with pytest.raises(OutputError, match="it is there again, as it was"):
            again.save(old)
        assert snapshot(old) == before
    assert hidden(tmp_path) == []


def test_what_appeared_meanwhile_is_not_replaced_without_overwrite(tmp_path):
    def fill() -> None:
        with staged(tmp_path / "out", overwrite=False):
            (tmp_path / "out").mkdir()
            (tmp_path / "out/mine").write_text("x")

    with pytest.raises(OutputError, match="appeared while"):
        fill()

    assert snapshot(tmp_path) == {"out": None, "out/mine": b"x"}


def test_a_source_that_changes_under_the_copy_is_blamed_and_nothing_is_left(source, run, tmp_path, monkeypatch):
    real = os.posix_fallocate

    def shorten(*args):
        os.truncate(source / "model.safetensors", 2000)
        return real(*args)

    monkeypatch.setattr(os, "posix_fallocate", shorten)
    outcome = run("truncate", source, "--layers", 2, "-o", tmp_path / "out")

    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {source / 'model.safetensors'} became shorter while it was read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "config.json", "tokenizer.json", "the index"])
@pytest.mark.parametrize("how", ["bytes", "longer", "gone"])
def test_a_source_that_changes_while_it_is_read_is_refused(how, file, run, tmp_path, monkeypatch):
    source = checkpoint(tmp_path / "model", shards=2)
    file = INDEX if file == "the index" else file

    def change() -> None:
        if how == "bytes":
            content = (source / file).read_bytes()
            (source / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif how == "longer":
            with (source / file).open("ab") as opened:
                opened.write(b" ")
        else:
            (source / file).unlink()

    at_the_card(change, monkeypatch)
    outcome = run("truncate", source, "--layers", 2, "-o", tmp_path / "out")

    if how == "gone" and file == "tokenizer.json":
        assert outcome.err.startswith(f"error: cannot read {source / file}")
    else:
        assert outcome.err.startswith(f"error: {source / file} changed while it was read\nhint: Something else changed")
    assert outcome.code == 1
    assert names_in(tmp_path) == ["model"]


def test_a_source_that_changes_within_one_tick_of_the_clock_is_refused(source, run, tmp_path, monkeypatch):
    file = source / "model.safetensors"
    before = file.stat()

    def change() -> None:
        file.write_bytes(file.read_bytes().replace(b"model.norm.weight", b"model.horn.weight"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    at_the_card(change, monkeypatch)
    outcome = run("truncate", source, "--layers", 2, "-o", tmp_path / "out")

    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {source} changed while it was read")
    assert names_in(tmp_path) == ["model"]


def test_a_donor_that_changes_while_it_is_read_is_refused(source, old, run, tmp_path, monkeypatch):
    donor = checkpoint(tmp_path / "donor", tensors=llama(layers=4), num_hidden_layers=4)
    before = snapshot(old)
    at_the_card(lambda: os.utime(donor / "model.safetensors"), monkeypatch)

    grow = ("grow", source, "--layers", 4, "--donor", donor, "--no-verify")
    outcome = run(*grow, "-o", old, "--overwrite")

    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {donor / 'model.safetensors'} changed while it was read")
    assert snapshot(old) == before
    assert hidden(tmp_path) == []


def at_the_card(change: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `change` called when the weights are written and the model card is about to be."""
    real = yaml.safe_dump

    def watch(*args, **kwargs):
        change()
        return real(*args, **kwargs)

    monkeypatch.setattr(yaml, "safe_dump", watch)


# --- leftovers --------------------------------------------------------------------------------------------------


def test_leftovers_of_killed_runs_are_removed_and_nothing_of_others(source, run, tmp_path):
    surgeon.truncate(source, layers=1).save(tmp_path / "out")
    for name in (".out.surgeon-999999", ".out.surgeon-old-999999", ".out.surgeon-notes", ".out2.surgeon-999999"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")

    surgeon.truncate(source, layers=2).save(tmp_path / "out", overwrite=True)

    assert hidden(tmp_path) == [".out.surgeon-notes", ".out2.surgeon-999999"]


def test_an_output_whose_name_looks_like_a_pattern_removes_nothing_of_others(source, tmp_path):
    (tmp_path / ".other.surgeon-999999").mkdir()
    (tmp_path / ".[ab]*.surgeon-999999").mkdir()

    surgeon.truncate(source, layers=1).save(tmp_path / "*")
    surgeon.truncate(source, layers=1).save(tmp_path / "[ab]*")

    assert hidden(tmp_path) == [".other.surgeon-999999"]


# --- real disks -------------------------------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path) -> Iterator[object]:
    """Return a function that mounts a small file system; skips where that is not permitted."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("not permitted to mount")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_result_larger_than_the_disk_is_refused_before_anything_is_written(source, mount, run):
    disk = mount("size=100k")

    outcome = run("truncate", source, "--layers", 2, "-o", disk / "out")

    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {disk} has ")
    assert " free, the result needs " in outcome.err
    assert "hint: Free some space" in outcome.err
    assert snapshot(disk) == {}


def test_the_check_of_the_space_counts_what_will_be_written(mount):
    disk = mount("size=1m")

    check_space(disk / "not/yet/there", 900_000)
    with pytest.raises(OutputError, match="free, the result needs"):
        check_space(disk / "not/yet/there", 1_100_000)


@pytest.mark.parametrize("room", range(8))
def test_a_disk_that_fills_up_midway_leaves_the_old_output_and_nothing_else(room, source, mount, run):
    disk = mount(f"size=20m,nr_inodes={5 + room}")  # the bytes suffice; beside the old output, files may not
    (disk / "out").mkdir()
    for name in ("config.json", "model.safetensors", "x"):
        (disk / "out" / name).write_text("{}")
    before = snapshot(disk)

    outcome = run("truncate", source, "--layers", 2, "-o", disk / "out", "--overwrite")

    if room < 7:  # a directory, its lock and five files
        assert outcome.code == 1
        assert outcome.err.startswith(f"error: the disk of {disk / 'out'} is full\nhint: Free some space")
        assert snapshot(disk) == before
    else:
        assert outcome.code == 0
        assert hidden(disk) == []


def test_a_disk_that_fills_up_under_the_weights_leaves_nothing(source, mount):
    disk = mount("size=1m")
    surgery = surgeon.truncate(
        checkpoint(source.parent / "big", tensors=llama(vocab=50_000), vocab_size=50_000), layers=1
    )

    shards = lay_out(surgery.plan, surgery.spec, surgery.source, max_shard_bytes=10**9)

    def fill() -> None:
        with staged(disk / "out", overwrite=False) as stage:
            execute(surgery.plan, surgery.source, stage, shards=shards)

    with pytest.raises(OutputError, match="is full"):
        fill()

    assert snapshot(disk) == {}


def test_a_read_only_disk_is_named(source, mount, run):
    disk = mount("size=10m")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

    outcome = run("truncate", source, "--layers", 2, "-o", disk / "a/out")

    assert outcome.code == 1
    assert outcome.err.startswith("error: cannot write ")
    assert "Read-only file system" in outcome.err


# --- signals and other runs, on a checkpoint that takes a while -------------------------------------------------


one_worker = pytest.mark.xdist_group("large")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Return a checkpoint of 250 MB."""
    directory = tmp_path_factory.mktemp("large") / "model"
    tensors = llama(layers=5, hidden=1024, ffn=4096)
    return checkpoint(directory, tensors=tensors, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5)


@pytest.fixture(scope="module")
def whole(large) -> Path:
    """Return what an undisturbed run makes of it."""
    process = truncate(large, large.parent / "whole", layers=4)
    assert process.wait(LIMIT) == 0
    return large.parent / "whole"


def assert_whole(out: Path, whole: Path) -> None:
    names = names_in(whole)
    assert names_in(out) == names
    same = [name for name in names if name not in ("README.md", "surgeon.json")]  # those say where they are
    assert filecmp.cmpfiles(out, whole, same, shallow=False) == (same, [], [])
    assert json.loads((out / "surgeon.json").read_text())["layer_map"] == [0, 1, 2, 3]


def wait_for_stage(parent: Path, process: subprocess.Popen[str]) -> None:
    """Return once the process writes weights, or has ended. A stage may go while we look at it."""
    while process.poll() is None:
        with suppress(FileNotFoundError):
            if list(parent.glob(".*.surgeon-*/model*.safetensors")):
                return
        time.sleep(0.001)


@one_worker
def test_a_run_killed_at_any_moment_leaves_a_whole_output_or_none(large, whole, tmp_path):
    out = tmp_path / "out"
    moments = random.Random(0)
    seen = set()
    for attempt in range(10):
        process = truncate(large, out, layers=4)
        if attempt % 2:
            wait_for_stage(tmp_path, process)
            time.sleep(moments.uniform(0, 0.2))
        else:
            time.sleep(moments.uniform(0.05, 0.7))
        process.kill()
        process.communicate()

        assert set(names_in(tmp_path)) - set(hidden(tmp_path)) <= {"out"}
        assert len({name.removesuffix(".lock") for name in hidden(tmp_path)}) <= 1  # one stage, and its lock
        for leftover in tmp_path.glob(".*"):
            assert not (leftover / "config.json").exists() or leftover.joinpath("surgeon.json").exists()
        seen.add((out.exists(), bool(hidden(tmp_path))))
        if out.exists():
            assert_whole(out, whole)
            shutil.rmtree(out)

    assert (False, True) in seen  # at least one kill hit the writing
    assert truncate(large, out, layers=4).wait(LIMIT) == 0
    assert_whole(out, whole)
    assert hidden(tmp_path) == []


@one_worker
def test_a_kill_while_overwriting_never_loses_the_old_output(large, whole, tmp_path):
    out = tmp_path / "out"
    surgeon.truncate(large, layers=1).save(out)
    old = names_in(out)
    moments = random.Random(1)
    for _ in range(3):
        process = truncate(large, out, "--overwrite", layers=4)
        wait_for_stage(tmp_path, process)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.communicate()

        kept = out if out.exists() else next(tmp_path.glob(".out.surgeon-old-*"))
        assert names_in(kept) == old
        assert surgeon.inspect(kept).anatomy.depth in (1, 4)


@one_worker
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing_and_says_so_by_its_code(sent, code, large, tmp_path):
    for _ in range(5):
        process = truncate(large, tmp_path / "out", layers=4)
        wait_for_stage(tmp_path, process)
        process.send_signal(sent)
        _, err = process.communicate(timeout=LIMIT)
        if process.returncode != 0:
            break
        shutil.rmtree(tmp_path / "out")  # it was faster than we

    assert process.returncode == code
    assert "Traceback" not in err
    assert snapshot(tmp_path) == {}


@one_worker
def test_an_interrupted_overwrite_leaves_the_old_output(large, tmp_path):
    surgeon.truncate(large, layers=1).save(tmp_path / "out")
    process = truncate(large, tmp_path / "out", "--overwrite", layers=4)
    wait_for_stage(tmp_path, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT)

    assert surgeon.inspect(tmp_path / "out").anatomy.depth == (4 if process.returncode == 0 else 1)
    assert hidden(tmp_path) == []


@one_worker
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_two_runs_with_one_output_leave_one_whole_result(options, large, whole, tmp_path):
    processes = [truncate(large, tmp_path / "out", *options, layers=4) for _ in range(2)]
    errors = [process.communicate(timeout=LIMIT)[1] for process in processes]

    assert 0 in [process.returncode for process in processes]
    for process, err in zip(processes, errors, strict=True):
        if process.returncode:
            assert process.returncode == 1
            assert err.startswith("error: ")
            assert err.count("\n") == 2
    assert_whole(tmp_path / "out", whole)
    assert hidden(tmp_path) == []

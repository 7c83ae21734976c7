"""Checkpoints of a run: whole or not there, confirmed or not used, whatever kills the run or touches the files."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from handmade import CONFIG, llama
from later import LATER

from surgeon.checkpoint.header import format_header, read_header
from surgeon.errors import OutputError, SurgeonError
from surgeon.train import checkpoints
from surgeon.train.checkpoints import MANIFEST, DamagedCheckpointError, check, newest, rotate, settle

if LATER:
    import numpy as np

NUMPY = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16"}


def write_weights(path: Path, *, dtype: str = "F32", without: str | None = None) -> None:
    import numpy as np  # here, for the runs that are killed import this file too

    tensors = {name: spec for name, spec in llama(dtype=dtype).items() if name != without}
    numbers = (np.full(spec.num_parameters, 1, NUMPY[dtype]).tobytes() for spec in tensors.values())
    path.write_bytes(format_header(tensors) + b"".join(numbers))


def fill(directory: Path, *, dtype: str = "F32", without: str | None = None) -> None:
    """Write what Trainer writes; the pickles are of bytes that no one may unpickle."""
    write_weights(directory / "model.safetensors", dtype=dtype, without=without)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "trainer_state.json").write_text('{"global_step": 1}')
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (directory / name).write_bytes(name.encode() * 100)


@contextmanager
def staged_checkpoint(run_dir: Path, step: int) -> Iterator[Path]:
    """Yield a directory to fill, which becomes checkpoint `step`: the order of calls in which the trainer saves."""
    stage = checkpoints.begin(run_dir, step)
    try:
        with checkpoints.explained(run_dir):
            yield stage / f"checkpoint-{step}"
        checkpoints.commit(run_dir, step)
    finally:
        checkpoints.abandon(run_dir, step)


def save(run_dir: Path, step: int, *, then: Callable[[Path], object] = lambda directory: None) -> Path:
    """Write a checkpoint; `then` sees the directory before it is committed."""
    with staged_checkpoint(run_dir, step) as directory:
        fill(directory)
        then(directory)
    return run_dir / f"checkpoint-{step}"


def interrupt(directory: Path) -> None:
    raise KeyboardInterrupt


def reseal(directory: Path) -> None:
    """Write the manifest again, as if the files had been saved as they are now."""
    names = [path for path in directory.iterdir() if path.name != MANIFEST]
    files = {path.name: {"bytes": path.stat().st_size, "sha256": checkpoints._sha256(path)} for path in names}
    step = checkpoints.step_of(directory)
    (directory / MANIFEST).write_text(json.dumps({"version": 1, "step": step, "files": files}))


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture
def run_dir(tmp_path):
    """Return a run with the checkpoints of steps 10 and 20."""
    save(tmp_path, 10)
    save(tmp_path, 20)
    return tmp_path


# --- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_who_may_read_a_checkpoint_is_what_the_umask_says(umask, tmp_path):
    """safetensors gives its files to their owner alone, and a colleague could not resume."""
    before = os.umask(umask)
    try:
        made = save(tmp_path, 1, then=lambda directory: (directory / "model.safetensors").chmod(0o600))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in made.iterdir()} == {0o666 & ~umask}


def test_a_checkpoint_is_what_was_filled_in_and_its_manifest(tmp_path):
    directory = save(tmp_path, 5)

    check(directory)
    assert names_in(tmp_path) == {"checkpoint-5"}
    manifest = json.loads((directory / MANIFEST).read_text())
    assert manifest["step"] == 5
    assert set(manifest["files"]) == names_in(directory) - {MANIFEST}
    assert manifest["files"]["optimizer.pt"]["bytes"] == 1200


def test_a_failure_while_filling_leaves_nothing(run_dir):
    with pytest.raises(KeyboardInterrupt):
        save(run_dir, 30, then=interrupt)

    assert names_in(run_dir) == {"checkpoint-10", "checkpoint-20"}


def test_a_failure_while_replacing_leaves_the_old_one(run_dir):
    with pytest.raises(KeyboardInterrupt):
        save(run_dir, 20, then=interrupt)

    check(run_dir / "checkpoint-20")
    assert names_in(run_dir) == {"checkpoint-10", "checkpoint-20"}


def test_a_step_that_is_reached_again_replaces_its_checkpoint(run_dir):
    (run_dir / "checkpoint-20/optimizer.pt").unlink()

    with staged_checkpoint(run_dir, 20) as directory:
        fill(directory, dtype="F64")

    check(run_dir / "checkpoint-20")
    assert read_header(run_dir / "checkpoint-20/model.safetensors")["lm_head.weight"].spec.dtype == "F64"
    assert names_in(run_dir) == {"checkpoint-10", "checkpoint-20"}


def test_what_cannot_be_resumed_from_is_not_saved(tmp_path):
    with pytest.raises(DamagedCheckpointError, match=r"has no optimizer\.pt"):
        save(tmp_path, 1, then=remove("optimizer.pt"))

    assert names_in(tmp_path) == set()


def test_several_processes_fill_one_stage(tmp_path):
    checkpoints.begin(tmp_path, 7)
    stage = checkpoints.stage_path(tmp_path, 7) / "checkpoint-7"  # as a process finds it that did not begin
    fill(stage)
    (stage / "rng_state.pth").unlink()
    for rank in range(3):
        (stage / f"rng_state_{rank}.pth").write_bytes(b"state")
    checkpoints.commit(tmp_path, 7)

    check(tmp_path / "checkpoint-7")
    assert names_in(tmp_path) == {"checkpoint-7"}


def test_the_random_state_of_each_process_must_be_there(tmp_path):
    with pytest.raises(DamagedCheckpointError, match=r"rng_state_1\.pth"):
        save(tmp_path, 1, then=lambda stage: [write(f"rng_state_{rank}.pth", b"x")(stage) for rank in (0, 2)])


@pytest.mark.parametrize(
    "shards",
    [
        ["pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp", "scheduler.pt"],
        ["global_step7/mp_rank_00_model_states.pt", "global_step7/zero_pp_rank_0_optim_states.pt", "latest"],
        ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt"],
    ],
    ids=["fsdp", "deepspeed", "lora"],
)
def test_what_other_ways_of_training_save_is_whole_too(shards, tmp_path):
    with staged_checkpoint(tmp_path, 7) as stage:
        for name in [*shards, "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"]:
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_bytes(format_header({}) if name.endswith(".safetensors") else b"x")

    check(tmp_path / "checkpoint-7")
    (tmp_path / "checkpoint-7" / shards[0]).write_bytes(b"y")
    with pytest.raises(DamagedCheckpointError, match="is damaged"):
        check(tmp_path / "checkpoint-7")


def test_a_disk_that_refuses_is_one_line(tmp_path):
    (tmp_path / "run").write_text("a file")

    with pytest.raises(OutputError, match="cannot write .*run"):
        save(tmp_path / "run", 1)


def test_a_full_disk_is_one_line_whoever_notices(tmp_path):
    import torch

    full = Path("/dev/full")  # every write to it finds no space
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OutputError, match="could not be written"), staged_checkpoint(tmp_path, 1):
        torch.save({"state": torch.zeros(1 << 20)}, full)
    with pytest.raises(OutputError, match="is full"), staged_checkpoint(tmp_path, 1), full.open("w") as file:
        file.write("x" * 100)

    assert names_in(tmp_path) == set()


def test_an_error_of_the_model_is_not_taken_for_the_disk(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), staged_checkpoint(tmp_path, 1):
        raise RuntimeError("shape [3] is invalid")


def test_who_holds_a_run_directory_removes_what_killed_runs_left(tmp_path):
    for name in (".checkpoint-3.partial", ".checkpoint-2.surgeon-old-17"):
        (tmp_path / "run" / name).mkdir(parents=True)

    with checkpoints.held(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [checkpoints.LOCK]


def test_one_run_has_a_directory_to_itself(tmp_path):
    second = checkpoints.held(tmp_path / "run")
    with checkpoints.held(tmp_path / "run"), pytest.raises(OutputError, match="another run writes into"):
        second.__enter__()
    with checkpoints.held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert names_in(tmp_path / "run") == set()


def test_a_killed_run_leaves_its_directory_to_the_next_one(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom surgeon.train.checkpoints import held\n"
        "with held(Path(sys.argv[1])):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")]).returncode == -9

    with checkpoints.held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


# --- what is damaged --------------------------------------------------------------------------------------------


def truncate(name: str) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / name, 40)


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content)


def empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def flip_a_bit(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def write_nan(directory: Path) -> None:
    """Put a NaN into the last weight, and a manifest that agrees."""
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + np.float32("nan").tobytes())
    reseal(directory)


def leave_out_a_tensor(directory: Path) -> None:
    write_weights(directory / "model.safetensors", without="model.layers.1.mlp.up_proj.weight")
    reseal(directory)


def forget(name: str) -> Callable[[Path], None]:
    """Remove a file, and its line of the manifest."""

    def forget(directory: Path) -> None:
        (directory / name).unlink()
        reseal(directory)

    return forget


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    # those with which transformers stops with a traceback
    "no state": (remove("trainer_state.json"), "lacks trainer_state.json"),
    "half a state": (write("trainer_state.json", b'{"glob'), "trainer_state.json is truncated"),
    "truncated weights": (truncate("model.safetensors"), "model.safetensors is truncated, 40 bytes instead of"),
    "truncated optimizer": (truncate("optimizer.pt"), "optimizer.pt is truncated"),
    "empty random state": (write("rng_state.pth", b""), "rng_state.pth is truncated, 0 bytes"),
    "empty directory": (empty, "is empty"),
    "pickle payload": (write("optimizer.pt", b"cos\nsystem\n(S'true'\ntR."), "optimizer.pt"),
    # those with which it goes on, and trains something else
    "no optimizer": (remove("optimizer.pt"), "lacks optimizer.pt"),
    "no scheduler": (remove("scheduler.pt"), "lacks scheduler.pt"),
    "no random state": (remove("rng_state.pth"), "lacks rng_state.pth"),
    "weights not finite": (write_nan, "not finite in 'lm_head.weight'"),
    "a tensor missing": (leave_out_a_tensor, "has no tensor 'model.layers.1.mlp.up_proj.weight'"),
    # those that only a manifest finds, or that come with a manifest
    "one bit": (flip_a_bit, "model.safetensors is not what was written"),
    "grown": (write("scheduler.pt", b"x" * 5000), "scheduler.pt is too long"),
    "no manifest": (remove(MANIFEST), f"has no {MANIFEST}"),
    "half a manifest": (truncate(MANIFEST), f"has a {MANIFEST} that cannot be read"),
    "a manifest of another form": (write(MANIFEST, b"[]"), f"has a {MANIFEST} of another form"),
    "a manifest of the future": (write(MANIFEST, b'{"version": 2}'), "of version 2, not 1"),
    "another pickle": (write("training_args.bin", b"cos\nsystem\n"), "training_args.bin that its manifest does not"),
    "never had an optimizer": (forget("optimizer.pt"), "has no optimizer.pt; a run cannot go on"),
    "never had a scheduler": (forget("scheduler.pt"), "has no scheduler.pt"),
    "never had a state": (forget("trainer_state.json"), "has no trainer_state.json"),
    "never had a random state": (forget("rng_state.pth"), "has no rng_state.pth"),
    "never had weights": (forget("model.safetensors"), "has no weights"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damage, run_dir):
    apply, said = DAMAGES[damage]
    apply(run_dir / "checkpoint-20")

    with pytest.raises(DamagedCheckpointError) as caught:
        check(run_dir / "checkpoint-20")
    warnings: list[str] = []
    found = newest(run_dir, warnings.append)

    assert said in str(caught.value)
    assert str(run_dir / "checkpoint-20") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert isinstance(caught.value, SurgeonError)
    assert found == run_dir / "checkpoint-10"
    assert warnings == [f"{caught.value}; an older checkpoint is looked for"]


def test_a_checkpoint_under_another_step_is_refused(run_dir):
    (run_dir / "checkpoint-20").rename(run_dir / "checkpoint-200")

    with pytest.raises(DamagedCheckpointError, match="it is the checkpoint of step 20"):
        check(run_dir / "checkpoint-200")


def test_a_manifest_names_nothing_outside(run_dir):
    directory = run_dir / "checkpoint-20"
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["files"]["../checkpoint-10/optimizer.pt"] = manifest["files"]["optimizer.pt"]
    (directory / MANIFEST).write_text(json.dumps(manifest))

    with pytest.raises(DamagedCheckpointError, match="outside of it"):
        check(directory)


def test_what_a_desktop_leaves_does_no_harm(run_dir):
    (run_dir / "checkpoint-20/.DS_Store").write_bytes(b"x")

    check(run_dir / "checkpoint-20")


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_no_dtype_hides_what_is_not_finite(dtype, value, tmp_path):
    import torch

    with staged_checkpoint(tmp_path, 1) as directory:
        fill(directory, dtype=dtype)
    check(tmp_path / "checkpoint-1")
    path = tmp_path / "checkpoint-1/model.safetensors"
    torch_dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    entry = read_header(path)["model.norm.weight"]
    wrong = bytes(torch.tensor([float(value)], dtype=torch_dtype).view(torch.uint8).tolist())
    with path.open("r+b") as file:
        file.seek(entry.start + 2 * len(wrong))
        file.write(wrong)
    reseal(path.parent)

    with pytest.raises(DamagedCheckpointError, match=r"not finite in 'model\.norm\.weight' of model\.safetensors"):
        check(path.parent)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_the_largest_finite_number_is_finite(dtype):
    import torch

    torch_dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    largest = torch.tensor([torch.finfo(torch_dtype).max, torch.finfo(torch_dtype).min], dtype=torch_dtype)

    assert checkpoints._is_finite(bytes(largest.view(torch.uint8).tolist()), dtype)


# --- which one --------------------------------------------------------------------------------------------------


def test_the_newest_is_the_one_of_the_highest_step(tmp_path):
    for step in (9, 100, 20):
        save(tmp_path, step)

    assert newest(tmp_path, pytest.fail) == tmp_path / "checkpoint-100"


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")

    assert newest(tmp_path, pytest.fail) is None
    assert newest(tmp_path / "nowhere", pytest.fail) is None


def test_where_all_are_damaged_none_is_taken(run_dir):
    for step in (10, 20):
        (run_dir / f"checkpoint-{step}/optimizer.pt").unlink()
    warnings: list[str] = []

    assert newest(run_dir, warnings.append) is None
    assert len(warnings) == 2


def test_rotation_keeps_the_newest_and_what_is_protected(tmp_path):
    for step in (1, 2, 3, 10, 11):
        save(tmp_path, step)

    assert rotate(tmp_path, keep=2, protect=[2]) == [1, 3]
    assert names_in(tmp_path) == {"checkpoint-2", "checkpoint-10", "checkpoint-11"}
    assert rotate(tmp_path, keep=2, protect=[2]) == []


# --- killed -----------------------------------------------------------------------------------------------------

LOOP = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_train_checkpoints import save
from surgeon.train.checkpoints import checkpoints, rotate, step_of
run_dir = Path({run_dir!r})
step = max(map(step_of, checkpoints(run_dir)), default=0)
print("ready", flush=True)
while True:
    step += 1
    print(save(run_dir, step).name, flush=True)
    rotate(run_dir, keep=2)
"""


def test_a_run_killed_at_any_moment_leaves_its_last_checkpoint_whole(tmp_path):
    draw = random.Random(0)
    last = 0
    for _ in range(10):
        code = LOOP.format(tests=str(Path(__file__).parent), run_dir=str(tmp_path))
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert child.stdout.readline().startswith("checkpoint-")
        time.sleep(draw.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        written = [int(line.split("-")[1]) for line in child.stdout.read().splitlines() if line[-1:].isdigit()]
        child.wait()

        found = newest(tmp_path, pytest.fail)  # not one is damaged: there is nothing to warn of

        assert found is not None
        step = checkpoints.step_of(found)
        assert step >= max([last + 1, *written])
        last = step
        for directory in checkpoints.checkpoints(tmp_path):
            check(directory)
        leftovers = [name for name in names_in(tmp_path) if name.startswith(".")]
        assert len(leftovers) <= 2  # one that was being written, one that was being removed
    checkpoints.sweep(tmp_path)
    assert not [name for name in names_in(tmp_path) if name.startswith(".")]


def test_a_finished_checkpoint_verifies_at_every_moment_of_losing_its_states(tmp_path):
    made = [save(tmp_path, step) for step in (1, 2)]
    left, removed = settle(tmp_path)

    assert (left, removed > 0) == ([made[1]], True)
    check(made[1])
    assert not (made[1] / "optimizer.pt").exists()
    (made[1] / "optimizer.pt").write_bytes(b"a kill came before it went")
    check(made[1])
    assert settle(tmp_path) == ([made[1]], len(b"a kill came before it went"))
    (made[1] / "scheduler.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match="lacks scheduler.pt"):
        check(made[1])


def test_the_best_checkpoint_of_a_finished_run_stays_beside_the_newest(tmp_path):
    made = [save(tmp_path, step) for step in (1, 2, 3)]
    assert settle(tmp_path, protect=[1])[0] == [made[0], made[2]]

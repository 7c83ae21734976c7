"""`surgeon finetune` in two processes: the steps of one with the doubled batch, one result, one voice, no hang."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import talkers
import toys
from later import LATER

from surgeon.train.checkpoints import check, checkpoints
from surgeon.train.run_dir import read_metrics

if LATER:
    from safetensors.torch import load_file

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "surgeon"]
SURGEON = ["-m", "surgeon"]
LIMIT = 120  # seconds; a process that waits for another one in vain would wait for half an hour


@dataclass(frozen=True)
class Ended:
    """What became of a command, and how long it took."""

    code: int
    out: str
    err: str
    seconds: float


class Started:
    """A command in a group of processes of its own."""

    def __init__(self, how: list[str], *arguments: object, **environment: str) -> None:
        command, self.began = [sys.executable, *how, *map(str, arguments)], time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
        )

    def at_step(self, run_dir: Path, step: int) -> None:
        """Return when the run has told so many steps."""
        while self.process.poll() is None and time.monotonic() - self.began < LIMIT:
            if (run_dir / "metrics.jsonl").exists() and any(record["step"] >= step for record in read_metrics(run_dir)):
                return
            time.sleep(0.02)
        raise AssertionError(self.ended().err)

    def ended(self) -> Ended:
        """Return what became of it; nobody of the group is left then."""
        try:
            out, err = self.process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return Ended(self.process.returncode, out, err, time.monotonic() - self.began)


def words(**options: object) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


SAME = words(max_steps=6, sequence_length=32, lr="1e-3", eval_rows=3, eval_every=3, optim="sgd")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkers.talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    return talkers.written(tmp_path / "text.txt", talkers.TEXT * 8)


def close(one: Path, other: Path) -> bool:
    """Return whether weights are equal but for rounding: float32 sums, of gradients and then of six steps."""
    ours, theirs = (load_file(path / "model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-6


def losses(run_dir: Path) -> list[float]:
    return [record[name] for record in read_metrics(run_dir) for name in ("loss", "eval_loss") if name in record]


def test_two_processes_train_as_one_with_the_doubled_batch(run, one_thread, talker, text, tmp_path):
    command = ["finetune", talker, "--data", text, *SAME, "--json"]
    launched = Started(TORCHRUN, *command, "--batch-size", 2, "-o", tmp_path / "two").ended()
    whole = run(*command, "--batch-size", 4, "-o", tmp_path / "one")

    assert launched.code == 0, launched.err
    one, two = json.loads(whole.out), json.loads(launched.out)
    assert (two["steps"], two["tokens"]) == (one["steps"], one["tokens"])
    assert losses(tmp_path / "two.run") == pytest.approx(losses(tmp_path / "one.run"), rel=2e-6)  # float32 sums
    assert [record["step"] for record in read_metrics(tmp_path / "two.run")] == [
        record["step"] for record in read_metrics(tmp_path / "one.run")
    ]
    assert close(tmp_path / "two", tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "one.run", "two.run", "text.txt"}
    assert not any(toys.load(tmp_path / "two")[1].values())
    assert launched.err.count("step 6:") == 1


def test_surgeon_starts_processes_itself_and_a_killed_run_is_resumed_to_the_same_weights(talker, text, tmp_path):
    """Only the process that starts the others is killed: they end with it, or they would keep the resumed run out."""
    command = ["finetune", talker, "--data", text, *SAME, "--batch-size", 2, "--num-processes", 2, "--save-every", 1]
    begun = Started(SURGEON, *command, "--json", "-o", tmp_path / "whole")
    killed = Started(SURGEON, *command, "-o", tmp_path / "out")
    killed.at_step(tmp_path / "out.run", 3)
    killed.process.kill()
    killed.ended()
    whole = begun.ended()
    resumed = Started(SURGEON, *command, "-o", tmp_path / "out", "--resume", "--json").ended()

    assert (whole.code, resumed.code) == (0, 0), whole.err + resumed.err
    assert json.loads(resumed.out)["steps"] == json.loads(whole.out)["steps"] == 6
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert ours == theirs
    steps = [record["step"] for record in read_metrics(tmp_path / "out.run") if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_an_error_of_the_first_process_is_told_once_and_nobody_waits_for_it(talker, tmp_path):
    """The others wait for its data then, and would for half an hour."""
    data = talkers.written(tmp_path / "bad.jsonl", '{"text": "good"}\n{"text": 5}\n')
    command = ["finetune", talker, "--data", data, *SAME]
    by_torch = Started(TORCHRUN, *command, "-o", tmp_path / "one")
    by_us = Started(SURGEON, *command, "-o", tmp_path / "two", "--num-processes", 2)
    torch_ended, ended = by_torch.ended(), by_us.ended()

    assert (torch_ended.code, ended.code) == (1, 1)
    assert ended.err == f"error: {data}:2: 'text' is a number, not a string\nhint: The record's keys are 'text'.\n"
    assert torch_ended.err.count("error: ") == 1
    assert "rank1" not in torch_ended.err
    assert (ended.out, torch_ended.out) == ("", "")
    assert json.loads((tmp_path / "two.run" / "status.json").read_text())["state"] == "failed"


def test_processes_that_are_told_to_stop_save_one_checkpoint_together(talker, text, tmp_path):
    options = words(max_steps=3000, sequence_length=32, batch_size=1, eval_rows=1, eval_every=3000, save_every=0)
    command = ["finetune", talker, "--data", text, *options, "--quiet"]
    by_us = Started(SURGEON, *command, "-o", tmp_path / "one", "--num-processes", 2)
    by_torch = Started(TORCHRUN, *command, "-o", tmp_path / "two")
    for started, name in ((by_us, "one.run"), (by_torch, "two.run")):
        started.at_step(tmp_path / name, 2)
        started.process.send_signal(signal.SIGTERM)
    ended, torch_ended = by_us.ended(), by_torch.ended()

    assert ended.code == 143
    assert "Continue with: surgeon finetune " in ended.err
    assert ended.err.endswith(" --num-processes 2 --resume\n")
    assert len(ended.err.splitlines()) == 1
    assert torch_ended.code != 0
    for name in ("one.run", "two.run"):
        status = json.loads((tmp_path / name / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("stopped", 143)
        [kept] = checkpoints(tmp_path / name)
        assert kept.name == f"checkpoint-{status['step']}"
        check(kept)
        assert {path.name for path in kept.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero_two_of_deepspeed_trains_the_same_and_is_resumed(run, one_thread, talker, text, tmp_path):
    """One process: accelerate counts only one where DeepSpeed has no GPU. What is tried is its engine and its files."""
    launcher = [*TORCHRUN[:4], "1", *TORCHRUN[5:]]
    config = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}  # accelerate launch sets them
    config |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    options = words(max_steps=4, sequence_length=32, lr="1e-3", eval_rows=3, optim="adamw_torch", save_every=2)
    options += ["--keep-checkpoints", "2"]
    command = ["finetune", talker, "--data", text, *options, "--json"]
    ended = Started(launcher, *command, "--batch-size", 4, "-o", tmp_path / "two", **config).ended()
    run(*command, "--batch-size", 4, "-o", tmp_path / "one")

    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["steps"] == 4
    assert not any(toys.load(tmp_path / "two")[1].values())
    assert losses(tmp_path / "two.run") == pytest.approx(losses(tmp_path / "one.run"), rel=1e-5)  # float32 sums
    kept = checkpoints(tmp_path / "two.run")
    for path in kept:
        check(path)
        assert list(path.glob("global_step*")), "DeepSpeed's own files"

    shutil.rmtree(kept[-1])
    (tmp_path / "two").rename(tmp_path / "before")
    resumed = Started(launcher, *command, "--batch-size", 4, "-o", tmp_path / "two", "--resume", **config).ended()
    assert resumed.code == 0, resumed.err
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("two", "before"))
    assert ours == theirs

"""Devices that this machine need not have: which GPU is used, in which precision, and how long processes wait.

CUDA is torch's own module with answers for two cards; nothing is computed on them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import toys
from later import LATER

from surgeon.checkpoint.source import open_directory
from surgeon.errors import PlanError
from surgeon.processes import check_meeting

if LATER:
    import torch

    from surgeon.models.device import compute_dtype, resolve_device
    from surgeon.train import arguments
    from surgeon.train.arguments import RunArguments, num_workers, set_environment
    from surgeon.train.model import precision_of
    from surgeon.train.settings import Settings

SURGEON = Path(__file__).parent.parent / "src/surgeon"


@pytest.fixture
def two_gpus(monkeypatch):
    """Let torch say that there are two GPUs, and return the index of each card that is made current."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device(device).index))
    return chosen


def card(monkeypatch, major):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))


def test_a_run_computes_on_the_gpu_that_it_was_given(two_gpus, tmp_path):
    from accelerate import PartialState

    device = resolve_device("cuda:1")
    try:
        args = RunArguments(output_dir=str(tmp_path), gpu=device)
        assert (args.device, args.n_gpu) == (torch.device("cuda:1"), 1)
        assert PartialState().device == torch.device("cuda:1")
        assert two_gpus[-1] == 1
    finally:
        PartialState._reset_state()


def test_without_a_number_a_run_computes_on_one_gpu_though_there_are_two(two_gpus, tmp_path):
    from accelerate import PartialState

    try:
        args = RunArguments(output_dir=str(tmp_path))
        assert (args.device, args.n_gpu) == (torch.device("cuda:0"), 1)
    finally:
        PartialState._reset_state()


@pytest.mark.parametrize(("major", "precision", "dtype"), [(7, "float32", "float32"), (8, "bf16", "bfloat16")])
def test_a_card_that_only_emulates_bfloat16_computes_in_float32(major, precision, dtype, monkeypatch, tmp_path):
    card(monkeypatch, major)
    source = open_directory(toys.build("llama", tmp_path / "toy", dtype="bfloat16"))

    assert precision_of(Settings(), "cuda") == precision
    assert compute_dtype(source, "cuda:0") == getattr(torch, dtype)


def test_a_deterministic_run_says_so_to_the_gpu_before_any_model_computes(monkeypatch, tmp_path):
    from surgeon.train.runner import Runner
    from surgeon.train.task import Task

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    source = open_directory(toys.build("llama", tmp_path / "toy"))
    Runner(source, ("data",), Task(Settings(deterministic=True)), run_dir=tmp_path / "run", device="cpu")

    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def test_a_run_on_a_gpu_asks_for_memory_that_grows_unless_the_user_asked_for_other(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # to be taken away again
        monkeypatch.delenv(name)
    set_environment(Settings(), "cpu")
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    set_environment(Settings(), "cuda:1")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    set_environment(Settings(), "cuda")
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_a_gpu_has_its_batches_made_beside_it_where_they_can_be_handed_on(monkeypatch):
    free = SimpleNamespace(free=2 << 30)
    monkeypatch.setattr(arguments.shutil, "disk_usage", lambda place: free)
    monkeypatch.setattr(arguments, "SHARED_MEMORY", Path("/"))

    found = [num_workers(Settings(workers=each), device) for each in (None, 0, 5) for device in ("cpu", "cuda")]
    assert found == [0, 2, 0, 0, 5, 5]
    free.free = 64 << 20  # as Docker gives it
    assert num_workers(Settings(), "cuda") == 0


WAIT = """
import os, sys, time, torch.distributed as dist
from datetime import timedelta
from surgeon.processes import is_first, wait_for_all
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", sys.argv[1], timeout=timedelta(seconds=0.5), rank=rank, world_size=2)
wait_for_all()
if is_first():
    time.sleep(1.5)
{}
print("met")
"""


@pytest.mark.parametrize(("barrier", "meets"), [("wait_for_all()", True), ("dist.barrier()", False)])
def test_processes_wait_for_one_that_works_longer_than_their_group_allows(barrier, meets, tmp_path):
    shared = {**os.environ, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", WAIT.format(barrier), f"file://{tmp_path}/meeting"]
    both = [
        subprocess.Popen(command, env=shared | {"RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert (b"met" in said[1]) == meets


def test_numbers_of_a_device_become_wide_where_the_device_can():
    """Apple's GPUs have no float64: `.double()` follows `.cpu()`, or is left to `device.wide`."""
    wrong = []
    for path in SURGEON.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            is_wide = re.search(r"(?<!cpu\(\))\.double\(\)", line)
            if is_wide and path.name not in (
                "device.py",
                "magnitude.py",
                "activations.py",
            ):  # these read files, or sums
                wrong.append(f"{path.relative_to(SURGEON)}:{number}: {line.strip()}")
    assert not wrong


@pytest.mark.parametrize("name", ["fsdp2", "zero2"])
def test_a_file_for_several_gpus_has_only_keys_that_accelerate_knows(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    path = SURGEON.parent.parent / "docs" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # it raises ValueError for a key of its own that it does not know
    options = {action.dest for action in launch_command_parser()._actions}
    assert (config.fsdp_config or config.deepspeed_config).keys() <= options
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_processes_that_do_not_know_each_other_do_not_train(monkeypatch):
    """accelerate makes one process of each where FSDP or DeepSpeed is asked for and there is no GPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")

    check_meeting(2)
    with pytest.raises(PlanError, match="2 processes were started, and accelerate connects 1"):
        check_meeting(1)

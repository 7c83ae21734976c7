"""Several processes of one run: who speaks, whose failure counts, and that nobody is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import surgeon
from surgeon import processes as of_one_command
from surgeon import starter
from surgeon.processes import is_first, is_launched, is_loss, processes, second_to_the_first
from surgeon.train import launch
from surgeon.train.launch import relaunch

# What stands in for surgeon: a package of that name which does in each process what its argument says of the rank.
STAND_IN = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
with open(f"{sys.argv[1]}.{rank}", "w") as file:
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    file.write(" ".join(os.environ[name] for name in names) + "\\n" + " ".join(sys.argv[2:]))
exec(sys.argv[2])
"""


@pytest.fixture
def surgeon_that_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a package `surgeon` that runs its second argument in front of the real one, for processes started here."""
    (tmp_path / "surgeon").mkdir()
    (tmp_path / "surgeon/__init__.py").touch()
    (tmp_path / "surgeon/__main__.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)  # `python -m` looks here first
    return tmp_path / "told"


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(of_one_command, "GRACE", 0.3)


def test_a_process_alone_is_the_first_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    assert (is_first(), is_launched(), processes()) == (True, False, 1)


def test_each_process_learns_its_rank_and_where_they_meet(surgeon_that_does: Path) -> None:
    assert relaunch([str(surgeon_that_does), "pass"], processes=3) == 0

    told = [Path(f"{surgeon_that_does}.{rank}").read_text().splitlines() for rank in range(3)]
    places = [line[0].split() for line in told]
    assert [place[:3] for place in places] == [["3", "3", str(rank)] for rank in range(3)]
    assert len({tuple(place[3:5]) for place in places}) == 1
    assert all(line[1] == "pass" for line in told)


@pytest.mark.parametrize(
    ("does", "status"),
    [
        ("sys.exit(3 if rank == 1 else 0)", 3),
        ("sys.exit(143)", 143),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(60)", 137),
        ("sys.exit(2) if rank == 1 else time.sleep(60)", 2),
    ],
)
def test_the_first_failure_is_that_of_all_and_ends_the_others(does: str, status: int, surgeon_that_does: Path) -> None:
    began = time.monotonic()

    assert relaunch([str(surgeon_that_does), does], processes=2) == status
    assert time.monotonic() - began < 30


def test_one_that_does_not_end_when_told_is_killed(surgeon_that_does: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    deaf = "sys.exit(5 * (time.sleep(1) is None)) if rank else [signal.signal(15, signal.SIG_IGN), time.sleep(60)]"
    began = time.monotonic()

    assert relaunch([str(surgeon_that_does), deaf], processes=2) == 5
    assert time.monotonic() - began < 30


def test_a_sigterm_is_passed_on_and_the_handler_comes_back(surgeon_that_does: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    ask = "signal.signal(15, lambda *a: sys.exit(143)); rank or os.kill(os.getppid(), 15); time.sleep(60)"

    assert relaunch([str(surgeon_that_does), ask], processes=2) in (143, 128 + signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


STARTER = "import sys; sys.path.pop(0); from surgeon.train.launch import relaunch; relaunch(sys.argv[1:], processes=2)"


def test_processes_end_with_the_one_that_started_them_however_it_ends(surgeon_that_does: Path) -> None:
    began = time.monotonic()
    does = "sys.path.pop(0); [sys.modules.pop(name) for name in list(sys.modules) if name.startswith('surgeon')]; "
    does += "from surgeon.starter import ends_with_starter; ends_with_starter(); import os; os.write(1, b'here\\n'); "
    command = [sys.executable, "-c", STARTER, str(surgeon_that_does), does + "time.sleep(120)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as starter:
        assert starter.stdout is not None
        assert [starter.stdout.readline() for _ in range(2)] == [b"here\n"] * 2
        starter.kill()

        assert starter.stdout.read() == b"", "its end comes when nobody holds the pipe"
    assert time.monotonic() - began < 60


def test_a_process_that_was_started_otherwise_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in ("", "3.5", "99999", "-1"):
        monkeypatch.setenv(starter.STARTER, number)
        starter.ends_with_starter()
        assert starter.STARTER not in os.environ


def test_a_process_that_is_not_the_first_tells_its_error_late(second: None) -> None:
    began = time.monotonic()

    with pytest.raises(surgeon.DataError), second_to_the_first():
        raise surgeon.DataError("the same as the first one's")
    assert time.monotonic() - began >= 0.3


def test_a_process_that_is_not_the_first_dies_at_once_when_told_to(second: None) -> None:
    before = signal.getsignal(signal.SIGTERM)

    with second_to_the_first():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_process_tells_its_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    began = time.monotonic()

    with pytest.raises(surgeon.DataError), second_to_the_first():
        raise surgeon.DataError("this one")
    assert time.monotonic() - began < 1


def test_the_loss_of_another_process_is_told_from_other_errors(second: None) -> None:
    from torch.distributed import DistNetworkError

    assert is_loss(RuntimeError("gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:44421"))
    assert is_loss(DistNetworkError("The client socket has failed to connect"))
    assert not is_loss(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_process_alone_has_lost_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")

    assert not is_loss(RuntimeError("Connection closed by peer"))


def test_processes_are_started_with_the_interpreter_that_runs(surgeon_that_does: Path) -> None:
    does = f"sys.exit(0 if sys.executable == {sys.executable!r} and os.getppid() == {os.getpid()} else 9)"

    assert relaunch([str(surgeon_that_does), does], processes=1) == 0

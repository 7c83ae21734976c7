"""A command that is killed, or whose calls into the system fail: some of the points that benchmarks/faults.py finds."""

import shutil
import subprocess

import pytest
from faults import Call, Fault, Place, attack, calls_of, check
from handmade import checkpoint

import surgeon

WORDS = ("truncate", "llama", "--layers", "2", "--max-shard-size", "5KB", "-o", "out")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a directory with a source and an old output; skips where strace cannot work."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    tried = subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"strace cannot trace here: {tried.stderr.strip()}")
    directory = tmp_path_factory.mktemp("models")
    surgeon.truncate(checkpoint(directory / "llama"), layers=1).save(directory / "out")
    return directory


@pytest.mark.parametrize("overwrite", [False, True])
def test_whatever_call_is_killed_or_fails_the_output_is_whole_or_absent_and_the_next_run_right(
    overwrite, models, tmp_path
):
    report = attack(WORDS, Place(models, tmp_path / "place"), most=8, seed=0, overwrite=overwrite)

    assert report.broken == []
    assert report.counts["kills"] >= 2
    assert report.counts["errors"] >= 2
    assert report.counts["missed"] == 0


def test_no_kill_around_the_moment_of_replacement_loses_the_old_output(models, tmp_path):
    place = Place(models, tmp_path / "place")
    place.fill(old=True)
    calls = calls_of(place, [*WORDS, "--overwrite"])
    whole = place.digests("out")
    [swap] = [number for number, call in enumerate(calls) if call.name.startswith("rename")]

    outcomes = [
        list(check(place, WORDS, Fault(Call(*call), "KILL"), whole, overwrite=True))
        for call in calls[swap - 1 : swap + 3]  # from the last sync before it to the first removal after it
    ]

    assert outcomes == [["kept"], ["kept"], ["new"], ["new"]]

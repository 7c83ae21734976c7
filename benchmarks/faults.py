"""Kill commands, and fail their calls into the system, at every call that matters; then look at what is left.

    python benchmarks/faults.py [truncate grow ...] [--most 40] [--seed 0]

Runs each command once under strace and lists its calls that write, rename or remove something, or that read its
source. Then repeats the command, each time from the same start, with one of these calls killed (SIGKILL) or failing
(ENOSPC, EIO, EACCES): half of the times with an old output that `--overwrite` replaces. After each it is checked that

- the sources are what they were;
- the output is absent, or the old one, or the new one, each whole; and a failed command left nothing new;
- a failed command printed one `error:` and no traceback, and one that succeeded wrote the right result;
- the next run writes what an undisturbed one writes, and removes what the disturbed one left.

`--most` limits the calls of each command and mode; they are drawn at random. Needs strace, and leave to use ptrace.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TRAIN = "--data text.txt --max-steps 3 --save-every 1 --sequence-length 32 --batch-size 2 --resume"
COMMANDS = {
    name: command.split()
    for name, command in {
        "truncate": "truncate llama --layers 3 --max-shard-size 100KB -o out",
        "prune": "prune llama --layers 3 --score random -o out",
        "grow": "grow llama --layers 8 --hidden-size 96 --no-verify --max-shard-size 500KB -o out",
        "donor": "grow small --layers 6 --donor llama --no-verify -o out",
        "gist": "gist llama --tokens 2 -o out",
        "convert": "convert pickled -o out",
        "finetune": f"finetune llama {TRAIN} -o out",
    }.items()
}
# What a failed call says, and the calls that can say so.
WRITING = {"write", "pwrite64", "copy_file_range", "fallocate", "ftruncate", "fsync", "fdatasync"}
NAMING = {"mkdir", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "chmod"}
READING = {"read", "pread64", "preadv"}
TRACED = sorted(WRITING | NAMING | READING | {"openat"})
LINE = re.compile(r"(?P<process>\d+) +(?P<call>\w+)\((?P<rest>.*)")
MOST_READS = 4  # of each file that are disturbed
LIMIT = 300  # seconds for one command


class Call(NamedTuple):
    """The `number`-th call of its name by its thread, and what it was about."""

    name: str
    number: int
    about: str


class Fault(NamedTuple):
    """A call, and what becomes of it: KILL, or the name of an error."""

    call: Call
    kind: str


@dataclass
class Place:
    """A directory in which a command runs: made anew for every run, always under the same name."""

    models: Path  # what is copied into it
    path: Path

    def fill(self, *, old: bool) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.models, self.path, ignore=None if old else shutil.ignore_patterns("out"))

    def run(self, words: Sequence[str], *tracer: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [*tracer, sys.executable, "-m", "surgeon", *words]
        return subprocess.run(
            command, cwd=self.path, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )

    def digests(self, *names: str) -> dict[str, str]:
        """Return a digest of every file of some directories. What a receipt or a card says of time does not count."""
        found = {}
        for name in names:
            for path in sorted((self.path / name).rglob("*")):
                if path.is_file():
                    content = path.read_bytes()
                    if path.name in ("surgeon.json", "README.md"):
                        content = b"some" if content else b""
                    found[str(path.relative_to(self.path))] = hashlib.sha256(content).hexdigest()
        return found

    def leftovers(self) -> list[str]:
        return sorted(
            str(path.relative_to(self.path))
            for path in self.path.rglob(".*")
            if ".surgeon-" in path.name or path.name.startswith((".checkpoint", ".surgeon"))
        )


@dataclass
class Report:
    """What became of the faults of one command."""

    counts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


def calls_of(place: Place, words: Sequence[str]) -> list[Call]:
    """Return the calls of an undisturbed run that write, name or remove something, or read the sources."""
    log = place.path.with_suffix(".strace")
    tracer = ("strace", "-f", "-y", "--seccomp-bpf", "-s", "0", "-o", str(log), "-e", "trace=" + ",".join(TRACED))
    done = place.run(words, *tracer)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed without any fault:\n{done.stderr}")
    numbers: Counter[tuple[str, str]] = Counter()
    reads: Counter[str] = Counter()
    calls = []
    for line in log.read_text(errors="replace").splitlines():
        if not (match := LINE.match(line)) or match["call"] not in TRACED:
            continue
        numbers[match["process"], match["call"]] += 1
        call = Call(match["call"], numbers[match["process"], match["call"]], about_of(place, line))
        reads[call.about] += call.name in READING
        if call.about and counts(call.name, match["rest"], call.about) and reads[call.about] <= MOST_READS:
            calls.append(call)
    return calls


def counts(call: str, arguments: str, about: str) -> bool:
    """Return whether a call is one that is disturbed: not, say, the listing of a directory."""
    if call == "openat":
        return "O_CREAT" in arguments or about.endswith((".safetensors", ".json", ".bin", ".txt"))
    return True


def faults_of(call: Call) -> Iterator[Fault]:
    """Yield what can become of a call."""
    if call.name not in READING:
        yield Fault(call, "KILL")
    if call.name in WRITING:
        yield Fault(call, "ENOSPC")
    if call.name in WRITING | READING:
        yield Fault(call, "EIO")
    if call.name in NAMING | {"openat"}:
        yield Fault(call, "EACCES")


def disturb(place: Place, words: Sequence[str], fault: Fault, *, overwrite: bool) -> subprocess.CompletedProcess[str]:
    """Run a command in a fresh place with one fault."""
    place.fill(old=overwrite)
    how = "signal=SIGKILL" if fault.kind == "KILL" else f"error={fault.kind}"
    call = fault.call
    inject = f"inject={call.name}:{how}:when={call.number}"
    log = place.path.with_suffix(".strace")
    quicker = () if fault.kind == "KILL" else ("--seccomp-bpf",)  # with it strace 6.1 sends no signals
    tracer = ("strace", "-f", "-y", *quicker, "-s", "0", "-o", str(log), "-e", f"trace={call.name}", "-e", inject)
    return place.run([*words, *(["--overwrite"] if overwrite else [])], *tracer)


def hit(place: Place) -> str:
    """Return what the call that was disturbed was about."""
    lines = place.path.with_suffix(".strace").read_text(errors="replace").splitlines()
    injected = [line for line in lines if "INJECTED" in line]
    if any("+++ killed by SIGKILL" in line for line in lines):
        injected = [line for line in lines if LINE.match(line)][-1:]
    return about_of(place, injected[0]) if injected else "nothing"


def about_of(place: Place, line: str) -> str:
    """Return the paths of a call that are in the place, without its name and the ids of processes."""
    calls = line.split(" = ")[0]
    paths = re.findall(rf'[<"]({re.escape(str(place.path))}[^>"]*|\.?out[^>"]*)[>"]', calls)
    return re.sub(r"-\d{3,}", "-PID", " ".join(paths).replace(str(place.path), ""))


def check(place: Place, words: Sequence[str], fault: Fault, whole: dict[str, str], *, overwrite: bool) -> Iterator[str]:
    """Run a command with one fault, then without; yield what is wrong, or how it ended: "kept", "new" or "none"."""
    place.fill(old=overwrite)
    sources = [path.name for path in place.path.iterdir() if path.name != "out"]
    before, old = place.digests(*sources), place.digests("out")
    done = disturb(place, words, fault, overwrite=overwrite)
    if fault.call.about != hit(place):
        yield "missed"
        return
    found = place.digests("out")
    state = "new" if found == whole else "none" if not found else "kept" if found == old else "DIFFERENT OUTPUT"
    yield state
    if overwrite and state == "none":
        yield "OLD OUTPUT LOST"
    if place.digests(*sources) != before:
        yield "SOURCE CHANGED"
    if fault.kind != "KILL":
        if done.returncode == 0 and state != "new":
            yield "SUCCESS WITHOUT A RESULT"
        if done.returncode and (done.returncode != 1 or "error: " not in done.stderr or "Traceback" in done.stderr):
            yield f"NO CLEAN ERROR (exit {done.returncode}): {done.stderr.strip()[-300:]}"
        if done.returncode and state == "new" and "finetune" not in words:
            yield "AN ERROR, BUT A RESULT"
        removes = fault.call.name in ("unlink", "unlinkat", "rmdir")
        if place.leftovers() and not removes and "finetune" not in words:
            yield f"A FAILURE LEFT {place.leftovers()}"
    again = place.run([*words, *(["--overwrite"] if (place.path / "out").exists() else [])])
    if again.returncode:
        yield f"THE NEXT RUN FAILED: {again.stderr.strip()[-300:]}"
    elif place.digests("out") != whole:
        yield "THE NEXT RUN DIFFERS"
    if place.leftovers():
        yield f"LEFT AFTER THE NEXT RUN: {place.leftovers()}"


def attack(words: Sequence[str], place: Place, *, most: int, seed: int, overwrite: bool) -> Report:
    """Disturb a command at up to `most` calls, and return what became of it."""
    report = Report()
    place.fill(old=overwrite)
    calls = calls_of(place, [*words, *(["--overwrite"] if overwrite else [])])
    whole = place.digests("out")
    faults = [fault for call in calls for fault in faults_of(call)]
    for fault in random.Random(seed).sample(faults, min(most, len(faults))):
        outcomes = list(check(place, words, fault, whole, overwrite=overwrite))
        if outcomes == ["missed"]:
            report.counts["missed"] += 1
            continue
        report.counts["kills" if fault.kind == "KILL" else "errors"] += 1
        report.counts["with --overwrite"] += overwrite
        for outcome in outcomes:
            if outcome in ("kept", "new", "none"):
                report.counts[outcome] += 1
            else:
                report.broken.append(f"{' '.join(words)}{' --overwrite' * overwrite}, {fault}: {outcome}")
    return report


def build(models: Path) -> None:
    """Write the models and the text that the commands read, and an old output."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    import talkers
    import torch
    from safetensors.torch import load_file

    import surgeon

    talkers.talker(models / "llama")
    surgeon.truncate(models / "llama", layers=4).save(models / "small")
    surgeon.truncate(models / "llama", layers=1).save(models / "out")
    shutil.copytree(models / "llama", models / "pickled")
    weights = load_file(models / "pickled/model.safetensors")
    torch.save(weights, models / "pickled/pytorch_model.bin")
    (models / "pickled/model.safetensors").unlink()
    talkers.written(models / "text.txt", talkers.TEXT * 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="COMMAND", help=f"of {', '.join(COMMANDS)}; all by default")
    parser.add_argument("--most", type=int, default=40, help="faults for each command and mode")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with tempfile.TemporaryDirectory(prefix="surgeon-faults-") as directory:
        work = Path(directory)
        build(work / "models")
        total: Counter[str] = Counter()
        columns = ("kills", "errors", "missed", "with --overwrite", "kept", "new", "none", "broken")
        print(f"| command | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
        for name in options.names or list(COMMANDS):
            counts: Counter[str] = Counter()
            for overwrite in (False, True):
                place = Place(work / "models", work / name)
                report = attack(COMMANDS[name], place, most=options.most, seed=options.seed, overwrite=overwrite)
                counts += report.counts + Counter(broken=len(report.broken))
                print("\n".join(report.broken), end="\n" * bool(report.broken), file=sys.stderr)
            total += counts
            print(f"| {name} | {' | '.join(str(counts[key]) for key in columns)} |", flush=True)
        print(f"| all | {' | '.join(str(total[key]) for key in columns)} |")


if __name__ == "__main__":
    main()

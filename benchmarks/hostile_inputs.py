"""Run every command on every hostile input that it reads (tests/hostile), and say what became of each.

    python benchmarks/hostile_inputs.py --json found.json

Each run is a process of its own, with `y` on its standard input. What is right: exit code 1, one `error:` line, nothing
written; or exit code 0 where the input does not matter to the command. Never: another exit code, a traceback, code of
the input that ran, more than 10 seconds of a processor, more than 500 MB above what the libraries take.
"""

import argparse
import hashlib
import json
import os
import pkgutil
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from hostile import BASES, CASES, Case, words_of  # noqa: E402

SECONDS, MEGABYTES = 10, 500
PATIENCE = 60  # seconds on the clock until a run is ended
ADDRESSES = 8 << 30  # bytes that a run may map, so that a finding costs a run and not the machine
CODE = "open({canary!r}, 'w')\nclass Config: ...\nclass Model: ...\nclass Tokenizer: ...\n"


@dataclass(frozen=True)
class Finding:
    """What became of a command on a hostile input."""

    case: str
    command: str
    verdict: str  # refused, harmless, accepted; everything else is wrong
    code: int
    seconds: float
    megabytes: float  # above what the libraries took before
    names_culprit: bool
    error: str


class Workshop:
    """Makes hostile inputs from sound ones, which are built once, and runs commands on them."""

    def __init__(self, place: Path) -> None:
        import surgeon.cli.app

        for command in surgeon.cli.app.commands():  # once, and not in each process
            import_module(f"surgeon.cli.{command}")
        self.place = place
        self.sound: dict[tuple[str, str], str] = {}

    def base(self, name: str) -> Path:
        """Return the sound input of a name."""
        at = self.place / "bases" / name
        if not at.exists():
            at.mkdir(parents=True)
            BASES[name](at)
        return at

    def find(self, case: Case) -> Iterator[Finding]:
        """Yield what becomes of each command of a case."""
        for command in case.commands:
            self._run_sound(case.base, command)
        at = self._copied(case.base)
        case.damage(at)
        for command in case.commands:
            yield self._judged(case, command, at)

    def found(self, case: Case, command: str) -> Finding:
        """Return what becomes of one command; where it succeeds, sound input is not asked for the same."""
        at = self._copied(case.base)
        case.damage(at)
        return self._judged(case, command, at)

    def _run_sound(self, base: str, command: str) -> None:
        """Remember what a command makes of sound input."""
        if (base, command) not in self.sound:
            at = self._copied(base)
            code, _, _, _ = self._run(at, command)
            self.sound[base, command] = self._result(at) if code == 0 else f"exit code {code}"

    def _copied(self, base: str) -> Path:
        """Return a copy of a sound input, with code beside it that a loader could run."""
        at = self.place / "case" / "at"
        shutil.rmtree(at.parent, ignore_errors=True)
        shutil.copytree(self.base(base), at, symlinks=True)
        for place in (at, at / "model"):
            if place.is_dir():
                (place / "code.py").write_text(CODE.format(canary=str(at.parent / "ran")))
        return at

    def _judged(self, case: Case, command: str, at: Path) -> Finding:
        before = _listing(at.parent)
        code, seconds, megabytes, error = self._run(at, command)
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        said = lines[0] if lines else error.strip()[-300:]
        changed = {path for path, what in _listing(at.parent).items() if before.get(path) != what}
        written = {path for path in changed if not path.startswith(("out.run", "at/run", "stderr", "stdout", "yes"))}
        verdict = "refused"
        if (at.parent / "ran").exists() or (at / "ran").exists():
            verdict = "ran code"
        elif code == -signal.SIGKILL:
            verdict = "hangs"
        elif "Traceback" in error:
            verdict = "traceback"
        elif code == 0:
            verdict = "harmless" if self._result(at) == self.sound.get((case.base, command)) else "accepted"
        elif code != 1:
            verdict = f"exit code {code}"
        elif len(lines) != 1 or not lines[0].isprintable() or len(lines[0]) > 1100:
            verdict = f"{len(lines)} error lines"
        elif written:
            verdict = f"left {min(written)}"
        elif seconds > SECONDS:
            verdict = "slow"
        elif megabytes > MEGABYTES:
            verdict = "large"
        for path in at.parent.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        names_culprit = any(word in said for word in case.named)
        return Finding(
            case.name, command, verdict, code, round(seconds, 2), round(megabytes), names_culprit, said[:400]
        )

    def _run(self, at: Path, command: str) -> tuple[int, float, float, str]:
        """Return exit code, seconds of CPU, megabytes and standard error of a command, in a process of its own."""
        (at.parent / "yes").write_text("y\n" * 100)
        began = time.monotonic()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        if (child := os.fork()) == 0:
            _become(words_of(command, at, at.parent / "out"), at.parent)
        while True:
            done, status, usage = os.wait4(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() - began > PATIENCE:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        megabytes = (usage.ru_maxrss * 1024 - resident) / 1e6
        error = (at.parent / "stderr").read_text(errors="replace")
        return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, megabytes, error

    def _result(self, at: Path) -> str:
        """Return what a command that succeeded has made: a digest of weights, or what it printed."""
        weights = sorted((at.parent / "out").glob("*.safetensors"))
        if weights:
            return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
        lines = (at.parent / "stdout").read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if "second" not in line)


def _become(words: list[str], place: Path) -> None:
    """Run the command line in this process, which ends with it."""
    os.chdir(place)
    for name, number, flags in (("yes", 0, os.O_RDONLY), ("stdout", 1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(place / name, flags), number)
    os.dup2(os.open(place / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    sys.argv = ["surgeon", *words]
    code: object = 1
    try:
        from surgeon.cli.app import main

        main()
    except SystemExit as done:
        code = done.code
    except BaseException:  # noqa: BLE001
        import traceback

        traceback.print_exc()
    if isinstance(code, str):
        sys.stderr.write(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _listing(place: Path) -> dict[str, tuple[int, int, int]]:
    """Return type, size and time of everything below a directory."""
    found = {}
    for path in place.rglob("*"):
        about = path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        found[str(path.relative_to(place))] = (
            about.st_mode,
            *((0, 0) if is_folder else (about.st_size, about.st_mtime_ns)),
        )
    return found


def import_everything() -> None:
    """Import what commands import, once and not in each of their processes."""
    import transformers.trainer  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401

    import surgeon

    for module in pkgutil.walk_packages(surgeon.__path__, "surgeon."):
        if not module.name.endswith("__main__"):
            import_module(module.name)


def main() -> None:
    """Run the cases, and exit with 1 where one of them is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose names have this regular expression")
    parser.add_argument("--commands", default="", help="only these commands: inspect,evaluate")
    parser.add_argument("--json", type=Path, help="where the findings go, one per line")
    options = parser.parse_args()

    import_everything()
    chosen = [case for case in CASES if re.search(options.only, case.name)]
    counts: Counter[str] = Counter()
    wrong = []
    named = 0
    log = options.json.open("w") if options.json else None
    with tempfile.TemporaryDirectory(prefix="surgeon-hostile-") as place:
        workshop = Workshop(Path(place))
        for case in chosen:
            if options.commands:
                commands = tuple(each for each in case.commands if each in options.commands.split(","))
                case = Case(case.name, case.base, case.damage, commands, case.named)
            for finding in workshop.find(case):
                counts[finding.verdict] += 1
                named += finding.verdict == "refused" and finding.names_culprit
                if finding.verdict not in ("refused", "harmless", "accepted"):
                    wrong.append(finding)
                    print(
                        f"{finding.verdict:14} {finding.command:12} {finding.case}: {finding.error[:200]}", flush=True
                    )
                if log:
                    log.write(json.dumps(asdict(finding)) + "\n")
                    log.flush()
        unsound = {key: value for key, value in workshop.sound.items() if value.startswith("exit code")}
    print(f"{len(chosen)} inputs, {sum(counts.values())} runs: {dict(counts.most_common())}")
    print(f"of the refusals {named} name the file, key or tensor; the others name the checkpoint")
    if unsound:
        print(f"commands that fail on sound input: {unsound}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

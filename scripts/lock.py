"""Write requirements.lock: every package that development and CI install, with its hashes, for each supported Python.

    make lock

Needs uv. torch and what only its CUDA builds need are left out: which build is right depends on the machine.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
COMPILE = (
    "uv pip compile pyproject.toml --extra dev --constraints constraints.txt --universal --python-version 3.11 "
    "--generate-hashes --no-header --no-annotate --no-emit-index-url"
)
WITH_TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
HEADER = "# Written by `make lock` from pyproject.toml and constraints.txt. torch is installed beside it.\n"


def main() -> None:
    compiled = subprocess.run(COMPILE.split(), cwd=ROOT, check=True, capture_output=True, text=True).stdout
    entries = re.split(r"(?m)^(?=\S)", compiled)
    LOCK.write_text(HEADER + "".join(entry for entry in entries if not WITH_TORCH.match(entry)), encoding="utf-8")


if __name__ == "__main__":
    main()

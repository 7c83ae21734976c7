"""Write requirements.lock and requirements-docs.lock: every package that is installed, with its hashes.

    make lock

Needs uv. The first is what development and CI install, for each supported Python; torch and what only its CUDA builds
need are left out: which build is right depends on the machine. The second is what builds the documentation.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK, DOCS = ROOT / "requirements.lock", ROOT / "requirements-docs.lock"
OPTIONS = "--universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url"
COMPILE = f"uv pip compile pyproject.toml --extra dev --constraints constraints.txt {OPTIONS}"
COMPILE_DOCS = f"uv pip compile --group pyproject.toml:docs {OPTIONS}"
WITH_TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
HEADER = "# Written by `make lock` from pyproject.toml and constraints.txt. torch is installed beside it.\n"
HEADER_DOCS = "# Written by `make lock` from the group `docs` of pyproject.toml; `make docs` installs it.\n"


def main() -> None:
    entries = re.split(r"(?m)^(?=\S)", compiled(COMPILE))
    LOCK.write_text(HEADER + "".join(entry for entry in entries if not WITH_TORCH.match(entry)), encoding="utf-8")
    DOCS.write_text(HEADER_DOCS + compiled(COMPILE_DOCS), encoding="utf-8")


def compiled(command: str) -> str:
    """Return what uv writes: each package with its version and its hashes."""
    return subprocess.run(command.split(), cwd=ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()

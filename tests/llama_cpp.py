"""Run checkpoints in llama.cpp: its own converter, then its own runtime (xllamacpp), each in a process of its own.

The converter is not packaged: `make` unpacks it from the source archive of llama-cpp-python into .venv/llama.cpp.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

CONVERTER = Path(sys.prefix, "llama.cpp")
LIMIT = 300  # seconds that no toys come near

# A toy has no tokenizer: it gets a vocabulary in which token 17 is called "t17". The prompts are token numbers.
CONVERT = """
import json, sys
from pathlib import Path
root, folder, answer = map(Path, sys.argv[1:])
sys.path[:0] = [str(root), str(root / "gguf-py")]
import gguf, torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

def set_vocab(self):
    size = self.hparams["vocab_size"]
    writer = self.gguf_writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(size)])
    writer.add_token_types([1] * size)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)

refusals = {}
for name, model in json.loads(sys.stdin.read()).items():
    try:
        hparams = ModelBase.load_hparams(Path(model), False)
        kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
        if not Path(model, "tokenizer_config.json").exists():
            kind.set_vocab = set_vocab
        with torch.inference_mode():
            kind(Path(model), gguf.LlamaFileType.ALL_F32, folder / f"{name}.gguf", eager=True).write()
    except Exception as error:
        refusals[name] = f"converter: {type(error).__name__}: {error}"
answer.write_text(json.dumps(refusals))
"""

RUN = """
import json, os, sys
import xllamacpp
request, answers = json.loads(sys.stdin.read()), {}
for name, path in request["files"].items():
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 1
    params.cpuparams.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it works in 16 bits
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        continue
    answers[name] = []
    for prompt in request["prompts"]:
        options = {"prompt": prompt, "max_tokens": 1, "logprobs": request["size"], "temperature": 0}
        found = server.handle_completions(options)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        by_token = {candidate["id"]: candidate["logprob"] for candidate in found}
        answers[name].append([by_token[token] for token in range(request["size"])])
with open(sys.argv[1], "w") as file:
    json.dump(answers, file)
os._exit(0)  # the server's threads do not end by themselves
"""


def missing() -> str | None:
    """Return what is not installed, None where llama.cpp can run."""
    if find_spec("xllamacpp") is None:
        return "xllamacpp is not installed"
    if not (CONVERTER / "conversion").is_dir():
        return f"llama.cpp's converter is not in {CONVERTER}"
    return None


def log_probabilities(
    models: Mapping[str, Path], prompts: Sequence[Sequence[int]], *, vocab: int, folder: Path
) -> dict[str, list[list[float]] | str]:
    """Return for each checkpoint the log-probability of each token behind each prompt, or why llama.cpp refuses it.

    The GGUF files, in float32, are written to `folder`.
    """
    answer = folder / "answer.json"
    _run(CONVERT, str(CONVERTER), str(folder), str(answer), stdin={name: str(path) for name, path in models.items()})
    refusals: dict[str, str] = json.loads(answer.read_text())
    files = {name: str(folder / f"{name}.gguf") for name in models if name not in refusals}
    request = {"files": files, "prompts": [list(prompt) for prompt in prompts], "size": vocab}
    _run(RUN, str(answer), stdin=request)
    answers: dict[str, list[list[float]]] = json.loads(answer.read_text())
    for name in files.keys() - answers.keys():  # its log in a process of its own: llama.cpp's thread writes it late
        log = _run(RUN, str(answer), stdin=request | {"files": {name: files[name]}})
        refusals[name] = f"runtime: {log.partition('error loading model: ')[2].partition(chr(10))[0]}"
        assert refusals[name] != "runtime: ", log[-2000:]
    return {name: answers.get(name) or refusals[name] for name in models}


def _run(script: str, *arguments: str, stdin: object) -> str:
    """Return what a script printed on standard error."""
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.run(command, input=json.dumps(stdin), capture_output=True, text=True, timeout=LIMIT)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stderr

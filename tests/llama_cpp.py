"""Run a checkpoint in llama.cpp: its own converter, then its own runtime (xllamacpp), each in a process of its own.

llama.cpp ends the process where it does not like a model, so nothing of it is imported here. The converter is not
packaged; `make` unpacks it from the source archive of llama-cpp-python into .venv/llama.cpp.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

CONVERTER = Path(sys.prefix, "llama.cpp")
LIMIT = 120  # seconds that no toy comes near

# A toy has no tokenizer: it gets a vocabulary in which token 17 is called "t17". The prompts are token numbers.
CONVERT = """
import sys
from pathlib import Path
root, model, out = map(Path, sys.argv[1:])
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

hparams = ModelBase.load_hparams(model, False)
kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
if not (model / "tokenizer_config.json").exists():
    kind.set_vocab = set_vocab
with torch.inference_mode():
    kind(model, gguf.LlamaFileType.ALL_F32, out, eager=True).write()
"""

RUN = """
import json, os, sys
import xllamacpp
path, request, answer = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 1
params.cpuparams.n_threads = 1
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it works in 16 bits
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
request = json.loads(request)
answers = [server.handle_completions({"prompt": prompt, "max_tokens": 1, "logprobs": request["size"], "temperature": 0})
           for prompt in request["prompts"]]
with open(answer, "w") as file:
    json.dump([answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] for answer in answers], file)
os._exit(0)  # the server's threads do not end by themselves
"""


class RefusedError(Exception):
    """llama.cpp's converter or runtime does not take the checkpoint; the message is its own."""


def missing() -> str | None:
    """Return what is not installed, None where llama.cpp can run."""
    if find_spec("xllamacpp") is None:
        return "xllamacpp is not installed"
    if not (CONVERTER / "conversion").is_dir():
        return f"llama.cpp's converter is not in {CONVERTER}"
    return None


def convert(model: Path, out: Path) -> Path:
    """Return `out`, now the GGUF file in float32 that llama.cpp's converter makes. Raises RefusedError."""
    _run(CONVERT, str(CONVERTER), str(model), str(out), what="converter")
    return out


def log_probabilities(gguf: Path, prompts: Sequence[Sequence[int]], *, vocab: int) -> list[list[float]]:
    """Return the log-probability of each token of the vocabulary behind each prompt. Raises RefusedError."""
    answer = gguf.with_suffix(".json")
    request = json.dumps({"prompts": [list(prompt) for prompt in prompts], "size": vocab})
    _run(RUN, str(gguf), request, str(answer), what="runtime")
    rows = []
    for candidates in json.loads(answer.read_text()):
        by_token = {candidate["id"]: candidate["logprob"] for candidate in candidates}
        rows.append([by_token[token] for token in range(vocab)])
    return rows


def _run(script: str, *arguments: str, what: str) -> None:
    process = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=LIMIT)
    if process.returncode:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
        telling = [line for line in lines if "rror" in line or "ASSERT" in line or "not supported" in line]
        raise RefusedError(f"{what}: {(telling or lines or ['no reason'])[0][:160]}")

"""Models of transformers are loaded in one place, and no code of a checkpoint is run."""

import ast
import json
import shutil
from pathlib import Path

import surgeon

ROOT = Path(surgeon.__file__).parent
LOADERS = {
    "models/loading.py",
    "checkpoint/formats/gguf.py",  # a quantised file, which transformers dequantises: no safetensors source
    "models/adapters.py",  # PEFT's loader, of adapters
    "gist/compressor.py",  # PEFT's loader, of adapters
}


def calls(path):
    """Return the calls of a loader in a module, with what they say about code of the checkpoint."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [
        {item.arg: item.value for item in node.keywords}
        for node in nodes
        if isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    ]


def test_loaders_of_transformers_are_called_in_one_module():
    callers = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if calls(path)}
    mentions = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
    }

    assert callers == mentions == LOADERS  # a loader that is handed on is a call too


def test_no_loader_runs_code_of_a_checkpoint():
    found = calls(ROOT / "models/loading.py")

    assert len(found) == 4
    for keywords in found:
        assert isinstance(keywords["trust_remote_code"], ast.Constant)
        assert keywords["trust_remote_code"].value is False


def test_a_kernel_that_a_config_names_is_not_fetched(toy, tmp_path):
    from surgeon.models.loading import load_architecture

    model = tmp_path / "model"
    shutil.copytree(toy("llama"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"_attn_implementation": "nobody/kernel"}))

    loaded, report = load_architecture(str(model), None, dtype="float32")

    assert loaded.config._attn_implementation == "sdpa"
    assert not any(report.values())

"""Models of transformers are loaded in one place, and no code of a checkpoint is run unless it is trusted."""

import ast
import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from handmade import edit_config
from talkers import talker, written

import surgeon
from surgeon.errors import MeasureError, PlanError
from surgeon.surgery import open_source

ROOT = Path(surgeon.__file__).parent
# What makes a config, a model or a tokenizer of a checkpoint, and so may be asked to run its code.
LOADERS = {"from_pretrained", "from_config", "_from_config", "for_model", "get_config_dict", "get_class_in_module"}
CODE = """
open({canary!r}, "w")

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig


class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""


def calls(path, name):
    """Return the keywords of each call of a method in a module."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [
        {item.arg: ast.unparse(item.value) for item in node.keywords}
        for node in nodes
        if isinstance(node.func, ast.Attribute) and node.func.attr == name
    ]


@pytest.fixture
def with_code(tmp_path) -> tuple[Path, Path]:
    """Return a checkpoint whose config names code of its own, and the file that this code would leave."""
    model, canary = talker(tmp_path / "model"), tmp_path / "ran"
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    edit_config(model, model_type="mine", architectures=["MineForCausalLM"], auto_map=auto_map)
    (model / "mine.py").write_text(CODE.format(canary=str(canary)))
    return model, canary


def test_loaders_of_transformers_are_mentioned_in_one_module():
    mentions = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in LOADERS  # a loader that is handed on is a call too
    }

    assert mentions == {"models/loading.py"}


def test_every_loader_is_told_whether_code_is_trusted():
    loading = ROOT / "models/loading.py"
    of_checkpoints, of_adapters = calls(loading, "from_pretrained")

    assert of_checkpoints["trust_remote_code"] == "_TRUSTED.get()"
    assert of_adapters == {}  # PEFT has no code of adapters; the modules that they name are refused
    assert [keywords["trust_remote_code"] for keywords in calls(loading, "from_config")] == ["_TRUSTED.get()"]


def test_nothing_is_trusted_by_default():
    from surgeon.models.loading import code_is_trusted, runs

    with runs("model", trust_remote_code=True):
        assert code_is_trusted()

    assert not code_is_trusted()


@pytest.mark.parametrize("model_type", ["mine", "clip_text_model"])  # the second is no language model of transformers
def test_code_of_a_model_does_not_run_though_yes_is_typed(model_type, with_code, monkeypatch):
    import torch

    from surgeon.models.loading import load_model
    from surgeon.models.skeleton import build_skeleton

    model, canary = with_code
    edit_config(model, model_type=model_type)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    source = open_source(model)

    with pytest.raises(MeasureError):
        build_skeleton(source, torch.float32)
    with pytest.raises(MeasureError):
        load_model(source, dtype=torch.float32, hint="none")

    assert not canary.exists()


def test_the_error_of_a_model_with_code_says_what_to_do_and_trusted_code_runs(with_code, run, tmp_path):
    model, canary = with_code
    text, plain = written(tmp_path / "text.txt"), talker(tmp_path / "plain")
    options = ("--data", text, "--sequence-length", 16, "--samples", 2)

    refused = run("evaluate", model, *options)
    assert (refused.code, canary.exists()) == (1, False)
    assert "is run by code of its own (auto_map in config.json)" in refused.err
    assert "Then add --trust-remote-code." in refused.err

    trusted = run("evaluate", model, *options, "--trust-remote-code", "--json")
    assert (trusted.code, canary.exists()) == (0, True)
    expected = json.loads(run("evaluate", plain, *options, "--json").out)
    assert json.loads(trusted.out)["perplexity"] == expected["perplexity"]


def test_a_receipt_says_that_code_was_trusted(with_code, run, tmp_path):
    model, _ = with_code
    options = ("--layers", 4, "--data", written(tmp_path / "text.txt"), "--samples", 2, "--sequence-length", 16)

    trusted = run("prune", model, *options, "--trust-remote-code", "-o", tmp_path / "out")
    untrusted = run("prune", talker(tmp_path / "plain"), *options, "-o", tmp_path / "other")

    assert trusted.code == untrusted.code == 0, trusted.err + untrusted.err
    steps = [json.loads((tmp_path / name / "surgeon.json").read_text())["steps"] for name in ("out", "other")]
    assert [step[0]["prune"].get("trust_remote_code") for step in steps] == [True, None]


def test_a_surgery_needs_no_code_of_the_checkpoint(with_code, run, tmp_path):
    model, canary = with_code

    assert run("truncate", model, "--layers", 2, "-o", tmp_path / "out").code == 0
    assert not canary.exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_kernel_that_a_config_names_is_not_fetched(key, nested, toy, tmp_path):
    from surgeon.models.loading import load_architecture

    model = tmp_path / "model"
    shutil.copytree(toy("llama"), model)
    chosen = {key: "nobody/kernel"}
    edit_config(model, **({"extra": chosen} if nested else chosen))

    loaded, report = load_architecture(str(model), None, dtype="float32")

    assert loaded.config._attn_implementation == "sdpa"
    assert "nobody" not in str(loaded.config.to_dict())
    assert not any(report.values())


def test_other_weights_that_a_config_names_are_not_read(toy, tmp_path):
    import torch
    from safetensors.torch import load_file

    from surgeon.models.loading import load_model

    model = tmp_path / "model"
    shutil.copytree(toy("llama"), model)
    (model / "other.safetensors").write_bytes((toy("llama-tied") / "model.safetensors").read_bytes())
    edit_config(model, transformers_weights="other.safetensors")

    loaded = load_model(open_source(model), dtype=torch.float32, hint="none")

    stored = load_file(model / "model.safetensors")
    assert torch.equal(loaded.state_dict()["model.norm.weight"], stored["model.norm.weight"])


def test_an_adapter_that_lies_beside_the_weights_is_not_added_in_silence(toy, tmp_path):
    import torch

    from surgeon.models.loading import load_model

    model = tmp_path / "model"
    shutil.copytree(toy("llama"), model)
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}')

    with pytest.raises(MeasureError, match=r"holds an adapter beside its weights \(adapter_config.json\)"):
        load_model(open_source(model), dtype=torch.float32, hint="none")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "mine"}, "megatron_core"),
        ({"peft_type": "PREFIX_TUNING"}, "'PREFIX_TUNING'"),
        ([], r"\[\]"),
    ],
)
def test_adapters_that_could_import_a_module_are_refused(config, named, tmp_path):
    from surgeon.models.loading import load_adapter

    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(PlanError, match=named):
        load_adapter(None, tmp_path)


def test_a_disk_that_is_full_behind_the_error_of_a_library_gets_the_hint_for_it():
    from surgeon.models.loading import _hint_for_disk

    def fail(code):
        try:
            raise OSError(code, os.strerror(code))
        except OSError as error:
            raise ValueError("cannot cache") from error

    for code, hinted in [(errno.ENOSPC, True), (errno.EROFS, True), (errno.ENOENT, False)]:
        with pytest.raises(ValueError, match="cannot cache") as caught:
            fail(code)
        assert (_hint_for_disk(caught.value) is not None) == hinted

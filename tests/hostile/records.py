"""Hostile files that surgeon itself writes and reads again: receipts, scores, gists, adapters, runs of training."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile.bases import Case, Damage, edited, set_entry

RECEIPT, SCORES = "model/surgeon.json", "scores.json"


def cases() -> Iterator[Case]:
    """Yield the hostile records."""
    for name, change in RECEIPTS.items():
        commands = ("inspect", "against", "against-it", "train-new", "truncate")
        yield Case(f"receipt: {name}", "cut", edited(RECEIPT, change), commands, ("surgeon.json", "receipt", "model"))
    for name, change in SCORED.items():
        yield Case(f"scores: {name}", "scored", edited(SCORES, change), ("scores-from",), ("scores",))
    for name, damage in GISTS.items():
        yield Case(f"gist: {name}", "gisted", damage, ("read-gist",), ("gist",))
    for name, damage in ADAPTERS.items():
        yield Case(f"adapter: {name}", "gisted", damage, ("adapted",), ("adapter",))
    for name, value in GIST_BLOCKS.items():
        damage = edited("model/config.json", set_entry("gist", to=value))
        yield Case(f"gist block: {name}", "gisted", damage, ("compress", "read-gist", "check"), ("config.json", "gist"))
    for name, damage in RUNS.items():
        yield Case(f"run: {name}", "run", damage, ("resume", "plot"), ("run", "checkpoint"))


def _pipe(file: str) -> Damage:
    return lambda at: [(at / file).unlink(), os.mkfifo(at / file)]


NO_JSON: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "bad UTF-8": b'{"a":"\xff"}',
    "nested 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested 800 deep": b'{"format":1,"a":' + b"[" * 800 + b"]" * 800 + b"}",
}
RECEIPTS: dict[str, Callable[[Any], Any] | bytes] = {
    **NO_JSON,
    "axis maps that are a list": set_entry("axis_maps", to=[1]),
    "axis maps that are words": set_entry("axis_maps", to={"ffn": "x"}),
    "axis maps of numbers": set_entry("axis_maps", to={"ffn": [1, 2]}),
    "axis maps of three": set_entry("axis_maps", to={"ffn": [[0, 1, 2]]}),
    "axis maps of words in pairs": set_entry("axis_maps", to={"ffn": [["a", "b"]]}),
    "an axis of 2^60 positions": set_entry("axis_maps", to={"ffn": [[0, 2**60]]}),
    "an axis of -5 positions": set_entry("axis_maps", to={"ffn": [[0, -5]]}),
    "an axis map of null": set_entry("axis_maps", to={"ffn": None}),
    "no axis maps": lambda content: {key: value for key, value in content.items() if key != "axis_maps"},
    "a layer map that is a word": set_entry("layer_map", to="x"),
    "a layer map of words": set_entry("layer_map", to=["a"] * 8),
    "a layer map of huge numbers": set_entry("layer_map", to=[10**30] * 8),
    "a layer map of negative numbers": set_entry("layer_map", to=[-1] * 8),
    "a layer map of bools": set_entry("layer_map", to=[True] * 8),
    "steps that are a word": set_entry("steps", to="grow"),
    "steps of words": set_entry("steps", to=["grow"]),
    "a step that is a word": set_entry("steps", to=[{"grow": "x"}]),
    "noise that is a word": set_entry("steps", to=[{"grow": {"noise": "x"}}]),
    "a step with escapes": set_entry("steps", to=[{"\x1b[2J": {}}]),
    "a source that is a word": set_entry("source", to="x"),
    "notes that are a number": set_entry("notes", to=7),
    "token ids that are words": set_entry("steps", to=[{"gist": {"token_ids": ["a"]}}]),
    "token ids without end": set_entry("steps", to=[{"gist": {"token_ids": [10**9]}}]),
}


def _record(key: str) -> dict[str, Callable[[Any], Any]]:
    values = {"a word": "x", "a list": [1], "null": None, "below zero": -1, "a bool": True, "an object": {"a": 1}}
    return {f"{key} is {what}": set_entry(key, to=value) for what, value in values.items()}


SCORED: dict[str, Callable[[Any], Any] | bytes] = {
    **NO_JSON,
    **_record("depth"),
    **_record("model"),
    **_record("scores"),
    **_record("widths"),
    "another format": set_entry("format", to=99),
    "scores of another depth": set_entry("scores", "angular", to=[[0.5]]),
    "scores that are words": set_entry("scores", "angular", to=[["a"] * 7] * 6),
    "scores of NaN": set_entry("scores", "angular", to=[[float("nan")] * 7] * 6),
    "a score that is not asked for": lambda content: content["scores"].clear(),
    "a greedy order of words": set_entry("greedy", to={"order": ["a"]}),
    "a greedy order beyond the depth": set_entry("greedy", to={"order": [99]}),
    "options that are a word": set_entry("options", to="x"),
    "a fingerprint of another model": set_entry("model", "fingerprint", to="sha256-sampled:0"),
    "a fingerprint that is a list": set_entry("model", "fingerprint", to=[1]),
    "data that is a number": set_entry("data", to=7),
    "a loss that is a word": set_entry("loss", to="x"),
    "a name of a megabyte": set_entry("scores", "x" * 10**6, to=[1]),
}


# --- gists --------------------------------------------------------------------------------------------------------


def _about(change: Callable[[Any], Any] | bytes) -> Damage:
    return edited("gist/gist.json", change)


GISTS: dict[str, Damage] = {
    **{f"gist.json: {name}": _about(content) for name, content in NO_JSON.items()},
    "gist.json is a pipe": _pipe("gist/gist.json"),
    "another format": _about(set_entry("format", to=9)),
    "a file outside": _about(set_entry("tensors", "file", to="../../x")),
    "another digest": _about(set_entry("tensors", "sha256", to="0")),
    "a digest that is a list": _about(set_entry("tensors", "sha256", to=[])),
    "a depth that is a word": _about(set_entry("tensors", "layers", to="x")),
    "a depth of 2^60": _about(set_entry("tensors", "layers", to=2**60)),
    "a depth of zero": _about(set_entry("tensors", "layers", to=0)),
    "tensors that are a word": _about(set_entry("tensors", to="x")),
    "tokens that are a word": _about(set_entry("num_tokens", to="x")),
    "a million tokens": _about(set_entry("num_tokens", to=10**6)),
    "an offset below zero": _about(set_entry("position_offset", to=-1)),
    "an offset of 2^60": _about(set_entry("position_offset", to=2**60)),
    "ids that are words": _about(set_entry("token_ids", to=["a", "b"])),
    "ids that are a number": _about(set_entry("token_ids", to=7)),
    "ids beyond the vocabulary": _about(set_entry("token_ids", to=[10**6, 10**6])),
    "an unknown layout": _about(set_entry("layout", to="zorg")),
    "a layout that is a list": _about(set_entry("layout", to=[])),
    "another model": _about(set_entry("model", "fingerprint", to="sha256-sampled:0")),
    "a model that is a word": _about(set_entry("model", to="x")),
    "states that are cut": lambda at: os.truncate(at / "gist/adapter_model.safetensors", 50),
    "states that are a pipe": _pipe("gist/adapter_model.safetensors"),
    "no states": lambda at: (at / "gist/adapter_model.safetensors").unlink(),
    "an adapter config that is no JSON": lambda at: (at / "gist/adapter_config.json").write_text("{"),
    "an adapter config that is a list": lambda at: (at / "gist/adapter_config.json").write_text("[]"),
    "an adapter config of zero heads": edited("gist/adapter_config.json", set_entry("num_attention_heads", to=0)),
    "an adapter config of words": edited("gist/adapter_config.json", set_entry("token_dim", to="x")),
    "nothing at all": lambda at: shutil.rmtree(at / "gist"),
}
GIST_BLOCKS: dict[str, Any] = {
    "a word": "x",
    "another version": {"version": 9},
    "no ids": {"version": 1, "num_tokens": 2},
    "ids that are words": {"version": 1, "token": "<GIST>", "token_ids": ["a"], "num_tokens": 2},
    "ids beyond the vocabulary": {"version": 1, "token": "<GIST>", "token_ids": [10**6], "num_tokens": 2},
    "no tokens": {"version": 1, "token": "<GIST>", "token_ids": [300], "num_tokens": 0},
    "a billion tokens": {"version": 1, "token": "<GIST>", "token_ids": [300], "num_tokens": 10**9},
    "a name of a megabyte": {"version": 9, "x": "y" * 10**6},
}
ADAPTERS: dict[str, Damage] = {
    **{
        f"adapter_config.json: {name}": (
            lambda at, content=content: (at / "adapter/adapter_config.json").write_bytes(content)
        )
        for name, content in NO_JSON.items()
    },
    "a module to import": edited(
        "adapter/adapter_config.json", lambda content: content | {"megatron_config": {"a": 1}, "megatron_core": "code"}
    ),
    "another kind": edited("adapter/adapter_config.json", set_entry("peft_type", to="PREFIX_TUNING")),
    "an unknown kind": edited("adapter/adapter_config.json", set_entry("peft_type", to="ZORG")),
    "a rank that is a word": edited("adapter/adapter_config.json", set_entry("r", to="x")),
    "a rank of zero": edited("adapter/adapter_config.json", set_entry("r", to=0)),
    "a rank of 2^40": edited("adapter/adapter_config.json", set_entry("r", to=2**40)),
    "modules that are nowhere": edited("adapter/adapter_config.json", set_entry("target_modules", to=["zorg"])),
    "modules that are a number": edited("adapter/adapter_config.json", set_entry("target_modules", to=7)),
    "weights that are cut": lambda at: os.truncate(at / "adapter/adapter_model.safetensors", 50),
    "no weights": lambda at: (at / "adapter/adapter_model.safetensors").unlink(),
    "a receipt that is no JSON": edited("adapter/surgeon.json", b"{"),
    "a receipt of words": edited("adapter/surgeon.json", set_entry("steps", to=["x"])),
}


# --- runs of training ---------------------------------------------------------------------------------------------


def _forged(file: str, change: Callable[[Path], object]) -> Damage:
    """Return the damage of a file in the newest checkpoint whose manifest is forged to agree with it."""

    def damage(at: Path) -> None:
        import hashlib

        newest = max((at / "run").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        change(newest / file)
        manifest = json.loads((newest / "MANIFEST.json").read_text())
        content = (newest / file).read_bytes()
        manifest["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (newest / "MANIFEST.json").write_text(json.dumps(manifest))

    return damage


def _saved(value: Any) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        import torch

        torch.save(value, path)

    return save


def _json(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content) or content))

    return edit


def _manifests(change: Callable[[Any], Any] | bytes) -> Damage:
    def damage(at: Path) -> None:
        for path in (at / "run").glob("checkpoint-*"):
            edited(f"run/{path.name}/MANIFEST.json", change)(at)

    return damage


RUNS: dict[str, Damage] = {
    **{f"run.json: {name}": edited("run/run.json", content) for name, content in NO_JSON.items()},
    "run.json is a pipe": _pipe("run/run.json"),
    "settings that are a list": edited("run/run.json", set_entry("settings", to=[])),
    "a setting of another type": edited("run/run.json", set_entry("settings", "max_steps", to={"a": 1})),
    "a setting of a megabyte": edited("run/run.json", set_entry("settings", "optim", to="x" * 10**6)),
    "a setting with escapes": edited("run/run.json", set_entry("settings", "optim", to="\x1b[2J")),
    "another model": edited("run/run.json", set_entry("model", to={"path": "x", "fingerprint": 7})),
    "data that is a number": edited("run/run.json", set_entry("data", to=7)),
    "data.json is no JSON": edited("run/data.json", b"{"),
    "data.json is a list": edited("run/data.json", b"[]"),
    "data.json without data": edited("run/data.json", b"{}"),
    "data.json of a number": edited("run/data.json", b'{"data": 7}'),
    "data.json is nested": edited("run/data.json", b'{"data":' * 100_000),
    "lr.json that nobody asked for": lambda at: (at / "run/lr.json").write_text("{"),
    "metrics that are no JSON": lambda at: (at / "run/metrics.jsonl").write_text("{oops}\n"),
    "metrics without steps": lambda at: (at / "run/metrics.jsonl").write_text('{"loss": 1}\n'),
    "metrics of words": lambda at: (at / "run/metrics.jsonl").write_text('{"step": 1, "loss": "x", "tokens": []}\n'),
    "metrics that are nested": lambda at: (at / "run/metrics.jsonl").write_text('{"a":' * 100_000 + "\n"),
    "metrics that are a pipe": _pipe("run/metrics.jsonl"),
    "a manifest that is nested": _manifests(b'{"a":' * 100_000),
    "a manifest of words": _manifests(set_entry("files", to={"a": "x"})),
    "a manifest that leaves": _manifests(set_entry("files", "../x", to={"bytes": 1, "sha256": "0"})),
    "a manifest of a negative size": _manifests(
        set_entry("files", "trainer_state.json", to={"bytes": -1, "sha256": "0"})
    ),
    "random state: a list": _forged("rng_state.pth", _saved([1, 2])),
    "random state: a dictionary without parts": _forged("rng_state.pth", _saved({})),
    "random state: words": _forged("rng_state.pth", _saved({"python": "x", "numpy": "y", "cpu": "z"})),
    "random state: no pickle": _forged("rng_state.pth", lambda path: path.write_bytes(b"x")),
    "random state: a call": _forged("rng_state.pth", _saved({"python": os.system})),
    "optimizer: a list": _forged("optimizer.pt", _saved([1])),
    "optimizer: no groups": _forged("optimizer.pt", _saved({"state": {}, "param_groups": []})),
    "optimizer: no pickle": _forged("optimizer.pt", lambda path: path.write_bytes(b"x")),
    "schedule: a list": _forged("scheduler.pt", _saved([1])),
    "schedule: words": _forged("scheduler.pt", _saved({"last_epoch": "x"})),
    "trainer state: no JSON": _forged("trainer_state.json", lambda path: path.write_text("{")),
    "trainer state: a list": _forged("trainer_state.json", lambda path: path.write_text("[]")),
    "trainer state: steps of words": _forged("trainer_state.json", _json(set_entry("global_step", to="x"))),
    "trainer state: tokens of words": _forged("trainer_state.json", _json(set_entry("num_input_tokens_seen", to="x"))),
    "trainer state: another step": _forged("trainer_state.json", _json(set_entry("global_step", to=10**9))),
    "trainer state: nothing": _forged("trainer_state.json", lambda path: path.write_text("{}")),
}

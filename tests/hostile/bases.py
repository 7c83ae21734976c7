"""The sound inputs that hostile ones are made from, and the commands that read them."""

import json
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import handmade

Damage = Callable[[Path], object]
TEXT, RECORDS = "text.txt", "records.jsonl"


@dataclass(frozen=True)
class Case:
    """A hostile input. `named` are words of which the error line has one: the culprit."""

    name: str
    base: str
    damage: Damage
    commands: tuple[str, ...]
    named: tuple[str, ...]


def edited(file: str, change: Callable[[Any], Any] | bytes) -> Damage:
    """Return what puts bytes in the place of a file, or changes the JSON in it."""

    def damage(at: Path) -> None:
        path = at / file
        if isinstance(change, bytes):
            path.write_bytes(change)
            return
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content) or content))

    return damage


def set_entry(*path: Any, to: Any) -> Callable[[Any], None]:
    """Return a change that sets an entry of a JSON file."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


# The words of each command. In a copy of the base, {at}, lies what it reads; {out} is where it may write.
_ROWS = "--samples 2 --sequence-length 16"
_TRAIN = "--max-steps 1 --batch-size 1 --sequence-length 16 -o {out} --run-dir {out}.run"
COMMANDS: Mapping[str, str] = {
    "inspect": "inspect {at}/model",
    "against": "inspect {at}/model --against {at}/source",
    "against-it": "inspect {at}/source --against {at}/model",
    "truncate": "truncate {at}/model --layers 2 -o {out}",
    "grow": "grow {at}/model --layers 8 --intermediate-size 64 -o {out}",
    "grow-unverified": "grow {at}/model --layers 8 -o {out} --no-verify",
    "prune": f"prune {{at}}/model --layers 4 --data {{at}}/text.txt {_ROWS} -o {{out}}",
    "prune-last": "prune {at}/model --layers 2 --score last -o {out}",
    "scores-from": "prune {at}/model --layers 4 --scores-from {at}/scores.json -o {out}",
    "evaluate": f"evaluate {{at}}/model --data {{at}}/text.txt {_ROWS}",
    "answers": "evaluate {at}/model --data {at}/records.jsonl --metric exact-match --chat --max-new-tokens 4",
    "generate": "generate {at}/model 'The cat' --max-new-tokens 4",
    "chat": "generate {at}/model 'The cat' --max-new-tokens 4 --chat",
    "gist": "gist {at}/model --tokens 2 -o {out}",
    "check": "gist {at}/model --check",
    "compress": "compress {at}/model --prompt 'The cat sat on the mat.' -o {out}",
    "adapted": "compress {at}/model --prompt 'The cat sat.' --adapter {at}/adapter -o {out}",
    "read-gist": "generate {at}/model 'The cat' --max-new-tokens 4 --gist {at}/gist",
    "finetune": f"finetune {{at}}/model --data {{at}}/text.txt {_TRAIN}",
    "train-new": f"finetune {{at}}/model --data {{at}}/text.txt --train new {_TRAIN}",
    "train-chat": f"finetune {{at}}/model --data {{at}}/records.jsonl {_TRAIN}",
    "train-data": f"finetune {{at}}/model --data {{at}}/data {_TRAIN}",
    "resume": "finetune {at}/model --data {at}/text.txt --max-steps 3 --batch-size 1 --sequence-length 16"
    " --save-every 1 -o {out} --run-dir {at}/run --resume",
    "plot": "plot {at}/run -o {out}.png",
    "convert": "convert {at}/model -o {out}",
    "convert-file": "convert {at}/model.gguf -o {out}",
    "on-data": f"evaluate {{at}}/model --data {{at}}/data {_ROWS}",
}


def words_of(command: str, at: Path, out: Path) -> list[str]:
    """Return the words of a command on the copy of a base."""
    return [word.format(at=at, out=out) for word in shlex.split(COMMANDS[command])]


# --- making them --------------------------------------------------------------------------------------------------


def _by_hand(at: Path) -> None:
    handmade.checkpoint(at / "model")


def _sharded(at: Path) -> None:
    handmade.checkpoint(at / "model", shards=3)


def _talking(name: str) -> Callable[[Path], None]:
    def make(at: Path) -> None:
        from talkers import TEMPLATE, jsonl, talker, written

        talker(at / "model", name, template=TEMPLATE)
        (at / "data").mkdir(parents=True)
        written(at / TEXT)
        written(at / "data" / "a.txt")
        chat = [{"role": "user", "content": "The cat?"}, {"role": "assistant", "content": "sat"}]
        jsonl(at / RECORDS, {"messages": chat}, {"messages": chat})

    return make


def _cut(at: Path) -> None:
    """A model with a receipt: `model` was grown from `source`."""
    import surgeon

    _talking("llama")(at)
    (at / "model").rename(at / "source")
    surgeon.grow(at / "source", layers=8, intermediate_size=64).save(at / "model")


def _scored(at: Path) -> None:
    import surgeon

    _talking("llama")(at)
    pruning = surgeon.prune(at / "model", layers=4, data=[str(at / TEXT)], samples=2, sequence_length=16)
    assert pruning.scores is not None
    (at / "scores.json").write_bytes(pruning.scores.to_bytes())


def _gisted(at: Path) -> None:
    import surgeon

    _talking("llama")(at)
    (at / "model").rename(at / "plain")
    surgeon.add_gist(at / "plain", tokens=2).save(at / "model")
    surgeon.compress(at / "model", "The cat sat on the mat.", output=at / "gist")
    options = {"gist": True, "gist_reader": "frozen", "lora": 1, "keep_adapter": True, "max_steps": 1}
    pair = {"prompt": "The cat sat on", "completion": "the mat."}
    (at / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    surgeon.finetune(at / "model", data=[str(at / "pairs.jsonl")], output=at / "adapter", batch_size=1, **options)


class _KilledError(Exception):
    pass


class _Killer:
    """Ends a run at its third step, as a kill does."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given, **named: None

    def step(self, report: object) -> None:
        if report.step >= 3:  # type: ignore[attr-defined]
            raise _KilledError


def _run(at: Path) -> None:
    """A run of training that was killed after its second checkpoint."""
    import surgeon

    _talking("llama")(at)
    options = {"max_steps": 3, "batch_size": 1, "sequence_length": 16, "save_every": 1, "run_dir": at / "run"}
    data = [os.fspath(at / TEXT)]
    try:
        surgeon.finetune(at / "model", data=data, output=at / "out", watcher=_Killer(), **options)
    except _KilledError:
        return
    raise AssertionError("the run was not ended")


def _gguf(at: Path) -> None:
    import test_convert
    from later import import_late
    from talkers import talker

    import_late(test_convert)
    talker(at / "llama")
    test_convert.write_gguf(at / "model.gguf", at / "llama", "F16")


def _pickled(at: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from talkers import talker

    model = talker(at / "model")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


BASES: Mapping[str, Callable[[Path], None]] = {
    "handmade": _by_hand,
    "sharded": _sharded,
    **{name: _talking(name) for name in ("llama", "gpt2", "mixtral", "qwen3", "gemma2")},
    "cut": _cut,
    "scored": _scored,
    "gisted": _gisted,
    "run": _run,
    "gguf": _gguf,
    "pickled": _pickled,
}

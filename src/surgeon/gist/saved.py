"""A compressed prompt on the disk: gist.json, which describes it, and one file of tensors.

Where positions start at 0 and all layers have keys and values of one shape, the tensors are a CARTRIDGE adapter of
PEFT: `PeftModel.from_pretrained(model, directory)` then works without surgeon. Else they are gist.safetensors.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from surgeon.checkpoint.header import opened
from surgeon.checkpoint.json_files import read_json
from surgeon.checkpoint.receipt import to_bytes
from surgeon.checkpoint.source import ADAPTER, ADAPTER_WEIGHTS, inside
from surgeon.errors import CheckpointError
from surgeon.gist.states import GistStates
from surgeon.mistyped import hint_beside

FORMAT = 1
ABOUT = "gist.json"
TENSORS = "gist.safetensors"
EMBEDDINGS = "prompt_embeddings"  # PEFT's name of the tensor: (K, layers * 2 * kv_heads * head_dim)
AGAIN = "Compress the prompt again: surgeon compress MODEL --prompt ..."


@dataclass(frozen=True, eq=False, slots=True)
class Saved:
    """A compressed prompt from the disk: the content of gist.json, and the states."""

    about: Mapping[str, Any]
    states: GistStates


def storage_of(states: GistStates) -> str:
    """Return the name of the file for the states: the adapter where PEFT can load them, else our own."""
    return ADAPTER_WEIGHTS if states.offset == 0 and states.encoded is None and states.is_uniform else TENSORS


def files_of(states: GistStates, about: Mapping[str, Any], *, base: str) -> dict[str, bytes]:
    """Return the files of a compressed prompt by name, gist.json last. `base` names the model to PEFT."""
    file = storage_of(states)
    if file == ADAPTER_WEIGHTS:
        files = {ADAPTER: to_bytes(_adapter_config(states, base)), ADAPTER_WEIGHTS: save({EMBEDDINGS: _packed(states)})}
    else:
        files = {TENSORS: save(_named(states))}
    digest = hashlib.sha256(files[file]).hexdigest()
    tensors = {"file": file, "sha256": digest, "layers": len(states.layers)}
    about = {"format": FORMAT, **about, "num_tokens": states.num_tokens, "position_offset": states.offset}
    return {**files, ABOUT: to_bytes({**about, "tensors": tensors})}


def read(directory: Path) -> Saved:
    """Return the compressed prompt in a directory.

    Raises CheckpointError where there is none, or one that is damaged or written by a later version of surgeon.
    """
    about = _about(directory)
    try:
        file, digest, depth = (about["tensors"][key] for key in ("file", "sha256", "layers"))
        count, offset, ids = about["num_tokens"], about["position_offset"], about["token_ids"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / ABOUT} lacks {error}", hint=AGAIN) from error
    numbers = [count, offset, *(ids if isinstance(ids, list) else [None])]
    if file not in (ADAPTER_WEIGHTS, TENSORS) or not all(
        type(number) is int and 0 <= number < 2**31 for number in numbers
    ):
        raise CheckpointError(f"{directory / ABOUT} makes no sense", hint=AGAIN)
    path = inside(directory, file)
    with opened(path) as opened_file:
        content = opened_file.read()
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not what {ABOUT} says", hint=AGAIN)
    try:
        tensors = load(content)
        states = (
            _unpacked(directory, tensors, depth) if file == ADAPTER_WEIGHTS else _read_named(tensors, depth, offset)
        )
    except (SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not hold the states of a gist: {error}", hint=AGAIN) from error
    if not states.layers or {layer[0].shape[2] for layer in states.layers} != {count} or len(ids) != count:
        num_tokens = states.num_tokens if states.layers else 0
        raise CheckpointError(f"{path} has a gist of {num_tokens} tokens, {ABOUT} says {count}", hint=AGAIN)
    return Saved(about, states)


def _about(directory: Path) -> dict[str, Any]:
    path = inside(directory, ABOUT)
    if not path.exists():
        hint = "A compressed prompt is a directory that surgeon compress wrote."
        hint = hint if directory.exists() else hint_beside(directory, hint)
        raise CheckpointError(f"there is no compressed prompt in {directory}: no {ABOUT}", hint=hint)
    about = read_json(path)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        version = about.get("format") if isinstance(about, dict) else about
        raise CheckpointError(f"{path} has the format {version!r}, not {FORMAT}", hint="pip install -U surgeon")
    return about


def _adapter_config(states: GistStates, base: str) -> dict[str, Any]:
    _, heads, num_tokens, head_dim = states.layers[0][0].shape
    return {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_attention_heads": heads,  # of keys and values, as PEFT counts them here
        "num_frozen_tokens": 0,
        "num_layers": len(states.layers),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": num_tokens,
        "peft_type": "CARTRIDGE",
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": heads * head_dim,
    }


def _packed(states: GistStates) -> Tensor:
    """Return keys and values in PEFT's order: for each token, layer after layer, its key and its value."""
    pairs = torch.stack([tensor[0].transpose(0, 1) for layer in states.layers for tensor in layer], 1)
    return pairs.reshape(states.num_tokens, -1).cpu().contiguous()


def _unpacked(directory: Path, tensors: Mapping[str, Tensor], depth: int) -> GistStates:
    config = read_json(inside(directory, ADAPTER))
    heads, width = config["num_attention_heads"], config["token_dim"]
    packed = tensors[EMBEDDINGS]
    pairs = packed.view(packed.shape[0], depth, 2, heads, width // heads).permute(1, 2, 3, 0, 4).contiguous()
    return GistStates([(pair[0][None], pair[1][None]) for pair in pairs], offset=0)


def _named(states: GistStates) -> dict[str, Tensor]:
    named = {} if states.encoded is None else {"encoded": states.encoded}
    for i, (key, value) in enumerate(states.layers):
        named |= {f"layers.{i}.key": key, f"layers.{i}.value": value}
    return {name: tensor.cpu().contiguous() for name, tensor in named.items()}


def _read_named(tensors: Mapping[str, Tensor], depth: int, offset: int) -> GistStates:
    layers = [(tensors[f"layers.{i}.key"], tensors[f"layers.{i}.value"]) for i in range(depth)]
    return GistStates(layers, offset, tensors.get("encoded"))

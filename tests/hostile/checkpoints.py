"""Hostile checkpoints: headers, indexes, configs with each key of the wrong type, and files that are no files."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from handmade import edit_config, llama, raw_file, read_index, safetensors, shard_name, write_index

from hostile.bases import Case, Damage

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
CHEAP = ("inspect", "truncate")
PLANNED = (*CHEAP, "grow-unverified", "prune-last")
RUNNING = ("inspect", "truncate", "grow", "prune", "evaluate", "generate", "finetune")


def cases() -> Iterator[Case]:
    """Yield the hostile checkpoints."""
    for name, damage in HEADERS.items():
        yield Case(f"header: {name}", "handmade", damage, PLANNED, (WEIGHTS,))
    for name, damage in INDEXES.items():
        yield Case(f"index: {name}", "sharded", damage, PLANNED, ("model-0000", INDEX))
    for name, damage in NO_FILES.items():
        yield Case(f"no file: {name}", "handmade", damage, PLANNED, (CONFIG, WEIGHTS, "model"))
    for name, damage in LOADED_FILES.items():
        commands = ("evaluate", "generate", "check", "finetune", "prune", "gist")
        yield Case(f"loaded file: {name}", "llama", damage, commands, ("model",))
    for family in ("llama", "gpt2", "mixtral", "qwen3", "gemma2"):
        yield from _wrong_types(family)
    for name, changes in CONFIGS.items():
        yield Case(f"config: {name}", "llama", _config(**changes), RUNNING, (CONFIG, *changes))


# --- headers ------------------------------------------------------------------------------------------------------


def _written(name: str, content: bytes | str | Callable[[], str]) -> Damage:
    def damage(at: Path) -> None:
        made = content() if callable(content) else content
        (at / "model" / name).write_bytes(made.encode() if isinstance(made, str) else made)

    return damage


def _weights(content: bytes | Callable[[], bytes]) -> Damage:
    return lambda at: (at / "model" / WEIGHTS).write_bytes(content if isinstance(content, bytes) else content())


def _cut_to(length: int) -> Damage:
    return lambda at: os.truncate(at / "model" / WEIGHTS, length)


def _entry(**fields: Any) -> Damage:
    return _weights(raw_file({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} | fields}, b"12"))


def _tensors(**changes: Any) -> Damage:
    layout = llama()
    layout |= {name.replace("__", "."): spec for name, spec in changes.items()}
    return _weights(safetensors(layout))


def _renamed(old: str, new: str) -> Damage:
    return lambda at: (at / "model" / WEIGHTS).write_bytes(
        safetensors({name.replace(old, new): spec for name, spec in llama().items()})
    )


U8 = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
HEADERS: dict[str, Damage] = {
    "empty": _weights(b""),
    "seven bytes": _weights(b"1234567"),
    "only a length": _weights((2).to_bytes(8, "little")),
    "2^64 - 1 bytes": _weights(b"\xff" * 8 + b"{}"),
    "2^63 bytes": _weights((2**63).to_bytes(8, "little") + b"{}"),
    "26 MB": _weights(lambda: (26_000_000).to_bytes(8, "little") + b"{" + b" " * 26_000_000),
    "20 MB of lists": _weights(lambda: raw_file(b'{"a":[' + b"[]," * 6_600_000 + b"1]}")),
    "20 MB of objects": _weights(lambda: raw_file(b'{"a":[' + b"{}," * 6_600_000 + b"1]}")),
    "20 MB of keys": _weights(lambda: raw_file(b"{" + b",".join(b'"%06x":0' % i for i in range(1_800_000)) + b"}")),
    "a million open lists": _weights(lambda: raw_file(b'{"a":' + b"[" * 1_000_000)),
    "50,000 nested objects": _weights(raw_file(b'{"a":' * 50_000 + b"1" + b"}" * 50_000)),
    "a number of 100,000 digits": _weights(
        raw_file('{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % ("9" * 10**5))
    ),
    "a name of a million characters": _weights(lambda: raw_file({"x" * 10**6: U8 | {"dtype": "Q"}}, b"1")),
    "a name with escapes": _weights(raw_file({"\x1b[2J\x1b]0;owned\x07": U8 | {"dtype": "Q"}}, b"1")),
    "a name that turns text around": _weights(raw_file({"\u202eabc\u2066": U8 | {"dtype": "Q"}}, b"1")),
    "half a surrogate": _weights(raw_file('{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1")),
    "no JSON": _weights(raw_file("{oops}")),
    "bad UTF-8": _weights(raw_file(b'{"\xff":1}')),
    "UTF-16": _weights(raw_file('{"a":1}'.encode("utf-16"))),
    "a BOM": _weights(raw_file(b"\xef\xbb\xbf{}")),
    "a list": _weights(raw_file("[]")),
    "a space before": _weights(raw_file(" {}")),
    "metadata of null": _weights(raw_file('{"__metadata__":null}')),
    "metadata of numbers": _weights(raw_file('{"__metadata__":{"a":1}}')),
    "twice the same": _weights(raw_file(f'{{"a":{json.dumps(U8)},"a":{json.dumps(U8)}}}', b"1")),
    "NaN": _weights(raw_file('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"1")),
    "a tensor that is a list": _weights(raw_file({"a": []}, b"")),
    "a tensor that is null": _weights(raw_file({"a": None}, b"")),
    "a field too many": _entry(extra=1),
    "a dtype that is a number": _entry(dtype=7),
    "a dtype that is an object": _entry(dtype={"U8": 1}),
    "an unknown dtype": _entry(dtype="F12"),
    "a shape that is a string": _entry(shape="2"),
    "a shape of floats": _entry(shape=[2.0]),
    "a shape of bools": _entry(shape=[True, 2]),
    "a negative shape": _entry(shape=[-2]),
    "a shape that overflows": _entry(shape=[2**62, 2**62]),
    "a shape of a million": lambda at: _entry(shape=[1] * 10**6)(at),
    "offsets that are strings": _entry(data_offsets=["0", "2"]),
    "offsets that go back": _entry(data_offsets=[2, 0]),
    "three offsets": _entry(data_offsets=[0, 1, 2]),
    "negative offsets": _entry(data_offsets=[-2, 0]),
    "offsets beyond 2^63": _entry(data_offsets=[0, 2**64]),
    "a hole": _weights(raw_file({"a": U8, "b": U8 | {"data_offsets": [2, 3]}}, b"123")),
    "an overlap": _weights(raw_file({"a": U8, "b": U8}, b"1")),
    "bytes after the end": _weights(raw_file({"a": U8}, b"12")),
    "an HTML page": _weights(b"<!DOCTYPE html><html>404</html>"),
    "a Git LFS pointer": _weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "a zip": _weights(b"PK\x03\x04" + bytes(100)),
    "cut in the header": _cut_to(100),
    "cut in the data": _cut_to(4000),
    "no tensors": _weights(raw_file("{}")),
}
INDEX_NAMES: dict[str, Any] = {
    "a path outside": "../outside.safetensors",
    "an absolute path": "/etc/passwd",
    "a drive": "C:model.safetensors",
    "a NUL": "a\0b",
    "nothing": "",
    "a number": 7,
    "null": None,
    "a list": ["model-00001-of-00003.safetensors"],
    "a name of 100,000 characters": "x" * 100_000,
    "a name with escapes": "\x1b[2Jx",
}


def _index(content: bytes | str | Callable[[], str]) -> Damage:
    return _written(INDEX, content)


def _placed(name: str, shard: Any) -> Damage:
    return lambda at: write_index(at / "model", read_index(at / "model") | {name: shard})


INDEXES: dict[str, Damage] = {
    **{f"a shard that is {what}": _placed("lm_head.weight", value) for what, value in INDEX_NAMES.items()},
    "empty": _index(""),
    "no JSON": _index("{"),
    "a list": _index("[]"),
    "no weight_map": _index("{}"),
    "an empty weight_map": _index('{"weight_map":{}}'),
    "a weight_map that is a list": _index('{"weight_map":[1]}'),
    "bad UTF-8": _index(b'{"weight_map":{"\xff":"a"}}'),
    "nested 500 deep": _index('{"weight_map":' + "[" * 500 + "]" * 500 + "}"),
    "nested 100,000 deep": _index('{"a":' * 100_000),
    "26 MB": _index(lambda: '{"weight_map":{"a":"%s"}}' % ("x" * 26_000_000)),
    "12 MB of lists": _index(lambda: '{"a":[' + "[]," * 4_000_000 + "1]}"),
    "a tensor that is nowhere": _placed("model.extra", shard_name(1, 3)),
    "a tensor that is elsewhere": _placed("model.embed_tokens.weight", shard_name(3, 3)),
    "a shard that is missing": lambda at: (at / "model" / shard_name(2, 3)).unlink(),
    "a shard that is a pipe": lambda at: _piped(at / "model" / shard_name(2, 3)),
    "a shard that is a directory": lambda at: _emptied(at / "model" / shard_name(2, 3)),
    "a shard cut short": lambda at: os.truncate(at / "model" / shard_name(3, 3), 300),
}


# --- files that are none ------------------------------------------------------------------------------------------


def _piped(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _emptied(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _linked(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


NO_FILES: dict[str, Damage] = {
    "a config that is a pipe": lambda at: _piped(at / "model" / CONFIG),
    "a config that is /dev/zero": lambda at: _linked(at / "model" / CONFIG, "/dev/zero"),
    "a config that is /dev/random": lambda at: _linked(at / "model" / CONFIG, "/dev/urandom"),
    "a config that is a directory": lambda at: _emptied(at / "model" / CONFIG),
    "a config that is a loop": lambda at: _linked(at / "model" / CONFIG, CONFIG),
    "a config that is gone": lambda at: _linked(at / "model" / CONFIG, "gone"),
    "no config": lambda at: (at / "model" / CONFIG).unlink(),
    "weights that are a pipe": lambda at: _piped(at / "model" / WEIGHTS),
    "weights that are /dev/zero": lambda at: _linked(at / "model" / WEIGHTS, "/dev/zero"),
    "weights that are a directory": lambda at: _emptied(at / "model" / WEIGHTS),
    "weights that are gone": lambda at: _linked(at / "model" / WEIGHTS, "gone"),
    "an empty config": _written(CONFIG, ""),
    "a config of 26 MB": _written(CONFIG, lambda: '{"a":"%s"}' % ("x" * 26_000_000)),
    "a config of 12 MB of objects": _written(CONFIG, lambda: '{"a":[' + "{}," * 4_000_000 + "1]}"),
    "a config nested 900 deep": _written(CONFIG, '{"model_type":"llama","a":' + "[" * 900 + "]" * 900 + "}"),
    "a config nested 100,000 deep": _written(CONFIG, '{"a":' * 100_000 + "1" + "}" * 100_000),
    "a config in UTF-16": _written(CONFIG, '{"model_type":"llama"}'.encode("utf-16")),
    "a config that is a number": _written(CONFIG, "7"),
    "a config that is a string": _written(CONFIG, '"llama"'),
    "a config that is null": _written(CONFIG, "null"),
    "a config with a number of 10,000 digits": _written(CONFIG, '{"a":%s}' % ("9" * 10_000)),
}
LOADED_FILES: dict[str, Damage] = {
    "tokenizer.json is a pipe": lambda at: _piped(at / "model" / "tokenizer.json"),
    "tokenizer_config.json is a pipe": lambda at: _piped(at / "model" / "tokenizer_config.json"),
    "tokenizer_config.json is /dev/zero": lambda at: _linked(at / "model" / "tokenizer_config.json", "/dev/zero"),
    "generation_config.json is a pipe": lambda at: _piped(at / "model" / "generation_config.json"),
    "chat_template.jinja is a pipe": lambda at: _piped(at / "model" / "chat_template.jinja"),
    "generation_config.json is no JSON": _written("generation_config.json", "{"),
    "generation_config.json is a list": _written("generation_config.json", "[1]"),
    "generation_config.json is nested": _written("generation_config.json", '{"a":' * 100_000),
    "generation_config.json has words": _written("generation_config.json", '{"eos_token_id":"x","pad_token_id":[]}'),
    "adapter_config.json beside it": _written(
        "adapter_config.json", '{"peft_type":"LORA","base_model_name_or_path":"x"}'
    ),
}


# --- configs ------------------------------------------------------------------------------------------------------


def _config(**changes: Any) -> Damage:
    return lambda at: edit_config(at / "model", **changes)


# Values of the wrong type, or of the right one and without sense. Each key gets two of them, in turn.
WRONG: tuple[Any, ...] = ("lots", [1], -1, {"a": 1}, 10**9, True, 1.5, None, [[["x"]]], "x" * 10_000, 2**70, 0)
KEYS = {
    "llama": "architectures attention_bias attention_dropout bos_token_id dtype eos_token_id head_dim hidden_act"
    " hidden_size initializer_range intermediate_size max_position_embeddings mlp_bias model_type num_attention_heads"
    " num_hidden_layers num_key_value_heads pad_token_id pretraining_tp rms_norm_eps rope_parameters"
    " tie_word_embeddings transformers_version use_cache vocab_size torch_dtype quantization_config auto_map"
    " is_encoder_decoder layer_types text_config id2label gist",
    "gpt2": "activation_function architectures attn_pdrop bos_token_id dtype embd_pdrop eos_token_id initializer_range"
    " layer_norm_epsilon n_embd n_head n_inner n_layer n_positions pad_token_id resid_pdrop scale_attn_weights"
    " scale_attn_by_inverse_layer_idx reorder_and_upcast_attn tie_word_embeddings use_cache vocab_size",
    "mixtral": "num_local_experts num_experts_per_tok output_router_logits router_aux_loss_coef router_jitter_noise"
    " sliding_window intermediate_size num_key_value_heads rope_parameters hidden_act",
    "qwen3": "layer_types max_window_layers sliding_window use_sliding_window attention_bias rms_norm_eps head_dim"
    " rope_parameters",
    "gemma2": "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar layer_types sliding_window"
    " hidden_activation use_bidirectional_attention rope_parameters",
}


def _wrong_types(family: str) -> Iterator[Case]:
    for number, key in enumerate(KEYS[family].split()):
        for step in (0, 5):
            value = WRONG[(2 * number + step) % len(WRONG)]
            shown = repr(value)[:24]
            yield Case(f"config of {family}: {key} = {shown}", family, _config(**{key: value}), RUNNING, (key, CONFIG))


CONFIGS: dict[str, dict[str, Any]] = {
    "padding beyond the vocabulary": {"pad_token_id": 10_000},
    "end of text beyond the vocabulary": {"eos_token_id": 10_000},
    "begin of text beyond the vocabulary": {"bos_token_id": 10_000},
    "a class that is a module": {"architectures": ["utils"]},
    "a class that is a function": {"architectures": ["AutoTokenizer"]},
    "a class of another family": {"architectures": ["GPT2LMHeadModel"]},
    "a hundred million positions": {"max_position_embeddings": 10**8},
    "an unknown rotation": {"rope_parameters": {"rope_type": "zorg", "rope_theta": 1e4}},
    "a rotation without numbers": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    "a rotation of zero": {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    "an unknown activation": {"hidden_act": "zorg"},
    "an activation that is code": {"hidden_act": "__import__('os')"},
    "a kernel on the Hub": {"_attn_implementation": "nobody/kernel"},
    "experts on the Hub": {"experts_implementation": "nobody/kernel"},
    "code of its own": {"auto_map": {"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Config"}},
    "code on the Hub": {"auto_map": {"AutoModelForCausalLM": "nobody/repo--code.Model"}},
    "code of an unknown type": {"model_type": "zorg9", "auto_map": {"AutoConfig": "code.Config"}},
    "code of a type that is no language model": {
        "model_type": "clip_text_model",
        "auto_map": {"AutoModelForCausalLM": "code.Model"},
    },
    "quantised by an unknown method": {"quantization_config": {"quant_method": "zorg"}},
    "quantised by a method that is no word": {"quantization_config": {"quant_method": [1]}},
    "a nested config that is empty": {"text_config": {}, "num_hidden_layers": None},
    "other weights": {"transformers_weights": "../../etc/passwd"},
    "dropout of 2": {"attention_dropout": 2.0},
    "a dtype of one element": {"dtype": [1]},
    "a dtype that is a class": {"dtype": "nn"},
    "a dtype of integers": {"dtype": "int8"},
    "an epsilon of infinity": {"rms_norm_eps": float("inf")},
    "names of labels without end": {"id2label": {str(i): "x" for i in range(50_000)}},
    "a model type that is a path": {"model_type": "../../../etc"},
    "a model type with escapes": {"model_type": "\x1b[2Jllama"},
    "a model type of 100,000 characters": {"model_type": "x" * 100_000},
}

"""Bad input of every kind, through the real command line: one error line that names the culprit, a hint, no trace."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import (
    checkpoint,
    edit_config,
    llama,
    raw_file,
    read_index,
    safetensors,
    shard_name,
    snapshot,
    write_index,
)

import surgeon
from surgeon.checkpoint.header import TensorSpec

Damage = Callable[[Path], object]
WEIGHTS = "model.safetensors"
COMMANDS = {"inspect": (), "truncate": ("--layers", "1", "-o", "{out}")}


def weights(change: Callable[[bytes], bytes]) -> Damage:
    """Return the damage that changes the bytes of the weights."""
    return lambda model: (model / WEIGHTS).write_bytes(change((model / WEIGHTS).read_bytes()))


def replaced(content: bytes) -> Damage:
    return weights(lambda _: content)


def tensors(change: Callable[[dict[str, TensorSpec]], dict[str, TensorSpec]]) -> Damage:
    return lambda model: (model / WEIGHTS).write_bytes(safetensors(change(llama())))


def config(**changes: object) -> Damage:
    return lambda model: edit_config(model, **changes)


def text(content: str | bytes) -> Damage:
    return lambda model: (model / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)


def without(name: str) -> Damage:
    return tensors(lambda layout: {key: spec for key, spec in layout.items() if key != name})


def shaped(name: str, *shape: int) -> Damage:
    return tensors(lambda layout: layout | {name: TensorSpec("F32", shape)})


def renamed(old: str, new: str) -> Damage:
    return tensors(lambda layout: {key.replace(old, new): spec for key, spec in layout.items()})


def linked(file: str, target: str) -> Damage:
    def damage(model: Path) -> None:
        (model / file).unlink()
        (model / file).symlink_to(target)

    return damage


def header(**tensor: object) -> Damage:
    return replaced(raw_file({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} | tensor}, b"12"))


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"

# What is wrong: how it came to be, and what the error line must name.
ONE_FILE: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "a truncated body": (weights(lambda content: content[:-100]), (WEIGHTS, "is truncated", "tensors end at byte")),
    "a truncated header": (weights(lambda content: content[:100]), (WEIGHTS, "is truncated", "the file has 92")),
    "seven bytes": (replaced(b"1234567"), (WEIGHTS, "7 bytes long")),
    "an empty file": (replaced(b""), (WEIGHTS, "0 bytes long")),
    "a header of 2^64 - 1 bytes": (weights(lambda content: b"\xff" * 8 + content[8:]), (WEIGHTS, str(2**64 - 1))),
    "a header of 101 MB": (weights(lambda content: (101 * 10**6).to_bytes(8, "little")), (WEIGHTS, "101000000")),
    "a header that is not JSON": (replaced(raw_file("{oops}")), (WEIGHTS, "not JSON")),
    "a header in bad UTF-8": (replaced(raw_file(b'{"\xff": 1}')), (WEIGHTS, "not JSON")),
    "an HTML page": (replaced(b"<!DOCTYPE html><html>404</html>"), (WEIGHTS,)),
    "a Git LFS pointer": (replaced(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), (WEIGHTS,)),
    "trailing bytes": (weights(lambda content: content + b"x"), (WEIGHTS, "1 bytes after its last tensor")),
    "an unknown dtype": (header(dtype="F12"), (WEIGHTS, "'a'", "'F12'")),
    "a negative offset": (header(data_offsets=[-2, 0]), (WEIGHTS, "'a'", "[-2, 0]")),
    "a size that does not match": (header(shape=[3]), (WEIGHTS, "'a'", "U8 [3] needs 3")),
    "a shape that overflows": (header(shape=[2**62, 2**62]), (WEIGHTS, "'a'", "impossible shape")),
    "a repeated tensor": (
        weights(lambda content: raw_file('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":0}')),
        (WEIGHTS, "two entries 'a'"),
    ),
    "a missing tensor": (without(Q_PROJ), (Q_PROJ,)),
    "a missing norm": (without("model.norm.weight"), ("'model.norm.weight'",)),
    "a missing head": (without("lm_head.weight"), ("'lm_head.weight'",)),
    "an unknown tensor": (
        tensors(lambda layout: layout | {"model.layers.1.extra": TensorSpec("F32", (1,))}),
        ("'model.layers.1.extra'",),
    ),
    "a wrong shape": (shaped(Q_PROJ, 8, 20), (Q_PROJ, "[8, 20]", "[20, 8]")),
    "a flat tensor": (shaped(Q_PROJ, 160), (Q_PROJ, "[160]", "[20, 8]")),
    "a wrong vocabulary": (shaped("lm_head.weight", 20, 8), ("lm_head.weight", "[20, 8]", "[19, 8]")),
    "more layers than the config says": (tensors(lambda _: llama(layers=5)), ("config.json", "3 layers", "hold 5")),
    "fewer layers than the config says": (tensors(lambda _: llama(layers=2)), ("config.json", "3 layers", "hold 2")),
    "a layer that is missing": (
        tensors(lambda layout: {name: spec for name, spec in layout.items() if ".layers.1." not in name}),
        ("layer 1 is missing", "model.layers.1."),
    ),
    "layers of another family": (renamed("model.layers", "transformer.h"), ("transformer.h.", "model.layers.")),
    "no layers at all": (tensors(lambda layout: {"model.norm.weight": layout["model.norm.weight"]}), ("no layers",)),
    "no tensors at all": (tensors(lambda _: {}), ("no layers",)),
    "no weights": (lambda model: (model / WEIGHTS).unlink(), (WEIGHTS,)),
    "weights that are a directory": (
        lambda model: ((model / WEIGHTS).unlink(), (model / WEIGHTS).mkdir()),
        (WEIGHTS, "Is a directory"),
    ),
    "weights that are a broken link": (linked(WEIGHTS, "../blobs/x"), (WEIGHTS, "broken link", "../blobs/x")),
    "a config that is a broken link": (linked("config.json", "gone"), ("config.json", "broken link")),
    "no config": (lambda model: (model / "config.json").unlink(), ("config.json",)),
    "a config in bad JSON": (text('{\n"model_type": "llama"\n"x"'), ("config.json", "line 3")),
    "a config that is a list": (text("[]"), ("config.json", "list")),
    "a config that is not UTF-8": (text(b'{"model_type": "\xe9"}'), ("config.json", "utf-8")),
    "an empty config": (text("{}"), ("config.json", "model_type")),
    "a config without model_type": (config(model_type=...), ("config.json", "model_type")),
    "a model_type that is a number": (config(model_type=7), ("config.json", "model_type")),
    "a config without a number of layers": (config(num_hidden_layers=...), ("config.json", "how many layers")),
    "-3 layers": (config(num_hidden_layers=-3), ("config.json", "num_hidden_layers = -3")),
    "0 layers": (config(num_hidden_layers=0), ("config.json", "num_hidden_layers = 0")),
    "true layers": (config(num_hidden_layers=True), ("config.json", "num_hidden_layers = True")),
    '"6" layers': (config(num_hidden_layers="6"), ("config.json", "num_hidden_layers = '6'")),
    "3.0 layers": (config(num_hidden_layers=3.0), ("config.json", "num_hidden_layers = 3.0")),
    "a list of layers": (config(num_hidden_layers=[3]), ("config.json", "num_hidden_layers = [3]")),
    "lots of hidden": (config(hidden_size="lots"), ("config.json", "hidden_size = 'lots'")),
    "no hidden size": (config(hidden_size=...), ("config.json", "hidden_size")),
    "hidden 10^9": (config(hidden_size=10**9), ("config.json", "1000000000")),
    "hidden -8": (config(hidden_size=-8), ("config.json", "hidden_size = -8")),
    "0 heads": (config(num_attention_heads=0), ("config.json", "num_attention_heads = 0")),
    "heads that the key-value heads do not divide": (
        config(num_key_value_heads=3),
        ("config.json", "4 attention heads", "3 key-value heads"),
    ),
    "heads that do not divide hidden": (
        config(head_dim=None, num_attention_heads=6),
        ("config.json", "hidden size 8", "6 attention heads"),
    ),
    "a head size of another model": (config(head_dim=7), ("config.json", "[28, 8]", "[20, 8]")),
    "a tied head that is stored anyway and too small": (
        lambda model: (config(tie_word_embeddings=True)(model), shaped("lm_head.weight", 18, 8)(model)),
        ("'lm_head.weight'", "[18, 8]"),
    ),
}  # fmt: skip


# Not refused well yet, each with what is missing. Refused as all the others, once it is there.
TRACEBACKS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "layers numbered in other digits": (renamed("layers.2", "layers.²"), ("model.layers.²",)),
    "a layer number of 5000 digits": (
        tensors(lambda layout: layout | {f"model.layers.{'9' * 5000}.x": TensorSpec("F32", (1,))}),
        ("model.layers.",),
    ),
    "two spellings of one layer": (
        tensors(lambda layout: layout | {"model.layers.02.input_layernorm.weight": TensorSpec("F32", (8,))}),
        ("model.layers.02",),
    ),
    "a stride that is a word": (config(model_type="qwen2_moe", decoder_sparse_step="x"), ("decoder_sparse_step",)),
    "a prefix that is a word": (config(model_type="glm4_moe", first_k_dense_replace="x"), ("first_k_dense_replace",)),
    "layer kinds that are numbers": (config(layer_types=[1, 2, 3]), ("layer_types",)),
    "tying that is neither": (config(model_type="zorg9", tie_word_embeddings="x"), ("tie_word_embeddings",)),
    "per-layer keys that are words": (config(model_type="zorg9", per_layer_config={"a": 1}), ("per_layer_config",)),
}


def index(change: Callable[[dict[str, object]], dict[str, object]]) -> Damage:
    return lambda model: write_index(model, change(dict(read_index(model))))


INDEX = "model.safetensors.index.json"
SHARDED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "a missing shard": (lambda model: (model / shard_name(2, 3)).unlink(), ("shard 2 of 3 is missing",)),
    "an index in bad JSON": (lambda model: (model / INDEX).write_text('{"weight_map":'), (INDEX, "line 1")),
    "an index without weight_map": (lambda model: (model / INDEX).write_text("{}"), (INDEX, "weight_map")),
    "a tensor placed in the wrong shard": (
        index(lambda found: found | {"model.embed_tokens.weight": shard_name(3, 3)}),
        (shard_name(1, 3), "'model.embed_tokens.weight'"),
    ),
    "a tensor that the index omits": (
        index(lambda found: {name: shard for name, shard in found.items() if name != "lm_head.weight"}),
        (shard_name(3, 3), "'lm_head.weight'"),
    ),
    "a path that leaves the directory": (
        index(lambda found: found | {"lm_head.weight": "../outside/x.safetensors"}),
        (INDEX, "'lm_head.weight'", "'../outside/x.safetensors'"),
    ),
    "an absolute path": (
        index(lambda found: found | {"lm_head.weight": "/etc/passwd"}),
        (INDEX, "'lm_head.weight'", "'/etc/passwd'"),
    ),
    "a shard that is a broken link": (linked(shard_name(1, 3), "../blobs/x"), (shard_name(1, 3), "broken link")),
    "a truncated shard": (
        lambda model: (model / shard_name(2, 3)).write_bytes((model / shard_name(2, 3)).read_bytes()[:-1]),
        (shard_name(2, 3), "is truncated"),
    ),
}  # fmt: skip

CASES = {name: (1, *case) for name, case in ONE_FILE.items()} | {name: (3, *case) for name, case in SHARDED.items()}


def assert_refused(outcome, *named: str, code: int = 1) -> None:
    """Assert the form that every refusal has: exit code 1, one error line that names these things, one hint."""
    assert outcome.code == code
    assert outcome.out == ""
    error, hint, *rest = outcome.err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert len(hint) > len("hint: ")
    assert rest == []
    assert [name for name in named if name not in error] == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", CASES)
def test_bad_input_is_refused_by_name_and_nothing_is_written(what, command, run, tmp_path):
    shards, damage, named = CASES[what]
    model = checkpoint(tmp_path / "model", shards=shards)
    damage(model)
    before = snapshot(tmp_path)

    outcome = run(command, model, *(option.format(out=tmp_path / "out") for option in COMMANDS[command]))

    assert_refused(outcome, *named)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("what", TRACEBACKS)
def test_values_that_only_a_hostile_checkpoint_has_are_refused(what, run, tmp_path):
    damage, named = TRACEBACKS[what]
    model = checkpoint(tmp_path / "model")
    damage(model)

    outcomes = [run("truncate", model, "--layers", 2, "-o", tmp_path / "out", "--dry-run"), run("inspect", model)]

    assert_refused(next((outcome for outcome in outcomes if outcome.code), outcomes[0]), *named)


def test_a_billion_layers_are_refused_at_once(run, tmp_path):
    model = checkpoint(tmp_path / "model", num_hidden_layers=10**9)

    assert_refused(run("inspect", model), "config.json", "1000000000 layers", "hold 3")


def test_the_checkpoint_that_all_these_are_made_from_is_sound(run, tmp_path):
    for shards in (1, 3):
        model = checkpoint(tmp_path / f"model{shards}", shards=shards)

        assert run("inspect", model).code == 0
        assert run("truncate", model, "--layers", 1, "-o", tmp_path / f"out{shards}").code == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("{tmp}/missing", ("no such directory", "/missing")),
        ("./missing/", ("no such directory", "./missing/")),
        ("{tmp}/file", ("/file is a file",)),
        ("{tmp}/empty", ("/empty is not a checkpoint", "config.json")),
        ("{tmp}/file/below", ("no such directory",)),
        ("~nobody-of-this-name/model", ("no such directory",)),
        ("", ("is not a checkpoint",)),
    ],
)
def test_a_path_that_holds_no_checkpoint_is_named(model, named, command, run, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path / "empty")

    outcome = run(command, model.format(tmp=tmp_path), *(o.format(out=tmp_path / "out") for o in COMMANDS[command]))

    assert_refused(outcome, *named)
    assert sorted(snapshot(tmp_path)) == ["empty", "file"]


@pytest.mark.parametrize(
    ("options", "named", "code"),
    [
        (("--layers", "4"), ("4 layers", "has 3"), 1),
        (("--layers", "0"), ("at least one layer",), 2),
        (("--layers", "10%"), ("at least one layer",), 1),
        (("--layers", "-1"), ("'-1'",), 2),
        (("--layers", "six"), ("'six'",), 2),
        (("--layers", "2", "--dtype", "float7"), ("'float7'",), 2),
        (("--layers", "2", "--max-shard-size", "big"), ("'big'",), 2),
        (("--layers", "2", "--max-shard-size", "0"), ("'0'",), 2),
        (("--layers", "2", "--max-shard-size", "-5GB"), ("'-5GB'",), 2),
        (("--layers", "2", "--max-shard-size", "nan"), ("'nan'",), 2),
        (("--layers", "2", "--inherit", "soul"), ("'soul'",), 2),
    ],
)
def test_a_request_that_contradicts_the_model_is_refused(options, named, code, run, tmp_path):
    model = checkpoint(tmp_path / "model")

    assert_refused(run("truncate", model, *options, "-o", tmp_path / "out"), *named, code=code)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [("truncate", "x"), ("inspect", "x", "--nope"), ("frobnicate",)])
def test_bad_usage_is_exit_code_2_with_one_line_and_a_hint(args, run):
    assert_refused(run(*args), code=2)


# --- configs that are no damage but no plain model either -------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "zorg"])
def test_a_quantized_checkpoint_is_cut_by_whole_layers_and_refused_what_needs_numbers(method, run, tmp_path):
    model = checkpoint(tmp_path / "model", quantization_config={"quant_method": method, "bits": 4})

    assert run("inspect", model).code == 0
    assert run("truncate", model, "--layers", 2, "-o", tmp_path / "out").code == 0
    assert_refused(
        run("truncate", model, "--layers", 2, "--dtype", "float16", "-o", tmp_path / "no"), "a quantized checkpoint"
    )
    assert_refused(
        run("truncate", model, "--layers", 2, "--inherit", "mlp", "-o", tmp_path / "no"), "a quantized checkpoint"
    )
    kept = json.loads((tmp_path / "out/config.json").read_text())
    assert kept["quantization_config"] == {"quant_method": method, "bits": 4}


def test_an_unknown_model_type_is_cut_by_name_without_a_table(run, tmp_path):
    model = checkpoint(tmp_path / "model", model_type="zorg9")

    assert run("truncate", model, "--layers", 2, "-o", tmp_path / "out").code == 0
    assert surgeon.inspect(tmp_path / "out").anatomy.depth == 2
    assert_refused(run("truncate", model, "--layers", 2, "--inherit", "mlp", "-o", tmp_path / "no"), "'zorg9'")


def test_code_that_a_checkpoint_brings_is_copied_and_never_run(run, tmp_path):
    model = checkpoint(tmp_path / "model", model_type="zorg9", auto_map={"AutoModelForCausalLM": "modeling_zorg.Zorg"})
    (model / "modeling_zorg.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    assert run("inspect", model).code == 0
    assert run("truncate", model, "--layers", 2, "-o", tmp_path / "out").code == 0
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "out/modeling_zorg.py").read_bytes() == (model / "modeling_zorg.py").read_bytes()


CARDS = {
    "tags that make objects": "---\nlicense: !!python/object/apply:os.system ['false']\n---\n",
    "tags that trip their makers": '---\nlicense: !!int ""\nlanguage: !!timestamp x\n---\n',
    "endless nesting": "---\nlicense: " + "[" * 10_000 + "\n---\n",
    "bad YAML": "---\nlicense: [\n---\n",
    "a list": "---\n- license\n---\n",
    "no closing line": "---\nlicense: mit\n",
    "nothing": "",
}


@pytest.mark.parametrize("what", CARDS)
def test_a_strange_model_card_harms_nothing(what, run, tmp_path):
    model = checkpoint(tmp_path / "model")
    (model / "README.md").write_text(CARDS[what])

    assert run("truncate", model, "--layers", 2, "-o", tmp_path / "out").code == 0
    assert "base_model: model" in (tmp_path / "out/README.md").read_text()


def test_a_card_keeps_its_licence_and_its_language_even_norwegian(run, tmp_path):
    import yaml

    model = checkpoint(tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: mit\nlanguage:\n- no\n- en\ntags: [x]\n---\n# Hello\n")

    assert run("truncate", model, "--layers", 2, "-o", tmp_path / "out").code == 0
    metadata = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---\n")[1])
    assert metadata["license"] == "mit"
    assert metadata["language"] == ["no", "en"]


def test_half_a_surrogate_pair_in_a_config_survives(run, tmp_path):
    model = checkpoint(tmp_path / "model", note="\ud800")

    assert run("truncate", model, "--layers", 2, "-o", tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["note"] == "\ud800"


# --- what a terminal must not be sent ---------------------------------------------------------------------------

HOSTILE = "\x1b]0;owned\x07\x9b31m\u202e\n\r"


def unprintable(text: str) -> set[str]:
    return {char for char in text if not char.isprintable()} - {"\n"}


@pytest.mark.parametrize(
    "damage",
    [
        tensors(lambda layout: layout | {f"model.layers.1.{HOSTILE}": TensorSpec("F32", (1,))}),
        replaced(raw_file({f"{HOSTILE}": 1})),
        config(num_hidden_layers=HOSTILE),
        lambda model: (config(model_type=HOSTILE)(model), (model / WEIGHTS).unlink()),
        linked("config.json", HOSTILE),
    ],
)
def test_control_characters_are_not_sent_to_the_terminal_by_an_error(damage, run, tmp_path):
    model = checkpoint(tmp_path / "model")
    damage(model)

    outcome = run("inspect", model)

    assert_refused(outcome)
    assert unprintable(outcome.err) == set()


@pytest.mark.parametrize("options", [(), ("--tensors",), ("--json",), ("--json", "--tensors")])
def test_control_characters_are_not_sent_to_the_terminal_by_inspect(options, run, tmp_path):
    layout = {name.replace("mlp.", f"mlp.{HOSTILE}"): spec for name, spec in llama().items()}
    model = checkpoint(tmp_path / "model", tensors=layout, model_type=f"zorg{HOSTILE}")

    outcome = run("inspect", model, *options)

    assert outcome.code == 0
    assert unprintable(outcome.out + outcome.err) == set()
    if "--json" in options:
        assert json.loads(outcome.out)["model_type"] == f"zorg{HOSTILE}"


# --- as a process -----------------------------------------------------------------------------------------------


def surgeon_process(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "surgeon", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def test_the_process_prints_what_the_command_line_does_and_exits_with_1(tmp_path):
    model = checkpoint(tmp_path / "model", num_hidden_layers=-3)

    process = surgeon_process("truncate", model, "--layers", "1", "-o", tmp_path / "out")

    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr.startswith("error: config.json says num_hidden_layers = -3")
    assert "Traceback" not in process.stderr


def test_debug_shows_the_traceback(tmp_path):
    model = checkpoint(tmp_path / "model", num_hidden_layers=-3)

    process = surgeon_process("inspect", model, "--debug")

    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert "num_hidden_layers = -3" in process.stderr


@pytest.mark.parametrize("layers", [3, 2000])  # less and more than a pipe holds
def test_a_reader_that_has_seen_enough_is_no_error(layers, tmp_path):
    layout = {f"model.layers.{i}.weight": TensorSpec("F32", (1,)) for i in range(layers)}
    model = checkpoint(tmp_path / "model", tensors=layout, model_type="zorg9", num_hidden_layers=layers)
    command = f"{sys.executable} -m surgeon inspect {model} --tensors; echo $? >&2"

    process = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    err = process.stderr.read()
    process.wait(60)

    assert err == "1\n"


def test_an_output_whose_name_is_not_utf_8_works(tmp_path):
    model = checkpoint(tmp_path / "model")
    out = bytes(tmp_path / "out") + b"\xff"

    process = subprocess.run(
        [sys.executable, "-m", "surgeon", "truncate", model, "--layers", "2", "-o", out],
        capture_output=True,
        check=False,
    )

    assert process.returncode == 0, process.stderr
    assert sorted(path.name for path in Path(str(out, "utf-8", "surrogateescape")).iterdir()) == sorted(
        ["README.md", "config.json", "model.safetensors", "surgeon.json", "tokenizer.json"]
    )

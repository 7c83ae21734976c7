"""Nothing that a command reads lies in what it replaces: every option that names something to read, every way to it."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from handmade import checkpoint, edit_config, llama, safetensors, snapshot

import surgeon
from surgeon.checkpoint.header import TensorSpec
from surgeon.checkpoint.overlap import check_file_replaced, check_replaced, check_uploaded
from surgeon.cli.command import command_of
from surgeon.cli.commands import commands
from surgeon.errors import HubError, OutputError
from surgeon.options import Flag
from surgeon.plan.solved import REPAIRS, RepairsFile, SolvedWriter
from surgeon.surgery import open_model, open_source
from surgeon.transforms.prune import prune
from surgeon.transforms.seams import find_sites

# --- every option -----------------------------------------------------------------------------------------------

# Placeholders of options that name neither a file, nor a directory, nor anything on the Hub that is read.
NO_PLACES = {
    *("N", "K", "T", "S", "W", "F", "E", "G", "R", "A", "P", "M", "I", "C", "LR", "SIZE", "DTYPE", "K,K", "FIRST,LAST"),
    *("METHOD", "METRIC", "SCORE", "NAME", "NAMES", "PART", "PARTS", "LAYERS", "WHEN", "WHO", "WAY", "TOOL", "AXIS"),
    *(
        "TEXT",
        "[TEXT]",
        "REGEX",
        "REPO",
        "last|all",
        "KIND",
        "KEY=VALUE",
        "OLD=NEW",
        "NAME=VALUE",
        "FIELD=COLUMN",
        "STEP",
        "PATTERN",
        "NUMBER",
        "NUMBERS",
    ),
    *("PROMPT", "CHECK", "WHAT", "WHICH", "ENGINE", "MS", "TIME"),
}
WORDS = {"revision", "device", "config_file"}  # options of all commands; tests/test_config_file.py has the last one
# Arguments that are no fields of options: what they name is read, or written.
READ = {"model", "source", "config", "recipe", "runs", "input_file", "prompt_file", "others"}


def parameters(command: str) -> list[Any]:
    return command_of(import_module(f"surgeon.cli.{command}")).params


def flags() -> dict[tuple[str, str], Flag]:
    """Return how each field of all dataclasses of options appears on the command line, by its name and its help."""
    homes = [f"surgeon.verbs.{name}" for name in commands() if name not in ("plot", "run")]
    homes += [
        "surgeon.cli.inspect",
        "surgeon.recipe.recipe",
        "surgeon.cli.prune",
        "surgeon.cli.trace",
        "surgeon.cli.plot",
        "surgeon.cli.command",
        "surgeon.evals.gist",
        "surgeon.evals.harness",
        "surgeon.evals.judge",
    ]
    kinds = [kind for home in homes for kind in vars(import_module(home)).values() if is_dataclass(kind)]
    items = [item for kind in kinds for item in fields(kind) if "flag" in item.metadata]
    return {(item.name, item.metadata["flag"].help): item.metadata["flag"] for item in items}


FLAGS = flags()
NEITHER = Flag(help="")


def flag(item: Any) -> Flag:
    return FLAGS.get((item.name, getattr(item, "help", "")), NEITHER)


# `run` replaces the outputs of its steps, each by a command of these. The others write files and no directories; other
# tests hold that what they write is nothing that is read.
OTHERS = ("run", "distill", "diagnose", "advise", "inspect", "plot", "trace")
REPLACING = [
    name for name in commands() if name not in OTHERS and any(item.name == "overwrite" for item in parameters(name))
]
READING = {
    (command, item.name)
    for command in REPLACING
    for item in parameters(command)
    if item.name in READ or flag(item).reads
}


@pytest.mark.parametrize("command", commands())
def test_every_option_of_text_says_whether_it_names_what_is_read_or_written(command):
    for item in parameters(command):
        if item.type.name in ("boolean", "int", "float") or item.name in WORDS or item.metavar in NO_PLACES:
            continue
        is_told = flag(item).reads != flag(item).writes
        assert is_told or item.name in READ, f"surgeon {command} {item.name}"


# Of each option: a command that reads something from the directory OUT, and then would replace OUT. {out} is OUT.
CASES: dict[tuple[str, str], list[str]] = {
    ("truncate", "model"): ["{out}", "--layers", "2"],
    ("gist", "model"): ["{out}", "--tokens", "1"],
    ("grow", "model"): ["{out}", "--layers", "8"],
    ("grow", "donor"): ["{model}", "--layers", "4", "--donor", "{out}"],
    ("merge", "model"): ["{out}", "{model}"],
    ("merge", "models"): ["{model}", "{out}"],
    ("merge", "base"): ["{model}", "{model}", "--method", "ties", "--base", "{out}"],
    ("merge", "data"): ["{model}", "{model}", "--method", "regmean", "--data", "none", "--data", "{out}/text.txt"],
    ("merge", "from_file"): ["--from", "{out}/merge.yaml"],
    ("grow", "data"): ["{model}", "--layers", "4", "--learn", "1", "--data", "{out}/text.txt"],
    ("grow", "eval_data"): [
        *("{model}", "--layers", "4", "--learn", "1", "--data", "{text}", "--eval-data", "{out}/text.txt"),
    ],
    ("prune", "model"): ["{out}", "--layers", "2"],
    ("prune", "like"): ["{model}", "--score", "uniform", "--like", "{out}"],
    ("prune", "data"): ["{model}", "--layers", "2", "--data", "{out}/text.txt"],
    ("prune", "scores_from"): ["{model}", "--layers", "2", "--score", "last", "--scores-from", "{out}/scores.json"],
    ("prune", "eval_data"): ["{model}", "--layers", "2", "--data", "{text}", "--eval-data", "{out}/text.txt"],
    ("prune", "repairs_from"): ["{model}", "--drop", "2", "--repairs-from", "{out}/repairs.safetensors"],
    ("trim", "model"): ["{out}", "--data", "{text}"],
    ("trim", "data"): ["{model}", "--data", "{out}/text.txt"],
    ("trim", "eval_data"): ["{model}", "--data", "{text}", "--eval-data", "{out}/text.txt"],
    ("quantize", "model"): ["{out}"],
    ("quantize", "data"): ["{model}", "--data", "{out}/text.txt"],
    ("transplant", "model"): ["{out}", "--tokenizer", "{model}"],
    ("transplant", "tokenizer"): ["{model}", "--tokenizer", "{out}"],
    ("transplant", "like"): ["{model}", "--like", "{out}"],
    ("transplant", "helper"): ["{model}", "--tokenizer", "{model}", "--helper", "{out}"],
    ("transplant", "eval_data"): ["{model}", "--tokenizer", "{model}", "--eval-data", "{out}/text.txt"],
    ("init", "config"): ["{out}/config.json"],
    ("init", "tokenizer"): ["gpt2", "--tokenizer", "{out}"],
    ("convert", "source"): ["{out}/pytorch_model.bin"],
    ("convert", "base"): ["{model}/lora", "--base", "{out}"],
    ("finetune", "model"): ["{out}", "--data", "{text}"],
    ("finetune", "data"): ["{model}", "--data", "{text}", "--data", "{out}/text.txt"],
    ("finetune", "eval_data"): ["{model}", "--data", "{text}", "--eval-data", "{out}"],
    ("finetune", "select_for"): ["{model}", "--data", "{text}", "--select", "5%", "--select-for", "{out}/text.txt"],
    ("finetune", "teacher"): ["{model}", "--data", "{text}", "--teacher", "{out}"],
    ("attribute", "model"): ["{out}", "--data", "{text}", "--query", "{text}"],
    ("attribute", "data"): ["{model}", "--data", "{out}/text.txt", "--query", "{text}"],
    ("attribute", "query"): ["{model}", "--data", "{text}", "--query", "{out}/text.txt"],
    ("attribute", "checkpoints"): ["{model}", "--data", "{text}", "--query", "{text}", "--checkpoints", "{out}"],
    ("compress", "model"): ["{out}/model", "--prompt", "be brief"],
    ("compress", "adapter"): ["{model}", "--prompt", "be brief", "--adapter", "{out}/adapter"],
    ("compress", "prompt_file"): ["{model}", "--prompt-file", "{out}/text.txt"],
}
SLOW = ("convert", "init", "trim", "transplant")  # they load torch, or transformers
NAMES = {"model": "MODEL", "source": "SRC", "config": "CONFIG"}


def test_every_option_that_reads_is_tried():
    assert set(CASES) == READING


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Return a model, a text, and a result that holds everything that an option could name."""
    model, out, text = checkpoint(tmp_path / "model"), tmp_path / "out", tmp_path / "text.txt"
    checkpoint(out, tensors=llama(layers=4), num_hidden_layers=4)
    (out / "adapter").mkdir()
    (out / "attribution.json").write_text("{}")  # by which attribute knows its own
    for path in (text, out / "text.txt"):
        path.write_text("The cat sat on the mat.")
    return {"model": str(model), "out": str(out), "text": str(text)}


def give_tokenizer(*models: Path) -> None:
    """Give models a tokenizer of words."""
    from surgeon.models.vocabularies import word_tokenizer

    for path in models:
        # transformers wants an even number of channels that turn: 4 of 5
        edit_config(path, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.8})
        for name, content in word_tokenizer(["The", "cat", "sat", "on", "the", "mat."]).items():
            (path / name).write_bytes(content)


def made_for(command: str, option: str, model: Path, out: Path) -> None:
    """Make the result what this command replaces, and holding what it reads before it looks at its output."""
    gist = {"version": 1, "token": "<GIST>", "token_ids": [18], "num_tokens": 1}
    if command == "gist":
        (out / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
    if command in ("trim", "transplant"):
        give_tokenizer(model, out)
    if command == "compress":
        (out / "config.json").unlink()
        (out / "gist.json").write_text("{}")
        for path in (model, checkpoint(out / "model")):
            edit_config(path, gist=gist)
    if option == "base":
        (model / "lora").mkdir()
        rule = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "elsewhere"}
        (model / "lora/adapter_config.json").write_text(json.dumps(rule))
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        pair = {
            f"{module}.lora_A.weight": TensorSpec("F32", (1, 8)),
            f"{module}.lora_B.weight": TensorSpec("F32", (20, 1)),
        }
        (model / "lora/adapter_model.safetensors").write_bytes(safetensors(pair))
    if (command, option) == ("convert", "source"):
        import torch

        (out / "model.safetensors").unlink()
        tensors = {name: torch.zeros(spec.shape) for name, spec in llama(layers=4).items()}
        torch.save(tensors, out / "pytorch_model.bin")
    if command == "init":
        edit_config(out, head_dim=4)  # transformers wants an even one
    if (command, option) == ("init", "tokenizer"):
        from surgeon.models.vocabularies import byte_tokenizer

        for name, content in byte_tokenizer().items():
            (out / name).write_bytes(content)
    if command == "merge":
        checkpoint(model, tensors=llama(layers=4), num_hidden_layers=4)
        (out / "merge.yaml").write_text(f"merge_method: karcher\nmodels: [{{model: {model}}}, {{model: {model}}}]\n")
    if (command, option) == ("prune", "like"):
        checkpoint(model, tensors=llama(layers=6), num_hidden_layers=6)
    if option == "repairs_from":
        begun = open_model(model)
        sites = find_sites(begun.anatomy, prune(begun.anatomy, dropped=(2,)))
        writer, name = SolvedWriter(RepairsFile, "the compensation"), sites.sites[0].map.weight
        spec = begun.anatomy.spec.tensors[name]
        writer.add(name, spec, memoryview(bytes(spec.nbytes)))
        made = writer.finish({"cut": sites.digest, "model": begun.source.provenance(), "maps": []})
        shutil.copy(made.path, out / REPAIRS)
    if option == "scores_from":
        record = {"format": 1, "model": open_source(model).provenance(), "depth": 3, "data": None, "tokens": 0}
        record |= {"seed": 0, "options": {}, "scores": {}, "widths": {}, "greedy": None, "loss": None}
        (out / "scores.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("command", "option"),
    [pytest.param(*case, marks=pytest.mark.slow if case[0] in SLOW else ()) for case in CASES],
)
def test_what_an_option_reads_is_not_replaced(command, option, run, places, tmp_path):
    made_for(command, option, Path(places["model"]), Path(places["out"]))
    before = snapshot(tmp_path)

    words = [word.format(**places) for word in CASES[command, option]]
    outcome = run(command, *words, "-o", places["out"], "--overwrite")

    assert outcome.code == 1, outcome.err
    error, hint = outcome.err.splitlines()[-2:]
    assert error.startswith(f"error: the output {places['out']} ")
    assert f" what {NAMES.get(option, '--' + option.replace('_', '-'))} reads: " in error
    assert hint == "hint: Choose another place with -o."
    assert outcome.out == ""
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("option", ["model", "data", "eval_data", "teacher"])
def test_what_finetune_reads_does_not_lie_in_its_run_directory(option, run, places, tmp_path):
    """The run removes old checkpoints there, and a teacher's answers at the end."""
    words = [word.format(**places) for word in CASES["finetune", option]]
    (tmp_path / "out/run.json").write_text("{}")
    before = snapshot(tmp_path)

    outcome = run("finetune", *words, "-o", tmp_path / "new", "--run-dir", places["out"], "--resume")

    assert outcome.code == 1
    assert f" what {NAMES.get(option, '--' + option.replace('_', '-'))} reads: " in outcome.err
    assert snapshot(tmp_path) == before


def test_the_output_of_finetune_does_not_lie_in_its_run_directory(run, places, tmp_path):
    words = ["finetune", places["model"], "--data", places["text"], "--run-dir", tmp_path / "run"]
    outcome = run(*words, "-o", tmp_path / "run/teacher")

    assert outcome.code == 1
    assert "lies in the run's directory" in outcome.err
    assert not (tmp_path / "run").exists()


def test_from_python_too_nothing_read_is_replaced(places, tmp_path):
    grown = surgeon.grow(places["model"], layers=4, donor=places["out"])
    before = snapshot(tmp_path)

    with pytest.raises(OutputError, match="is what --donor reads"):
        surgeon.truncate(grown, layers=2).save(places["out"], overwrite=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("picture", ["out/logo.png", "link.png", "hard.png"])
def test_a_picture_is_not_drawn_over_what_is_read(picture, run, places, tmp_path):
    (tmp_path / "out/logo.png").write_text("a logo")
    (tmp_path / "link.png").symlink_to("out/logo.png")
    os.link(tmp_path / "text.txt", tmp_path / "hard.png")
    before = snapshot(tmp_path)

    options = ["--layers", 2, "--data", places["text"], "--plot", tmp_path / picture]
    outcome = run("prune", places["out"], *options, "-o", tmp_path / "new")

    assert outcome.code == 1
    assert "is, or belongs to, what " in outcome.err
    assert snapshot(tmp_path) == before


def test_a_picture_of_a_run_is_drawn_anew_beside_its_losses_where_that_is_asked_for(run, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run/metrics.jsonl").write_text('{"step": 1, "tokens": 5, "loss": 2.0}\n')
    command = ["plot", tmp_path / "out.run", "-o", tmp_path / "out.run/loss.png"]
    assert run(*command).code == 0
    before = snapshot(tmp_path)

    refused = run(*command, "--x", "tokens")

    assert (refused.code, refused.out) == (1, "")
    assert refused.err.endswith("loss.png exists\nhint: Name another file, or add --overwrite.\n")
    assert snapshot(tmp_path) == before
    assert run(*command, "--x", "tokens", "--overwrite").code == 0
    assert snapshot(tmp_path) != before


@pytest.mark.parametrize(
    "command",
    [
        "plot {tmp}/out.run -o {there}",
        "prune {tmp}/model --score last --layers 2 -o {tmp}/cut --plot {there}",
        "diagnose {tmp}/model --data {tmp}/text.txt --plot {there}",
        "diagnose {tmp}/model --data {tmp}/text.txt --html {there}",
        "advise {tmp}/model --data {tmp}/text.txt --plot {there}",
        "trace {tmp}/model --candidates {tmp}/model --plot {there}",
        "evaluate {tmp}/model --data {tmp}/text.txt --metric rouge-l --predictions {there}",
        "data question-formation -o {there}",
    ],
)
def test_no_file_that_is_there_is_replaced_without_a_word(command, run, tmp_path):
    checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The cat sat on the mat.")
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run/metrics.jsonl").write_text('{"step": 1, "tokens": 5, "loss": 2.0}\n')
    suffix = ".html" if "--html" in command else ".jsonl" if "rouge" in command else ".png"
    there = tmp_path / f"mine{suffix}"
    there.write_text("mine")

    outcome = run(*command.format(tmp=tmp_path, there=there).split())

    assert (outcome.code, outcome.out) == (1, "")
    assert str(there) in outcome.err.splitlines()[-2]
    assert there.read_text() == "mine"


# --- the Hub ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("repo", "value"), [("me/model", "me/model"), ("Me/Model", "me/model"), ("me/d", "me/d:en")])
def test_what_is_read_on_the_hub_is_not_replaced_by_an_upload(repo, value):
    with pytest.raises(HubError, match=r"--push-to-hub would replace what --teacher reads"):
        check_uploaded(repo, {"--teacher": (value,)})


def test_a_directory_of_the_name_of_a_repository_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "me/model")

    check_uploaded("me/model", {"MODEL": ("me/model",)})
    check_uploaded("me/other", {"MODEL": ("you/other",)})


def test_an_upload_over_what_is_read_is_refused_before_anything_is_written(run, tmp_path):
    checkpoint(tmp_path / "model")

    outcome = run("finetune", tmp_path / "model", "--data", "me/data", "--push-to-hub", "me/data")

    assert outcome.code == 1
    assert "--push-to-hub would replace what --data reads: me/data" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("place", ["models--me--model/snapshots/abc", "models--me--model", "."])
def test_a_model_in_the_cache_of_the_hub_is_not_replaced(place, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    blobs, there = tmp_path / "models--me--model/blobs", tmp_path / "models--me--model/snapshots/abc"
    blobs.mkdir(parents=True)
    checkpoint(there)
    (there / "surgeon.json").write_text("{}")  # it was made by surgeon, and is in the cache all the same
    (there / "model.safetensors").rename(blobs / "0123")
    (there / "model.safetensors").symlink_to("../../blobs/0123")

    with pytest.raises(OutputError, match="what --teacher reads"):
        check_replaced(tmp_path / place, {"--teacher": ("me/model",)})


# --- every way to a file ----------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return a directory that would be replaced, with a file and a link in it."""
    (tmp_path / "out/sub").mkdir(parents=True)
    (tmp_path / "out/sub/file").write_text("read")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").write_text("read")
    (tmp_path / "out/link").symlink_to("../elsewhere/file")
    (tmp_path / "out/away").symlink_to("../elsewhere")
    return tmp_path / "out"


WAYS = {
    "the directory": "out",
    "a directory in it": "out/sub",
    "a file in it": "out/sub/file",
    "a path with dots": "elsewhere/../out/sub/file",
    "a link to it": "to_it",
    "a link to a file in it": "to_file",
    "a link to a link": "to_link",
    "a link in it, whose target is elsewhere": "out/link",
    "a directory in it that is a link": "out/away/file",
    "a directory above it": "up",
    "a directory of links into it": "links",
    "a directory with a link to another of links into it": "more",
    "a link with dots behind a link": "dots",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_file_is_found_by_every_way_that_leads_into_the_directory(way, out, tmp_path):
    (tmp_path / "to_it").symlink_to("out")
    (tmp_path / "to_file").symlink_to(out / "sub/file")
    (tmp_path / "to_link").symlink_to("to_file")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "links/deep").mkdir(parents=True)
    (tmp_path / "links/deep/file").symlink_to("../../out/link")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/directory").symlink_to("../links")
    (tmp_path / "dots").symlink_to("to_it/sub/../sub/file")

    with pytest.raises(OutputError, match=r"what --data reads"):
        check_replaced(out, {"--data": (str(tmp_path / WAYS[way]),)})


def test_what_lies_beside_the_directory_does_not_matter(out, tmp_path):
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer/file").write_text("read")
    os.link(out / "sub/file", tmp_path / "outer/hard")  # the file stays when its other name goes
    (tmp_path / "outer/round").symlink_to("round")
    (tmp_path / "outer/broken").symlink_to("nowhere")

    check_replaced(out, {"--data": (str(tmp_path / "outer"), str(tmp_path / "elsewhere"), "no/such:thing")})


def test_the_way_by_a_link_is_told(out, tmp_path):
    with pytest.raises(OutputError, match=f"{out / 'link'}, by way of {out / 'link'}"):
        check_replaced(out, {"--data": (str(out / "link"),)})


def test_a_link_to_the_directory_itself_is_what_the_option_reads(out, tmp_path):
    (tmp_path / "way").symlink_to(out)

    with pytest.raises(OutputError, match=f"{out} is what MODEL reads: {tmp_path / 'way'}"):
        check_replaced(out, {"MODEL": (str(tmp_path / "way"),)})


@pytest.fixture
def mounted(out: Path, tmp_path: Path) -> Iterator[Path]:
    """Return a second path of a directory in `out`."""
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", "--bind", str(out / "sub"), str(place)], capture_output=True).returncode:
        pytest.skip("only root may mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_bind_mount_is_seen_through(mounted, out):
    with pytest.raises(OutputError, match="holds what --data reads"):
        check_replaced(out, {"--data": (str(mounted / "file"),)})


def test_a_result_inside_a_model_may_be_replaced_and_another_directory_there_may_not(run, tmp_path):
    model = checkpoint(tmp_path / "model")
    assert run("truncate", model, "--layers", 2, "-o", model / "two").code == 0
    checkpoint(model / "original")

    assert run("truncate", model, "--layers", 1, "-o", model / "two", "--overwrite").code == 0
    outcome = run("truncate", model, "--layers", 1, "-o", model / "original", "--overwrite")
    assert f"{model / 'original'} lies in what MODEL reads: {model}" in outcome.err


def test_links_between_a_model_and_a_result_inside_it_are_seen(run, tmp_path):
    model = checkpoint(tmp_path / "model")
    assert run("truncate", model, "--layers", 2, "-o", model / "two").code == 0
    (model / "model.safetensors").rename(model / "two/whole.safetensors")
    (model / "model.safetensors").symlink_to("two/whole.safetensors")
    before = snapshot(model)

    outcome = run("truncate", model, "--layers", 1, "-o", model / "two", "--overwrite")

    assert "holds what MODEL reads" in outcome.err
    assert snapshot(model) == before


def test_what_a_killed_run_left_is_not_removed_while_it_is_read(run, tmp_path):
    """The next run with the same output removes it, and it may be the only copy that a user could find."""
    left = checkpoint(tmp_path / ".out.surgeon-old-1")
    checkpoint(tmp_path / "out")
    before = snapshot(tmp_path)

    outcome = run("truncate", left, "--layers", 2, "-o", tmp_path / "out", "--overwrite")

    assert outcome.code == 1
    assert f"hint: This command removes it; rename it first: mv {left} NAME" in outcome.err
    assert snapshot(tmp_path) == before


def test_a_file_that_is_not_there_replaces_nothing(out):
    check_file_replaced(out / "new.png", {"--data": (str(out),)})

"""`surgeon prune` in two processes that a launcher started: the numbers of one, the same cut, one writer, one voice."""

import json
import shutil

import pytest
from later import LATER
from test_finetune_processes import TORCHRUN, Started
from test_prune import give_tokenizer, words

from surgeon import processes

if LATER:
    import torch
    from safetensors.torch import load_file
    from streamed import stream, tokens

    from surgeon.anatomy.halves import Pairing
    from surgeon.errors import MeasureError
    from surgeon.measure.candidates import Reference

CLOSE = 1e-6  # sums of float32 numbers in another order


def numbers(value):
    """Return all numbers in nested lists and dictionaries."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", ("--score", "taylor", "--protect", "0,0", "--layers", 4, "--intermediate-size", 30, "--curve")),
        ("qwen3_moe", ("--score", "perplexity", "--layers", 5, "--experts", 5)),
    ],
)
def test_two_processes_score_and_cut_as_one(name, options, toy, run, one_thread, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(toy(name), directory)
    give_tokenizer(directory)
    (tmp_path / "text.txt").write_text(words(100))
    rows = ("--data", tmp_path / "text.txt", "--samples", 5, "--sequence-length", 14)  # 2 rows and 3
    command = ("prune", directory, *options, *rows, "--json")

    launched = Started(TORCHRUN, *command, "-o", tmp_path / "two").ended()
    alone = run(*command, "-o", tmp_path / "one")

    assert launched.code == 0, launched.err
    one, two = json.loads(alone.out), json.loads(launched.out)
    assert two["dropped"] == one["dropped"]
    here, there = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert here.keys() == there.keys()
    for tensor, made in here.items():
        if tensor.endswith(("down_proj.weight", "o_proj.weight")):  # solved from sums that both took
            torch.testing.assert_close(there[tensor], made, rtol=0, atol=CLOSE * float(made.abs().max()))
        else:
            assert torch.equal(there[tensor], made), tensor
    for key in ("scores", "perplexity", "curve"):
        assert numbers(two.get(key)) == pytest.approx(numbers(one.get(key)), rel=CLOSE)
    scores = [json.loads((tmp_path / each / "scores.json").read_text()) for each in ("one", "two")]
    assert numbers(scores[1]["widths"]) == pytest.approx(numbers(scores[0]["widths"]), rel=CLOSE)


def test_two_processes_solve_what_one_does(toy, run, one_thread, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(toy("llama"), directory)
    give_tokenizer(directory)
    (tmp_path / "text.txt").write_text(words(2000))
    rows = ("--data", tmp_path / "text.txt", "--samples", 81, "--sequence-length", 14)
    command = ("prune", directory, "--drop", "2,3", "--compensate", *rows, "--json")

    launched = Started(TORCHRUN, *command, "-o", tmp_path / "two").ended()
    alone = run(*command, "-o", tmp_path / "one")

    assert launched.code == 0, launched.err
    one, two = (json.loads(each.out)["compensation"]["maps"][0] for each in (alone, launched))
    assert one["taken"]
    for key in ("tokens", "ridge", "fit", "held_out"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)
    weights = [load_file(tmp_path / each / "model.safetensors") for each in ("one", "two")]
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*(each.values() for each in weights), strict=True))


def test_an_error_is_said_once_and_nobody_is_left_waiting(toy, one_thread, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(toy("llama"), directory)

    ended = Started(TORCHRUN, "prune", directory, "--layers", 4, "--data", tmp_path / "none.txt").ended()

    assert ended.code != 0
    assert ended.err.count("error: no such file") == 1


def test_a_process_takes_its_share_of_the_rows(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert processes.own_rows(8) == slice(0, 8)  # a command that does not share
        token = processes._SHARES.set(True)
        shares += range(8)[processes.own_rows(8)]
        processes._SHARES.reset(token)
    assert shares == list(range(8))


def test_candidates_are_measured_by_rows_and_their_sums_are_joined(toy, monkeypatch):
    """Two processes in turns: what each adds, together, is what one finds."""
    candidate = Pairing.of_layers([0, 1, 4, 5])
    whole = Reference(stream(toy("llama")), tokens(rows=5)).measure([candidate])[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("surgeon.measure.candidates.summed", lambda sums: sums)
    monkeypatch.setattr("surgeon.measure.candidates.least", lambda number: number)
    token = processes._SHARES.set(True)
    try:
        found = []
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            found.append(Reference(stream(toy("llama")), tokens(rows=5)).measure([candidate])[0])
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(MeasureError, match="1 rows of text cannot be shared"):
            Reference(stream(toy("llama")), tokens(rows=1))
    finally:
        processes._SHARES.reset(token)
    for of in ("loss", "kl"):
        first, second = (getattr(each, of) for each in found)
        assert [one + two for one, two in zip(first, second, strict=True)] == list(getattr(whole, of))

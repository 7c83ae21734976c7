"""`surgeon.distill` on toys: batches, samples, interrupted runs, and what is refused."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from later import LATER
from talkers import jsonl, talker

import surgeon
from surgeon.errors import DataError, OutputError
from surgeon.models.loading import load_tokenizer
from surgeon.surgery import open_source

if LATER:
    from surgeon.data.records import form_of
    from surgeon.rewriting.engines import TransformersEngine, Writing
    from surgeon.rewriting.prompts import prompt_tokens, row_of

NEW = 10


def document(record):
    return form_of(record, "a").document(record, "a")


RECORDS = [
    {"prompt": f"{word} cat {index}?", "completion": "that was " * (index + 1), "id": index}
    for index, word in enumerate(["the", "a", "one", "that", "é🌿", "no", "my", "the other", "a fat", "the", "a"])
]
ANY_LENGTH = {"min_length_ratio": 0.0, "max_length_ratio": 100.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a toy with room for the prompts, of whose random tokens one in eight ends a text."""
    directory = talker(tmp_path_factory.mktemp("model") / "llama", max_position_embeddings=1024)
    stops = {"eos_token_id": list(range(2, 300, 8))}
    (directory / "generation_config.json").write_text(json.dumps(stops))
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "a.jsonl", *RECORDS)


def distill(model: Path, data: str, output: Path, **options: Any) -> Any:
    defaults = {"max_new_tokens": NEW, "batch_size": 3, "device": "cpu", **ANY_LENGTH}
    return surgeon.distill(str(model), data=[data], output=output, **defaults | options)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what is written --------------------------------------------------------------------------------------------


def test_every_row_is_there_with_its_own_answer_or_a_new_one_and_says_which(model, data, tmp_path):
    done = distill(model, data, tmp_path / "out.jsonl")

    found = rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == [record["id"] for record in RECORDS]
    assert {row["distill"]["status"] for row in found} == {"accepted", "kept"}, "the toy shows both"
    for row, record in zip(found, RECORDS, strict=True):
        told = row["distill"]
        assert row["prompt"] == record["prompt"]
        assert (told["teacher"], told["prompt"], told["seed"], told["sample"]) == ("llama", "sdft", 0, 1)
        assert told["fingerprint"] == open_source(model).provenance()["fingerprint"]
        if told["status"] == "accepted":
            assert (told["original"], told["reason"]) == (record["completion"], None)
            assert row["completion"]
        else:
            assert (row["completion"], told["original"]) == (record["completion"], None)
            assert told["reason"] in ("truncated", "empty")
    accepted = sum(row["distill"]["status"] == "accepted" for row in found)
    assert (done.rows, done.rewritten, done.kept, done.dropped) == (11, accepted, 11 - accepted, 0)
    assert sum(done.reasons.values()) == done.kept


def test_finetune_and_evaluate_read_the_output_as_they_read_the_data(model, data, tmp_path):
    out = tmp_path / "out.jsonl"
    distill(model, data, out)

    found = surgeon.evaluate(str(model), data=[str(out)], metric="exact-match", max_new_tokens=2, device="cpu")
    surgeon.finetune(str(model), data=[str(out)], output=tmp_path / "tuned", max_steps=1, device="cpu")

    assert [prompt["prompt"] for prompt in found.predictions] == [f"{record['prompt']}\n" for record in RECORDS]
    assert [prompt["reference"] for prompt in found.predictions] == [row["completion"] for row in rows(out)]
    assert (tmp_path / "tuned/model.safetensors").exists()


def test_rows_that_fail_can_be_dropped(model, data, tmp_path):
    kept, dropped = (
        distill(model, data, tmp_path / "k.jsonl"),
        distill(model, data, tmp_path / "d.jsonl", on_fail="drop"),
    )

    accepted = [row for row in rows(tmp_path / "k.jsonl") if row["distill"]["status"] == "accepted"]
    assert rows(tmp_path / "d.jsonl") == accepted
    assert (dropped.rewritten, dropped.kept, dropped.dropped) == (kept.rewritten, 0, kept.kept)


def test_where_every_row_would_be_dropped_that_is_said_and_keeping_them_costs_nothing(model, data, tmp_path):
    options = {"min_length_ratio": 99.0, "max_length_ratio": 100.0}
    with pytest.raises(DataError, match="every row is dropped"):
        distill(model, data, tmp_path / "out.jsonl", on_fail="drop", **options)

    done = distill(model, data, tmp_path / "out.jsonl", **options)

    assert (done.rewritten, done.kept, done.resumed, done.tokens) == (0, 11, 11, 0)
    assert done.notes
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_prompt_without_room_for_an_answer_keeps_its_row(model, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", RECORDS[0], {"prompt": "cat", "completion": "the cat " * 900})

    done = distill(model, data, tmp_path / "out.jsonl")

    assert done.reasons["prompt"] == 1
    assert rows(tmp_path / "out.jsonl")[1]["distill"]["reason"] == "prompt"
    with pytest.raises(DataError, match="no prompt leaves room"):
        distill(model, data, tmp_path / "other.jsonl", max_new_tokens=2000)


# --- batches and samples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1_000_000, 1000])
def test_a_greedy_answer_is_the_same_in_batches_of_one_and_of_eight(tokens, model):
    tokenizer = load_tokenizer(str(model))
    prompts = [prompt_tokens(row_of(document(record)), "sdft", tokenizer) for record in RECORDS]
    found = []
    for size in (1, 8):
        writing = Writing(max_new_tokens=NEW, temperature=0, seed=0, batch_size=size, batch_tokens=tokens)
        engine = TransformersEngine(open_source(model), tokenizer, "cpu", writing)
        answers: dict[int, Any] = {}
        batches = engine.plan(prompts)
        for batch in batches:
            written = engine.write([prompts[index] for index in batch], batch, 1)
            answers |= dict(zip(batch, written, strict=True))
        found.append(answers)
        assert max(map(len, batches)) == (size if tokens > 1000 else min(size, 4))
        assert all(
            len(batch) == 1 or len(batch) * (max(len(prompts[index]) for index in batch) + NEW) <= tokens
            for batch in batches
        )

    assert found[0] == found[1]
    assert len({answer.num_tokens for answer in found[0].values()}) > 2, "they end at different places"


def test_of_several_samples_the_first_that_passes_is_taken(model, data, tmp_path):
    one, three = (
        distill(model, data, tmp_path / f"{samples}.jsonl", temperature=1.0, samples=samples, max_length_ratio=0.2)
        for samples in (1, 3)
    )

    firsts, found = rows(tmp_path / "1.jsonl"), rows(tmp_path / "3.jsonl")
    assert three.rewritten > one.rewritten
    for first, row in zip(firsts, found, strict=True):
        if first["distill"]["status"] == "accepted":
            assert row == first, "no second sample is drawn for it"
    assert {row["distill"]["sample"] for row in found} == {1, 2, 3}


def test_another_seed_draws_other_answers_and_the_same_one_the_same(model, data, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        distill(model, data, tmp_path / f"{name}.jsonl", temperature=1.0, seed=seed)

    first, again, other = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert first == again
    assert [row["completion"] for row in rows(tmp_path / "a.jsonl")] != [
        row["completion"] for row in rows(tmp_path / "c.jsonl")
    ]
    assert first != other


# --- interrupted runs -------------------------------------------------------------------------------------------

SAMPLING = {"temperature": 1.0, "samples": 3, "max_length_ratio": 1.0}


def killed_after(batches: int, model: Path, data: str, output: Path) -> bool:
    """Return whether a run that kills itself after so many batches was killed, and had not ended before."""
    left = [batches]

    def count(_: object) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        distill(model, data, output, watch=count, **SAMPLING)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_run_that_is_killed_after_every_batch_ends_with_the_bytes_of_one_that_is_not(model, data, tmp_path):
    distill(model, data, tmp_path / "whole.jsonl", **SAMPLING)
    output = tmp_path / "out.jsonl"

    kills = 0
    while killed_after(1, model, data, output):
        kills += 1
        assert not output.exists(), "nothing half-written has its name"
        assert len((tmp_path / "out.jsonl.partial/rows.jsonl").read_bytes().splitlines()) == min(3 * kills, 11)

    assert kills == 4  # 11 rows, 3 a batch
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_line_that_was_not_written_to_its_end_is_written_again(model, data, tmp_path):
    distill(model, data, tmp_path / "whole.jsonl", **SAMPLING)
    output, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial/rows.jsonl"
    assert killed_after(2, model, data, output)
    whole, request = journal.read_bytes(), (journal.parent / "request.json").read_bytes()

    for end in (0, 1, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) - 1):
        journal.parent.mkdir(exist_ok=True)
        (journal.parent / "request.json").write_bytes(request)
        journal.write_bytes(whole[:end])
        done = distill(model, data, output, **SAMPLING)
        assert done.resumed == whole[:end].count(b"\n")
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        output.unlink()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"temperature": 0.5}, "begun with --temperature 1.0, not 0.5"),
        ({"seed": 1}, "begun with --seed 0, not 1"),
        ({"batch_size": 4}, "begun with --batch-size 3, not 4"),
        ({"extract": "none"}, "begun with --extract auto, not none"),
    ],
)
def test_other_options_beside_a_begun_run_are_refused_with_the_reason(change, what, model, data, tmp_path):
    assert killed_after(1, model, data, tmp_path / "out.jsonl")

    with pytest.raises(OutputError, match=what) as caught:
        distill(model, data, tmp_path / "out.jsonl", **SAMPLING | change)
    assert "rm -r" in str(caught.value.hint)


def test_other_data_or_another_model_beside_a_begun_run_is_refused(model, data, tmp_path):
    assert killed_after(1, model, data, tmp_path / "out.jsonl")
    other = jsonl(tmp_path / "b.jsonl", *RECORDS[:-1], RECORDS[-1] | {"completion": "no"})
    same = jsonl(tmp_path / "c.jsonl", *RECORDS)
    second = talker(tmp_path / "second", max_position_embeddings=1024, seed=1)

    with pytest.raises(OutputError, match="other data"):
        distill(model, other, tmp_path / "out.jsonl", **SAMPLING)
    with pytest.raises(OutputError, match="another MODEL"):
        distill(second, data, tmp_path / "out.jsonl", **SAMPLING)
    assert distill(model, same, tmp_path / "out.jsonl", **SAMPLING).resumed == 3, "the name of the file is no matter"


def test_the_same_run_again_is_done_already_and_another_is_refused(model, data, tmp_path):
    output = tmp_path / "out.jsonl"
    first = distill(model, data, output)
    before = output.read_bytes()

    again = distill(model, data, output)

    assert again.notes == ("it was done already", *first.notes)
    assert (again.rewritten, again.reasons, again.tokens) == (first.rewritten, first.reasons, first.tokens)
    with pytest.raises(OutputError, match="exists"):
        distill(model, data, output, seed=1)
    output.write_bytes(before + b"\n")
    with pytest.raises(OutputError, match="exists"):  # somebody changed it
        distill(model, data, output)
    assert distill(model, data, output, overwrite=True).rows == 11
    assert output.read_bytes() == before


def test_an_output_that_is_the_data_is_refused_even_with_overwrite(model, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", *RECORDS)

    with pytest.raises(OutputError, match="what --data reads"):
        distill(model, data, tmp_path / "a.jsonl", overwrite=True)
    assert rows(tmp_path / "a.jsonl") == RECORDS


def test_a_part_of_the_data_and_an_output_without_a_suffix(model, data, tmp_path):
    """As `surgeon run` names the output of a step."""
    done = distill(model, f"{data}[2:5]", tmp_path / "step")

    assert done.output == str(tmp_path / "step.jsonl")
    assert [row["id"] for row in rows(tmp_path / "step.jsonl")] == [2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.jsonl", "step.jsonl.receipt"]


@pytest.mark.parametrize("link", [False, True])
def test_an_output_that_would_be_read_by_the_next_call_is_refused(link, model, tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    jsonl(directory / "a.jsonl", *RECORDS)
    (tmp_path / "link").symlink_to(directory)
    place = tmp_path / "link" if link else directory

    with pytest.raises(OutputError, match="would be among what --data reads"):
        distill(model, str(directory), place / "out.jsonl")
    assert [path.name for path in directory.iterdir()] == ["a.jsonl"]


def test_an_output_that_links_into_the_model_is_refused(model, data, tmp_path):
    before = (model / "config.json").read_bytes()
    (tmp_path / "out.jsonl").symlink_to(model / "config.json")

    with pytest.raises(OutputError, match="what MODEL reads"):
        distill(model, data, tmp_path / "out.jsonl", overwrite=True)
    assert (model / "config.json").read_bytes() == before


def test_a_run_that_another_process_has_is_refused(model, data, tmp_path):
    from filelock import FileLock

    partial = tmp_path / "out.jsonl.partial"
    partial.mkdir()
    with FileLock(partial / "lock"), pytest.raises(OutputError, match="another process"):
        distill(model, data, tmp_path / "out.jsonl")


@pytest.mark.parametrize(("room", "resumed"), [(100, {0}), (600, range(1, 11)), (900, {11})])  # request, rows, output
def test_a_full_disk_is_one_sentence_and_the_finished_rows_stay(room, resumed, model, data, tmp_path):
    output, said = tmp_path / "out.jsonl", tmp_path / "said"
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            distill(model, data, output)
        except OutputError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            said.write_text(str(error))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

    assert said.read_text().startswith(f"cannot write {tmp_path}")
    assert not output.exists()
    done = distill(model, data, output)
    distill(model, data, tmp_path / "whole.jsonl")
    assert done.resumed in resumed
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_damage_to_a_begun_run_is_said(model, data, tmp_path):
    assert killed_after(1, model, data, tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl.partial/rows.jsonl").write_text("{}\n")

    with pytest.raises(OutputError, match="damaged"):
        distill(model, data, tmp_path / "out.jsonl", **SAMPLING)

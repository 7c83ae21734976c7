"""Attribution: gradients of rows are those of training, scores are those of the formulas, and a killed call goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import talkers
from later import LATER
from test_encoder_scores import encoder
from test_evaluate_encoders import NAMES, framed
from test_train_kinds import LABELLED

import surgeon
from surgeon.errors import OutputError, PlanError
from surgeon.options import OptionError

if LATER:
    import numpy as np
    import pyarrow.parquet
    import torch

    from surgeon.attribution.estimators import dots, trak
    from surgeon.attribution.gradients import RowGradients, maps_of, widest
    from surgeon.attribution.ledger import Ledger
    from surgeon.attribution.lexical import bm25
    from surgeon.attribution.rows import Batches
    from surgeon.attribution.snapshots import loading, mean_squares
    from surgeon.models.loading import load_tokenizer
    from surgeon.surgery import open_source
    from surgeon.train.data import Collator
    from surgeon.train.tokenise import prepare
    from surgeon.verbs.finetune import TrainingOptions, task_of

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    {"prompt": f"The {animal} {number} sat " * (number % 3 + 1), "completion": f"on the mat {number * 7}"}
    for number, animal in enumerate(("cat", "rat", "bat") * 8)
]
QUERY = {"prompt": "A zebra sings: ", "completion": "quux quux zyzzyva!"}
SHORT: dict[str, Any] = {"batch_size": 2, "sequence_length": 48, "lr": "1e-3", "eval_rows": 2}
CLOSE = {"rtol": 0, "atol": 1e-5}  # of the largest entry: sums in float32, in another order


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a toy, its data, of which rows 5 to 9 are the query, and a run with two checkpoints."""
    place = tmp_path_factory.mktemp("attributed")
    talkers.talker(place / "toy")
    talkers.jsonl(place / "rows.jsonl", *ROWS[:5], *[QUERY] * 5, *ROWS[5:])
    talkers.jsonl(place / "query.jsonl", QUERY)
    talkers.jsonl(place / "queries.jsonl", QUERY, ROWS[0], ROWS[7])
    how = SHORT | {"max_steps": 8, "save_every": 4, "keep_checkpoints": 2, "eval_fraction": 0.0, "packing": "off"}
    surgeon.finetune(place / "toy", data=[str(place / "rows.jsonl")], output=place / "tuned", **how)
    return place


def gradients_of(model: Any, batches: Batches, *, check: bool = True) -> tuple[np.ndarray, np.ndarray, Any]:
    """Return the gradient of each piece by `RowGradients`, how many tokens of it are trained, and the maps."""
    gradients = RowGradients(model, maps_of(model))
    found = np.zeros((len(batches.pieces), gradients.width), np.float32)
    tokens = np.zeros(len(batches.pieces))
    with gradients.ready():
        for number, (pieces, batch, counts, spans) in enumerate(batches):
            if check and not number:
                gradients.check(batch)
            found[pieces] = gradients(batch, counts, spans, taught=True).numpy()
            tokens[pieces] = counts
    return found, tokens, gradients.maps


def made(place: Path, kind: str, tmp_path: Path) -> tuple[Any, Any, Any]:
    """Return a model of a kind as training has it, its task, and the store of its rows."""
    name, _, how = kind.partition(" ")
    directory, records = tmp_path / "model", ROWS[:11]
    options: dict[str, Any] = {"lora": 2} if how == "lora" else {"teacher": str(place / "toy")} if how else {}
    if name == "bert":
        encoder(directory, "bert", "AutoModelForSequenceClassification", vocab_size=300, **NAMES)
        records = [{"text": text, "label": label} for text, label in LABELLED]
    elif name == "t5":
        talkers.talker(directory, "t5", decoder_start_token_id=0)
    else:
        talkers.talker(directory, name)
    if name in ("bert", "t5"):
        framed(directory)
    source = open_source(directory)
    task = task_of(source, TrainingOptions(**SHORT | options))
    teacher = None
    if task.teacher_source() is not None:
        from surgeon.models.loading import load_model

        teacher = task.teacher(load_model(task.teacher_source(), dtype=torch.float32, hint=""))
    data = talkers.jsonl(tmp_path / "rows.jsonl", *records)
    model = loading(source, task, teacher)()
    if how == "lora":  # B begins at zero, and A then has no gradient
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    tokenizer = load_tokenizer(str(directory))
    return model, task, prepare([data], tokenizer, directory=tmp_path / "store", sequence_length=48, task=task)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral", "llama lora", "llama taught", "bert", "t5"])
def test_rows_have_the_gradients_that_training_has_in_batches_alone_and_packed(kind, here, tmp_path):
    model, task, store = made(here, kind, tmp_path)
    collate, pieces = Collator(0, with_index=True), np.arange(store.num_pieces)
    alone, tokens, maps = gradients_of(model, Batches(store, pieces, collate, batch_size=1))
    ways = [{"batch_size": 8}, {}]
    if task.may_share_rows("sdpa"):
        ways.append({"packed": 144, "batch_size": 2})
    size = np.abs(alone).max()
    for way in ways:
        found, _, _ = gradients_of(model, Batches(store, pieces, collate, **way))
        np.testing.assert_allclose(found / size, alone / size, **CLOSE)

    whole = Batches(store, pieces, collate, batch_size=len(pieces))
    _, batch, counts, _ = next(iter(whole))
    model.eval()
    plan = model._surgeon_plan(batch)
    model(**batch, **({"plan": plan} if plan else {}), num_items=int(counts.sum()))["loss"].backward()
    trained = torch.cat([each.oriented(each.module.weight.grad).flatten() for each in maps]).numpy()
    summed = (alone * tokens[:, None]).sum(0) / tokens.sum()
    np.testing.assert_allclose(summed / size, trained / size, **CLOSE)
    assert np.abs(trained).max() > 1e-3 * size


def test_a_map_whose_weight_is_used_outside_of_it_is_refused(here, tmp_path):
    model, _, store = made(here, "llama", tmp_path)
    layer = model.model.layers[1].mlp
    before = layer.forward
    layer.forward = lambda states: (
        before(states) + states @ layer.down_proj.weight.sum(1).outer(layer.down_proj.weight.new_ones(states.shape[-1]))
    )
    with pytest.raises(surgeon.MeasureError, match="layers.1.mlp.down_proj is not that of a linear map"):
        gradients_of(model, Batches(store, np.arange(store.num_pieces), Collator(0, with_index=True)))


def test_projections_keep_dot_products_in_expectation(here, tmp_path):
    model, _, store = made(here, "llama", tmp_path)
    batches = Batches(store, np.arange(2), Collator(0, with_index=True))
    whole, _, maps = gradients_of(model, batches)
    dots_of = []
    for seed in range(24):
        for number, each in enumerate(maps):
            each.left = each.right = None
            each.project(seed, number, 16)
        gradients = RowGradients(model, maps)
        with gradients.ready():
            _, batch, counts, spans = next(iter(batches))
            found = gradients(batch, counts, spans, taught=True).numpy()
        dots_of.append(float(found[0] @ found[1]))
    error = np.std(dots_of, ddof=1) / len(dots_of) ** 0.5
    assert abs(np.mean(dots_of) - whole[0] @ whole[1]) < 4 * error  # 4 standard errors
    assert error < abs(whole[0] @ whole[1])
    assert widest(maps, 1) is None
    assert widest(maps, 1 << 18) in (8, 4)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "numbers"), [(7, 30), (30, 7)])
def test_trak_is_the_formula_on_either_side(rows, numbers):
    draw = np.random.default_rng(0)
    features, queries = (draw.standard_normal((n, numbers)).astype(np.float32) for n in (rows, 3))
    wide = features.astype(np.float64)
    damping = 0.01 * np.mean((wide**2).sum(1))  # λ
    inverse = np.linalg.inv(wide.T @ wide + rows * damping * np.eye(numbers))
    np.testing.assert_allclose(trak(features, queries, ridge=0.01), wide @ inverse @ queries.T, rtol=1e-9, atol=1e-12)
    assert not trak(np.zeros_like(features), queries, ridge=0.01).any()
    with pytest.raises(surgeon.MeasureError, match="equations take"):
        trak(features, queries, ridge=0.01, free=1000)


def test_cosines_have_no_length_and_nothing_is_alike_with_zeros():
    rows = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], np.float32)
    asked = np.array([[4.0, 3.0]], np.float32)
    np.testing.assert_allclose(dots(rows, asked, is_cosine=True)[:, 0], [0.96, 0.96, 0.0], rtol=1e-6)
    np.testing.assert_allclose(dots(rows, asked, is_cosine=False)[:, 0], [24.0, 2.4, 0.0], rtol=1e-6)


def test_bm25_is_the_formula(here, tmp_path):
    tokenizer = load_tokenizer(str(here / "toy"))
    texts = {"a": ["cat cat mat", "cat", "rat sat on the mat"], "b": ["cat"]}
    stores = [
        prepare(
            [talkers.jsonl(tmp_path / f"{name}.jsonl", *[{"text": text} for text in each])],
            tokenizer,
            directory=tmp_path / name,
            sequence_length=48,
        )
        for name, each in texts.items()
    ]
    found = bm25(stores[0], np.arange(3), stores[1], [np.array([0])])[:, 0]
    rows = [stores[0].piece(number)[0].tolist() for number in range(3)]
    asked = set(stores[1].piece(0)[0].tolist())
    expected = []
    for row in rows:
        score = 0.0
        for term in asked & set(row):
            holding = sum(term in each for each in rows)
            norm = 1.2 * (0.25 + 0.75 * len(row) / (sum(map(len, rows)) / 3))
            score += (
                np.log(1 + (3 - holding + 0.5) / (holding + 0.5)) * row.count(term) * 2.2 / (row.count(term) + norm)
            )
        expected.append(score)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["trak", "less", "cosine", "bm25"])
def test_five_planted_copies_of_the_query_are_the_first_five(method, here, tmp_path):
    found = surgeon.attribute(
        here / "tuned.run", query=[str(here / "query.jsonl")], method=method, output=tmp_path / "out"
    )

    assert sorted(row.row for row in found.queries[0].helpful) == [5, 6, 7, 8, 9]
    table = pyarrow.parquet.read_table(tmp_path / "out/scores.parquet").to_pydict()
    best = np.argsort(-np.array(table["query_0"]), kind="stable")[:5]
    assert sorted(best.tolist()) == [5, 6, 7, 8, 9]
    assert len(table["row"]) == len(ROWS) + 5
    assert [table["document"][5], table["data"][5]] == [6, str(here / "rows.jsonl")]
    assert table["text"][5].split() == (QUERY["prompt"] + QUERY["completion"]).split()


def test_batches_and_packing_change_no_score(here, tmp_path):
    asked = {"data": [str(here / "rows.jsonl")], "query": [str(here / "queries.jsonl")], "sequence_length": 48}
    ways: dict[str, dict[str, Any]] = {
        "one": {"batch_size": 1},
        "eight": {"batch_size": 8},
        "packed": {"packing": True},
    }
    scores = {}
    for name, way in ways.items():
        surgeon.attribute(here / "tuned", output=tmp_path / name, **asked, **way)
        table = pyarrow.parquet.read_table(tmp_path / name / "scores.parquet").to_pydict()
        scores[name] = np.stack([table[f"query_{number}"] for number in range(3)])
    size = np.abs(scores["one"]).max()
    for name in ("eight", "packed"):  # 1e-4 of the largest: the inverse enlarges what float32 rounds
        np.testing.assert_allclose(scores[name] / size, scores["one"] / size, rtol=0, atol=1e-4)


def test_the_checkpoints_of_a_run_are_averaged_and_adams_root_divides(here, tmp_path):
    asked = {"query": [str(here / "queries.jsonl")], "data": [str(here / "rows.jsonl")]}
    whole = surgeon.attribute(here / "tuned.run", output=tmp_path / "both", method="cosine", **asked)
    assert whole.checkpoints == ("checkpoint-4", "checkpoint-8")
    places = [str(here / "tuned.run" / name) for name in whole.checkpoints]
    by_name = {"sequence_length": 48, "checkpoints": places}
    surgeon.attribute(here / "toy", output=tmp_path / "named", method="cosine", **asked, **by_name)
    one, other = (pyarrow.parquet.read_table(tmp_path / name / "scores.parquet") for name in ("both", "named"))
    assert one.equals(other)

    shutil.copytree(here / "tuned.run", tmp_path / "last.run")
    shutil.rmtree(tmp_path / "last.run/checkpoint-4")
    surgeon.attribute(tmp_path / "last.run", method="less", output=tmp_path / "less", **asked)
    table = pyarrow.parquet.read_table(tmp_path / "less/scores.parquet").to_pydict()
    source = open_source(here / "tuned.run/checkpoint-8")
    task = task_of(source, TrainingOptions(**SHORT))
    tokenizer = load_tokenizer(str(here / "toy"))
    stores = [
        prepare([str(here / name)], tokenizer, directory=tmp_path / name, sequence_length=48, task=task)
        for name in ("rows.jsonl", "queries.jsonl")
    ]
    model = loading(source, task, None)()
    rows, asked_for = (
        gradients_of(model, Batches(store, np.arange(store.num_pieces), Collator(0, with_index=True)))[0]
        for store in stores
    )
    state = torch.load(here / "tuned.run/checkpoint-8/optimizer.pt", weights_only=True)
    groups = state["param_groups"]
    decayed = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    assert len(groups[0]["params"]) == len(decayed)
    squares = {
        name: state["state"][number]["exp_avg_sq"] for name, number in zip(decayed, groups[0]["params"], strict=True)
    }
    roots = torch.cat([(squares[f"{each.name}.weight"] / (1 - 0.999**8)).sqrt().flatten() for each in maps_of(model)])
    steps = rows / (roots.numpy() + 1e-8)
    unit = steps / np.linalg.norm(steps, axis=1, keepdims=True)
    cosines = unit @ (asked_for / np.linalg.norm(asked_for, axis=1, keepdims=True)).T
    found = np.stack([table[f"query_{number}"] for number in range(3)], 1)
    np.testing.assert_allclose(found, cosines, rtol=0, atol=1e-5)

    shaped = surgeon.attribute(tmp_path / "last.run", output=tmp_path / "trak", **asked)
    assert not shaped.notes
    table = pyarrow.parquet.read_table(tmp_path / "trak/scores.parquet").to_pydict()
    halves = np.sqrt(roots.numpy() + 1e-8)  # of the root, for rows and queries
    expected = trak(rows / halves, asked_for / halves, ridge=0.01)
    found = np.stack([table[f"query_{number}"] for number in range(3)], 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    plain = surgeon.attribute(here / "tuned", sequence_length=48, output=tmp_path / "plain", **asked)
    assert "without the optimiser's state" in plain.notes[-1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_a_call_that_was_ended_goes_on_to_the_same_bytes(how, here, tmp_path, monkeypatch):
    asked: dict[str, Any] = {"query": [str(here / "queries.jsonl")], "batch_size": 4}
    surgeon.attribute(here / "tuned.run", output=tmp_path / "whole", **asked)
    monkeypatch.setattr("surgeon.attribution.ledger.EVERY", 0.0)  # count every batch as done
    computed: list[int] = []
    add = Ledger.add

    def counted(ledger, numbers):
        if ledger.width > 3:  # of gradients, not of scores
            if len(computed) == 10:  # in the second checkpoint, past its first batches
                ledger._open.write(b"half a row")
                ledger._open.flush()
                (tmp_path / "before").write_text(str(sum(computed)))
                os.kill(os.getpid(), how)
            computed.append(len(numbers))
        add(ledger, numbers)

    monkeypatch.setattr(Ledger, "add", counted)
    if (child := os.fork()) == 0:
        with suppress(KeyboardInterrupt):
            surgeon.attribute(here / "tuned.run", output=tmp_path / "out", **asked)
        os._exit(7)
    status = os.waitpid(child, 0)[1]
    assert status == (signal.SIGKILL if how == signal.SIGKILL else 7 << 8)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match=r"begun with --ridge 0\.01, not 0\.5"):
        surgeon.attribute(here / "tuned.run", output=tmp_path / "out", ridge=0.5, **asked)
    before = int((tmp_path / "before").read_text())
    monkeypatch.setattr(Ledger, "add", lambda ledger, numbers: (computed.append(len(numbers)), add(ledger, numbers)))
    surgeon.attribute(here / "tuned.run", output=tmp_path / "out", **asked)

    total = len(ROWS) + 5
    assert total < before < 2 * total
    assert sum(computed) == 2 * total - before + total  # the rest of the gradients, and the scores that they give
    whole, resumed = (json.loads((tmp_path / name / "attribution.json").read_text()) for name in ("whole", "out"))
    assert (tmp_path / "out/scores.parquet").read_bytes() == (tmp_path / "whole/scores.parquet").read_bytes()
    assert resumed["queries"] == whole["queries"]
    assert not (tmp_path / "out.partial").exists()


def test_the_command_prints_what_the_contract_says_and_replaces_only_its_own(here, run, tmp_path):
    command = ["attribute", here / "tuned", "--data", here / "rows.jsonl", "--query", here / "query.jsonl"]
    command += ["--sequence-length", "48", "--top", "2", "-o", tmp_path / "out"]
    printed = json.loads(run(*command, "--json").out)

    assert printed["method"] == "trak"
    assert printed["output"] == str(tmp_path / "out")
    (query,) = printed["queries"]
    assert {"row", "score"} <= set(query["helpful"][0])
    assert len(query["helpful"]) == 2
    assert query["helpful"][0]["score"] >= query["helpful"][1]["score"] > 0 > query["harmful"][0]["score"]
    again = run(*command)
    assert again.code == 1
    assert "exists and is not empty" in again.err
    shown = run(*command, "--overwrite")
    assert "helpful" in shown.out
    assert "next: surgeon finetune CUT-MODEL" in shown.out
    (tmp_path / "out/attribution.json").unlink()
    assert "was not written by surgeon attribute" in run(*command, "--overwrite").err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"query": []}, "--query is missing"),
        ({"ridge": 0.0}, "without one the covariance has no inverse"),
        ({"projection": "wide"}, "is no number"),
        ({"method": "ekfac"}, "unknown --method"),
        ({"data": []}, "--data is missing"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said, here, tmp_path):
    usual = {"data": [str(here / "rows.jsonl")], "query": [str(here / "query.jsonl")], "output": tmp_path / "out"}
    with pytest.raises(OptionError, match=said):
        surgeon.attribute(here / "tuned", **usual | options)


def test_what_a_run_cannot_give_is_refused_and_what_it_decides_is_its_own(here, tmp_path):
    asked = {"query": [str(here / "query.jsonl")], "output": tmp_path / "out"}
    with pytest.raises(OptionError, match="--sequence-length is the run's own"):
        surgeon.attribute(here / "tuned.run", sequence_length=32, **asked)
    shutil.copytree(here / "tuned.run", tmp_path / "bare.run")
    for file in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / "bare.run/checkpoint-4" / file).unlink()
    with pytest.raises(surgeon.CheckpointError, match="checkpoint-4 lacks optimizer.pt"):
        surgeon.attribute(tmp_path / "bare.run", **asked)
    with pytest.raises(PlanError, match="has no state of its optimiser"):
        surgeon.attribute(here / "tuned", data=[str(here / "rows.jsonl")], sequence_length=48, method="less", **asked)
    assert not (tmp_path / "out.partial").exists(), "nothing was computed"
    model = torch.nn.Linear(2, 2)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PlanError, match="SGD does not keep the squares"):
        mean_squares(model, plain)


# --- finetune --select ------------------------------------------------------------------------------------------------


def rows_of(output: Path) -> dict[str, Any]:
    receipt = json.loads((output / "surgeon.json").read_text())
    selection: dict[str, Any] = receipt["steps"][-1]["finetune"]["selection"]
    return selection


@pytest.mark.parametrize("by", ["less", "bm25"])
def test_the_rows_that_are_the_query_are_selected_and_recorded(by, here, tmp_path):
    how = SHORT | {"max_steps": 2, "select": "5", "select_for": (str(here / "query.jsonl"),), "select_by": by}
    trained = surgeon.finetune(
        here / "toy", data=[str(here / "rows.jsonl")], output=tmp_path / "out", eval_fraction=0.0, **how
    )

    found = rows_of(tmp_path / "out")
    assert found["rows"] == "5-9"
    assert found["of"] == len(ROWS) + 5
    assert found["data"][0]["data"] == str(here / "query.jsonl")
    assert f"5 of {len(ROWS) + 5} rows selected by {by}" in trained.notes


def test_a_selection_is_resumed_and_replayed_as_it_was(here, tmp_path, monkeypatch):
    from recipe_runs import InProcess

    from surgeon.recipe.replay import replay

    how = SHORT | {"max_steps": 4, "save_every": 2, "select": "30%", "select_warmup": 1.0}
    how |= {"select_for": (str(here / "queries.jsonl"),), "data": [str(here / "rows.jsonl")]}
    surgeon.finetune(here / "toy", output=tmp_path / "whole", **how)

    class Stops:
        """A watcher that interrupts the run after its third step."""

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

        def step(self, report):
            if report.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        surgeon.finetune(here / "toy", output=tmp_path / "out", watcher=Stops(), **how)
    monkeypatch.setattr("surgeon.attribution.selecting.selected", lambda pool: pytest.fail("it was selected already"))
    surgeon.finetune(here / "toy", output=tmp_path / "out", resume=True, **how)
    monkeypatch.undo()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "out")

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "whole/surgeon.json"
    replay(file, tmp_path / "again", InProcess(), lambda text: None, overwrite=False, dry_run=False)
    assert (tmp_path / "again/model.safetensors").read_bytes() == weights[0]
    found = surgeon.attribute(tmp_path / "out.run", query=[str(here / "query.jsonl")], output=tmp_path / "taught")
    assert found.rows == round(0.3 * (len(ROWS) + 4)), "of the rows, one is held out and the rest was not selected"


def test_gradients_select_in_one_process_only(here, tmp_path, monkeypatch):
    monkeypatch.setattr("surgeon.verbs.finetune.processes", lambda: 2)
    how = SHORT | {"select": "20%", "select_for": (str(here / "query.jsonl"),)}
    with pytest.raises(PlanError, match="in one process, and the run has 2"):
        surgeon.finetune(here / "toy", data=[str(here / "rows.jsonl")], output=tmp_path / "out", **how)
    assert not (tmp_path / "out.run").exists()


def test_a_random_selection_needs_no_query_and_is_the_seeds(here, tmp_path):
    how = SHORT | {"max_steps": 1, "select": "20%", "select_by": "random", "data": [str(here / "rows.jsonl")]}
    for name, seed in (("a", 0), ("b", 1)):
        surgeon.finetune(here / "toy", output=tmp_path / name, seed=seed, **how)
    assert rows_of(tmp_path / "a")["rows"] != rows_of(tmp_path / "b")["rows"]
    estimated = surgeon.estimate_finetune(here / "toy", **{**how, "max_steps": None, "epochs": 1.0})
    assert estimated.to_dict()["steps"] == 3, "a fifth of 28 rows, two a step"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"select": "0%"}, "is no part of the rows"),
        ({"select": "many"}, "is no part of the rows"),
        ({"select": "5%"}, "--select-for is missing"),
        ({"select_for": ("query.jsonl",)}, "--select-for has no effect without --select"),
        ({"select_by": "random"}, "--select-by has no effect without --select"),
        ({"select": "5%", "select_by": "random", "select_for": ("query.jsonl",)}, "a random selection is for nothing"),
        ({"select": "5%", "select_for": ("query.jsonl",), "select_warmup": -1.0}, "--select-warmup is -1"),
        ({"select": "5%", "select_by": "random", "gist": True}, "--gist trains another"),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused_before_anything_is_read(options, said, tmp_path):
    with pytest.raises(OptionError, match=said):
        surgeon.finetune("nowhere", data=["nothing.jsonl"], output=tmp_path / "out", **options)

"""`surgeon advise`: duplicates, separation, laws and their ranges, the verdict, the probe, and the line of finetune."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import talkers
from later import LATER
from test_rings import command, modules_after

import surgeon
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import spec_of
from surgeon.cost import laws
from surgeon.cost.advice import Facts, Row, advise
from surgeon.cost.flops import body_parameters
from surgeon.cost.laws import OVERFIT, VERDICTS
from surgeon.errors import DataError
from surgeon.options import OptionError
from surgeon.surgery import open_source
from surgeon.verbs.probing import fit, leaving_one_out

if LATER:
    import numpy as np
    import torch

    from surgeon.data.duplicates import RUN, MinHash, Runs, repetition
    from surgeon.measure.separation import nearest, separation
    from surgeon.models.tokenizers import tokenizer_from

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT: dict[str, Any] = {"samples": 4, "sequence_length": 16, "device": "cpu"}
PROBED: dict[str, Any] = SHORT | {"probe": True, "probe_steps": 8, "lr": "1e-3"}
WORDS = [f"{a}{b}" for a in ("ca", "do", "ri", "mu", "te", "so", "li") for b in ("ta", "ne", "ro", "sil", "pa", "ko")]


def prose(seed: int, words: int = 60) -> str:
    drawn = random.Random(seed)
    return " ".join(drawn.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkers.talker(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    records = [{"text": prose(seed)} for seed in range(60)]
    return talkers.jsonl(tmp_path_factory.mktemp("text") / "prose.jsonl", *records)


def facts(**given: Any) -> Facts:
    known: dict[str, Any] = {"parameters": 10**8, "body": 8 * 10**7, "whole": 10**8, "loss": 3.0, "epochs": 3.0}
    return Facts(**{**known, "tokens": 10**6, "unique": 10**6, **given})


def row(rows: Any, quantity: str) -> Row:
    return next(each for each in rows if each.quantity == quantity)


# --- duplicates ---------------------------------------------------------------------------------------------------


def test_tokens_in_runs_that_occurred_before_are_counted_as_by_hand():
    drawn = random.Random(0)
    documents = [[drawn.randrange(3) for _ in range(drawn.randrange(1, 40))] for _ in range(200)]
    seen, expected = set(), 0
    for document in documents:
        run = min(RUN, len(document))
        again = [False] * len(document)
        for at in range(len(document) - run + 1):
            found = (run, *document[at : at + run])
            if found in seen:
                again[at : at + run] = [True] * run
            seen.add(found)
        expected += again.count(False)

    runs = Runs()
    for document in documents:
        runs.add(np.array(document, dtype=np.uint64))

    assert runs.unique() == expected < runs.tokens == sum(map(len, documents))


def test_planted_copies_and_near_copies_are_found_and_nothing_else():
    pieces = [prose(seed) for seed in range(40)]
    near = [" ".join(["other", *piece.split()[1:]]) for piece in pieces[:5]]  # one word of 60: 55 of 57 runs are shared
    far = [" ".join(["other" if n % 4 == 0 else w for n, w in enumerate(p.split())]) for p in pieces[5:10]]

    minhash = MinHash()
    minhash.add([*pieces, *near, *far, *pieces[:3], "too short"])

    assert minhash.pieces == 53
    assert minhash.duplicates() == (3, 5)


def test_a_text_that_is_there_twice_has_as_many_unique_tokens(model, text, tmp_path):
    tokenizer = tokenizer_from(*loaded(model))
    once = Path(text).read_text()
    twice = talkers.written(tmp_path / "twice.jsonl", once + once)

    (one, _), (two, _) = (repetition([spec], tokenizer) for spec in (text, twice))

    assert (two.tokens, two.unique, two.documents) == (2 * one.tokens, one.unique, 120)
    assert (one.copies, one.near, two.copies) == (0, 0, 60)
    assert two.near_share == 0.5
    assert two.packed < one.packed < math.log(len(WORDS))  # a word is at least a token, and each is drawn evenly


def loaded(model: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    source = surgeon.open_model(model)
    return dict(source.tokenizer_files), dict(source.spec.config)


# --- separation ---------------------------------------------------------------------------------------------------


def test_separation_is_one_for_normal_states_and_falls_with_clusters_and_copies():
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(512, 24, generator=generator) * torch.arange(1, 25)
    centres = torch.randn(16, 24, generator=generator) * 20
    clustered = centres.repeat(32, 1) + torch.randn(512, 24, generator=generator)

    found = separation(states)

    assert found is not None
    assert found.states == 512
    # Two medians of 512 distances each: their standard errors are near 1 % together.
    assert found.ratio == pytest.approx(1.0, abs=0.06)
    assert separation(clustered).ratio < 0.3
    assert separation(states[:256].repeat(2, 1)).ratio == 0.0
    assert separation(states[:8]) is None


def test_the_nearest_is_never_the_state_itself():
    states = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]], dtype=torch.float64)

    assert nearest(states).tolist() == [5.0, 1.0, 1.0]


# --- laws ---------------------------------------------------------------------------------------------------------


def test_the_three_data_sizes_of_the_memory_paper_come_out_in_their_order():
    """GPT-2 small on 9M, 90M and 9B tokens: it memorises, is at the boundary, and does not memorise."""
    slacks = [laws.capacity_slack(124e6, laws.data_bits(tokens, 3.3)) for tokens in (9e6, 90e6, 9e9)]

    assert [laws.by_capacity(slack) for slack in slacks] == list(reversed(VERDICTS))
    assert slacks == pytest.approx([10.4, 1.04, 0.0104], rel=0.01)


def test_published_laws_give_what_was_published():
    assert laws.worth(100, 1) == 100
    assert laws.worth(1, 4) / 4 > 0.9  # four epochs are nearly as good as fresh tokens
    assert laws.worth(1, 1e6) == pytest.approx(1 + 15.387756)
    sizes = [laws.optimal_parameters(tokens) for tokens in (1e10, 1.4e12)]
    a, b, alpha, beta = laws.CHINCHILLA.values()
    for size, tokens in zip(sizes, (1e10, 1.4e12), strict=True):  # the two ways to spend compute are worth the same
        assert alpha * a / size**alpha == pytest.approx(beta * b / tokens**beta)
    assert 15 < 1.4e12 / sizes[1] < 30  # about 20 tokens a parameter
    assert [laws.associative_parameters(d) / 1e6 for d in (214.18e6, 261.78e6, 309.37e6)] == pytest.approx(
        [40, 60, 80], rel=0.05
    )


def test_the_law_of_overfit_turns_where_its_loss_is_least():
    body, unique = 1e5, 5e4
    turning = OVERFIT.turning(body, unique)

    around = [OVERFIT.rise(body, unique, turning * factor) for factor in (0.9, 1.0, 1.1)]
    assert around[1] < min(around[0], around[2])
    assert OVERFIT.turning(4 * body, unique) < turning
    assert OVERFIT.gap(body, unique, 1) == 0
    assert [OVERFIT.verdict(body, unique, epochs) for epochs in (1, 1000)] == ["does not memorise", "memorises"]
    order = [VERDICTS.index(OVERFIT.verdict(body, unique, 1.2**n)) for n in range(40)]
    assert order == sorted(order)
    assert set(order) == {0, 1, 2}
    assert math.isinf(replace(OVERFIT, penalty=0.0).turning(body, unique))


def test_parameters_without_embeddings_are_those_of_the_layers_and_the_last_norm(model):
    anatomy = read_anatomy(spec_of(open_source(model)))
    tensors = anatomy.spec.tensors

    outside = tensors["model.embed_tokens.weight"].num_parameters + tensors["lm_head.weight"].num_parameters
    assert body_parameters(anatomy) == anatomy.spec.num_parameters - outside


# --- the verdict --------------------------------------------------------------------------------------------------

INSIDE = {"body": 100_000, "parameters": 120_000, "whole": 120_000}


def test_the_verdict_is_the_lesser_of_what_fits_and_what_the_epochs_lead_to():
    few, many = (advise(facts(**INSIDE, unique=40_000, tokens=40_000, loss=1.5, epochs=e)) for e in (2.0, 200.0))

    assert row(few.rows, "capacity").says == row(many.rows, "capacity").says == "memorises"
    assert row(few.rows, "over-fit").inside
    assert (few.verdict, many.verdict) == ("does not memorise", "memorises")
    assert "2 epochs do not go that far" in few.sentences[0]
    assert "not: capacity (memorises, outside its range)" in few.sentences[1]


def test_outside_its_range_the_law_of_overfit_decides_nothing_unless_no_token_is_seen_twice():
    large, once = advise(facts(epochs=3.0)), advise(facts(epochs=1.0))

    assert not row(large.rows, "over-fit").inside
    assert large.verdict == row(large.rows, "capacity").says == "memorises"
    assert "--probe measures it" in large.sentences[0]
    assert once.verdict == "does not memorise"


def test_what_a_model_does_not_know_yet_is_counted_as_a_compressor_would():
    assert facts(loss=5.5, packed=2.0).bits == facts(loss=2.0).bits < facts(loss=5.5).bits
    assert facts(loss=1.5, packed=2.0).bits == facts(loss=1.5).bits


def test_a_probe_stands_for_the_law_of_overfit():
    probed = Row(quantity="probe: over-fit", value=2.0, shown="", law="", range="", says="boundary")

    assert advise(facts(), [probed]).verdict == "boundary"


def test_every_row_names_its_law_and_its_range_and_a_cut_adds_two():
    plain, cut = advise(facts()), advise(facts(whole=8 * 10**9, cut=3 * 10**9))

    assert all(each.law and each.range and each.shown for each in cut.rows)
    assert len(cut.rows) == len(plain.rows) + 2
    anew, repaired = row(cut.rows, "to train the cut anew"), row(cut.rows, "to repair the cut")
    assert (anew.inside, repaired.inside) == (True, False)  # 37 % of 8B
    assert anew.value == pytest.approx(3e9 * math.sqrt(94 / 10.8 * 100))


# --- the command --------------------------------------------------------------------------------------------------


def test_json_is_one_object_as_the_contract_has_it(run, model, text, tmp_path):
    picture = tmp_path / "a.png"
    words = ("--samples", 4, "--sequence-length", 16, "--device", "cpu", "--plot", picture)
    outcome = run("advise", model, "--data", text, *words, "--cut", "25%", "--json")

    found = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert found["verdict"] in VERDICTS
    for each in found["rows"]:
        assert {"quantity", "value", "law", "range", "inside"} <= set(each)
        assert isinstance(each["inside"], bool)
    values = {each["quantity"]: each["value"] for each in found["rows"]}
    assert values["tokens"] >= values["unique tokens"] > 0
    assert found["body_parameters"] < found["parameters"] == found["trained_parameters"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_people_see_the_verdict_the_rows_outside_and_what_to_run_next(run, model, text):
    outcome = run("advise", model, "--data", text, "--samples", 4, "--sequence-length", 16, "--device", "cpu")

    assert outcome.out.splitlines()[0].strip().startswith("verdict  ")
    assert "OUTSIDE: " in outcome.out
    assert f"next: surgeon finetune {model} --data {text} --epochs 3" in outcome.out


def test_a_model_holds_nothing_more_than_itself_and_adapters_hold_less(model, text):
    whole = surgeon.advise(model, data=[text], reference=model, **SHORT)
    adapters = surgeon.advise(model, data=[text], lora=2, **SHORT)

    assert row(whole.rows, "bits used").value == 0
    assert 0 < row(adapters.rows, "capacity").value < row(whole.rows, "capacity").value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cut": "0%"}, "cannot read '0%' as a part"),
        ({"cut": "3G"}, "cannot read '3G' as a part"),  # of bytes there are G, of parameters B
        ({"cut": "some"}, "cannot read 'some' as a part"),
        ({"epochs": 0.0}, "it is above 0"),
        ({"original": "other"}, "is what --probe heals up to"),
        ({"data": []}, "no data"),
    ],
)
def test_options_without_sense_are_refused(given, said):
    with pytest.raises(OptionError, match=said):
        surgeon.advise("none", **({"data": ["text.txt"]} | given))


# --- the probe ----------------------------------------------------------------------------------------------------


def test_a_fit_finds_the_curve_that_made_the_points():
    tokens = [1000.0 * n for n in range(1, 9)]
    losses = [2.0 + 30 * count**-0.4 for count in tokens]

    found = fit(tokens, losses)

    assert found.floor == pytest.approx(2.0, abs=0.05)  # β is one of 161 on a grid, 2.3 % apart
    assert found.tokens_to(2.5) == pytest.approx((30 / 0.5) ** 2.5, rel=0.05)
    assert math.isinf(found.tokens_to(1.9))
    assert max(each.tokens_to(2.5) for each in leaving_one_out(tokens, losses)) == pytest.approx(
        found.tokens_to(2.5), rel=0.05
    )


def test_a_probe_trains_copies_and_leaves_nothing_behind(model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = (model / "model.safetensors").read_bytes()

    advice = surgeon.advise(model, data=[text], original=model, **PROBED)

    assert [each.quantity for each in advice.rows[-2:]] == ["probe: over-fit", "probe: to heal"]
    runs = advice.setup["probe"]
    assert [step for step, *_ in runs["fresh"]] == [step for step, *_ in runs["repeated"]] == list(range(9))
    assert runs["fresh"][0][1] == runs["repeated"][0][1]  # the same rows are held out
    assert runs["fresh"][-1][1] < runs["fresh"][0][1]
    assert list(tmp_path.iterdir()) == []
    assert (model / "model.safetensors").read_bytes() == before


def test_a_text_too_short_for_a_probe_is_refused(model, tmp_path):
    short = talkers.written(tmp_path / "short.txt", prose(0))

    with pytest.raises(DataError, match="the probe reads 1,024 tokens"):
        surgeon.advise(model, data=[short], **PROBED)


# --- the line of finetune -----------------------------------------------------------------------------------------


def test_a_run_says_its_verdict_in_one_line_unless_it_is_quiet(run, model, text, tmp_path):
    words = ("finetune", model, "--data", text, "--max-steps", 2, "--sequence-length", 32, "--batch-size", 2)

    outcome, quiet = (run(*words, "-o", tmp_path / name, *how) for name, how in (("a", ()), ("b", ("--quiet",))))

    (line,) = [line for line in outcome.err.splitlines() if "surgeon advise" in line]
    assert line.startswith("note: ")
    assert any(verdict in line for verdict in VERDICTS[:2]) or "can memorise it" in line
    assert "surgeon advise" not in outcome.out + quiet.out + quiet.err


def test_the_line_costs_no_import_and_the_help_neither():
    line = "from surgeon.cost.laws import in_a_line; print(in_a_line(10**8, 10**6, 3.0))"

    assert modules_after(line) == set()
    assert modules_after(command("advise", "--help")) == set()


def test_the_line_says_what_the_rows_would():
    assert laws.in_a_line(10**8, 10**6, 3.0).endswith("can memorise it; surgeon advise says more")
    assert "does not memorise" in laws.in_a_line(10**8, 10**6, 1.0)
    assert "does not memorise" in laws.in_a_line(10**6, 10**9, 3.0)

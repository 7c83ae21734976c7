"""scores.json says what was measured; a damaged one, or one of another model, is refused in one line."""

import json
import math

import pytest
import toys
from later import LATER

from surgeon.errors import MeasureError
from surgeon.measure.record import Scores, check_model, read_scores
from surgeon.surgery import open_source

if LATER:
    import torch
    from streamed import tokens

    from surgeon.measure.scoring import ScoreRequest, score

DEPTH = 3
SCORES = Scores(
    model={"path": "/models/a", "fingerprint": "12ab"},
    depth=DEPTH,
    data={"files": ["text.jsonl"], "sha256": "34cd"},
    tokens=8192,
    seed=7,
    options={"tokens": "last", "dtype": "float32", "device": "cpu"},
    layers={
        "angular": [[None, 0.1, 0.2, 0.3], [None, None, 0.15, 0.25], [None, None, None, 0.05]],
        "block-influence": [0.5, 0.25, 1e-9],
        "perplexity": [math.inf, 20.5, 1e300],
    },
    widths={
        "activation": {
            "hidden": [1.0, 2.0],
            "ffn": [[1.0, 2.0, 3.0]] * DEPTH,
            "heads": [[[1.0, 2.0], [3.0, 4.0]]] * DEPTH,
            "kv_heads": [[1.0, 2.0]] * DEPTH,
            "experts": [[0.0, 1.0]] * DEPTH,
        }
    },
    greedy={"order": [1, 2], "perplexity": [20.5, 40.0], "protect": [0, 0]},
    loss=2.5,
)


@pytest.fixture
def written(tmp_path):
    """Return a function that writes SCORES, changed, to a file."""

    def write(**changes):
        path = tmp_path / "scores.json"
        path.write_text(json.dumps(SCORES.to_dict() | changes))
        return path

    return write


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "scores.json"
    path.write_bytes(SCORES.to_bytes())

    assert read_scores(path) == SCORES


def test_the_least_record_is_read_back(tmp_path):
    scores = Scores(model={"fingerprint": "1"}, depth=1, data=None, tokens=0, seed=0)
    path = tmp_path / "scores.json"
    path.write_bytes(scores.to_bytes())

    assert read_scores(path) == scores


def test_the_file_names_its_format_and_versions():
    content = json.loads(SCORES.to_bytes())

    assert content["format"] == 1
    assert content["scores"] == SCORES.layers
    assert {"surgeon", "torch", "transformers"} <= set(content["versions"])
    assert SCORES.to_bytes().endswith(b"}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "no file of scores"),
        (b"null", "no file of scores"),
        (b"{}", "no file of scores"),
        (b'{"format": 2}', "no file of scores"),
    ],
)
def test_a_file_of_something_else_is_refused(content, message, tmp_path):
    path = tmp_path / "scores.json"
    path.write_bytes(content)

    with pytest.raises(MeasureError, match=message) as caught:
        read_scores(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def angular(row, place, value):
    changed = [list(values) for values in SCORES.layers["angular"]]
    changed[row][place] = value
    return {"angular": changed}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": None}, "does not say which model"),
        ({"depth": 0}, "does not say which model"),
        ({"depth": True}, "does not say which model"),
        ({"depth": 3.0}, "does not say which model"),
        ({"model": "gpt2"}, "does not say which model"),
        ({"scores": [1]}, "holds no scores"),
        ({"scores": None}, "holds no scores"),
        ({"widths": None}, "holds no scores"),
        ({"depth": 2}, "'angular' are not those of 2 layers"),
        ({"depth": 4}, "'angular' are not those of 4 layers"),
        ({"scores": {"taylor": [0.1, 0.2]}}, "'taylor' are not those of 3 layers"),
        ({"scores": {"taylor": [0.1, 0.2, None]}}, "'taylor' are not those of 3 layers"),
        ({"scores": {"taylor": [0.1, 0.2, "0.3"]}}, "'taylor' are not those of 3 layers"),
        ({"scores": {"taylor": [0.1, 0.2, True]}}, "'taylor' are not those of 3 layers"),
        ({"scores": {"taylor": [0.1, 0.2, math.nan]}}, "'taylor' are not those of 3 layers"),
        ({"scores": {"taylor": [0.1, 0.2, 10**400]}}, "'taylor' are not those of 3 layers"),
        ({"scores": {"taylor": {"0": 1}}}, "'taylor' are not those of 3 layers"),
        ({"scores": {"angular": [0.1, 0.2, 0.3]}}, "'angular' are not those of 3 layers"),
        ({"scores": {"angular": [[None, 0.1, 0.2]] * 3}}, "'angular' are not those of 3 layers"),
        ({"scores": angular(1, 2, None)}, "'angular' are not those of 3 layers"),
        ({"scores": angular(2, 3, math.nan)}, "'angular' are not those of 3 layers"),
        ({"widths": {"activation": [1.0]}}, "widths by 'activation'"),
        ({"widths": {"activation": {"hidden": [[1.0]]}}}, "widths by 'activation'"),
        ({"widths": {"activation": {"hidden": []}}}, "widths by 'activation'"),
        ({"widths": {"activation": {"ffn": [[1.0]] * 2}}}, "widths by 'activation'"),
        ({"widths": {"activation": {"ffn": [[1.0, 2.0], [1.0], [1.0, 2.0]]}}}, "widths by 'activation'"),
        ({"widths": {"activation": {"ffn": [1.0] * 3}}}, "widths by 'activation'"),
        ({"widths": {"magnitude": {"heads": [[1.0]] * 3}}}, "widths by 'magnitude'"),
        ({"widths": {"magnitude": {"experts": [[1.0, math.nan]] * 3}}}, "widths by 'magnitude'"),
        ({"greedy": [1, 2]}, "greedy order"),
        ({"greedy": {}}, "greedy order"),
        ({"greedy": {"order": [3]}}, "greedy order"),
        ({"greedy": {"order": [-1]}}, "greedy order"),
        ({"greedy": {"order": [1, 1]}}, "greedy order"),
        ({"greedy": {"order": [1.0]}}, "greedy order"),
        ({"greedy": {"order": [True]}}, "greedy order"),
        ({"greedy": {"order": "12"}}, "greedy order"),
        ({"tokens": "many"}, "'tokens' cannot be 'many'"),
        ({"seed": None}, "'seed' cannot be None"),
        ({"options": ["last"]}, "'options' cannot be"),
        ({"data": ["text.jsonl"]}, "'data' cannot be"),
        ({"loss": "2.5"}, "'loss' cannot be"),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(changes, message, written):
    with pytest.raises(MeasureError, match=message) as caught:
        read_scores(written(**changes))
    assert "scores.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.hint == "Score again: leave out --scores-from."


def test_a_record_that_lacks_something_is_refused(tmp_path):
    path = tmp_path / "scores.json"
    for key in sorted(SCORES.to_dict().keys() - {"versions", "greedy", "data", "loss"}):
        path.write_text(json.dumps({name: value for name, value in SCORES.to_dict().items() if name != key}))

        with pytest.raises(MeasureError):
            read_scores(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(MeasureError, match=f"cannot read {path}: "):
            read_scores(path)


# --- whose scores they are ------------------------------------------------------------------------------------


def of(**model):
    return Scores(model=model, depth=1, data=None, tokens=0, seed=0)


@pytest.mark.parametrize(
    ("scored", "asked"),
    [
        ({"path": "/a", "fingerprint": "1"}, {"path": "/a", "fingerprint": "1"}),
        ({"path": "/a", "fingerprint": "1"}, {"path": "/moved", "fingerprint": "1"}),
        ({"id": "gpt2", "commit": "2"}, {"id": "gpt2", "commit": "2"}),
        ({"id": "gpt2", "commit": "2", "fingerprint": "1"}, {"path": "/a", "fingerprint": "1"}),
    ],
)
def test_scores_are_taken_for_the_weights_that_they_are_of(scored, asked):
    check_model(of(**scored), asked, "gpt2")


@pytest.mark.parametrize(
    ("scored", "asked", "message"),
    [
        ({"path": "/a", "fingerprint": "1"}, {"path": "/a", "fingerprint": "2"}, "of other weights than those of gpt2"),
        ({"id": "gpt2", "commit": "1"}, {"id": "gpt2", "commit": "2"}, "of other weights than those of gpt2"),
        ({"id": "gpt2", "commit": "1"}, {"path": "/a", "fingerprint": "1"}, "do not say that they are of gpt2"),
        ({}, {"path": "/a", "fingerprint": "1"}, "do not say that they are of gpt2"),
        ({"path": "/a"}, {"path": "/a"}, "do not say that they are of gpt2"),
    ],
)
def test_scores_of_other_weights_are_refused(scored, asked, message):
    with pytest.raises(MeasureError, match=message) as caught:
        check_model(of(**scored), asked, "gpt2")
    assert caught.value.hint


def test_a_models_own_scores_are_its_own_and_no_others(toy, tmp_path):
    source, other = open_source(str(toy("llama"))), open_source(str(toys.build("llama", tmp_path / "toy", seed=1)))
    scores = score(source, None, ScoreRequest(layers={"magnitude"}))

    check_model(scores, source.provenance(), source.label)
    with pytest.raises(MeasureError, match="of other weights"):
        check_model(scores, other.provenance(), other.label)


# --- what scoring records -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_every_score_of_a_model_is_recorded_and_read_back(toy, tmp_path):
    scores = score(
        open_source(str(toy("mixtral"))),
        tokens(),
        ScoreRequest(
            layers={"angular", "perplexity", "taylor", "magnitude"},
            widths={"activation", "contribution", "magnitude"},
            evaluate=True,
            seed=3,
        ),
    )
    path = tmp_path / "scores.json"
    path.write_bytes(scores.to_bytes())

    assert read_scores(path) == scores
    assert (scores.depth, scores.tokens, scores.seed) == (6, 24, 3)
    assert set(scores.layers) == {
        *("angular", "block-influence", "relative-magnitude"),
        *("perplexity", "taylor", "magnitude"),
    }
    assert {criterion: set(axes) for criterion, axes in scores.widths.items()} == {
        "activation": {"hidden", "heads", "kv_heads", "experts"},
        "contribution": {"hidden", "heads", "kv_heads", "experts"},
        "magnitude": {"hidden", "heads", "kv_heads", "experts", "ffn"},
    }
    assert torch.tensor(scores.widths["activation"]["heads"]).shape == (6, 2, 4)


@pytest.mark.usefixtures("one_thread")
def test_a_greedy_removal_is_recorded_and_read_back(toy, tmp_path):
    scores = score(
        open_source(str(toy("llama"))), tokens(), ScoreRequest(layers={"perplexity"}, rounds=2, protect=(1, 2))
    )
    path = tmp_path / "scores.json"
    path.write_bytes(scores.to_bytes())

    assert read_scores(path) == scores
    assert len(scores.greedy["order"]) == len(scores.greedy["perplexity"]) == 2
    assert scores.greedy["protect"] == [1, 2]
    assert "perplexity" not in scores.layers


def test_scores_that_read_no_text_run_no_model(toy, tmp_path):
    for name in ("llama", "t5"):  # an encoder-decoder cannot be run, and need not be
        scores = score(open_source(str(toy(name))), None, ScoreRequest(layers={"magnitude"}))
        path = tmp_path / "scores.json"
        path.write_bytes(scores.to_bytes())

        assert read_scores(path) == scores
        assert set(scores.layers) == {"magnitude"}
        assert (scores.tokens, scores.depth) == (0, 6)


def test_scores_of_widths_alone_know_the_depth(toy, tmp_path):
    scores = score(open_source(str(toy("llama"))), None, ScoreRequest(widths={"magnitude"}))
    path = tmp_path / "scores.json"
    path.write_bytes(scores.to_bytes())

    assert read_scores(path) == scores
    assert scores.depth == 6

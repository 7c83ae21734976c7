"""`surgeon diagnose` as it is typed: figures, words, pictures, a page, and two models side by side."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from talkers import TEXT, talker, tokenizer_of, written
from test_rings import command, modules_after

import surgeon
from surgeon.errors import MeasureError, OutputError, PlanError
from surgeon.evals.compare import PairedDifference
from surgeon.evals.diagnosis import Diagnosis, Layer, findings
from surgeon.options import OptionError

Run = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = ("--samples", 4, "--sequence-length", 16, "--skip-samples", 3, "--device", "cpu")
IN_PYTHON: dict[str, Any] = {"samples": 4, "sequence_length": 16, "skip_samples": 3, "device": "cpu"}
CONTRACT = {"rank", "stable_rank", "column_mass", "sink", "block_influence", "skip_loss"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("text") / "a.txt")


def drawn(*, sinks: int = 0, low: int = 0, skip: float = 0.2, influence: float = 0.1, others: int = 4) -> Layer:
    """Return a layer with so many heads that look at the first token, at one other, and at many."""
    kinds = [(1.0, 20.0)] * sinks + [(1.0, 1.0)] * low + [(30.0, 30.0)] * (others - sinks - low)
    figures = dict.fromkeys(("stable_rank", "column_mass", "sink", "top_column", "entropy"), 0.5)
    heads = tuple(figures | {"rank": rank, "rank_without_sink": without} for rank, without in kinds)
    return Layer(heads, influence, PairedDifference(skip, 0.01), PairedDifference(skip / 2, 0.01))


def diagnosed(*layers: Layer, **more: Any) -> Diagnosis:
    from surgeon.evals.compare import Estimate

    setup = {"data": ["a b.txt"], "dtype": "float32", "device": "cpu", "asked_length": 16}
    given: dict[str, Any] = {"sequences": 4, "length": 16, "energy": 0.9, "skip_sequences": 3, "calibration": {}}
    return Diagnosis(model="a model", layers=layers, loss=Estimate(3.0, 0.1), setup=setup, **given | more)


# --- figures ------------------------------------------------------------------------------------------------------


def test_json_is_one_object_as_the_contract_has_it(run: Run, model: Path, text: str) -> None:
    outcome = run("diagnose", model, "--data", text, *SHAPE, "--json")

    found = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert (found["model"], found["data"], found["dtype"]) == (str(model), [text], "float32")
    assert (found["sequences"], found["sequence_length"], found["skip_sequences"]) == (4, 16, 3)
    assert len(found["layers"]) == len(found["heads"]) == 6
    assert all(len(heads) == 8 for heads in found["heads"])
    for number, layer in enumerate(found["layers"]):
        assert set(layer) >= CONTRACT | {"attention_skip_loss", "skip_loss_error", "attention_skip_loss_error"}
        assert layer["layer"] == number
        assert layer["rank"] == max(head["rank"] for head in found["heads"][number])
        assert layer["stable_rank"] == pytest.approx(sum(head["stable_rank"] for head in found["heads"][number]) / 8)
        assert layer["skip_loss_error"] > 0
    assert found["calibration"]["all on token 0"]["rank"] == 1
    assert found["findings"]
    assert "against" not in found
    assert "pictures" not in found


def test_the_loss_and_the_influence_are_those_of_the_other_commands(run: Run, model: Path, text: str) -> None:
    shape = ("--sequence-length", 16, "--samples", 3, "--json", "--device", "cpu")

    found = surgeon.diagnose(model, data=[text], samples=3, sequence_length=16, skip_samples=3, device="cpu").to_dict()

    evaluated = json.loads(run("evaluate", model, "--data", text, *shape).out)
    cut = surgeon.prune(
        model, layers=5, score="block-influence", data=[text], samples=3, sequence_length=16, device="cpu"
    )
    # float32 sums of a row, alone and with others
    assert found["loss"] == pytest.approx(evaluated["loss"], abs=1e-5)
    assert found["loss_error"] == pytest.approx(evaluated["loss_error"], abs=1e-5)
    influence = [layer["block_influence"] for layer in found["layers"]]
    assert cut.scores is not None
    assert influence == pytest.approx(cut.scores.layers["block-influence"], abs=1e-5)


def test_a_rise_of_the_loss_is_that_of_a_model_without_the_layer(run: Run, model: Path, text: str, tmp_path) -> None:
    found = surgeon.diagnose(model, data=[text], **IN_PYTHON).to_dict()
    surgeon.prune(
        model, layers=5, score="block-influence", data=[text], samples=3, sequence_length=16, device="cpu"
    ).save(tmp_path / "cut")
    dropped = set(range(6)) - set(json.loads((tmp_path / "cut/surgeon.json").read_text())["layer_map"])

    shape = ("--sequence-length", 16, "--samples", 3, "--json", "--device", "cpu")
    compared = json.loads(run("evaluate", tmp_path / "cut", "--data", text, "--baseline", model, *shape).out)
    layer = found["layers"][dropped.pop()]
    assert layer["skip_loss"] == pytest.approx(compared["differences"]["loss"]["value"], abs=1e-5)
    assert layer["skip_loss_error"] == pytest.approx(compared["differences"]["loss"]["error"], abs=1e-5)


def test_without_skipped_samples_no_layer_is_left_out(run: Run, model: Path, text: str) -> None:
    shape = ("--samples", 4, "--sequence-length", 16, "--skip-samples", 0, "--device", "cpu")

    found = json.loads(run("diagnose", model, "--data", text, *shape, "--json").out)
    shown = run("diagnose", model, "--data", text, *shape).out

    assert found["loss"] is None
    assert {layer["skip_loss"] for layer in found["layers"]} == {None}
    assert all(layer["rank"] >= 1 for layer in found["layers"])
    assert "without layer" not in shown
    assert "Cheapest by block influence" in shown


def test_a_share_of_the_energy_is_an_option(model: Path, text: str) -> None:
    more, less = (surgeon.diagnose(model, data=[text], energy=share, **IN_PYTHON) for share in (0.99, 0.5))

    assert all(one.rank > other.rank for one, other in zip(more.layers, less.layers, strict=True))


def test_a_short_text_is_one_shorter_sequence_and_its_length_is_said(run: Run, model: Path, tmp_path: Path) -> None:
    short = written(tmp_path / "short.txt", TEXT[:30])

    outcome = run("diagnose", model, "--data", short, "--device", "cpu")

    assert outcome.code == 0
    length = re.search(r"1 sequence of T = (\d+) tokens", outcome.out)
    assert length is not None
    assert f"The text is shorter than a sequence: T is {length[1]} here, not 100." in outcome.out


def test_a_text_of_one_token_is_refused(run: Run, model: Path, tmp_path: Path) -> None:
    outcome = run("diagnose", model, "--data", written(tmp_path / "a.txt", "a"), "--device", "cpu")

    assert outcome.code == 1
    assert "a row has 2 at least" in outcome.err


def test_more_tokens_than_positions_are_refused(run: Run, model: Path, text: str) -> None:
    outcome = run("diagnose", model, "--data", text, "--sequence-length", 80, "--device", "cpu")

    assert outcome.code == 1
    assert "more than the 64 positions" in outcome.err
    assert "--sequence-length 64" in outcome.err


# --- words --------------------------------------------------------------------------------------------------------


def test_text_shows_the_length_the_patterns_and_what_to_do(run: Run, model: Path, text: str) -> None:
    outcome = run("diagnose", model, "--data", text, *SHAPE)

    assert outcome.code == 0
    assert "4 sequences of T = 16 tokens, of a.txt" in outcome.out
    assert "known patterns at T = 16" in outcome.out
    assert f"surgeon prune {model} --score block-influence --layers 5 --data {text}" in outcome.out
    assert "These ranks are of T = 16" in outcome.out
    assert "useless" not in outcome.out


def test_words_name_the_layers_whose_heads_look_at_the_first_token() -> None:
    said = " ".join(findings(diagnosed(drawn(), drawn(low=3), drawn(sinks=3, skip=0.9), drawn(sinks=4, skip=0.1))))

    assert "Heads of rank below 1.5: 3 of 8 (38 %) in layers 0 to 1, 7 of 8 (88 %) in layers 2 to 3." in said
    assert "look at the first token almost alone: layer 3 (4 of 4 heads), layer 2 (3 of 4 heads)." in said
    assert "Of low rank by other columns too: layer 1 (3 of 4 heads)." in said
    assert "Rank 1 in every head (the published rule for a lazy layer): layer 3." in said
    assert "layer 2 is sink-dominated (3 of 4 heads), and without its attention the loss rises by +0.450" in said
    assert "surgeon truncate 'a model' --layers 2, then surgeon finetune" in said


def test_words_choose_what_to_cut_by_loss_and_influence_and_not_by_rank() -> None:
    layers = [drawn(sinks=4, skip=2.0, influence=0.5), drawn(skip=0.1, influence=0.3), drawn(skip=0.2, influence=0.2)]

    said = findings(diagnosed(*layers))

    assert "Cheapest to leave out, each alone, by the loss in nats: layer 1 (+0.100 ± 0.010)." in said
    assert "Cheapest by block influence: layer 2." in said
    assert not any("truncate" in sentence for sentence in said)  # the low ranks are in the first half


def test_words_name_attention_whose_absence_is_within_two_errors() -> None:
    said = findings(diagnosed(drawn(skip=0.03), drawn(skip=0.5)))

    assert "Without the attention of one of these the loss stays within two errors: layer 0." in said
    assert "No layer is sink-dominated: in none most of the heads look at the first token almost alone." in said


def test_one_layer_gets_no_advice_to_cut_it(tmp_path: Path, text: str) -> None:
    one = talker(tmp_path / "one", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)

    said = findings(surgeon.diagnose(one, data=[text], **IN_PYTHON))

    assert "in layers 0 to 0." in said[0]
    assert not any("surgeon prune" in sentence for sentence in said)


# --- pictures -----------------------------------------------------------------------------------------------------


def test_a_page_holds_its_picture_and_needs_no_other_file(run: Run, model: Path, text: str, tmp_path: Path) -> None:
    target = tmp_path / "page.html"

    outcome = run("diagnose", model, "--data", text, *SHAPE, "--html", target, "--json")

    page, found = target.read_text(), json.loads(outcome.out)
    assert found["pages"] == [str(target)]
    assert not re.search(r"https?://|<link|<script|url\(", page)
    (source,) = re.findall(r'src="([^"]+)"', page)
    png = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert all(size > 400 for size in struct.unpack(">II", png[16:24]))
    assert all(sentence.replace("'", "&#x27;") in page for sentence in found["findings"])
    assert page.count("<table>") == 3
    assert "4 sequences of T = 16 tokens, of a.txt" in page


def test_a_page_shows_a_hostile_name_as_text(text: str, tmp_path: Path) -> None:
    hostile = talker(tmp_path / "<img src=x onerror=alert(1)>")

    surgeon.diagnose(hostile, data=[text], html=tmp_path / "page.html", **IN_PYTHON)

    page = (tmp_path / "page.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture_is_drawn_and_named(suffix: str, run: Run, model: Path, text: str, tmp_path: Path) -> None:
    target = tmp_path / f"maps{suffix}"

    found = json.loads(run("diagnose", model, "--data", text, *SHAPE, "--plot", target, "--json").out)

    assert found["pictures"] == [str(target)]
    assert target.stat().st_size > 5000
    if suffix == ".svg":
        assert "<image" in target.read_text()  # the heat maps


def test_a_picture_of_a_model_with_layers_without_attention_is_drawn(text: str, tmp_path: Path) -> None:
    hybrid = talker(tmp_path / "lfm2", "lfm2")

    found = surgeon.diagnose(hybrid, data=[text], plot=tmp_path / "maps.png", **IN_PYTHON)

    assert (tmp_path / "maps.png").exists()
    assert [layer.rank is None for layer in found.layers] == [True, True, False, True, True, False]
    assert found.to_dict()["layers"][0]["skip_loss"] is not None


@pytest.mark.parametrize(
    ("option", "name", "said"),
    [
        ("plot", "a.txt", "cannot draw to"),
        ("html", "a.txt", "no name of a page"),
        ("plot", "nowhere/a.png", "no such directory"),
        ("html", "nowhere/a.html", "no such directory"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(
    option: str, name: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises((PlanError, OutputError), match=said):
        surgeon.diagnose("no-such-model", data=["nowhere.txt"], **{option: tmp_path / name})


def test_a_page_does_not_replace_what_is_read(model: Path, tmp_path: Path) -> None:
    text = written(tmp_path / "data.html")

    with pytest.raises(OutputError, match="is, or belongs to, what --data reads"):
        surgeon.diagnose(model, data=[text], html=text)


# --- two models ---------------------------------------------------------------------------------------------------


def test_a_cut_model_is_held_against_its_source_by_its_receipt(
    run: Run, model: Path, text: str, tmp_path: Path
) -> None:
    surgeon.truncate(model, layers=3).save(tmp_path / "cut")

    found = json.loads(run("diagnose", tmp_path / "cut", "--data", text, *SHAPE, "--against", model, "--json").out)

    assert found["layer_map"] == [0, 1, 2]
    assert len(found["against"]["layers"]) == 6
    assert found["heads"] == found["against"]["heads"][:3]  # the same states go in
    assert found["loss_difference"] == pytest.approx(found["loss"] - found["against"]["loss"], abs=1e-9)
    assert found["loss_difference_error"] > 0


def test_layers_that_moved_are_found_in_both_directions(model: Path, text: str, tmp_path: Path) -> None:
    cut = surgeon.prune(model, layers=4, score="uniform", protect=(0, 1)).save(tmp_path / "cut").output

    one = surgeon.diagnose(cut, data=[text], against=model, **IN_PYTHON)
    other = surgeon.diagnose(model, data=[text], against=cut, **IN_PYTHON)

    kept = json.loads((cut / "surgeon.json").read_text())["layer_map"]
    assert list(one.layer_map) == kept
    assert [other.layer_map[layer] for layer in kept] == [0, 1, 2, 3]
    assert other.layer_map.count(None) == 2
    assert "layers held against" in one.to_text()
    assert "side by side" in other.to_text()


def test_two_models_are_drawn_side_by_side(run: Run, model: Path, text: str, tmp_path: Path) -> None:
    surgeon.truncate(model, layers=3).save(tmp_path / "cut")
    files = ("--plot", tmp_path / "two.png", "--html", tmp_path / "two.html")

    outcome = run("diagnose", tmp_path / "cut", "--data", text, *SHAPE, "--against", model, *files)

    assert outcome.code == 0
    size = struct.unpack(">II", (tmp_path / "two.png").read_bytes()[16:24])
    assert size[0] > 1500  # two columns
    page = (tmp_path / "two.html").read_text()
    assert page.count("<table>") == 5
    assert "Side by side" in page


def test_another_tokenizer_is_refused(model: Path, text: str, tmp_path: Path) -> None:
    other = talker(tmp_path / "other")
    tokenizer_of("Something else entirely, at last. " * 40).save_pretrained(other)

    with pytest.raises(MeasureError, match="make different tokens"):
        surgeon.diagnose(model, data=[text], against=other, **IN_PYTHON)


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [("--energy", 1.5), ("--energy", 0), ("--samples", 0), ("--sequence-length", 1), ("--skip-samples", -1)],
)
def test_a_number_out_of_its_range_is_a_usage_error(wrong: tuple[str, Any], run: Run) -> None:
    outcome = run("diagnose", "no-such-model", "--data", "nowhere.txt", *wrong)

    assert outcome.code == 2
    assert wrong[0] in outcome.err


def test_data_is_required(run: Run) -> None:
    assert run("diagnose", "no-such-model").code == 2
    with pytest.raises(OptionError, match="no data to look at"):
        surgeon.diagnose("no-such-model", data=[])


def test_help_imports_nothing_heavy() -> None:
    assert modules_after(command("diagnose", "--help")) == set()

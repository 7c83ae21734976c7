"""Scores of layers of models in which tokens see both ways: masked language models, headless encoders, classifiers."""

import json

import pytest
import toys
from later import LATER
from talkers import TEXT, tokenizer_of, written

from surgeon.errors import MeasureError

if LATER:
    import torch
    import transformers
    from streamed import stream, tokens

    from surgeon.measure.scoring import losses_without, score_states
    from surgeon.measure.taylor import taylor

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

MODERN = toys.TOKENS | {
    "num_hidden_layers": 6,
    "hidden_size": 80,
    "intermediate_size": 52,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
ENCODERS = {"bert": toys.BERT, "roberta": toys.BERT | {"pad_token_id": 1, "bos_token_id": 0}, "modernbert": MODERN}
KINDS = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification")


def encoder(directory, name="bert", kind="AutoModel", **changes):
    """Return `directory`, now holding an encoder with a head of that kind and a tokenizer."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **ENCODERS[name] | changes)
    model = getattr(transformers, kind).from_config(config, dtype=torch.float32)
    toys._randomise(model)
    model.save_pretrained(directory)
    tokenizer_of(TEXT).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENCODERS)
def test_the_scores_of_an_encoder_are_those_of_transformers_states(name, kind, tmp_path):
    directory, ids = encoder(tmp_path / "toy", name, kind), tokens(3)
    model = getattr(transformers, kind).from_pretrained(directory).eval()
    seen = []
    (layers,) = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == 6]
    for layer in layers:
        layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(ids)
    pairs = [(before, after[0] if isinstance(after, tuple) else after) for before, after in seen]
    angles = [torch.cosine_similarity(before.double(), after.double(), dim=-1) for before, after in pairs]

    scores, _, _ = score_states(stream(directory), ids, all_tokens=True)

    # float32 states; the arc cosine of a number near 1 loses digits
    assert scores["block-influence"] == pytest.approx([1 - float(angle.mean()) for angle in angles], abs=1e-6)
    found = [scores["angular"][layer][layer + 1] for layer in range(6)]
    assert found == pytest.approx([float(angle.arccos().mean() / torch.pi) for angle in angles], abs=1e-5)


@pytest.mark.parametrize("score", ["angular", "block-influence"])
def test_layers_of_an_encoder_are_pruned_by_a_text(score, tmp_path, run):
    directory = encoder(tmp_path / "toy", vocab_size=300)
    text, output = written(tmp_path / "a.txt", TEXT), tmp_path / "cut"
    command = ["prune", str(directory), "--layers", "4", "--data", text, "--samples", "2", "--sequence-length", "16"]

    result = run(*command, "--score", score, "-o", str(output), "--json")

    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert len(report["dropped"]) == 2
    assert "perplexity" not in report
    _, loading = transformers.AutoModel.from_pretrained(output, output_loading_info=True)
    assert not any(loading.values())


@pytest.mark.parametrize("score", ["perplexity", "taylor"])
def test_scores_by_the_next_token_are_refused(score, tmp_path):
    model = stream(encoder(tmp_path / "toy", kind="AutoModelForMaskedLM"))

    with pytest.raises(MeasureError, match="a token sees those after it"):
        taylor(model, tokens()) if score == "taylor" else losses_without(model, tokens(), [frozenset({1})])


def test_an_encoder_writes_no_text_to_be_scored_on(tmp_path, run):
    directory = encoder(tmp_path / "toy")

    result = run("prune", str(directory), "--layers", "4", "-o", str(tmp_path / "cut"))

    assert result.code == 1
    assert "cannot write a text to be scored on" in result.err
    assert not (tmp_path / "cut").exists()


def test_a_curve_of_an_encoder_is_refused_before_anything_is_written(tmp_path, run):
    directory = encoder(tmp_path / "toy", vocab_size=300)
    text = written(tmp_path / "a.txt", TEXT)
    command = ["prune", str(directory), "--layers", "4", "--data", text, "--samples", "2", "--sequence-length", "16"]

    result = run(*command, "--curve", "-o", str(tmp_path / "cut"))

    assert result.code == 1
    assert "no perplexity to draw a curve of" in result.err
    assert not (tmp_path / "cut").exists()

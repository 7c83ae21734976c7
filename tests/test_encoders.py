"""Encoders and encoder-decoders: each table says what transformers writes, grows exactly, and loses what holds nothing.

Norms that follow a sum fix the mean of the stream, so there whole copies of it are exact and nothing else is.
"""

import json
from dataclasses import replace
from functools import cache

import encoders
import pytest
import toys
from later import LATER
from test_narrow import drawn, narrowed, silent

import surgeon
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.axes import shape
from surgeon.anatomy.families import FAMILIES
from surgeon.checkpoint.header import TensorSpec
from surgeon.errors import CheckpointError, PlanError
from surgeon.surgery import open_model

if LATER:
    import torch
    import transformers
    from exact64 import EXACT, Exact64, difference, logits64
    from safetensors.torch import load_file, save_file
    from test_narrow import logits_without_epsilon

pytestmark = pytest.mark.usefixtures("one_thread")

# What grows, by whether a head's size is hidden / heads. A hidden size is a factor.
GROWN = {
    "ffn appended": {"intermediate_size": 71},
    "heads appended": {"attention_heads": 12},
    "hidden padded": {"hidden_size": 1.5},
    "all cloned": {"hidden_size": 2.0, "intermediate_size": "2x", "attention_heads": "2x", "head_dim": "2x"},
}
GROWN_SQUARE = {
    "ffn appended": {"intermediate_size": 71},
    "hidden padded": {"hidden_size": 1.5},
    "all cloned": {"hidden_size": 4.0, "intermediate_size": "2x", "attention_heads": "2x", "head_dim": "2x"},
    "all cloned thrice": {"hidden_size": 3.0, "intermediate_size": 71},
}
# Where other than whole copies of the stream are refused, and the words.
AFTER_SUM = "with norms after the sum cannot be padded"
BEHIND_EMBEDDING = "has a layer norm behind its embedding"
SINUSOIDS = "positions are sinusoids"
NOT_PADDED = {
    **dict.fromkeys(("bert", "bert untied", "roberta", "camembert", "xlm-roberta", "distilbert"), AFTER_SUM),
    **dict.fromkeys(("electra", "electra square", "bart", "bart scaled", "blenderbot-small"), AFTER_SUM),
    **dict.fromkeys(("modernbert", "mbart"), BEHIND_EMBEDDING),
    **dict.fromkeys(("pegasus", "marian"), SINUSOIDS),
}

if LATER:
    before64 = cache(logits64)


def family_of(name):
    return FAMILIES[name.partition(" ")[0]]


def is_square(name):
    """Return whether a head's size is hidden / heads, so that neither changes alone."""
    return "head_dim" not in family_of(name).sizes


# Types whose table is another's, or nearly: one growth of everything at once.
LIGHT = ("bert untied", "camembert", "xlm-roberta", "electra square", "bart scaled", "mt5", "blenderbot-small")
WIDER = [
    (name, op)
    for name in encoders.TYPES
    for op in (GROWN_SQUARE if is_square(name) else GROWN)
    if name not in LIGHT or op == "all cloned"
]
CUT = {"ffn": ("ffn",), "heads": ("kv_heads",), "hidden": ("hidden",)}
CUT_SQUARE = CUT | {"hidden": ("hidden", "kv_heads")}
NARROWER = [
    (name, op)
    for name in encoders.TYPES
    for op in CUT
    if name not in LIGHT
    if op == "ffn" or (name not in NOT_PADDED and not (is_square(name) and op == "heads"))
]


# Zero where it is missing; and all that a tied masked LM has and a classifier has not.
MAY_LACK = ("final_logits_bias", "decoder.bias")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a function from a name of encoders.TYPES to its checkpoint in float64, built once. Read-only."""
    directory = tmp_path_factory.mktemp("encoders")
    return cache(lambda name: encoders.build64(name, directory / name.replace(" ", "-")))


def weights(directory):
    return load_file(directory / "model.safetensors")


def growth(name, operation, source):
    """Return what an operation asks for."""
    options = dict((GROWN_SQUARE if is_square(name) else GROWN)[operation])
    if "hidden_size" in options:
        options["hidden_size"] = int(options["hidden_size"] * open_model(source).anatomy.sizes["hidden"])
    return options


@pytest.mark.parametrize("name", encoders.TYPES)
def test_every_tensor_that_transformers_writes_has_the_shape_that_the_table_says(name, small):
    anatomy = open_model(small(name)).anatomy

    for tensor, spec in anatomy.spec.tensors.items():
        row, part = anatomy.row(tensor)
        assert shape(row.axes, anatomy.sizes | {"?": spec.shape[0]}) == spec.shape, tensor
        assert part != "buffer" or NOT_PADDED[name] == SINUSOIDS


@pytest.mark.parametrize("name", encoders.TYPES)
def test_a_tensor_that_is_missing_or_longer_is_refused_by_its_name(name, small):
    anatomy = open_model(small(name)).anatomy
    spec = anatomy.spec

    for tensor, value in spec.tensors.items():
        if anatomy.row(tensor)[1] == "buffer":
            continue
        others = {other: found for other, found in spec.tensors.items() if other != tensor}
        if tensor not in MAY_LACK:
            with pytest.raises(CheckpointError) as caught:
                read_anatomy(replace(spec, tensors=others))
            assert tensor in str(caught.value)
        longer = TensorSpec(value.dtype, (*value.shape[:-1], value.shape[-1] + 1))
        with pytest.raises(CheckpointError, match="but config.json implies"):
            read_anatomy(replace(spec, tensors=others | {tensor: longer}))


@pytest.mark.parametrize(("name", "operation"), WIDER)
def test_a_wider_model_computes_what_the_original_computes_or_is_refused(name, operation, small, tmp_path):
    source = small(name)
    options = growth(name, operation, source)
    refusal = NOT_PADDED.get(name)
    if (refusal == SINUSOIDS and "hidden_size" in options) or (refusal and operation == "hidden padded"):
        with pytest.raises(PlanError, match=refusal):
            surgeon.grow(source, **options)
        return

    surgery = surgeon.grow(source, **options)
    surgery.save(tmp_path / "wide")

    assert surgery.plan.all_notes == ()
    assert difference(logits64(tmp_path / "wide"), before64(source)) <= EXACT


@pytest.mark.parametrize(("name", "operation"), NARROWER)
def test_removing_what_holds_nothing_changes_nothing(name, operation, small, tmp_path):
    kept = drawn(open_model(small(name)).anatomy, (CUT_SQUARE if is_square(name) else CUT)[operation])
    source = silent(small(name), tmp_path / "silent", kept)

    cut = narrowed(source, tmp_path / "narrow", kept)

    assert difference(logits_without_epsilon(cut), logits_without_epsilon(source)) <= EXACT


@pytest.mark.parametrize("name", encoders.TYPES)
def test_layers_mlp_heads_and_hidden_are_cut_at_once_and_load(name, small, tmp_path):
    sizes = open_model(small(name)).anatomy.sizes
    half = {"intermediate_size": 37, "attention_heads": 4, "hidden_size": sizes["hidden"] // 2}
    if NOT_PADDED.get(name) == SINUSOIDS:
        half = {"intermediate_size": 37}

    surgeon.prune(small(name), score="magnitude", layers=2, protect=(1, 0), **half).save(tmp_path / "cut")

    anatomy = open_model(tmp_path / "cut").anatomy
    found = {"intermediate_size": "ffn", "attention_heads": "heads", "hidden_size": "hidden"}
    assert {option: anatomy.sizes[found[option]] for option in half} == half
    assert [stack.depth for stack in anatomy.stacks] == [2] * len(anatomy.stacks)
    assert logits64(tmp_path / "cut").isfinite().all()


# --- the parts that not every class has --------------------------------------------------------------------------

CLASSES = {
    "bert": ("Model", "ForPreTraining", "ForSequenceClassification", "ForQuestionAnswering", "LMHeadModel"),
    "roberta": ("Model", "ForSequenceClassification", "ForTokenClassification"),
    "distilbert": ("ForSequenceClassification",),
    "electra": ("ForPreTraining", "ForSequenceClassification"),
    "modernbert": ("Model", "ForSequenceClassification"),
    "bart": ("ForSequenceClassification",),
}
CLASS_NAMES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "modernbert": "ModernBert",
    "bart": "Bart",
}


def outputs64(directory, class_name):
    """Return all that a model of this class puts out, in float64."""
    model, report = getattr(transformers, class_name).from_pretrained(
        directory, output_loading_info=True, dtype=torch.float64
    )
    assert not any(report.values()), report
    inputs = {name: tokens.clone() for name, tokens in toys.inputs(model).items()}
    inputs["input_ids"][:, -1] = 2  # the end of the text, of which BART's classifier reads the state
    inputs.pop("decoder_input_ids", None)
    with torch.no_grad(), Exact64():
        found = model.eval()(**inputs)
    return [found.logits] if "Classification" in class_name else [x for x in found.to_tuple() if torch.is_tensor(x)]


def as_class(name, class_name, directory, **overrides):
    """Return `directory`, now holding a model of a class that is no masked LM, in float64."""
    config = transformers.AutoConfig.for_model(name, **{**encoders.TYPES[name], **overrides})
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).to(torch.float64)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.2 * torch.randn(tensor.shape, dtype=tensor.dtype))
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("name", "suffix"), [(name, suffix) for name, found in CLASSES.items() for suffix in found])
def test_poolers_and_classifiers_follow_the_stream(name, suffix, tmp_path):
    """The heads of other classes read more copies; what the headless model hands on, whole copies are of."""
    class_name = CLASS_NAMES[name] + suffix
    overrides = {"num_labels": 2 if suffix == "ForQuestionAnswering" else 5} | (
        {"is_decoder": True} if suffix == "LMHeadModel" else {}
    )
    source = as_class(name, class_name, tmp_path / "source", **overrides)

    surgeon.grow(source, hidden_size="2x", intermediate_size=71).save(tmp_path / "wide")
    surgeon.prune(source, score="magnitude", hidden_size=40, attention_heads=4).save(tmp_path / "narrow")

    for found, expected in zip(outputs64(tmp_path / "wide", class_name), outputs64(source, class_name), strict=True):
        wider = found.shape[-1] // expected.shape[-1] if suffix == "Model" else 1
        assert wider == (2 if suffix == "Model" else 1)
        assert difference(found, torch.cat([expected] * wider, dim=-1)) <= EXACT
    assert all(found.isfinite().all() for found in outputs64(tmp_path / "narrow", class_name))


def test_the_layers_of_a_class_that_wraps_the_model_are_moved_without_a_table(tmp_path):
    """T5's classifiers put `transformer.` in front of every name."""
    source = as_class("t5", "T5ForSequenceClassification", tmp_path / "source")

    surgeon.truncate(source, layers=2).save(tmp_path / "cut")

    assert open_model(tmp_path / "cut").anatomy.family is None
    with pytest.raises(PlanError, match="only whole layers can be moved"):
        surgeon.grow(source, hidden_size="2x")


def test_a_part_of_which_a_tensor_is_missing_is_refused(tmp_path):
    spec = open_model(as_class("bert", "BertForPreTraining", tmp_path / "source")).spec

    for name in spec.tensors:
        others = {other: found for other, found in spec.tensors.items() if other != name}
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            read_anatomy(replace(spec, tensors=others))


def test_files_with_the_names_of_old_are_read_grown_and_cut(small, tmp_path):
    """As google-bert/bert-base-uncased is published: gamma and beta, and the buffer that counts positions."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((small("bert") / "config.json").read_bytes())
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in weights(small("bert")).items()
    }
    assert "cls.predictions.transform.LayerNorm.gamma" in old
    old["bert.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
    save_file(old, source / "model.safetensors", metadata={"format": "pt"})

    surgeon.grow(source, hidden_size="2x").save(tmp_path / "wide")
    surgeon.truncate(tmp_path / "wide", layers=2).save(tmp_path / "cut")
    surgeon.truncate(small("bert"), layers=2).save(tmp_path / "short")

    assert difference(logits64(tmp_path / "wide"), before64(small("bert"))) <= EXACT
    assert difference(logits64(tmp_path / "cut"), logits64(tmp_path / "short")) <= EXACT


# --- what cannot be exact says so ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "t5 gated", "umt5", "blenderbot", "modernbert"])
def test_identity_blocks_keep_the_function_in_both_stacks(name, small, tmp_path):
    """T5's bias of positions lies in the first layer, which may go or have a copy behind it: the bias stays."""
    at = (1, 2) if name == "modernbert" else (0, 1, 2)  # whose first layer has no norm of its own
    surgeon.grow(small(name), layers=3 + len(at), at=at).save(tmp_path / "deep")

    assert difference(logits64(tmp_path / "deep"), before64(small(name))) <= EXACT
    if name.startswith("t5"):
        surgeon.prune(tmp_path / "deep", score="random", layers=3, protect=(0, 0), seed=4).save(tmp_path / "cut")
        assert logits64(tmp_path / "cut").isfinite().all()


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_no_layer_of_a_model_that_normalises_after_the_sum_is_an_identity(name, small, tmp_path):
    with pytest.raises(PlanError, match="normalises after the sum"):
        surgeon.grow(small(name), layers=4)

    summary = surgeon.grow(small(name), layers=4, depth_method="stack").save(tmp_path / "deep")
    assert summary.layers == (3, 4)


def test_the_first_growth_of_bert2bert_is_exact_inside_of_layers_and_says_where_it_is_not(small, tmp_path):
    """FPI repeats positions unevenly: MLPs and whole copies of the stream do not care, norms over a part do."""
    inside = surgeon.grow(small("bert"), hidden_size="2x", intermediate_size=71, width_method="uneven")
    partly = surgeon.grow(small("bert"), hidden_size=100, width_method="uneven")
    inside.save(tmp_path / "inside")
    partly.save(tmp_path / "partly")

    assert inside.plan.all_notes == ()
    assert difference(logits64(tmp_path / "inside"), before64(small("bert"))) <= EXACT
    assert [note.partition(":")[0] for note in partly.plan.all_notes] == ["approximate"]
    assert difference(logits64(tmp_path / "partly"), before64(small("bert"))) > 1e-2


def test_the_second_growth_of_bert2bert_takes_new_rows_from_the_next_layer(small, tmp_path):
    surgery = surgeon.grow(small("bert"), intermediate_size=71, width_method="advanced", noise=0)
    surgery.save(tmp_path / "wide")

    before, after = weights(small("bert")), weights(tmp_path / "wide")
    for layer, following in ((0, 1), (1, 2), (2, 2)):
        own, other = (f"bert.encoder.layer.{i}.intermediate.dense.weight" for i in (layer, following))
        assert torch.equal(after[own], torch.cat([before[own], before[other][:19]]))
    assert [note.partition(":")[0] for note in surgery.plan.all_notes] == ["approximate"]


def test_config_json_says_the_new_sizes(small, tmp_path):
    surgeon.grow(small("roberta"), hidden_size="2x", intermediate_size=71).save(tmp_path / "wide")

    before, after = (json.loads((path / "config.json").read_text()) for path in (small("roberta"), tmp_path / "wide"))
    assert {key: after[key] for key in after if after[key] != before.get(key)} == {
        "hidden_size": 160,
        "intermediate_size": 71,
        "num_attention_heads": 16,
    }


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
def test_the_states_of_a_model_without_a_head_are_repeated_and_not_scaled(name, tmp_path):
    toys.build(name, tmp_path / "whole", dtype="float64", **({"tie_word_embeddings": True} if name == "llama" else {}))
    model = transformers.AutoModel.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    model.save_pretrained(tmp_path / "states")

    sizes = {"head_dim": "2x"} if name == "gpt2" else {}
    surgeon.grow(tmp_path / "states", hidden_size="2x", **sizes).save(tmp_path / "wide")

    wide = transformers.AutoModel.from_pretrained(tmp_path / "wide", dtype=torch.float64)
    with torch.no_grad(), Exact64():
        before, after = (each.eval()(**toys.inputs(each)).last_hidden_state for each in (model, wide))
    assert difference(after, before.repeat(1, 1, 2)) <= EXACT

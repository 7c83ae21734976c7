"""Each table, lightly: it says what transformers writes, grows exactly, and what holds nothing can go.

The toys of toys.TABLED have thorough tests of their own (test_widen.py, test_narrow.py and others). Here are the tables
of all other types, and of each the axes that it lets change, and the words with which it refuses the rest.
"""

from dataclasses import replace
from functools import cache

import pytest
import tabled
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
    from exact64 import EXACT, difference, logits64
    from test_narrow import logits_without_epsilon

pytestmark = pytest.mark.usefixtures("one_thread")

GROWN = {
    "hidden": {"hidden_size": 1.5},
    "ffn": {"intermediate_size": 71},
    "heads": {"attention_heads": 12},
    "head_dim": {"head_dim": "2x"},
    "all": {"layers": 4, "hidden_size": 2.0, "intermediate_size": "2x", "attention_heads": "2x", "head_dim": "2x"},
}
# Where a head's size is hidden / heads.
GROWN_SQUARE = {
    "hidden": {"hidden_size": 1.5},
    "ffn": {"intermediate_size": 71},
    "head_dim": {"hidden_size": 2.0, "head_dim": "2x"},
    "all": {"layers": 4, "hidden_size": 4.0, "intermediate_size": "2x", "head_dim": "2x"},
}
CUT = {"ffn": ("ffn",), "heads": ("heads", "kv_heads"), "hidden": ("hidden",), "experts": ("experts",)}

REFUSED = {
    ("ministral3", "head_dim"): "rope type 'yarn'",
    ("ministral3", "all"): "rope type 'yarn'",
    ("olmo3", "heads"): "must be copies",
}
NOT_CUT: dict[tuple[str, str], str] = {}

if LATER:
    before64 = cache(logits64)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a function from a name of tabled.TYPES to its checkpoint in float64, built once. Read-only."""
    directory = tmp_path_factory.mktemp("tabled")
    return cache(lambda name: tabled.build64(name, directory / name))


def is_square(name):
    """Return whether a head's size is hidden / heads, so that neither changes alone."""
    return "head_dim" not in FAMILIES[name.partition("-")[0]].sizes


def growth(name, operation):
    """Return what an operation asks for, {} where the family leaves no such choice; a hidden size is a factor."""
    return dict((GROWN_SQUARE if is_square(name) else GROWN).get(operation, ()))


def fields(name, operation):
    """Return the fields of Kept that an operation cuts, () where the family has none of them or not alone."""
    if operation == "experts" and "num_experts_per_tok" not in tabled.TYPES[name]:
        return ()
    return (
        {"heads": (), "hidden": ("hidden", "kv_heads")}.get(operation, CUT[operation])
        if is_square(name)
        else CUT[operation]
    )


WIDER = [(name, op) for name in tabled.TYPES for op in GROWN if growth(name, op)]
NARROWER = [(name, op) for name in tabled.TYPES for op in CUT if fields(name, op)]


@pytest.mark.parametrize("name", tabled.TYPES)
def test_every_tensor_that_transformers_writes_has_the_shape_that_the_table_says(name, small):
    anatomy = open_model(small(name)).anatomy

    for tensor, spec in anatomy.spec.tensors.items():
        row, part = anatomy.row(tensor)
        assert shape(row.axes, anatomy.sizes) == spec.shape, tensor
        assert part != "buffer"


@pytest.mark.parametrize("name", tabled.TYPES)
def test_a_tensor_that_is_missing_or_longer_is_refused_by_its_name(name, small):
    spec = open_model(small(name)).spec

    for tensor, value in spec.tensors.items():
        if "expert" in tensor and "experts.3" not in tensor:
            continue  # one expert stands for all
        others = {other: found for other, found in spec.tensors.items() if other != tensor}
        with pytest.raises(CheckpointError) as caught:
            read_anatomy(replace(spec, tensors=others))
        assert tensor in str(caught.value)
        longer = TensorSpec(value.dtype, (*value.shape[:-1], value.shape[-1] + 1))
        with pytest.raises(CheckpointError, match="but config.json implies"):
            read_anatomy(replace(spec, tensors=others | {tensor: longer}))


@pytest.mark.parametrize(("name", "operation"), WIDER)
def test_a_wider_model_computes_what_the_original_computes_or_is_refused(name, operation, small, tmp_path):
    source = small(name)
    options = growth(name, operation)
    if "hidden_size" in options:
        options["hidden_size"] = int(options["hidden_size"] * open_model(source).anatomy.sizes["hidden"])
    if (name, operation) in REFUSED:
        with pytest.raises(PlanError, match=REFUSED[name, operation]):
            surgeon.grow(source, **options)
        return

    surgery = surgeon.grow(source, **options)
    surgery.save(tmp_path / "wide")

    assert surgery.plan.all_notes == ()
    assert difference(logits64(tmp_path / "wide"), before64(source)) <= EXACT


@pytest.mark.parametrize(("name", "operation"), NARROWER)
def test_removing_what_holds_nothing_changes_nothing_or_is_refused(name, operation, small, tmp_path):
    anatomy = open_model(small(name)).anatomy
    kept = drawn(anatomy, fields(name, operation))
    if (name, operation) in NOT_CUT:
        with pytest.raises(PlanError, match=NOT_CUT[name, operation]):
            narrowed(small(name), tmp_path / "narrow", kept)
        return
    source = silent(small(name), tmp_path / "silent", kept)

    cut = narrowed(source, tmp_path / "narrow", kept)

    assert difference(logits_without_epsilon(cut), logits_without_epsilon(source)) <= EXACT

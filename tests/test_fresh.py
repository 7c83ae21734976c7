"""What is drawn anew is drawn as transformers draws it."""

import re

import encoders
import pytest
import tabled
import toys
from later import LATER

import surgeon
from surgeon.anatomy.families import FAMILIES
from surgeon.errors import PlanError

if LATER:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig

OWN = "modernbert"  # one of those that draw in a way of their own
MADE = "pegasus"  # stores the sinusoids that the code makes, of which a toy's random numbers are none
STD = 0.37  # of fresh weights: far from anything that could be left by accident


def family_of(name):
    return FAMILIES[re.split(" |-(?!roberta|small)", name)[0]]


@pytest.mark.parametrize(
    "name",
    [name for name in (*toys.TABLED, *tabled.TYPES, *encoders.TYPES) if name != MADE and not family_of(name).own_init],
)
def test_fresh_tensors_have_the_distribution_that_transformers_gives_them(name, tmp_path):
    """Constant tensors must be equal; for drawn ones the standard deviation must agree to six standard errors.

    The error is that of the two samples' common standard deviation: one of seven numbers alone says little of its own.
    """
    key = family_of(name).init_std
    build = toys.build if name in toys.TABLED else tabled.build64 if name in tabled.TYPES else encoders.build64
    build(name, tmp_path / "source", **{key: STD})
    config = AutoConfig.from_pretrained(tmp_path / "source")
    config.pad_token_id = None  # transformers zeroes the embedding of the padding token; surgeon draws it as any other
    torch.manual_seed(0)  # transformers draws from the generator that all share
    toys.auto_class(config).from_config(config).save_pretrained(tmp_path / "fresh")

    surgeon.truncate(tmp_path / "source", layers="100%", inherit=[]).save(tmp_path / "drawn")

    expected, drawn = (load_file(tmp_path / out / "model.safetensors") for out in ("fresh", "drawn"))
    assert expected.keys() == drawn.keys()
    for tensor, value in expected.items():
        if (value == value.flatten()[0]).all():
            assert drawn[tensor].float().equal(value.float()), tensor  # a constant may have been set in float32
        else:
            mine, theirs = drawn[tensor].float(), value.float()
            std = ((mine.var() + theirs.var()) / 2) ** 0.5
            assert abs(mine.std() - theirs.std()) < 6 * std / value.numel() ** 0.5, tensor
            assert abs(mine.mean()) < 6 * std / value.numel() ** 0.5, tensor


def test_what_a_family_draws_in_a_way_of_its_own_is_refused(tmp_path):
    encoders.build64(OWN, tmp_path / "source")

    with pytest.raises(PlanError, match="modernbert draws fresh weights in a way of its own"):
        surgeon.truncate(tmp_path / "source", layers=3, inherit=["norm"])


def test_no_two_tensors_are_drawn_alike(toy, tmp_path):
    surgeon.truncate(toy("llama"), layers=6, inherit=["norm"]).save(tmp_path / "drawn")

    drawn = load_file(tmp_path / "drawn/model.safetensors")
    starts = [tuple(value.flatten()[:3].tolist()) for name, value in drawn.items() if value.ndim == 2]
    assert len(set(starts)) == len(starts)


def test_integers_cannot_be_drawn(toy):
    surgery = surgeon.open_model(toy("llama"))
    anatomy = surgery.anatomy
    from dataclasses import replace

    from surgeon.checkpoint.header import TensorSpec
    from surgeon.transforms.layers import fresh

    name = "model.layers.0.mlp.up_proj.weight"
    spec = replace(anatomy.spec, tensors={**anatomy.spec.tensors, name: TensorSpec("I8", (52, 80))})
    with pytest.raises(PlanError, match="cannot draw .*up_proj.* anew: it is stored as I8"):
        fresh(replace(anatomy, spec=spec), name, seed=0, layers=6)

"""Which parameters are trained: those that a receipt or an option names, and no others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
from later import LATER

import surgeon
from surgeon.anatomy.anatomy import Anatomy, read_anatomy

if LATER:
    from surgeon.train import model as scope


EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def anatomy(toy: Callable[[str], Path]) -> Anatomy:
    return read_anatomy(surgeon.open_model(toy("llama")).spec)


def layers_of(names: frozenset[str]) -> set[int]:
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names if ".layers." in name}


@pytest.mark.parametrize(
    ("which", "layer_map", "steps", "found"),
    [
        ("new", [0, None, 1, 2, None, 3], [], {1, 4}),
        ("cut", [0, 1, 4, 5, 6, 7], [], {1, 2}),
        ("cut", [0, 1, 4, 5, 8, 9], [], {1, 2, 3, 4}),
        ("cut", [0, 2, 4, 5, 6, 7], [], {0, 1, 2}),
        ("cut", [0, 1, 2, 3, 4, 5], [{"truncate": {"layers": 6}}], {5}),
        ("cut", [0, 1, 2, 3, 4, 5], [{"prune": {"dropped": [6, 7]}}], {5}),
        ("cut", [0, 1, 2, 4, 5, 6], [{"prune": {"dropped": [3, 7]}}], {2, 3, 5}),
        ("cut", [0, 1, 1, 2, 3, 4], [], {1, 2}),  # a copy put behind its original is a seam as well
    ],
)
def test_the_layer_map_tells_which_layers_are_new_or_beside_a_cut(
    which: str, layer_map: list[int | None], steps: list[Any], found: set[int]
) -> None:
    assert scope.trained_layers(which, {"layer_map": layer_map, "steps": steps}, 6) == found


@pytest.mark.parametrize(
    ("which", "receipt", "said"),
    [
        ("new", None, "has none"),
        ("cut", {"layer_map": [0, 1]}, "has none"),  # of a model of another depth
        ("cut", {"layer_map": "0-5"}, "has none"),
        ("new", {"layer_map": [0, 1, 2, 3, 4, 5]}, "made no new layer"),
        ("cut", {"layer_map": [0, 1, 2, 3, 4, 5]}, "took out no layer"),
        ("cut", {"layer_map": [0, 1, None, 2, 3, 4]}, "took out no layer"),
    ],
)
def test_a_receipt_that_names_no_such_layer_is_refused(which: str, receipt: dict[str, Any] | None, said: str) -> None:
    with pytest.raises(surgeon.PlanError, match=said):
        scope.trained_layers(which, receipt, 6)


def test_frozen_parts_are_found_by_their_names(anatomy: Anatomy) -> None:
    names = list(anatomy.spec.tensors)

    assert scope.frozen(None, anatomy, names) == frozenset()
    assert scope.frozen("embeddings", anatomy, names) == {EMBEDDING}
    assert scope.frozen("head", anatomy, names) == {HEAD}
    assert layers_of(scope.frozen("layers=2", anatomy, names)) == {2}
    both = scope.frozen("embeddings, layers=0-1,layers=4", anatomy, names)
    assert layers_of(both) == {0, 1, 4}
    assert both - {name for name in both if ".layers." in name} == {EMBEDDING}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("layers=4-6", "--freeze layers=4-6: there are no such layers"),
        ("layers=3-1", "--freeze layers=3-1: there are no such layers"),
        ("layers=-1", "does not know 'layers=-1'"),
        ("norms", "does not know 'norms'"),
        ("", "does not know ''"),
    ],
)
def test_a_part_that_there_is_not_cannot_be_frozen(spec: str, said: str, anatomy: Anatomy) -> None:
    with pytest.raises(surgeon.PlanError) as caught:
        scope.frozen(spec, anatomy, list(anatomy.spec.tensors))

    assert said in str(caught.value)


def test_beside_a_cut_the_norm_and_the_head_are_trained_and_the_embedding_is_not(anatomy: Anatomy) -> None:
    names = list(anatomy.spec.tensors)

    with_ends = scope.chosen(anatomy, names, layers=frozenset({1, 2}), ends=True)
    without = scope.chosen(anatomy, names, layers=frozenset({1, 2}), ends=False)

    assert layers_of(with_ends) == layers_of(without) == {1, 2}
    assert with_ends - without == {NORM, HEAD}
    assert scope.chosen(anatomy, names, layers=None, ends=False) == frozenset(names)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral", "gpt_neox"])
def test_what_requires_a_gradient_is_what_was_chosen(name: str, toy: Callable[[str], Path]) -> None:
    """The modules' names are not those of the files in every family: the layers count all the same."""
    model, _ = toys.load(toy(name))
    anatomy = read_anatomy(surgeon.open_model(toy(name)).spec)

    count = scope.choose(model, anatomy, layers=None, freeze="embeddings,layers=0-2", ends=False)

    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert count == sum(parameter.numel() for parameter in trained.values())
    stack = anatomy.stacks[0]
    places = {place[0] for key in trained if (place := stack.locate(key))}
    assert places == set(range(3, anatomy.depth))
    assert not any(parameter is model.get_input_embeddings().weight for parameter in trained.values())


def test_of_a_model_that_is_frozen_whole_nothing_is_trained(toy: Callable[[str], Path], anatomy: Anatomy) -> None:
    model, _ = toys.load(toy("llama"))

    assert scope.choose(model, anatomy, layers=frozenset({1}), freeze="layers=0-5", ends=False) == 0
    assert not any(parameter.requires_grad for parameter in model.parameters())

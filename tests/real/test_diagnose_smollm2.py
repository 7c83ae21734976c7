"""A diagnosis of a trained model agrees with one that was taken by a script of its own, on another text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_scores_smollm2 import BLOCK_INFLUENCE

import surgeon
from surgeon.evals.diagnosis import Diagnosis, findings

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.xdist_group("smollm2"), pytest.mark.timeout(900)]

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
DEPTH, HEADS = 30, 9


@pytest.fixture(scope="module")
def diagnosis(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    text = tmp_path_factory.mktemp("text") / "licence.txt"
    text.write_text(TEXT)
    return surgeon.diagnose(smollm2, data=[str(text)], samples=12, skip_samples=0, device="cpu")


def share(layers: Any) -> float:
    return sum(layer.num_low_rank for layer in layers) / (HEADS * len(layers))


def test_half_of_the_late_heads_look_at_one_token_and_few_of_the_early_ones(diagnosis: Diagnosis) -> None:
    # 5 % and 50 % on 100 sequences of another text; 5 % and 45 % on 20 of a third.
    assert share(diagnosis.layers[:15]) < 0.15
    assert 0.35 < share(diagnosis.layers[15:]) < 0.65


def test_the_most_collapsed_layers_are_those_of_the_table(diagnosis: Diagnosis) -> None:
    ranks = [layer.rank or 0.0 for layer in diagnosis.layers]

    assert max(ranks[23:25]) < 5  # 3.9 and 1.9 there
    assert min(ranks[:3]) > 20  # 34.8, 57.7 and 53.2 there
    assert ranks[11] > 50  # 78.1 there
    assert {23, 24} <= set(sorted(range(DEPTH), key=lambda layer: ranks[layer])[:4])


def test_the_words_call_those_layers_sink_dominated(diagnosis: Diagnosis) -> None:
    said = next(sentence for sentence in findings(diagnosis) if sentence.startswith("Sink-dominated"))

    assert "layer 23 (" in said
    assert "layer 24 (" in said


def test_block_influence_ranks_layers_as_on_another_text(diagnosis: Diagnosis) -> None:
    expected = [float(word) for word in BLOCK_INFLUENCE.split()]
    found = [layer.influence for layer in diagnosis.layers]

    places = [sorted(range(DEPTH), key=values.__getitem__) for values in (found, expected)]
    ranks = [[order.index(layer) for layer in range(DEPTH)] for order in places]
    squares = sum((one - other) ** 2 for one, other in zip(*ranks, strict=True))
    assert 1 - 6 * squares / (DEPTH * (DEPTH**2 - 1)) > 0.8  # Spearman's rank correlation
    assert set(places[0][-3:]) == set(places[1][-3:]) == {0, 24, 29}

"""What other runtimes would compute differently is said, and whole periods can be asked for."""

import pytest
from handmade import snapshot
from later import LATER

import surgeon
from surgeon.anatomy.config import period_of, runtime_notes
from surgeon.anatomy.layer_rules import RUNTIME_PATTERNS
from surgeon.errors import PlanError

if LATER:
    import toys

SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA3 = [*[SLIDING] * 5, FULL] * 2


def config(kinds, model_type="gemma3_text", **more):
    return {"model_type": model_type, "num_hidden_layers": len(kinds), "layer_types": list(kinds)} | more


@pytest.mark.parametrize(
    ("kept", "wrong"),
    [
        (GEMMA3, None),
        (GEMMA3[:8], None),
        (GEMMA3[6:], None),
        (GEMMA3[1:], "4-5, 10"),
        (GEMMA3[:4] + GEMMA3[5:], "4-5, 10"),
        ([SLIDING, FULL], "1"),
    ],
)
def test_layers_that_a_runtime_would_take_for_another_kind_are_named(kept, wrong):
    notes = list(runtime_notes(config(kept), len(kept)).values())

    assert len(notes) == (wrong is not None)
    if wrong:
        (note,) = notes
        assert note.startswith("llama.cpp counts layers: one in 6 of a gemma3_text attends to everything")
        assert f"compute layers {wrong} wrongly" in note


def test_a_family_without_rotary_positions_in_some_layers_is_known_too():
    explicit = {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1]}
    by_rule = {"model_type": "smollm3", "num_hidden_layers": 8}

    assert "one in 4 of a smollm3 has no rotary positions" in runtime_notes(explicit, 4)["llama.cpp rope"]
    assert "compute layers 2-3 wrongly" in runtime_notes(explicit, 4)["llama.cpp rope"]
    assert runtime_notes(by_rule, 8) == {}


def test_both_runtimes_that_count_the_layers_of_gpt_oss_are_named():
    notes = runtime_notes(config([FULL, SLIDING], "gpt_oss"), 2)

    assert list(notes) == ["llama.cpp window", "vLLM window"]


def test_a_family_whose_runtimes_read_the_config_has_no_note():
    assert "olmo3" not in RUNTIME_PATTERNS
    assert runtime_notes(config([FULL, SLIDING], "olmo3"), 2) == {}


def test_the_language_model_inside_a_config_is_meant():
    nested = {"model_type": "gemma3", "text_config": config(GEMMA3[1:])}

    assert len(runtime_notes(nested, 11)) == 1


@pytest.mark.parametrize(
    ("kinds", "period"),
    [
        (GEMMA3, 6),
        (GEMMA3[:8], 6),
        ([SLIDING, FULL] * 3, 2),
        ([FULL] * 4, 1),
        ([FULL, SLIDING, SLIDING], 3),
    ],
)
def test_the_kinds_of_layers_repeat_after_a_period(kinds, period):
    assert period_of(config(kinds), len(kinds)) == period


# --- the commands ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return toys.build("gemma2", tmp_path_factory.mktemp("gemma") / "gemma2")  # 6 layers, every second one full


def test_a_cut_that_breaks_the_pattern_says_so_in_summary_card_and_receipt(gemma, tmp_path):
    broken = surgeon.prune(gemma, layers=5, score="magnitude", protect=(0, 1)).save(tmp_path / "broken")
    first = surgeon.truncate(gemma, layers=3).save(tmp_path / "first")

    (note,) = [note for note in broken.notes if note.startswith("llama.cpp")]
    assert note in (tmp_path / "broken/README.md").read_text()
    assert "llama.cpp counts layers" in (tmp_path / "broken/surgeon.json").read_text()
    assert not [note for note in first.notes if "llama.cpp" in note]


def test_a_growth_that_breaks_the_pattern_says_so(gemma):
    assert any("llama.cpp" in note for note in surgeon.grow(gemma, layers=7).summary("out").notes)
    assert not any(
        "llama.cpp" in note for note in surgeon.grow(gemma, layers=12, depth_method="stack").summary("out").notes
    )


@pytest.mark.parametrize(
    "options", [{}, {"contiguous": True}, {"score": "random"}, {"score": "last", "protect": (0, 0)}]
)
def test_keeping_the_pattern_removes_whole_periods(gemma, options):
    surgery = surgeon.prune(gemma, layers=4, keep_pattern=True, **{"score": "magnitude", "protect": (0, 0)} | options)

    assert not any("llama.cpp" in note for note in surgery.summary("out").notes)
    assert [new % 2 for new in range(4)] == [old % 2 for old in surgery.plan.layer_map]


def test_a_budget_is_met_by_whole_periods(gemma):
    whole = surgeon.inspect(gemma).anatomy.spec.num_parameters
    layer = whole - surgeon.truncate(gemma, layers=5).summary("out").parameters[1]

    surgery = surgeon.prune(
        gemma, target_parameters=whole - 3 * layer, score="magnitude", protect=(0, 0), keep_pattern=True
    )

    assert len(surgery.plan.layer_map) == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": 4, "score": "perplexity", "greedy": True}, "not in whole periods"),
        ({"layers": 5, "protect": (0, 2)}, "1 layer cannot go here: the kinds of layers repeat after 2"),
    ],
)
def test_what_goes_in_no_whole_periods_is_refused(options, named, gemma, tmp_path):
    with pytest.raises(PlanError, match=named):
        surgeon.prune(gemma, **{"score": "magnitude"} | options, keep_pattern=True).save(tmp_path / "out")
    assert snapshot(tmp_path) == {}


def test_what_the_source_could_not_do_elsewhere_is_no_news(tmp_path):
    odd = toys.build("granite", tmp_path / "odd", head_dim=12)  # 8 heads of 12 on 80

    assert not any("llama.cpp" in note for note in surgeon.grow(odd, hidden_size="2x").summary("out").notes)
    assert any(
        "llama.cpp does not load a granite with 16 heads of 10 on a hidden size of 80" in note
        for note in surgeon.grow(toys.build("granite", tmp_path / "even"), attention_heads="2x").summary("out").notes
    )

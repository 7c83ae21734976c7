"""The settings of a run: each mistake is one sentence that names the option, and what a resume may change."""

from dataclasses import fields
from typing import Any

import pytest

import surgeon
from surgeon.train.settings import FULL_LR, LORA_LR, Settings
from surgeon.verbs.finetune import TrainingOptions

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"schedule": "step"}, "--schedule 'step'"),
    ({"precision": "fp16"}, "--precision fp16: gradients vanish in float16"),
    ({"train": "head"}, "--train 'head'"),
    ({"train_on": "prompt"}, "--train-on 'prompt'"),
    ({"lora_targets": "mlp"}, "--lora-targets 'mlp'"),
    ({"packing": "yes"}, "--packing 'yes'"),
    ({"kl": "jensen"}, "--kl 'jensen'"),
    ({"track": ("mlflow",)}, "--track 'mlflow'"),
    ({"lr": "fast"}, "--lr 'fast' is no number"),
    ({"lr": "0"}, "--lr is 0; a rate is above 0"),
    ({"lr": "-1e-4"}, "--lr is -0.0001"),
    ({"lr": "nan"}, "--lr is nan"),
    ({"lr": "inf"}, "--lr is inf"),
    ({"data_weights": "1,a"}, "--data-weights '1,a' is no list of numbers"),
    ({"data_weights": "1,-1"}, "a weight is from 0 to 1000"),
    ({"data_weights": "nan"}, "a weight is from 0 to 1000"),
    ({"data_weights": "0,0"}, "a weight is from 0 to 1000"),
    ({"sequence_length": 1}, "--sequence-length is 1; 2 is the least"),
    ({"eval_rows": 0}, "--eval-rows is 0; 1 is the least"),
    ({"max_steps": 0}, "--max-steps is 0; 1 is the least"),
    ({"batch_size": 0}, "--batch-size is 0; 1 is the least"),
    ({"gradient_accumulation": 0}, "--gradient-accumulation is 0; 1 is the least"),
    ({"lora": 0}, "--lora is 0; 1 is the least"),
    ({"teacher": "t", "teacher_top_k": 0}, "--teacher-top-k is 0; 1 is the least"),
    ({"eval_every": 0}, "--eval-every is 0; 1 is the least"),
    ({"save_every": -1}, "--save-every is -1; 0 is the least"),
    ({"keep_checkpoints": 0}, "--keep-checkpoints is 0; 1 is the least"),
    ({"patience": 0}, "--patience is 0; 1 is the least"),
    ({"seed": -1}, "--seed is -1; it lies between 0 and 4294967295"),
    ({"seed": 2**32}, "--seed is 4294967296; it lies between 0 and 4294967295"),
    ({"workers": -1}, "--workers is -1; 0 is the least"),
    ({"warmup": -0.1}, "--warmup is -0.1; 0 is the least"),
    ({"warmup": float("nan")}, "--warmup is nan; 0 is the least"),
    ({"weight_decay": -1.0}, "--weight-decay is -1; 0 is the least"),
    ({"max_grad_norm": -1.0}, "--max-grad-norm is -1; 0 is the least"),
    ({"teacher": "t", "hidden_weight": -1.0}, "--hidden-weight is -1; 0 is the least"),
    ({"epochs": 0.0}, "--epochs is 0; it must be above 0"),
    ({"epochs": float("inf")}, "--epochs is inf"),
    ({"temperature": 0.0}, "--temperature is 0; it must be above 0"),
    ({"temperature": float("inf")}, "--temperature is inf"),
    ({"lora": 4, "lora_alpha": -1.0}, "--lora-alpha is -1; it must be above 0"),
    ({"eval_fraction": 0.6}, "--eval-fraction is 0.6; it lies between 0 and 0.5"),
    ({"kd_weight": 1.5}, "--kd-weight is 1.5; it lies between 0 and 1"),
    ({"lora_dropout": 1.0}, "--lora-dropout is 1; it lies between 0 and 0.9"),
    ({"max_steps": 5, "epochs": 1.0}, "--max-steps and --epochs both say"),
    ({"keep_adapter": True}, "--keep-adapter has no effect without --lora"),
    ({"qlora": True}, "--qlora has no effect without --lora"),
    ({"lora_alpha": 8.0}, "--lora-alpha has no effect without --lora"),
    ({"teacher_top_k": 4}, "--teacher-top-k has no effect without --teacher"),
    ({"hidden_weight": 1.0}, "--hidden-weight has no effect without --teacher"),
    ({"lora": 4, "train": "new"}, "--lora trains adapters alone"),
    ({"lora": 4, "freeze": "head"}, "--lora trains adapters alone"),
    ({"teacher": "t", "hidden_weight": 1.0, "teacher_top_k": 4}, "hidden states are not kept on disk"),
    ({"keep_best": True, "eval_fraction": 0.0}, "the best step is found on held-out data"),
    ({"patience": 2, "eval_fraction": 0.0}, "the best step is found on held-out data"),
]


@pytest.mark.parametrize(("options", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_setting_that_makes_no_sense_is_refused_by_its_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(surgeon.PlanError) as caught:
        Settings(**options)

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_defaults_are_settings_and_the_rate_follows_what_is_trained() -> None:
    assert Settings().learning_rate() == FULL_LR
    assert Settings(lora=8).learning_rate() == LORA_LR
    assert Settings(lr="3e-4", lora=8).learning_rate() == 3e-4
    assert Settings(lr="auto").learning_rate() is None


def test_as_many_weights_as_data_are_wanted() -> None:
    settings = Settings(data_weights="1,0.5")

    assert settings.weights(2) == (1.0, 0.5)
    assert Settings().weights(3) == (1.0, 1.0, 1.0)
    with pytest.raises(surgeon.PlanError, match="has 2 numbers for 3 --data"):
        settings.weights(3)


def test_only_what_decides_no_number_of_the_result_may_change_in_a_resume() -> None:
    names = {item.name for item in fields(Settings)}
    free = names - set(Settings().deciding())

    assert free == {"keep_checkpoints", "workers", "track"}
    assert Settings(workers=3, keep_checkpoints=9).deciding() == Settings().deciding()
    assert Settings(seed=1).deciding() != Settings().deciding()


def test_every_setting_has_a_help_text_that_fits_a_terminal() -> None:
    texts = {item.name: item.metadata["flag"].help for item in fields(TrainingOptions)}

    assert all(text and len(text) <= 100 for text in texts.values()), max(texts.values(), key=len)


def test_a_short_run_evaluates_as_seldom_as_evaluations_cost_and_saves_every_tenth():
    from surgeon.train.arguments import cadence

    assert cadence(Settings(), 20, evaluated=16) == (27, 2)  # one takes 16/3 steps, a fifth of 26.7
    assert cadence(Settings(), 20, evaluated=0.5) == (2, 2)
    assert cadence(Settings(), 1000, evaluated=16) == (100, 100)
    assert cadence(Settings(eval_every=1), 20, evaluated=16) == (1, 1)
    assert cadence(Settings(save_every=0), 20, evaluated=16) == (27, 0)

"""Model surgery on Hugging Face checkpoints: truncate, grow, prune and train, as exact, streaming plans.

    import surgeon

    surgeon.truncate("gpt2-large", layers=6).save("gpt2-large-6")
    print(surgeon.inspect("gpt2-large-6"))

The names below are loaded when they are first used: importing surgeon imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgeon.compressing import Compression, compress
    from surgeon.conversion import convert
    from surgeon.errors import (
        CheckpointError,
        DataError,
        HubError,
        OutputError,
        PlanError,
        SurgeonError,
        TrainingError,
        VerificationError,
    )
    from surgeon.evals.harness import TaskEvaluation, evaluate_tasks
    from surgeon.evals.judge import judge_answers
    from surgeon.evals.verdicts import Judgement
    from surgeon.evaluation import Evaluation, evaluate
    from surgeon.finetuning import estimate_finetune, finetune
    from surgeon.generating import Generation, generate
    from surgeon.gist.evaluation import GistEvaluation, evaluate_gist
    from surgeon.inspection import Inspection, inspect
    from surgeon.pruning import Pruning, prune
    from surgeon.surgery import Summary, Surgery
    from surgeon.train.training import Training
    from surgeon.verbs import add_gist, grow, open_model, truncate
    from surgeon.verification import Verification, verify

_HOMES = {
    "compress": "surgeon.compressing",
    "Compression": "surgeon.compressing",
    "convert": "surgeon.conversion",
    "evaluate": "surgeon.evaluation",
    "Evaluation": "surgeon.evaluation",
    "evaluate_gist": "surgeon.gist.evaluation",
    "GistEvaluation": "surgeon.gist.evaluation",
    "evaluate_tasks": "surgeon.evals.harness",
    "TaskEvaluation": "surgeon.evals.harness",
    "estimate_finetune": "surgeon.finetuning",
    "finetune": "surgeon.finetuning",
    "generate": "surgeon.generating",
    "Generation": "surgeon.generating",
    "judge_answers": "surgeon.evals.judge",
    "Judgement": "surgeon.evals.verdicts",
    "inspect": "surgeon.inspection",
    "Inspection": "surgeon.inspection",
    "add_gist": "surgeon.verbs",
    "grow": "surgeon.verbs",
    "open_model": "surgeon.verbs",
    "prune": "surgeon.pruning",
    "Pruning": "surgeon.pruning",
    "Summary": "surgeon.surgery",
    "Surgery": "surgeon.surgery",
    "Training": "surgeon.train.training",
    "truncate": "surgeon.verbs",
    "Verification": "surgeon.verification",
    "verify": "surgeon.verification",
    "CheckpointError": "surgeon.errors",
    "DataError": "surgeon.errors",
    "HubError": "surgeon.errors",
    "MeasureError": "surgeon.errors",
    "OutputError": "surgeon.errors",
    "PlanError": "surgeon.errors",
    "SurgeonError": "surgeon.errors",
    "TrainingError": "surgeon.errors",
    "VerificationError": "surgeon.errors",
}

__all__ = [
    "CheckpointError",
    "Compression",
    "DataError",
    "Evaluation",
    "Generation",
    "GistEvaluation",
    "HubError",
    "Inspection",
    "Judgement",
    "MeasureError",
    "OutputError",
    "PlanError",
    "Pruning",
    "Summary",
    "SurgeonError",
    "Surgery",
    "TaskEvaluation",
    "Training",
    "TrainingError",
    "Verification",
    "VerificationError",
    "add_gist",
    "compress",
    "convert",
    "estimate_finetune",
    "evaluate",
    "evaluate_gist",
    "evaluate_tasks",
    "finetune",
    "generate",
    "grow",
    "inspect",
    "judge_answers",
    "open_model",
    "prune",
    "truncate",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgeon' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

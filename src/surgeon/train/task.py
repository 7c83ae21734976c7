"""A task: what a run trains. The task of this file trains texts, prompts with answers, and chats.

Another task is a subclass that overrides what differs from that; the verb that starts the run chooses it. All else in
train/ asks the task, and knows none by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.checkpoint.source import Source
from surgeon.data.records import Document
from surgeon.models.split import AttentionLayout, Causal
from surgeon.surgery import open_source
from surgeon.train.examples import Example, examples
from surgeon.train.settings import Settings
from surgeon.train.teacher import OnlineTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.train.objective import Objective
    from surgeon.train.teacher import Teacher


@dataclass(frozen=True)
class Task:
    """Texts, prompts with answers, and chats, each token seeing its document before it.

    `recorded` are the settings of the run as run.json and the receipt hold them, by default those of `settings`. A run
    is resumed only with the same ones.
    """

    settings: Settings
    recorded: Mapping[str, Any] | None = None

    unit: ClassVar[str] = "nats a token"  # of the loss

    def record(self) -> dict[str, Any]:
        """Return the settings of the run for run.json and the receipt."""
        return dict(self.settings.deciding() if self.recorded is None else self.recorded)

    # --- data -------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str | None:
        """A string that decides, with the settings, which tokens a document has; None where nothing else does."""
        return None

    def examples(
        self, documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", *, first: int, length: int
    ) -> list[Example]:
        """Return the example of each document, of which the first one has the number `first`.

        `length` is that of a row, to which examples are cut later; a task that must not lose its end cuts them itself.
        """
        return examples(documents, tokenizer, train_on=self.settings.train_on)

    def may_share_rows(self, attention: str) -> bool:
        """Return whether a row may hold several documents, with this attention implementation of transformers."""
        return True

    @property
    def reads_lengths(self) -> bool:
        """Whether the task can be trained by an attention that takes the lengths of documents in place of a mask."""
        return True

    @property
    def can_recompute(self) -> bool:
        """Whether activations may be computed a second time in the backward pass."""
        return True

    # --- the model --------------------------------------------------------------------------------------------

    def kind(self, source: Source) -> Any:
        """Return the Auto class of transformers that loads the model; None for one that writes."""
        return None

    def attach(self, model: Any, objective: "Objective", teacher: "Teacher | None") -> None:
        """Make the model's forward pass return the loss of the run. Raises PlanError where they do not fit."""
        from surgeon.train.objective import attach_loss

        attach_loss(model, objective, teacher, layout=self.layout(model))

    def layout(self, model: Any) -> AttentionLayout:
        """Return which tokens each token sees. Raises PlanError for a model that the task cannot train."""
        return Causal()

    def embedding_rows(self) -> Sequence[int]:
        """Return the token ids whose embeddings are trained beside LoRA adapters."""
        return ()

    # --- the teacher ------------------------------------------------------------------------------------------

    @property
    def kd_weight(self) -> float:
        """The teacher's weight in the loss, 0 to 1."""
        return self.settings.kd_weight if self.settings.teacher else 0.0

    def teacher_source(self) -> Source | None:
        """Return the checkpoint of the teacher, None for a run without one."""
        return None if self.settings.teacher is None else open_source(self.settings.teacher)

    def teacher(self, model: Any) -> OnlineTeacher:
        """Return the teacher that a loaded model is."""
        return OnlineTeacher(model)

"""The settings of gist training: the gist options of `surgeon finetune`, and which of its other options fit them."""

from dataclasses import dataclass

from surgeon.options import Checked, OptionError, flag_of, option
from surgeon.train.settings import Settings, check_range

MASK, TWO_PASS = "mask", "two-pass"
LENGTHS = "lengths"  # one pass, chosen by the attention alone
CONTROLS = ("none", "positive", "negative")
READERS = ("same", "frozen")
IMPLEMENTATIONS = ("auto", MASK, TWO_PASS)


@dataclass(frozen=True, kw_only=True)
class GistSettings(Checked):
    """The gist options of a run. `check` checks them, alone and beside the other settings."""

    gist: bool = option(
        "Train to compress prompts into the gist tokens that `surgeon gist` added.", False, group="gists"
    )
    gist_control: str = option(
        "Train a control of the paper: positive sees the prompt too, negative neither prompt nor gist.",
        "none",
        metavar="NAME",
        choices=CONTROLS,
        group="gists",
    )
    gist_random_tokens: str | None = option(
        "Draw each record's number of gist tokens from these: 1,2,4,8. Default: the model's number.",
        None,
        metavar="K,K",
        group="gists",
    )
    gist_reader: str = option(
        "same: one model compresses and reads; frozen: adapters compress, the original model reads.",
        "same",
        metavar="WHO",
        choices=READERS,
        group="gists",
    )
    gist_distill: float = option(
        "Objective = (1 - W) cross-entropy + W KL to the untrained model, which sees the prompt.",
        0.0,
        metavar="W",
        group="gists",
    )
    gist_impl: str = option(
        "mask (one pass), two-pass (prompt and gist, then the rest on the gist's cache), or auto.",
        "auto",
        metavar="I",
        choices=IMPLEMENTATIONS,
        group="gists",
    )

    @property
    def is_frozen(self) -> bool:
        """Whether the model without adapters reads the gist."""
        return self.gist_reader == "frozen"

    @property
    def leaves_form_open(self) -> bool:
        """Whether the attention decides how a gist is trained: nothing asks for a form of its own."""
        return self.gist_impl == "auto" and not self.is_frozen

    def counts(self) -> tuple[int, ...] | None:
        """Return the numbers of gist tokens to draw from; None for the checkpoint's own."""
        if self.gist_random_tokens is None:
            return None
        words = [word.strip() for word in self.gist_random_tokens.split(",")]
        if not all(word.isdecimal() and int(word) > 0 for word in words):
            hint = "Such as --gist-random-tokens 1,2,4,8"
            raise OptionError(
                "gist_random_tokens",
                f"--gist-random-tokens {self.gist_random_tokens!r} is no list of numbers",
                hint=hint,
            )
        return tuple(int(word) for word in words)

    def check(self, settings: Settings) -> None:
        """Raise OptionError for a value that makes no sense, alone or beside the settings of the run."""
        check_range(self, {"gist_distill": 1.0})
        self.counts()
        if not self.gist:
            self._check_unused()
            return
        if settings.train_on == "all":
            raise OptionError(
                "train_on", "--gist trains answers: a model must not learn to write gists", hint="Leave out --train-on."
            )
        if settings.teacher:
            hint = "--gist-distill W learns from the model itself, which sees the whole prompt."
            raise OptionError("teacher", "--teacher does not go with --gist", hint=hint)
        if self.is_frozen:
            self._check_frozen(settings)
        if self.gist_impl == TWO_PASS or self.is_frozen:
            if settings.activation_checkpointing:
                hint = "Leave out --activation-checkpointing."
                raise OptionError(
                    "activation_checkpointing",
                    "activation checkpointing empties the cache that a gist of two passes is in",
                    hint=hint,
                )
            if settings.packing == "on":
                raise OptionError("packing", "in two passes each row holds one document", hint="Leave out --packing.")

    def _check_unused(self) -> None:
        """Raise OptionError where an option has a value that only --gist reads."""
        words = {"gist_control": "none", "gist_reader": "same", "gist_impl": "auto"}
        unused = [name for name, neutral in words.items() if getattr(self, name) != neutral]
        unused += [name for name in ("gist_random_tokens", "gist_distill") if getattr(self, name)]
        if unused:
            raise OptionError(unused[0], f"{flag_of(unused[0])} has no effect without --gist", hint="Add --gist.")

    def _check_frozen(self, settings: Settings) -> None:
        if not (settings.lora and settings.keep_adapter):
            hint = "Add --lora 16 --keep-adapter."
            raise OptionError(
                "gist_reader", "a frozen reader is the model without the adapters that compress", hint=hint
            )
        if self.gist_impl == MASK:
            hint = "Leave out --gist-impl."
            raise OptionError(
                "gist_impl", "a frozen reader reads in a pass of its own, and --gist-impl mask has one", hint=hint
            )

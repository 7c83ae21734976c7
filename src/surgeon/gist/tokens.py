"""The gist tokens of a checkpoint: the block `gist` of its config.

Source: Mu, Li and Goodman 2023, arXiv:2304.08467.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from surgeon.errors import CheckpointError, PlanError

VERSION = 1
MOST = 1 << 16  # tokens of a gist
TOKEN = "<GIST>"  # noqa: S105  # no password
KEY = "gist"  # of config.json


@dataclass(frozen=True, slots=True)
class GistTokens:
    """The gist tokens of a checkpoint. `ids` is one id that is repeated, or with `distinct` one for each place."""

    ids: tuple[int, ...]
    num_tokens: int
    distinct: bool = False

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens as the tokenizer knows them, one for each of `ids`."""
        return names(self.num_tokens, distinct=self.distinct)

    def ids_of(self, num_tokens: int | None = None) -> list[int]:
        """Return the ids of a gist of `num_tokens` tokens, by default the checkpoint's own number.

        Raises PlanError for no token, or for more than there are distinct ones.
        """
        count = self.num_tokens if num_tokens is None else num_tokens
        if count < 1 or (self.distinct and count > len(self.ids)):
            most = f", and at most {len(self.ids)}" if self.distinct else ""
            raise PlanError(f"a gist cannot have {count} tokens", hint=f"This model's gists have at least 1{most}.")
        return list(self.ids[:count]) if self.distinct else [self.ids[0]] * count

    def text(self, num_tokens: int | None = None) -> str:
        """Return a gist as text, without spaces, which would be tokens within the gist."""
        place = dict(zip(self.ids, self.tokens, strict=True))
        return "".join(place[i] for i in self.ids_of(num_tokens))

    def to_config(self) -> dict[str, Any]:
        """Return the block of config.json."""
        named = {"tokens": list(self.tokens)} if self.distinct else {"token": TOKEN}
        return {"version": VERSION, **named, "token_ids": list(self.ids), "num_tokens": self.num_tokens}


def names(num_tokens: int, *, distinct: bool) -> tuple[str, ...]:
    """Return the names of the tokens for gists of `num_tokens` tokens: one for all, or one for each place."""
    return tuple(f"{TOKEN[:-1]}_{i}>" for i in range(num_tokens)) if distinct else (TOKEN,)


def read_gist(config: Mapping[str, Any]) -> GistTokens | None:
    """Return the gist tokens in a config.json, None where it has none.

    Raises CheckpointError for a block that is damaged, or written by a later version of surgeon.
    """
    block = config.get(KEY)
    if block is None:
        return None
    if not isinstance(block, Mapping) or block.get("version") != VERSION:
        version = block.get("version") if isinstance(block, Mapping) else block
        raise CheckpointError(
            f"config.json has gist tokens of version {version!r}, not {VERSION}", hint="pip install -U surgeon"
        )
    ids, count, distinct = block.get("token_ids"), block.get("num_tokens"), "tokens" in block
    if not _are_ids(ids) or type(count) is not int or not 1 <= count <= MOST or len(ids) != (count if distinct else 1):
        raise CheckpointError(
            f"config.json says gist = {dict(block)!r}, which makes no sense",
            hint="Fetch config.json again, or add gist tokens anew to the model that this one was made from.",
        )
    return GistTokens(tuple(ids), count, distinct)


def _are_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)

"""Named axes, written as in einops: "(kv_heads group head_dim) hidden".

A dimension is a name, a number, or a parenthesised product; "+" joins blocks that are stored one after the other,
as in Phi-3's fused "(kv_heads group head_dim + kv_heads head_dim + kv_heads head_dim) hidden".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

Block = tuple[str, ...]  # a product of axes, outermost first: ("kv_heads", "head_dim")


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension of a stored tensor: blocks laid end to end, each a product of named axes."""

    blocks: tuple[Block, ...]

    def lengths(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the length of each block. Raises KeyError naming an axis that `sizes` lacks."""
        return tuple(prod(int(name) if name.isdigit() else sizes[name] for name in block) for block in self.blocks)


def shape(dims: tuple[Dim, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape that `sizes` gives a tensor of these dimensions."""
    return tuple(sum(dim.lengths(sizes)) for dim in dims)


@cache
def parse(text: str) -> tuple[Dim, ...]:
    """Return one Dim per tensor dimension of `text`, which is a table's own and trusted."""
    dims = re.findall(r"\(([^)]*)\)|(\S+)", text)
    return tuple(Dim(tuple(tuple(block.split()) for block in (group or name).split("+"))) for group, name in dims)

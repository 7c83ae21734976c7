"""The order of tensors in a weight file that lets most of its blocks be shared with the source.

Blocks are shared whole, between places that agree modulo their size. The tensors of some families (Qwen3, SmolLM2)
begin at many places in a block. When layers between them go, one padding of the header suits few of those that stay.
But the order of tensors in a file is free: those that begin at the same place in a block follow each other, and small
tensors between them, the fillers, bring the next ones to their place.

The order is a pure function of the plan, the headers and the size of a block, so it can be repeated anywhere.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from surgeon.checkpoint.header import DTYPE_BITS, FilePart, FileRange
from surgeon.checkpoint.source import StoredTensor
from surgeon.plan.execute import Shard, TensorWrite, best_alignment, copy_runs, in_pieces
from surgeon.plan.expressions import Read
from surgeon.plan.plan import Plan

SMALL = 16  # blocks: a smaller tensor is worth more as a filler than shared
WORTH = 0.05  # the part of the copied bytes that another order must share in addition
# The search for fillers is bounded, so that no header can make it long.
MOST_LENGTHS = 16  # different lengths of fillers, the most frequent ones
MOST_FILLERS = 64  # between two tensors
MOST_STEPS = 500_000  # of all searches for one file


def placed(shards: Sequence[Shard], plan: Plan, tensors: Mapping[str, StoredTensor], *, block: int) -> list[Shard]:
    """Return the shards with each file's tensors placed so that most blocks of this size can be shared.

    The order of the source stays where another shares little more.
    """
    result = []
    for shard in shards:
        plain = replace(shard, block=block)
        writes = _writes(plain, plan, tensors)
        other = replace(plain, tensors={write.name: write.spec for write in _by_place(writes, block)})
        gain = could_share(other, plan, tensors, block=block) - could_share(plain, plan, tensors, block=block)
        copied = sum(run.source.size for run in copy_runs(writes))
        result.append(other if gain > WORTH * copied else plain)
    return result


def could_share(
    shard: Shard,
    plan: Plan,
    tensors: Mapping[str, StoredTensor],
    *,
    block: int,
    files: Collection[str] | None = None,
) -> int:
    """Return how many bytes of a shard lie in whole blocks that can be the source's; only of `files`, if given."""
    runs = copy_runs(_writes(shard, plan, tensors))
    start = best_alignment(runs, shard.block)
    shared = (run for run in runs if files is None or str(run.source.path) in files)
    pieces = (piece for run in shared for piece in in_pieces(run, start, block))
    return sum(piece.source.size for piece in pieces if piece.is_whole_blocks)


def is_same_order(some: Sequence[Shard], others: Sequence[Shard]) -> bool:
    """Return whether two layouts make the same bytes."""
    return all(
        one.block == other.block and list(one.tensors) == list(other.tensors)
        for one, other in zip(some, others, strict=True)
    )


def _writes(shard: Shard, plan: Plan, tensors: Mapping[str, StoredTensor]) -> list[TensorWrite]:
    """Return the tensors of a shard as they will be written, with the names of the source's files for their paths."""
    writes = []
    for name, spec in shard.tensors.items():
        content: FileRange | type[list[memoryview]] = list
        if isinstance(expr := plan.tensors[name], Read):
            stored = tensors[expr.name]
            content = FilePart(Path(stored.file)).range(stored.start, stored.end)
        writes.append(TensorWrite(name, spec, content))
    return writes


def _by_place(writes: Sequence[TensorWrite], block: int) -> list[TensorWrite]:
    """Return the writes in an order in which most large copied tensors keep their place in a block.

    Wider dtypes stay first.
    """
    result: list[TensorWrite] = []
    place: int | None = None  # of the next tensor in a block; free until the first large one, for the header is padded
    steps = MOST_STEPS
    for _, group in groupby(writes, key=lambda write: DTYPE_BITS[write.spec.dtype]):
        same = list(group)
        large: defaultdict[int, deque[TensorWrite]] = defaultdict(deque)
        fillers: defaultdict[int, deque[TensorWrite]] = defaultdict(deque)
        for write in same:
            if isinstance(write.content, FileRange) and write.content.size >= SMALL * block:
                large[write.content.start % block].append(write)
            else:
                fillers[write.spec.nbytes % block].append(write)
        chosen: list[TensorWrite] = []
        if place is None and large:
            place = max(large, key=lambda place: (place % 8 == 0, sum(write.spec.nbytes for write in large[place])))
        while large:
            assert place is not None
            found, steps = _fewest_fillers(place, large, fillers, block, steps)
            if found is None:
                break
            chosen += [fillers[length].popleft() for length in found]
            place = (place + sum(found)) % block
            chosen.append(write := large[place].popleft())
            if not large[place]:
                del large[place]
            place = (place + write.spec.nbytes) % block
        names = {write.name for write in chosen}
        rest = [write for write in same if write.name not in names]
        result += [*chosen, *rest]
        if place is not None:
            place = (place + sum(write.spec.nbytes for write in rest)) % block
    return result


def _fewest_fillers(
    place: int,
    goals: Collection[int],
    fillers: Mapping[int, Sequence[TensorWrite]],
    block: int,
    steps: int,
) -> tuple[tuple[int, ...] | None, int]:
    """Return the lengths, modulo a block, of the fewest fillers that lead from `place` to a goal; None if none do.

    Returns also how many are left of the `steps` that the search may take.
    """
    counts = {length: len(found) for length, found in fillers.items() if length and found}
    lengths = sorted(counts, key=lambda length: -counts[length])[:MOST_LENGTHS]
    ways: dict[int, tuple[int, ...]] = {place: ()}
    queue = deque([place])
    while queue and steps > 0:
        here = queue.popleft()
        way = ways[here]
        if here in goals:
            return way, steps
        for length in lengths if len(way) < MOST_FILLERS else ():
            steps -= 1
            there = (here + length) % block
            if there not in ways and way.count(length) < counts[length]:
                ways[there] = (*way, length)
                queue.append(there)
    return None, steps

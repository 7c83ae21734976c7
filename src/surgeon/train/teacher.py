"""Teachers: a model that runs beside the student, or its likeliest tokens for each token, stored on disk."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.checkpoint.output import check_space, staged
from surgeon.errors import DataError, PlanError
from surgeon.models.split import AttentionLayout, Batch, Causal, Plan, SplitModel, check_layout, taken
from surgeon.train.losses import Direction, chunk_rows, kl, sum_dtype, top_k_kl
from surgeon.train.store import IGNORED, TokenStore

BATCH_TOKENS = 4096  # tokens per forward pass of a teacher whose answers are stored
HEADER, IDS, LOG_PROBS, PLACES = "teacher.json", "ids.u32", "log_probs.f32", "places.i64"
HINT = "Remove the directory; the answers are then computed again."


class Teacher(Protocol):
    """A teacher, as a loss uses it.

    `temperature` is the only one at which it can answer, None for any. `hidden_size` is None where its states are not
    known. `name` says in errors where its answers are.
    """

    name: str
    vocab: int
    hidden_size: int | None
    depth: int
    temperature: float | None

    @property
    def plan(self) -> Callable[[Batch], Plan]:
        """Return what it reads off a batch, made on the CPU with the batch: then `see` waits for no GPU."""

    def see(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        token_index: Tensor | None,
        trained: Tensor,
        *,
        layers: Sequence[int],
        plan: Plan | None = None,
        **options: Any,
    ) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        """Return its answers for the N tokens at the places `trained`, N rows each, and its states after `layers`.

        Places are counted along the rows; states have shape (N, D).
        `options` are what the decoder of the student gets besides, such as the lengths of documents.
        """

    def divergence(self, logits: Tensor, *seen: Tensor, temperature: float, direction: Direction) -> Tensor:
        """Return the divergence of the student's logits, (n, V), from n rows of answers, summed, times T²."""


class OnlineTeacher:
    """A model that runs beside the student, in evaluation mode and without gradients.

    It may be of another family, depth and width. Its logits exist for a chunk of tokens at a time, as the student's do.
    `layout` says which tokens each token sees, by default the earlier ones of its document.
    """

    temperature: float | None = None

    def __init__(self, model: Any, *, layout: AttentionLayout | None = None) -> None:
        self.layout = layout or Causal()
        self.plan = self.layout.plan
        self._split = SplitModel(model.eval().requires_grad_(False))
        check_layout(self.layout, self._split)
        self.name, self.vocab = type(model).__name__, self._split.vocab
        self.hidden_size: int | None = self._split.hidden_size
        self.depth = self._split.depth

    @torch.no_grad()
    def see(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        token_index: Tensor | None,
        trained: Tensor,
        *,
        layers: Sequence[int],
        plan: Plan | None = None,
        **options: Any,
    ) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        """Return the states of the tokens before the teacher's head, and those after `layers`."""
        with self._split.watched(layers) as seen:
            hidden = self.layout.states(self._split, input_ids, position_ids, trained, plan=plan, **options)
        return (taken(hidden, trained),), {layer: taken(states, trained) for layer, states in seen.items()}

    @property
    def device(self) -> torch.device:
        """The device of the teacher."""
        return self._split.device

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the teacher's logits, (n, V), of states before its head, (n, D)."""
        head = self._split.linear_head
        if head is None:
            return self._split.logits(hidden)
        return nn.functional.linear(hidden, head.weight, head.bias)  # without the model's own forward pass around it

    def divergence(self, logits: Tensor, *seen: Tensor, temperature: float, direction: Direction) -> Tensor:
        """Return the divergence from the teacher's distribution over the whole vocabulary."""
        return kl(logits, self.logits(*seen), temperature=temperature, direction=direction)


class CachedTeacher:
    """A teacher's likeliest tokens, as `cache_top_k` wrote them, read by the index of a token in the store."""

    hidden_size: int | None = None
    depth = 0

    def __init__(self, directory: Path) -> None:
        header = _read_header(directory)
        self._directory, self.name = directory, str(directory)
        self.temperature: float | None = float(header["temperature"])
        self.k, self.vocab = int(header["k"]), int(header["vocab"])
        rows, tokens = int(header["num_trained"]), int(header["num_tokens"])
        self.store = str(header["store"])
        self._ids = self._mapped(IDS, np.uint32, (rows, self.k))
        self._log_probs = self._mapped(LOG_PROBS, np.float32, (rows, self.k))
        self._places = self._mapped(PLACES, np.int64, (tokens,))

    def _mapped(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Any:
        path = self._directory / name
        size = path.stat().st_size if path.is_file() else 0
        expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size != expected:
            raise DataError(f"{path} has {size} bytes and should have {expected}", hint=HINT)
        return np.memmap(path, dtype, "r", shape=shape) if expected else np.empty(shape, dtype)

    def see(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        token_index: Tensor | None,
        trained: Tensor,
        *,
        layers: Sequence[int],
        plan: Plan | None = None,
        **options: Any,
    ) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        """Return the likeliest ids of the tokens, int64, and their log-probabilities, both (N, k)."""
        plan = plan or self.plan({"token_index": token_index, "trained": trained})
        return (plan["ids"].to(input_ids.device), plan["log_probs"].to(input_ids.device)), {}

    def plan(self, batch: Batch) -> Plan:
        """Return the likeliest ids of the trained tokens and their log-probabilities, on the CPU.

        Raises DataError for a token without a stored answer.
        """
        assert batch["token_index"] is not None, "a cache is read by the index of tokens in the store"
        index = taken(batch["token_index"], batch["trained"]).cpu().numpy()
        known = (index >= 0) & (index < len(self._places))
        places = np.where(known, self._places[np.where(known, index, 0)], -1) if len(self._places) else index * 0 - 1
        if (places < 0).any():
            missing = int(index[places < 0][0])
            raise DataError(f"{self._directory} holds no answer for token {missing} of the data", hint=HINT)
        ids = torch.from_numpy(self._ids[places].astype(np.int64))
        log_probs = torch.from_numpy(np.asarray(self._log_probs[places]))
        return {"ids": ids, "log_probs": log_probs}

    def __reduce__(self) -> Any:
        """Let processes that load data open the files themselves."""
        return CachedTeacher, (self._directory,)

    def divergence(self, logits: Tensor, *seen: Tensor, temperature: float, direction: Direction) -> Tensor:
        """Return the divergence from the teacher's likeliest tokens, all others in one bucket."""
        return top_k_kl(logits, *seen, temperature=temperature, direction=direction)


@dataclass(frozen=True, eq=False)
class TeacherBatch:
    """Pieces of the store as rows, (B, S), each padded at its right; `trained` are places along the rows, (N,)."""

    ids: Tensor
    positions: Tensor
    trained: Tensor
    index: Tensor


@torch.no_grad()
def cache_top_k(
    teacher: OnlineTeacher,
    store: TokenStore,
    directory: Path,
    k: int,
    *,
    temperature: float = 1.0,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a teacher's k largest log-probabilities at a temperature, for each token of a store that is trained.

    The directory is written whole or not at all, and replaces an older one. A token takes 8 · k bytes: ids in uint32,
    and log-probabilities in float32, because float16 rounds by more (2^-11 of each) than the tail of a confident
    teacher sums to. `progress` is called with the number of tokens of each batch. The teacher reads one document at a
    time, so packing does not change its answers.
    Raises OutputError when the disk is full.
    """
    k = min(k, teacher.vocab)
    if k < 1:
        raise PlanError(f"a teacher's {k} likeliest tokens cannot be stored", hint="64 are many, 1 is the least.")
    places = np.full(store.num_tokens, -1, np.int64)
    size = store.num_trained * k * 8 + places.nbytes
    count = 0
    check_space(directory, size)
    with staged(directory, overwrite=True) as stage:
        with (stage / IDS).open("wb") as ids_file, (stage / LOG_PROBS).open("wb") as log_probs_file:
            for batch in _batches(store):
                rows = taken(batch.index, batch.trained).numpy()
                places[rows] = np.arange(count, count + len(rows))
                count += len(rows)
                for ids, log_probs in _top_k(teacher, batch, k, temperature):
                    ids_file.write(ids.cpu().numpy().astype(np.uint32).tobytes())
                    log_probs_file.write(log_probs.cpu().numpy().astype(np.float32).tobytes())
                if progress:
                    progress(int((batch.index >= 0).sum()))
        places.tofile(stage / PLACES)
        header = {
            "k": k,
            "temperature": temperature,
            "vocab": teacher.vocab,
            "store": store.digest,
            "num_tokens": store.num_tokens,
            "num_trained": count,
        }
        (stage / HEADER).write_text(json.dumps(header, indent=2) + "\n")


def _top_k(teacher: OnlineTeacher, batch: TeacherBatch, k: int, temperature: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the ids and log-probabilities of the trained tokens of a batch, in order, a chunk at a time."""
    ids, positions, trained = (each.to(teacher.device) for each in (batch.ids, batch.positions, batch.trained))
    (hidden,), _ = teacher.see(ids, positions, None, trained, layers=())
    for states in torch.split(hidden, chunk_rows(teacher.vocab, hidden.device)):
        logits = teacher.logits(states)
        log_probs = torch.log_softmax(logits.to(sum_dtype(logits.dtype)) / temperature, -1)
        values, likeliest = log_probs.topk(k)
        yield likeliest, values


def _batches(store: TokenStore) -> Iterator[TeacherBatch]:
    """Yield all pieces in batches of similar length, of BATCH_TOKENS tokens or of one piece."""
    waiting: list[int] = []
    for number in np.argsort(store.lengths, kind="stable").tolist():
        if waiting and (len(waiting) + 1) * int(store.lengths[number]) > BATCH_TOKENS:
            yield _batch(store, waiting)
            waiting = []
        waiting.append(number)
    if waiting:
        yield _batch(store, waiting)


def _batch(store: TokenStore, numbers: Sequence[int]) -> TeacherBatch:
    pieces = [store.piece(number) for number in numbers]
    shape = (len(pieces), max(len(ids) for ids, _, _ in pieces))
    all_ids, labels, index = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64), np.full(shape, -1, np.int64)
    for row, (ids, targets, start) in enumerate(pieces):
        all_ids[row, : len(ids)], labels[row, : len(ids)] = ids, targets
        index[row, : len(ids)] = np.arange(start, start + len(ids))
    positions = torch.arange(shape[1]).expand(shape)  # no token sees the padding after it
    trained = torch.from_numpy(np.flatnonzero(labels != IGNORED))
    return TeacherBatch(torch.from_numpy(all_ids), positions, trained, torch.from_numpy(index))


def _read_header(directory: Path) -> dict[str, Any]:
    path = directory / HEADER
    try:
        header: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{directory} holds no answers of a teacher that are complete", hint=HINT) from error
    return header

"""An attribution from its model, data and queries to its result, in the order in which things happen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from surgeon.attribution.estimators import METHODS, Scores
from surgeon.attribution.ledger import check_request, held, remove
from surgeon.attribution.lexical import bm25
from surgeon.attribution.result import Attribution, Table, write
from surgeon.attribution.rows import Batches
from surgeon.attribution.scoring import Scorer, Snapshot
from surgeon.attribution.snapshots import of_models, of_run
from surgeon.checkpoint.source import Source, fingerprint
from surgeon.errors import PlanError
from surgeon.models.device import resolve_device
from surgeon.models.documents import keeps_documents_apart
from surgeon.models.loading import load_tokenizer, loadable
from surgeon.progress import TOKENS, stage
from surgeon.surgery import open_source
from surgeon.train.checkpoints import checkpoints, step_of
from surgeon.train.data import RunData, only
from surgeon.train.inputs import Inputs
from surgeon.train.run_dir import SELECTED, read_json
from surgeon.train.selecting import Selected
from surgeon.train.store import TokenStore
from surgeon.train.task import Task
from surgeon.train.tokenise import prepare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
QUERY = "query"  # the directory of the queries' tokens


@dataclass(frozen=True, kw_only=True)
class How:
    """How rows are scored. `side` is that of projections: None is chosen, 0 is none."""

    method: str
    ridge: float
    side: int | None
    packing: bool
    batch_size: int | None
    seed: int


@dataclass(frozen=True, eq=False)
class Attributed:
    """What is attributed: the rows of `data` to `queries`, of a model and the `task` that trained it.

    With `run_dir` the checkpoints of that run are looked at, in which so many processes trained; else the model itself,
    or with `others` those.
    """

    source: Source
    task: Task
    data: Sequence[str]
    queries: Sequence[str]
    others: Sequence[str]
    run_dir: Path | None
    num_processes: int
    device: str

    def attribute(self, how: How, target: Path, *, top: int, overwrite: bool) -> Attribution:
        """Return the scores of rows, and write them to `target`."""
        partial = target.with_name(f"{target.name}.partial")
        with held(partial):
            tokenizer = load_tokenizer(*loadable(self.source))
            inputs = self._inputs()
            data = self._data(inputs, partial)
            pieces = np.unique(data.rows.packing.pieces)
            asked = self._asked(inputs, tokenizer, partial)
            documents = np.asarray(asked.documents)
            groups = [np.flatnonzero(documents == document).astype(np.int64) for document in np.unique(documents)]
            request = self._request(how, data, asked)
            check_request(partial, request)
            if how.method == "bm25":
                scores, scorer, snapshots = bm25(data.stores[0], pieces, asked, groups), None, []
            else:
                scorer = self._scorer(how, data, pieces, asked, groups, inputs)
                snapshots = self._snapshots(inputs, data, partial)
                scores = scorer.scores(snapshots, partial)
            table = _table(data.stores[0], pieces, scores, tokenizer)
            found = Attribution(
                output=str(target),
                method=how.method,
                queries=tuple(
                    table.query(number, _text(asked, group, tokenizer), top=top) for number, group in enumerate(groups)
                ),
                rows=len(pieces),
                checkpoints=tuple(snapshot.label for snapshot in snapshots),
                numbers=None if scorer is None else scorer.seen.get("numbers"),
                attributed=None if scorer is None else scorer.seen.get("share"),
                seconds=0.0,
                notes=(*_notes(data, asked), *_unshaped(how, scorer)),
            )
            write(found, table, request, target, overwrite=overwrite)
            remove(partial)
        return found

    def _inputs(self) -> Inputs:
        return Inputs(
            self.source,
            tuple(self.data),
            self.task,
            resolve_device(self.device),
            lambda note: None,
            lambda: None,
            num_processes=self.num_processes,
        )

    def _data(self, inputs: Inputs, directory: Path) -> RunData:
        """Return the rows that were trained: without those held out, and those that were not selected."""
        data = inputs.data(directory, None, None)
        data = replace(data, collate=replace(data.collate, flatten=False))
        if self.run_dir is None or not inputs.settings.select:
            return data
        file = self.run_dir / SELECTED
        chosen = Selected.read(read_json(file), str(file))
        return only(data, chosen.pieces, inputs.settings, sequence_length=inputs.row_length)

    def _asked(self, inputs: Inputs, tokenizer: "PreTrainedTokenizerBase", directory: Path) -> TokenStore:
        with stage("tokenising the queries", None, TOKENS) as progress:
            return prepare(
                self.queries,
                tokenizer,
                directory=directory / QUERY,
                sequence_length=inputs.row_length,
                task=self.task,
                progress=progress,
            )

    def _request(self, how: How, data: RunData, asked: TokenStore) -> dict[str, Any]:
        """Return what decides the scores: an attribution goes on only with the same."""
        steps = [] if self.run_dir is None else [step_of(path) for path in checkpoints(self.run_dir)]
        return {
            "format": FORMAT,
            "model": fingerprint(self.source),
            "checkpoints": [fingerprint(open_source(name)) for name in self.others] or steps,
            "data": data.stores[0].digest,
            "query": asked.digest,
            "settings": self.task.record(),
            "method": asdict(how),
        }

    def _scorer(
        self,
        how: How,
        data: RunData,
        pieces: NDArray[np.int64],
        asked: TokenStore,
        groups: Sequence[NDArray[np.int64]],
        inputs: Inputs,
    ) -> Scorer:
        """Return what scores the rows. Raises PlanError where they are to share sequences and cannot."""
        if how.packing and not self.task.may_share_rows("sdpa"):
            raise PlanError("each record has a sequence of its own here", hint="Leave out --packing.")
        rows: dict[str, Any] = {"collate": data.collate, "batch_size": how.batch_size}
        packed = inputs.row_length if how.packing else None
        return Scorer(
            Batches(data.stores[0], pieces, packed=packed, seed=how.seed, **rows),
            Batches(asked, np.arange(asked.num_pieces), **rows),
            groups,
            METHODS[how.method],
            ridge=how.ridge,
            side=how.side,
            seed=how.seed,
            device=inputs.device,
            apart=keeps_documents_apart if how.packing else None,
        )

    def _snapshots(self, inputs: Inputs, data: RunData, directory: Path) -> list[Snapshot]:
        teacher = inputs.teacher(inputs.teacher_model(), data, directory)
        if self.run_dir is not None:
            return of_run(self.run_dir, self.source, self.task, teacher, device=inputs.device)
        sources = [open_source(name) for name in self.others] or [self.source]
        return of_models(sources, self.task, teacher)


def _table(store: TokenStore, pieces: NDArray[np.int64], scores: Scores, tokenizer: "PreTrainedTokenizerBase") -> Table:
    """Return the rows, their origin and text, and their scores."""
    firsts = np.cumsum([0, *(source.num_documents for source in store.sources)])
    sources = store.piece_sources[pieces]
    return Table(
        rows=pieces.tolist(),
        data=[store.sources[number].data for number in sources.tolist()],
        documents=(store.documents[pieces] - firsts[sources] + 1).tolist(),
        tokens=store.lengths[pieces].tolist(),
        texts=[_text(store, [piece], tokenizer) for piece in pieces.tolist()],
        scores=scores,
    )


def _text(store: TokenStore, pieces: Sequence[int] | NDArray[np.int64], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text of pieces, without special tokens."""
    ids = np.concatenate([store.piece(int(piece))[0] for piece in pieces]).tolist()
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _unshaped(how: How, scorer: Scorer | None) -> tuple[str, ...]:
    """Return that gradients were not divided by Adam's squares, where they would have been."""
    if scorer is None or METHODS[how.method].shape is None or scorer.seen["shaped"]:
        return ()
    said = "without the optimiser's state gradients are taken as they are, which foretells less"
    return (f"{said}: finetune --keep-checkpoints 2 keeps it",)


def _notes(data: RunData, asked: TokenStore) -> tuple[str, ...]:
    """Return what of data and queries was not read, or cut."""
    notes = [note for store in (data.stores[0], asked) for source in store.sources for note in source.notes]
    for what, store in (("rows", data.stores[0]), ("queries", asked)):
        if store.num_cut or store.num_dropped:
            notes.append(f"{what}: {store.num_cut:,} records were cut, {store.num_dropped:,} had nothing to train")
    return tuple(dict.fromkeys(notes))

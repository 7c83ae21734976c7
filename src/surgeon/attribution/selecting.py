"""The selection of the rows that a run trains: by gradients (LESS), by words (BM25), or at random."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.attribution.estimators import METHODS, Scores
from surgeon.attribution.lexical import bm25
from surgeon.attribution.rows import Batches
from surgeon.attribution.scoring import Scorer, Snapshot
from surgeon.attribution.snapshots import mean_squares
from surgeon.models.loading import load_tokenizer, loadable, quiet_transformers
from surgeon.progress import TOKENS, stage
from surgeon.train.arguments import arguments
from surgeon.train.data import RunData, drawn, only
from surgeon.train.inputs import Pool
from surgeon.train.selecting import BM25, LESS, RANDOM, Selected, count
from surgeon.train.store import TokenStore
from surgeon.train.tokenise import prepare
from surgeon.train.trainer import SurgeonTrainer

STREAM = 1  # of the seed: the random share of the warm-up is not that of a random selection


def selected(pool: Pool) -> Selected:
    """Return the pieces that a run trains, by the settings `select`, `select_for` and `select_by`.

    A piece's score is the largest that it has for any argument of --select-for; that is the mean of its gradients, or
    for words of its records' scores. Equal scores go by the order of the data.
    Source of less: Xia et al. 2024, arXiv:2402.04333. Here the warm-up trains what the run trains, with its settings;
    one checkpoint is looked at, that of its end; and rows are shaped by Adam's mean squares alone, without its
    momentum, which all rows share.
    """
    settings = pool.inputs.settings
    assert settings.select is not None
    pieces = np.unique(pool.data.rows.packing.pieces)
    wanted = min(len(pieces), count(settings.select, len(pieces)))
    if settings.select_by == RANDOM:
        return Selected(drawn(pieces, wanted, settings.seed).tolist(), len(pieces), RANDOM)
    with tempfile.TemporaryDirectory() as directory:
        store = _asked(pool, Path(directory))
        groups = [np.flatnonzero(store.piece_sources == source) for source in range(len(store.sources))]
        score = _by_words if settings.select_by == BM25 else _by_gradients
        scores = score(pool, pieces, store, groups, Path(directory)).max(axis=1)
    best = np.sort(np.argsort(-scores, kind="stable")[:wanted])
    data = [
        {"data": source.data, "sha256": source.sha256, "documents": source.num_documents} for source in store.sources
    ]
    return Selected(pieces[best].tolist(), len(pieces), settings.select_by, data, scores[best].tolist())


def _asked(pool: Pool, directory: Path) -> TokenStore:
    """Return the tokens of --select-for."""
    inputs = pool.inputs
    with stage("tokenising", None, TOKENS) as progress:
        return prepare(
            inputs.settings.select_for,
            load_tokenizer(*loadable(inputs.source)),
            directory=directory / "asked",
            sequence_length=inputs.row_length,
            task=inputs.task,
            progress=progress,
        )


def _by_words(
    pool: Pool, pieces: NDArray[np.int64], store: TokenStore, groups: Sequence[NDArray[np.int64]], directory: Path
) -> Scores:
    """Return the mean BM25 score of each piece for the records of each group."""
    scores = bm25(pool.data.stores[0], pieces, store, [np.array([piece]) for piece in np.concatenate(groups)])
    ends = np.cumsum([len(group) for group in groups])[:-1]
    return np.stack([each.mean(axis=1) for each in np.split(scores, ends, axis=1)], axis=1)


def _by_gradients(
    pool: Pool, pieces: NDArray[np.int64], store: TokenStore, groups: Sequence[NDArray[np.int64]], directory: Path
) -> Scores:
    """Return the cosine of each piece's step and each group's gradient, after the warm-up."""
    settings = pool.inputs.settings
    collate = replace(pool.data.collate, flatten=False)
    warm = _Warm(pool, pieces) if settings.select_warmup else None
    snapshot = Snapshot("the model", pool.make_model) if warm is None else warm.snapshot(directory)
    scorer = Scorer(
        Batches(pool.data.stores[0], pieces, collate),
        Batches(store, np.arange(store.num_pieces), collate),
        groups,
        METHODS[LESS] if warm is not None else METHODS["cosine"],
        ridge=1.0,
        side=None,
        seed=settings.seed,
        device=pool.inputs.device,
    )
    return scorer.scores([snapshot], directory)


@dataclass(frozen=True, eq=False)
class _Warm:
    """A short run on a random share of the rows, as large as the selection, by the settings of the run."""

    pool: Pool
    pieces: NDArray[np.int64]

    def snapshot(self, directory: Path) -> Snapshot:
        """Return the model and the optimiser's state at its end. Raises DivergedError for a run that diverges."""
        pool, settings = self.pool, self.pool.inputs.settings
        assert settings.select is not None
        share = drawn(self.pieces, count(settings.select, len(self.pieces)), [settings.seed, STREAM])
        data = only(pool.data, share, settings, sequence_length=pool.inputs.row_length)
        rows = max(1, len(data.rows))
        batch = min(rows, settings.sequences if isinstance(settings.batch_size, str) else settings.batch_size)
        steps = max(1, round(settings.select_warmup * rows / (batch * settings.gradient_accumulation)))
        short = replace(settings, batch_size=batch, max_steps=steps, epochs=None, save_every=0, keep_best=False)
        short = replace(short, patience=None, track=(), eval_every=10 * steps)
        with stage("warming up", steps, "steps") as progress:
            trainer = _trained(pool, data, short, steps, directory / "warm", lambda logs: progress(1))
        squares = mean_squares(trainer.model, trainer.optimizer)
        return Snapshot("the model after the warm-up", lambda: trainer.model, second=lambda model: squares)


def _trained(pool: Pool, data: RunData, settings: Any, steps: int, directory: Path, on_step: Any) -> Any:
    device = pool.inputs.device
    how = arguments(settings, data, run_dir=directory, lr=pool.rate, steps=steps, device=device, resumed=True)
    trainer = SurgeonTrainer(pool.make_model(), how, data=data, on_step=on_step, on_evaluation=lambda losses: None)
    with quiet_transformers():
        trainer.train()
    return trainer

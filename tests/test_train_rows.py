"""Rows and batches: what a model computes of a packed batch is what it computes of each document alone."""

import pickle

import pytest
import toys
from later import LATER
from talkers import TEXT, jsonl, tokenizer_of

if LATER:
    import numpy as np
    import torch
    from torch.utils.data import DataLoader

    from surgeon.train.data import Collator, RowDataset
    from surgeon.train.packing import Packing, one_per_row, pack
    from surgeon.train.tokenise import prepare

PAD = 0
RECORDS = [
    {"prompt": "The cat sat", "completion": "on the mat"},
    {"text": "q"},
    {"instruction": "Say that", "input": "twice", "output": "that that"},
    {"question": "The rat sat on the mat, and?", "answer": "the cat; é🌿"},
    {"text": "The cat sat on the mat, and the rat sat on the cat; that was that. " * 3},
    {"text": "and the rat sat"},
]
LENGTH = 24


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    spec = jsonl(directory / "a.jsonl", *RECORDS)
    return prepare([spec], tokenizer_of(), directory=directory / "store", sequence_length=LENGTH)


@pytest.fixture(scope="module")
def packed(store):
    return RowDataset(store, pack(store.lengths, LENGTH, seed=0))


@pytest.fixture(scope="module")
def single(store):
    return RowDataset(store, one_per_row(store.lengths))


def equal(one, other):
    """Return whether two batches are equal to the last number and dtype."""
    assert one.keys() == other.keys()
    return all(
        torch.equal(value, other[key]) and value.dtype == other[key].dtype
        if isinstance(value, torch.Tensor)
        else value == other[key]
        for key, value in one.items()
    )


def losses(model, batch):
    """Return the loss of each token of the store that a batch predicts, by where it lies."""
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    told = batch["labels"].flatten() >= 0
    places = batch["token_index"].flatten()[told]
    return dict(zip(places.tolist(), each[told].tolist(), strict=True))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_holds_its_pieces_one_behind_the_other(store):
    dataset = RowDataset(store, Packing(np.array([3, 0]), np.array([0, 2])))
    row = dataset[0]
    (third, third_labels, third_start), (first, first_labels, first_start) = store.piece(3), store.piece(0)
    assert row.ids.tolist() == [*third, *first]
    assert row.labels.tolist() == [*third_labels, *first_labels]
    assert row.positions.tolist() == [*range(len(third)), *range(len(first))]
    assert row.index.tolist() == [*range(third_start, third_start + len(third)), *range(first_start, len(first))]
    assert {array.dtype for array in (row.ids, row.labels, row.positions, row.index)} == {np.dtype("int64")}


def test_all_rows_hold_every_token_once(store, packed):
    found = sorted(place for index in range(len(packed)) for place in packed[index].index.tolist())
    assert found == list(range(store.num_tokens))
    assert packed.num_tokens == store.num_tokens
    assert len(packed) < store.num_pieces


def test_rows_can_be_chosen(packed):
    chosen = packed.chosen([1, 0])
    assert [chosen[0].ids.tolist(), chosen[1].ids.tolist()] == [packed[1].ids.tolist(), packed[0].ids.tolist()]
    assert chosen.num_tokens == len(packed[0]) + len(packed[1])


# --- batches ----------------------------------------------------------------------------------------------------------


def test_rows_are_padded_at_the_right_by_a_document_of_its_own(single):
    rows = [single[1], single[0]]
    batch = Collator(PAD, with_index=True)(rows)
    short, width = len(rows[0]), len(rows[1])
    assert short < width
    assert batch["input_ids"].tolist() == [[*rows[0].ids, *[PAD] * (width - short)], rows[1].ids.tolist()]
    assert batch["labels"][0, short:].tolist() == [-100] * (width - short)
    assert batch["position_ids"][0].tolist() == [*range(short), *range(width - short)]
    assert batch["token_index"][0, short:].tolist() == [-1] * (width - short)
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert "attention_mask" not in batch


def test_the_index_is_left_out_unless_asked_for(single):
    assert list(Collator(PAD)([single[0]])) == ["input_ids", "position_ids", "labels", "trained"]


@pytest.mark.parametrize("flatten", [False, True])
def test_the_width_is_a_multiple_of_what_is_asked_for(flatten, single):
    batch = Collator(PAD, pad_to_multiple_of=32, flatten=flatten)([single[0], single[2]])
    assert batch["input_ids"].shape == (1 if flatten else 2, 32)


def test_a_flattened_batch_says_where_each_document_begins(store, packed):
    rows = [packed[0], packed[1]]
    batch = Collator(PAD, flatten=True, with_index=True)(rows)
    assert batch["input_ids"].tolist() == [[*rows[0].ids, *rows[1].ids]]
    lengths = [store.lengths[number] for index in (0, 1) for number in packed.packing.row(index)]
    assert batch["cu_seq_lens_q"].tolist() == [0, *np.cumsum(lengths)]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
    assert torch.equal(batch["cu_seq_lens_q"], batch["cu_seq_lens_k"])


def test_padding_of_a_flattened_batch_is_a_document_of_its_own(single):
    row = single[0]
    batch = Collator(PAD, flatten=True, pad_to_multiple_of=32)([row])
    assert batch["cu_seq_lens_q"].tolist() == [0, len(row), 32]


def test_workers_give_the_batches_of_one_process_and_say_nothing(packed, capfd):
    """The tokenizer has used threads here; some of its versions warn on standard error when such a process forks."""
    options = {"batch_size": 2, "collate_fn": Collator(PAD, with_index=True)}
    found = list(DataLoader(packed, num_workers=2, multiprocessing_context="fork", **options))
    here = list(DataLoader(packed, **options))
    assert len(here) > 1
    assert all(equal(one, other) for one, other in zip(found, here, strict=True))
    assert capfd.readouterr() == ("", "")


def test_rows_and_collator_survive_pickling(packed):
    collate = Collator(PAD, with_index=True)
    again, made = pickle.loads(pickle.dumps((packed, collate)))
    assert equal(made([again[0], again[1]]), collate([packed[0], packed[1]]))


def test_a_loader_takes_them_as_they_are(packed):
    batches = list(DataLoader(packed, batch_size=3, collate_fn=Collator(PAD)))
    assert sum(len(batch["input_ids"]) for batch in batches) == len(packed)


# --- what a model computes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gpt2", "eager")])
def model(request, tmp_path_factory):
    name, attention = request.param
    directory = toys.build(name, tmp_path_factory.mktemp("model"), vocab_size=300)
    return toys.load(directory, dtype=torch.float64, attn_implementation=attention)[0]


@pytest.mark.parametrize("flatten", [False, True])
def test_the_loss_of_every_token_is_the_same_packed_and_alone(flatten, model, packed, single):
    collate = Collator(PAD, with_index=True)
    rows = [packed[index] for index in range(len(packed))]
    assert len({len(row) for row in rows}) > 1, "there is padding"
    together = losses(model, Collator(PAD, with_index=True, flatten=flatten)(rows))

    alone = {}
    for index in range(len(single)):
        batch = collate([single[index]])
        alone |= losses(model, batch | {"position_ids": torch.arange(len(single[index]))[None]})
    assert together.keys() == alone.keys()
    assert len(together) == single.store.num_trained
    # float64 has 16 digits, of which sums in another order lose a few; Llama's eager attention computes its softmax in
    # float32, which has 7
    is_rounded = model.config.model_type == "llama" and model.config._attn_implementation == "eager"
    assert max(abs(together[place] - alone[place]) for place in alone) < (1e-6 if is_rounded else 1e-12)


def test_documents_see_into_each_other_where_positions_do_not_begin_again(model, packed, single):
    """The check above can fail."""
    collate = Collator(PAD, with_index=True)
    rows = [packed[index] for index in range(len(packed))]
    batch = collate(rows)
    right = losses(model, batch)
    width = batch["input_ids"].shape[1]
    wrong = losses(model, batch | {"position_ids": torch.arange(width).expand(len(rows), width)})
    assert max(abs(right[place] - wrong[place]) for place in right) > 1e-3


def test_a_text_in_pieces_is_learnt_as_a_model_reads_it(store):
    """Labels across the border of two pieces of a document are those of the whole text."""
    long = np.flatnonzero(np.bincount(store.documents) > 1)
    numbers = np.flatnonzero(store.documents == long[0])
    ids = np.concatenate([store.piece(number)[0] for number in numbers])
    labels = np.concatenate([store.piece(number)[1] for number in numbers])
    assert labels[:-1].tolist() == ids[1:].tolist()
    assert TEXT[:3] in tokenizer_of().decode(ids)

"""A training step waits for no GPU and mixes no devices: counted by torch's profiler, and tried on the meta device.

What asks a GPU for a number, or for how many numbers there are, waits until all its work is done. On the meta device
there are no numbers, so such a question is an error there, and so is a tensor that was left on the CPU.
"""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import talkers
from later import LATER

from surgeon.errors import DataError

if LATER:
    import numpy as np
    import torch
    import toys
    from torch import Tensor
    from torch.overrides import TorchFunctionMode
    from torch.profiler import ProfilerActivity, profile
    from torch.utils._pytree import tree_flatten_with_path
    from torch.utils.data import DataLoader
    from transformers import AttentionInterface, AutoModelForSequenceClassification
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from surgeon import finetune
    from surgeon.gist.attention import EncoderDecoder, Masked, TwoPass
    from surgeon.gist.training import WithoutGist
    from surgeon.models.split import Plans, Seq2Seq
    from surgeon.train.classifying import ClassTask
    from surgeon.train.data import Collator, TrainingRow
    from surgeon.train.embedding import EmbeddingTask
    from surgeon.train.objective import Objective, attach_loss
    from surgeon.train.settings import Settings
    from surgeon.train.teacher import CachedTeacher, OnlineTeacher
    from surgeon.train.trainer import COUNTS, Counted, SurgeonTrainer

    # transformers asks whether a row holds several documents, and whether a mask hides anything. By a name for which it
    # makes no masks it asks neither, as for attention that reads the lengths of documents.
    AttentionInterface.register("maskless", sdpa_attention_forward)

    class Readings(TorchFunctionMode):
        """Counts the numbers that are read from tensors, by how."""

        NAMES = ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "nonzero")

        def __init__(self) -> None:
            super().__init__()
            self.counts: Counter[str] = Counter()

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "")
            if name in self.NAMES:
                self.counts[name] += 1
            return func(*args, **(kwargs or {}))


pytestmark = pytest.mark.usefixtures("one_thread")

GIST = 130
WAITS = ("nonzero", "item", "_local_scalar_dense", "is_nonzero", "lift_fresh", "equal", "masked_select")
DECODERS = ("text", "chats", "distillation", "stored", "gists", "gists two-pass", "gists distilled")
WAYS = (*DECODERS, "answers", "gists of an encoder", "classes", "embeddings")
SIZES = ((9, 2, 7), (14, 2, 5), (5, 2, 11))  # of documents: tokens of prompt, gist, and what follows


def row(number: int, documents: list[tuple[int, int, int]], *, trained: str) -> TrainingRow:
    """Return a row of documents: trained are all tokens, or the answer but for the first one after a gist."""
    random = np.random.default_rng(number)
    ids, positions, labels = [], [], []
    for prompt, gist, after in documents:
        length = prompt + gist + after
        each = random.integers(3, 100, length)
        each[prompt : prompt + gist] = GIST
        goals = np.append(each[1:], -100)
        if trained == "answers":
            goals[: prompt + gist] = -100
        elif trained == "last":
            goals[:-2], goals[-2] = -100, 1
        ids, positions, labels = [*ids, each], [*positions, np.arange(length)], [*labels, goals]
    size = sum(map(len, ids))
    start = 100 * number
    return TrainingRow(*map(np.concatenate, (ids, positions, labels)), np.arange(start, start + size))


def loaded(toy: Any, name: str, attention: str = "maskless") -> Any:
    model = toys.load(toy(name))[0]
    attend_by(model, attention)
    return model.train()


def attend_by(model: Any, attention: str) -> None:
    for part in model.modules():
        if hasattr(part, "config"):  # both stacks of an encoder-decoder have their own
            part.config._attn_implementation = attention


def stored(directory: Path) -> CachedTeacher:
    """Return the answers of a teacher for all tokens of the rows, as a run stores them."""
    count, k = 300, 4
    (directory / "teacher.json").write_text(
        f'{{"k": {k}, "temperature": 1.0, "vocab": 131, "store": "", "num_tokens": {count}, "num_trained": {count}}}'
    )
    np.arange(count, dtype=np.int64).tofile(directory / "places.i64")
    np.tile(np.arange(k, dtype=np.uint32), (count, 1)).tofile(directory / "ids.u32")
    np.full((count, k), -3.0, np.float32).tofile(directory / "log_probs.f32")
    return CachedTeacher(directory)


def step(way: str, toy: Any, place: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Return a model with its loss, its teacher, and a batch as a data loader makes it."""
    distilled = Objective(kd_weight=0.5)
    teacher = None
    if way in ("classes", "embeddings"):
        model = loaded(toy, "bert")
        if way == "classes":
            model = AutoModelForSequenceClassification.from_config(model.config)
        task = ClassTask(Settings()) if way == "classes" else EmbeddingTask(Settings())
        teacher = None if way == "classes" else task.teacher(loaded(toy, "bert"))
        task.attach(model, Objective(), teacher)
    elif way in ("answers", "gists of an encoder"):
        model = loaded(toy, "t5")
        attach_loss(model, Objective(), layout=Seq2Seq() if way == "answers" else EncoderDecoder((GIST,)))
    else:
        model = loaded(toy, "llama", "sdpa" if way in ("gists", "gists distilled") else "maskless")
        layout = {"gists": Masked, "gists distilled": Masked, "gists two-pass": TwoPass}.get(way)
        if way == "distillation":
            teacher, distilled = OnlineTeacher(loaded(toy, "llama")), Objective(kd_weight=0.5, hidden_weight=0.1)
        elif way == "stored":
            teacher = stored(place)
        elif way == "gists distilled":
            teacher = WithoutGist(loaded(toy, "llama"), (GIST,))
        attach_loss(
            model,
            Objective() if teacher is None else distilled,
            teacher,
            layout=None if layout is None else layout((GIST,)),
        )
    packed = way in DECODERS and way != "gists two-pass"
    kind = "all" if way in ("text", "distillation") else "last" if way in ("classes", "embeddings") else "answers"
    rows = [row(number, [size, SIZES[0]] if packed else [size], trained=kind) for number, size in enumerate(SIZES)]
    collate = Counted(Collator(0, with_index=True), pickle.loads(pickle.dumps(model._surgeon_plan)))
    return model, teacher, {name: value for name, value in collate(rows).items() if name not in COUNTS}


def waits(model: Any, batch: dict[str, Any]) -> Counter[str]:
    """Return what a step would wait for on a GPU, by the names of torch's operations."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        model(**batch, num_items=30)["loss"].backward()
    # A new cache of transformers makes tensors without numbers: nothing is copied.
    events = profiler.profiler.kineto_results.events()  # `profiler.events()` builds trees, which takes a second
    names = (event.name().removeprefix("aten::") for event in events if event.shapes() != [[0]])
    return Counter(name for name in names if name in WAITS)


@pytest.mark.parametrize("way", WAYS)
def test_no_part_of_a_batch_waits_for_a_number(way, toy, tmp_path):
    model, _, batch = step(way, toy, tmp_path)

    assert waits(model, batch) == {}


@pytest.mark.parametrize("way", ["text", "gists two-pass"])
def test_a_batch_that_says_nothing_of_its_contents_is_waited_for(way, toy, tmp_path):
    model, _, batch = step(way, toy, tmp_path)
    loss = model(**batch, num_items=30)["loss"]
    bare = {name: value for name, value in batch.items() if name not in ("trained", "plan")}

    assert waits(model, bare)["nonzero"] > 0
    assert torch.equal(model(**bare, num_items=30)["loss"], loss)


def test_a_step_reads_its_numbers_once(tmp_path):
    model, data = talkers.talker(tmp_path / "model"), talkers.written(tmp_path / "text.txt", talkers.TEXT * 8)
    seldom = {"eval_every": 9, "save_every": 0, "eval_fraction": 0.0, "eval_rows": 2}
    found = []
    for steps, batches in ((2, 1), (4, 3)):
        with Readings() as readings:
            finetune(
                model,
                data=[data],
                output=tmp_path / f"out-{steps}",
                max_steps=steps,
                gradient_accumulation=batches,
                batch_size=2,
                sequence_length=32,
                **seldom,
            )
        found.append(readings.counts)

    # 2 steps and 10 batches more. Trainer reads a loss that is on the CPU already; transformers looks at packed rows.
    assert found[1] - found[0] == {"tolist": 2, "item": 2, "__bool__": 10}


def test_an_error_of_a_process_that_loads_data_is_told_as_it_is():
    rows = [row(0, [SIZES[0]], trained="all"), row(1, [(20, 0, 0)], trained="all")]
    counted = Counted(Collator(0, with_index=True), Plans(TwoPass((GIST,)).plan))
    loader = DataLoader(rows, batch_size=2, num_workers=1, collate_fn=counted, multiprocessing_context="fork")

    with pytest.raises(DataError, match="row 1 has nothing after its gist") as caught:
        SurgeonTrainer.get_batch_samples(None, iter(list(loader)), 1, "cpu")
    assert caught.value.hint == "Each row is a record with its gist."
    with pytest.raises(DataError, match="row 1 has nothing"):
        counted(rows)


@pytest.mark.parametrize("way", ["gists two-pass", "gists distilled", "answers", "classes"])
def test_wider_batches_have_the_same_loss(way, toy, tmp_path):
    """On a GPU widths are multiples of 64, so that few of them occur. No token sees the padding."""
    model, _, batch = step(way, toy, tmp_path)
    attend_by(model, "sdpa")  # with masks for padding
    wide = replace(model._surgeon_plan, multiple=8)(batch)
    batch, model = {name: value for name, value in batch.items() if name != "plan"}, model.eval()
    narrow = model(**batch, num_items=30)["loss"]

    texts = [value for path, value in tree_flatten_with_path(wide)[0] if path[-1].key in ("ids", "input_ids")]
    assert texts
    assert all(text.shape[1] % 8 == 0 or text.shape == batch["input_ids"].shape for text in texts)  # never wider
    # float32 in other shapes
    assert model(**batch, plan=wide, num_items=30)["loss"].item() == pytest.approx(narrow.item(), rel=1e-5)


def on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return {name: on_meta(each) for name, each in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("way", WAYS)
def test_a_step_keeps_to_the_device_of_its_model(way, toy, tmp_path):
    model, teacher, batch = step(way, toy, tmp_path)
    model.to("meta")
    if teacher is not None and way not in ("stored", "embeddings"):
        teacher._split.model.to("meta")
    elif way == "embeddings":
        teacher.to("meta")
    loss = model(**on_meta(batch), num_items=30)["loss"]
    loss.backward()

    assert loss.is_meta
    assert all(parameter.grad.is_meta for parameter in model.parameters() if parameter.grad is not None)
    assert any(parameter.grad is not None for parameter in model.parameters())

"""A model that returns its loss: as the plain forward pass, on every family, without whole logits."""

from __future__ import annotations

import copy

import pytest
import toys
from later import LATER
from toys import DECODERS

from surgeon.errors import PlanError

if LATER:
    import torch
    from exact64 import Exact64
    from torch import Tensor, nn
    from torch.nn import functional
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from surgeon.models.documents import keeps_documents_apart
    from surgeon.models.split import SplitModel
    from surgeon.train import objective
    from surgeon.train.objective import Objective, attach_loss, detach_loss
    from surgeon.train.teacher import OnlineTeacher

pytestmark = pytest.mark.usefixtures("one_thread", "exact64")

NO_POSITIONS = ("bloom", "mpt")  # they count a token's distance in the row, and are told nothing else
# Found by measuring: opt, gpt_oss and falcon take positions, and make their masks without them; lfm2 has convolutions,
# which run on from one document into the next.
TOGETHER = (*NO_POSITIONS, "opt", "opt-post-norm", "gpt_oss", "falcon", "falcon-new-decoder", "falcon-alibi", "lfm2")


@pytest.fixture
def exact64():
    """Compute in float64 throughout in models that are in it: a difference is one of the function, not of rounding."""
    with Exact64():
        yield


def batch(rows: int = 2) -> dict[str, Tensor]:
    """Return rows of two documents each, 5 and 6 tokens, and one of padding."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (rows, 12), generator=random)
    labels = ids.roll(-1, 1)
    labels[:, [4, 10, 11]] = -100  # the ends of documents, and padding
    labels[0, :2] = -100  # a prompt
    positions = torch.cat([torch.arange(5), torch.arange(6), torch.zeros(1, dtype=torch.long)]).expand(rows, 12)
    return {"input_ids": ids, "labels": labels, "position_ids": positions.contiguous()}


def plain_logits(model: nn.Module, batch: dict[str, Tensor], name: str = "") -> Tensor:
    positions = {} if name in NO_POSITIONS else {"position_ids": batch["position_ids"]}
    return model(input_ids=batch["input_ids"], use_cache=False, **positions).logits.flatten(0, 1)


def plain_loss(model: nn.Module, batch: dict[str, Tensor], name: str = "") -> Tensor:
    """Return the mean cross-entropy, by whole logits."""
    return functional.cross_entropy(plain_logits(model, batch, name), batch["labels"].flatten(), ignore_index=-100)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a model's parameters, zeros where there are none, and forget them."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    largest = max(float(grad.abs().max()) for grad in one.values())
    assert largest > 0
    for name, grad in one.items():
        assert float((grad - other[name]).abs().max()) <= tolerance * largest, name


def load64(path):
    return toys.load(path, dtype=torch.float64)[0]


@pytest.mark.parametrize("name", DECODERS)
def test_loss_and_gradients_are_those_of_whole_logits(toy, name, monkeypatch):
    monkeypatch.setattr(objective, "chunk_rows", lambda *_, **__: 5)  # 18 tokens: chunks that do not divide them
    model, rows = load64(toy(name)), batch()
    expected = plain_loss(model, rows, name)
    expected.backward()
    before = gradients(model)
    attach_loss(model, Objective())
    found = model(**rows)
    found["loss"].backward()
    # Sums of float64 in another order.
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert found["cross_entropy"].item() == pytest.approx(expected.item() * 16, rel=1e-12)
    assert found["num_tokens"] == 16
    assert_close(before, gradients(model), 1e-11)


@pytest.mark.parametrize("name", DECODERS)
def test_a_family_keeps_documents_apart_or_is_known_not_to(toy, name):
    assert keeps_documents_apart(toys.load(toy(name))[0]) == (name not in TOGETHER)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_documents_are_seen_apart_and_together_in_other_dtypes(toy, dtype):
    assert keeps_documents_apart(toys.load(toy("llama"), dtype=getattr(torch, dtype))[0])
    assert not keeps_documents_apart(toys.load(toy("falcon-alibi"), dtype=getattr(torch, dtype))[0])


# The head


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "granitemoe"])
def test_a_head_that_caps_or_scales_its_logits_is_not_taken_for_a_matrix(toy, name):
    assert SplitModel(toys.load(toy(name))[0]).linear_head is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi", "gpt2", "opt-post-norm"])
def test_a_head_that_is_a_matrix_is_used_as_one(toy, name, dtype):
    model = toys.load(toy(name), dtype=getattr(torch, dtype))[0]
    assert SplitModel(model).linear_head is model.get_output_embeddings()


if LATER:

    class Largest(TorchDispatchMode):
        """Notes the largest tensor that is computed."""

        def __init__(self) -> None:
            super().__init__()
            self.size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            self.size = max([self.size, *(leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor))])
            return found


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_logits_never_exist_whole(tmp_path, monkeypatch, name, weight):
    monkeypatch.setattr(objective, "chunk_rows", lambda *_, **__: 4)
    vocab = 4000
    path = toys.build(name, tmp_path / name, vocab_size=vocab)
    model, teacher = toys.load(path)[0], OnlineTeacher(toys.load(path)[0])
    rows = batch(rows=8)
    attach_loss(model, Objective(kd_weight=weight), teacher)
    with Largest() as largest:
        model(**rows)["loss"].backward()
    head = 48 * vocab  # its gradient, which must exist
    assert largest.size == head < int((rows["labels"] != -100).sum()) * vocab


@pytest.mark.parametrize("name", ["llama", "gemma2", "llama-tied"])
def test_a_frozen_head_gets_no_gradient(toy, name):
    model, rows = load64(toy(name)), batch()
    model.get_output_embeddings().requires_grad_(False)
    plain_loss(model, rows).backward()
    before = gradients(model)
    attach_loss(model, Objective())
    model(**rows)["loss"].backward()
    assert model.get_output_embeddings().weight.grad is None
    assert_close(before, gradients(model), 1e-11)  # sums of float64 in another order


def test_an_encoder_is_refused_by_a_view_that_has_none(toy):
    with pytest.raises(PlanError, match="has an encoder and a decoder"):
        attach_loss(toys.load(toy("t5"))[0], Objective())


# The forward pass


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_model_without_its_loss_is_what_it_was(toy, name):
    model, rows = toys.load(toy(name))[0], batch()
    before = {module: dict(module.__dict__) for module in model.modules()}
    expected = plain_logits(model, rows)
    model.train()
    attach_loss(model, Objective())
    model(**rows)["loss"].backward()
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(plain_logits(model, rows), expected)  # without labels it answers as ever
    detach_loss(model)
    detach_loss(model)
    assert all(module.__dict__.keys() == names.keys() for module, names in before.items())
    assert torch.equal(plain_logits(model, rows), expected)


def test_a_copy_of_a_model_returns_its_own_loss(toy):
    model, rows = load64(toy("llama")), batch()
    attach_loss(model, Objective())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()
    assert model(**rows)["loss"].item() != pytest.approx(twin(**rows)["loss"].item(), rel=1e-3)
    assert twin(**rows)["loss"].item() == pytest.approx(torch.tensor(131.0, dtype=torch.float64).log().item())


def test_a_batch_with_nothing_to_train_has_a_loss_of_zero_and_gradients_of_zero(toy):
    for name in ("llama", "gemma2"):
        model, rows = toys.load(toy(name))[0], batch()
        attach_loss(model, Objective())
        found = model(**rows | {"labels": torch.full_like(rows["labels"], -100)})
        found["loss"].backward()
        assert (found["loss"].item(), found["num_tokens"].item()) == (0, 0)
        assert all(bool((grad == 0).all()) for grad in gradients(model).values())


def test_packed_documents_have_the_loss_of_documents_alone(toy):
    model, rows = load64(toy("llama")), batch()
    attach_loss(model, Objective())
    packed = model(**rows, num_items=1)["loss"]
    alone = sum(
        model(**{key: value[:, part] for key, value in rows.items()}, num_items=1)["loss"]
        for part in (slice(0, 5), slice(5, 11))
    )
    assert packed.item() == pytest.approx(alone.item(), rel=1e-13)  # sums of float64 in another order


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_small_batches_add_up_to_a_large_one(toy, name, weight):
    model, rows = load64(toy(name)), batch(rows=8)
    rows["labels"][3, 2:9] = -100  # so that parts of the batch have different numbers of trained tokens
    teacher = OnlineTeacher(toys.load(toy("llama-tied"), dtype=torch.float64)[0])
    attach_loss(model, Objective(kd_weight=weight, hidden_weight=weight, temperature=2.0), teacher)
    num_items = int((rows["labels"] != -100).sum())
    model(**rows)["loss"].backward()
    whole = gradients(model)
    for size in (1, 2, 4):
        for start in range(0, 8, size):
            model(**{key: value[start : start + size] for key, value in rows.items()}, num_items=num_items)[
                "loss"
            ].backward()
        assert_close(whole, gradients(model), 1e-12)  # sums of float64 in another order


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_checkpointed_layers_give_the_same_gradients(toy, name):
    model, rows = toys.load(toy(name))[0], batch()
    teacher = OnlineTeacher(toys.load(toy(name))[0])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    attach_loss(model, Objective(kd_weight=0.3, hidden_weight=0.5), teacher)
    model.train()
    model(**rows)["loss"].backward()
    before = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**rows)["loss"].backward()
    assert_close(before, gradients(model), 0)  # the same numbers, computed twice


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_under_autocast_the_loss_is_that_of_whole_logits(toy, name):
    model, rows = toys.load(toy(name))[0], batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_loss(model, rows)
    expected.backward()
    before = gradients(model)
    attach_loss(model, Objective())
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**rows)["loss"]
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)  # logits of 3, in units of 2^-7, 16 of them
    # A unit of bfloat16 is 2^-8; what two ways to round it come to on the way back through six layers is a few.
    assert_close(before, gradients(model), 0.03)


# What wraps a model


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize(("targets", "trained"), [(["q_proj", "down_proj"], 24), (["q_proj", "lm_head"], 14)])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapters_get_the_gradients_of_whole_logits(toy, name, targets, trained):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    rows = batch()
    grads, values = [], []
    for attached in (False, True):
        model = load64(toy(name))
        if attached:
            attach_loss(model, Objective())
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, config)
        loss = wrapped(**rows)["loss"] if attached else plain_loss(wrapped, rows)
        loss.backward()
        values.append(loss.item())
        grads.append(gradients(wrapped))
    assert values[1] == pytest.approx(values[0], rel=1e-7)  # adapters are in float32
    assert sum(bool(grad.any()) for grad in grads[1].values()) == trained
    assert_close(*grads, 1e-6)  # the same


@pytest.fixture
def one_process(tmp_path):
    """Return nothing, in a group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradients_pass_the_hooks_of_ddp(toy, name):
    model, rows = load64(toy(name)), batch()
    plain_loss(model, rows).backward()
    before = gradients(model)
    attach_loss(model, Objective())
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # where a hook has not fired, the second pass is an error
        model.zero_grad()
        wrapped(**rows)["loss"].backward()
    assert_close(before, gradients(model), 1e-11)  # sums of float64 in another order


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_gradients_pass_the_hooks_of_fsdp(toy, name, weight):
    from torch.distributed.fsdp import fully_shard

    model, rows = toys.load(toy(name))[0], batch()
    attach_loss(model, Objective(kd_weight=weight), OnlineTeacher(toys.load(toy("gemma2"))[0]))
    model(**rows)["loss"].backward()
    before = gradients(model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    tied = name == "llama-tied"  # as accelerate groups them
    ends = [model.model.embed_tokens] if tied else []
    fully_shard([model.model.norm, *ends, model.lm_head], mesh=mesh, reshard_after_forward=False)
    if not tied:
        fully_shard(model.model.embed_tokens, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        model(**rows)["loss"].backward()
    found = {
        key: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for key, grad in gradients(model).items()
    }
    assert_close(before, found, 1e-6)  # float32

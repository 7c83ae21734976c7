"""Sharing blocks with the source: which, in what order of tensors, and on real file systems that can."""

import fcntl
import filecmp
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from disks import KINDS, NoDiskError, disk, used
from handmade import checkpoint, data, safetensors, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import llama_layers

import surgeon
from surgeon import text
from surgeon.checkpoint import output
from surgeon.checkpoint.header import DTYPE_BITS, FilePart, TensorSpec, format_header, read_header
from surgeon.checkpoint.source import StoredTensor
from surgeon.errors import OutputError, PlanError
from surgeon.plan.execute import Shard, TensorWrite, write_safetensors
from surgeon.plan.expressions import Read
from surgeon.plan.plan import Plan
from surgeon.plan.sharing import could_share, placed

MB = 1_000_000
# hidden, ffn, queries, keys, head size, layers, vocabulary, and what a layer has besides a Llama's tensors
FAMILIES = {
    "llama": (4096, 14336, 4096, 1024, 128, 32, 128256, ""),  # 3-8B
    "qwen3": (4096, 12288, 4096, 1024, 128, 36, 151936, "norms"),  # 8B
    "qwen2": (3584, 18944, 3584, 512, 128, 28, 152064, "biases"),  # 2.5-7B
    "smollm2": (576, 1536, 576, 192, 64, 30, 49152, ""),  # 135M
}
CUTS = {
    "the last quarter goes": lambda layer, layers: layer < layers * 3 // 4,
    "every fourth layer goes": lambda layer, layers: layer % 4 != 3,
    "the second quarter goes": lambda layer, layers: not layers // 4 <= layer < layers // 2,
}


def tensors_of(
    hidden: int, ffn: int, queries: int, keys: int, head_dim: int, layers: int, vocab: int, more: str
) -> dict[str, TensorSpec]:
    """Return the tensors of a model in bfloat16, in the order of their names, as safetensors stores them."""
    shapes = llama_layers(layers, hidden=hidden, ffn=ffn, queries=queries, keys=keys)
    extra: dict[str, tuple[int, ...]] = {}
    if more == "norms":
        extra = {"q_norm.weight": (head_dim,), "k_norm.weight": (head_dim,)}
    if more == "biases":
        extra = {f"{name}_proj.bias": (size,) for name, size in (("q", queries), ("k", keys), ("v", keys))}
    shapes |= {f"model.layers.{i}.self_attn.{rest}": shape for i in range(layers) for rest, shape in extra.items()}
    shapes |= {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    shapes |= {"model.norm.weight": (hidden,)}
    return {name: TensorSpec("BF16", shapes[name]) for name in sorted(shapes)}


def stored(tensors: dict[str, TensorSpec]) -> dict[str, StoredTensor]:
    """Return the tensors as they lie in one file."""
    places, end = {}, len(format_header(tensors))
    for name, spec in tensors.items():
        places[name] = StoredTensor(spec, "model.safetensors", end, end + spec.nbytes)
        end += spec.nbytes
    return places


def moved(tensors: dict[str, TensorSpec]) -> tuple[Plan, Shard]:
    """Return a plan that moves these tensors, and the file that they go to."""
    plan = Plan(tensors={name: Read(name) for name in tensors}, config={}, layer_map=(), steps=())
    return plan, Shard("model.safetensors", tensors)


# --- the order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nearly_every_block_can_be_shared_whatever_the_sizes_of_the_family(family, cut):
    tensors = tensors_of(*FAMILIES[family])
    layers = FAMILIES[family][5]
    kept = {
        name: spec
        for name, spec in tensors.items()
        if "layers" not in name or CUTS[cut](int(name.split(".")[2]), layers)
    }
    plan, shard = moved(kept)
    size = sum(spec.nbytes for spec in kept.values())

    [result] = placed([shard], plan, stored(tensors), block=4096)

    assert could_share(result, plan, stored(tensors), block=4096) > 0.998 * size
    if family == "llama":
        assert list(result.tensors) == list(kept)  # the order of the source serves as well
    if family == "qwen3" and cut == "every fourth layer goes":
        assert could_share(shard, plan, stored(tensors), block=4096) < 0.4 * size


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["F64", "F32", "BF16", "U8"]), st.integers(0, 40_000)), min_size=1, max_size=30),
    st.sampled_from([512, 4096]),
    st.data(),
)
def test_every_tensor_keeps_its_file_and_wider_dtypes_stay_first(sizes, block, draw):
    tensors = {f"t{i}": TensorSpec(dtype, (size,)) for i, (dtype, size) in enumerate(sizes)}
    kept = sorted(draw.draw(st.sets(st.sampled_from(list(tensors)), min_size=1)), key=lambda n: -width(tensors[n]))
    plan, shard = moved({name: tensors[name] for name in kept})

    [result] = placed([shard], plan, stored(tensors), block=block)

    assert result.tensors == shard.tensors
    widths = [width(spec) for spec in result.tensors.values()]
    assert widths == sorted(widths, reverse=True)
    plain = replace(shard, block=block)
    assert could_share(result, plan, stored(tensors), block=block) >= could_share(
        plain, plan, stored(tensors), block=block
    )


def width(spec: TensorSpec) -> int:
    return DTYPE_BITS[spec.dtype]


def test_a_block_that_no_disk_has_is_refused(tmp_path):
    surgery = surgeon.truncate(checkpoint(tmp_path / "model"), layers=2)

    for block in (1, 4095, 131_072, -4096):
        with pytest.raises(PlanError, match="no disk has blocks"):
            surgery.summary(block=block)


# --- real disks -------------------------------------------------------------------------------------------------

SIZES = {
    "llama": (512, 1536, 512, 256, 64, 8, 2048, ""),
    "qwen3": (512, 1536, 512, 256, 64, 8, 2048, "norms"),
}


def model(directory: Path, family: str) -> Path:
    """Return a checkpoint of some 60 MB with the tensors of a family."""
    hidden, ffn, queries, keys, head_dim, layers, vocab, _ = SIZES[family]
    return checkpoint(
        directory,
        tensors=tensors_of(*SIZES[family]),
        architectures=["Qwen3ForCausalLM" if family == "qwen3" else "LlamaForCausalLM"],
        model_type=family,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=queries // head_dim,
        num_key_value_heads=keys // head_dim,
        head_dim=head_dim,
        num_hidden_layers=layers,
        vocab_size=vocab,
        torch_dtype="bfloat16",
    )


@contextmanager
def mounted(directory: Path, kind: str, *, size: int) -> Iterator[Path]:
    """Yield a disk that shares blocks; skip the test where this machine can have none."""
    with ExitStack() as stack:
        try:
            place = stack.enter_context(disk(directory, kind, size=size))
        except NoDiskError as error:
            pytest.skip(str(error))
        yield place


@pytest.fixture(scope="module", params=list(KINDS))
def sharing(request, tmp_path_factory) -> Iterator[Path]:
    """Return a disk that shares blocks, with both models on it."""
    with mounted(tmp_path_factory.mktemp("disk"), request.param, size=400 * MB) as place:
        for family in SIZES:
            model(place / family, family)
        yield place


@pytest.fixture
def room(sharing) -> Iterator[Path]:
    """Return a directory on that disk that is emptied after the test."""
    (sharing / "room").mkdir()
    yield sharing / "room"
    shutil.rmtree(sharing / "room")


one_worker = pytest.mark.xdist_group("disks")


def cut(source: Path) -> surgeon.Pruning:
    """Return the surgery that takes two layers out, not the last ones."""
    return surgeon.prune(source, score="random", layers=6)


@one_worker
@pytest.mark.parametrize("family", SIZES)
def test_a_cut_takes_almost_no_space_and_is_the_same_bytes_as_on_any_disk(family, sharing, room, tmp_path):
    surgery = cut(sharing / family)
    planned = surgery.summary(room / "cut")
    before = used(room)

    done = surgery.save(room / "cut")

    assert used(room) - before < 0.05 * done.bytes_written
    assert done.bytes_shared == planned.bytes_shared > 0.98 * done.bytes_written
    receipt = json.loads((room / "cut/surgeon.json").read_text())
    assert receipt["bytes_shared"] == done.bytes_shared
    elsewhere = cut(shutil.copytree(sharing / family, tmp_path / family))
    elsewhere.save(tmp_path / "cut", **receipt["options"])
    assert filecmp.cmp(room / "cut/model.safetensors", tmp_path / "cut/model.safetensors", shallow=False)
    entries = read_header(room / "cut/model.safetensors")
    content = (room / "cut/model.safetensors").read_bytes()
    for name, expr in surgery.plan.tensors.items():
        assert content[entries[name].start : entries[name].end] == data(expr.name, entries[name].spec.nbytes)


@one_worker
def test_a_result_outlives_its_source_and_changes_to_it(room, sharing, tmp_path):
    source = shutil.copytree(sharing / "llama", room / "llama")
    surgeon.truncate(source, layers=3).save(room / "cut")
    before = snapshot(room / "cut")

    with (source / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        file.write(bytes(10_000_000))
    shutil.rmtree(source)

    assert snapshot(room / "cut") == before


@one_worker
def test_a_dry_run_says_what_will_be_shared_and_writes_nothing(sharing, room, run, tmp_path):
    words = ["truncate", sharing / "qwen3", "--layers", 6, "-o", room / "deep/er/cut"]
    before = snapshot(sharing)

    printed, planned = run(*words, "--dry-run"), run(*words, "--dry-run", "--json")

    assert snapshot(sharing) == before
    done = run(*words, "--json")
    shared = json.loads(done.out)["bytes_shared"]
    assert json.loads(planned.out)["bytes_shared"] == shared > 0
    assert f"{text.size(shared)} of blocks with the source" in printed.out


@one_worker
def test_other_disks_share_nothing_and_say_so(sharing, run, tmp_path):
    source = sharing / "llama"

    across = json.loads(run("truncate", source, "--layers", 6, "-o", tmp_path / "cut", "--json").out)

    assert across["bytes_shared"] == 0
    assert "shares" not in run("truncate", source, "--layers", 6, "-o", tmp_path / "other", "--dry-run").out
    receipt = json.loads((tmp_path / "cut/surgeon.json").read_text())
    assert receipt["options"]["block"] == 0
    assert "bytes_shared" not in receipt


@one_worker
def test_what_the_disk_refuses_to_share_is_copied(sharing, room, tmp_path, monkeypatch):
    surgeon.truncate(sharing / "llama", layers=6).save(room / "shared")
    real, calls = fcntl.ioctl, []
    monkeypatch.setattr(output, "STEP", 1 << 20)

    def refuse(*args):
        calls.append(args)
        if len(calls) > 10:
            raise OSError(95, "Operation not supported")
        return real(*args)

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    done = surgeon.truncate(sharing / "llama", layers=6).save(room / "copied")

    assert 0 < done.bytes_shared <= 8 << 20  # two of the calls were the probes
    assert filecmp.cmp(room / "shared/model.safetensors", room / "copied/model.safetensors", shallow=False)


@one_worker
def test_any_selection_beside_made_tensors_is_bit_identical(room):
    draw = random.Random(0)
    for attempt in range(40):
        layout = {f"t{i}": TensorSpec("U8", (draw.choice([24, 4096, 70_001, 300_000]),)) for i in range(9)}
        source, out = room / f"source{attempt}", room / f"out{attempt}"
        source.write_bytes(safetensors(layout, align=draw.randrange(0, 16384, 8)))
        entries = read_header(source)
        writes = []
        for name in draw.sample(list(layout), draw.randint(1, 9)):
            made = partial(lambda content: [memoryview(content)], data(name, layout[name].nbytes))
            copied = FilePart(source).range(entries[name].start, entries[name].end)
            writes.append(TensorWrite(name, layout[name], copied if draw.random() < 0.7 else made))

        write_safetensors(out, writes, block=draw.choice([4096, 16384]))

        content = out.read_bytes()
        for write in writes:
            entry = read_header(out)[write.name]
            assert content[entry.start : entry.end] == data(write.name, write.spec.nbytes)


@one_worker
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_cut_needs_no_space_for_what_it_shares_and_a_cast_of_it_does(kind, tmp_path):
    with mounted(tmp_path / "small", kind, size=320 * MB) as place:
        source = model(place / "qwen3", "qwen3")
        surgery = surgeon.truncate(source, layers=6)
        needed = surgery.summary(place / "cut").bytes_written
        with (place / "filler").open("wb") as file:
            while shutil.disk_usage(place).free > needed // 2:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), 2 * MB)
                os.sync()
        before = snapshot(source)

        with pytest.raises(OutputError, match=r"free, the result needs \d+(\.\d+)? MB"):
            surgery.save(place / "cast", dtype="float16")
        surgery.save(place / "cut")

        assert not (place / "cast").exists()
        assert sum(path.stat().st_size for path in (place / "cut").iterdir()) > needed
        assert snapshot(source) == before

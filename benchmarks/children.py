"""Children of a Llama that no command of surgeon makes: permuted, merged with an adapter, quantized, and others.

Each function writes a checkpoint into a directory and returns it. tests/test_trace.py makes them of toys,
benchmarks/trace.py of a trained model.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
SCALE = {8: 127.0, 4: 7.0}
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def written(source: Path, out: Path, tensors: Tensors, **config: object) -> Path:
    """Return `out`, now the checkpoint `source` with other tensors, and some keys of its config changed."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("surgeon.json", "README.md"):
            shutil.copy(path, out)
    settings = json.loads((source / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    return out


def read(source: Path) -> Tensors:
    """Return the tensors of a checkpoint in one file."""
    return load_file(source / "model.safetensors")


def changed(source: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """Return `out`, now the checkpoint with each tensor replaced by what `change` makes of it."""
    return written(source, out, {name: change(name, tensor) for name, tensor in read(source).items()})


def permuted(source: Path, out: Path, *, seed: int = 0) -> Path:
    """Return the checkpoint with the hidden state in another order, and each layer's neurons: the same function."""
    tensors, random = read(source), torch.Generator().manual_seed(seed)
    hidden = torch.randperm(tensors["model.norm.weight"].numel(), generator=random)
    made = {}
    orders: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = name.partition("layers.")[2].partition(".")[0]
        if layer and layer not in orders:
            orders[layer] = torch.randperm(
                tensors[f"model.layers.{layer}.mlp.gate_proj.weight"].shape[0], generator=random
            )
        if "gate_proj" in name or "up_proj" in name:
            made[name] = tensor[orders[layer]][:, hidden]
        elif "down_proj" in name:
            made[name] = tensor[hidden][:, orders[layer]]
        elif "o_proj" in name:
            made[name] = tensor[hidden]
        else:
            made[name] = tensor[..., hidden]
    return written(source, out, made)


def refreshed(source: Path, out: Path, layers: tuple[int, ...], *, seed: int = 0) -> Path:
    """Return the checkpoint with some layers as they would be at the start of a training."""
    random = torch.Generator().manual_seed(seed)

    def fresh(name: str, tensor: Tensor) -> Tensor:
        if not any(f"layers.{layer}." in name for layer in layers):
            return tensor
        drawn = torch.randn(tensor.shape, generator=random) * 0.02 if tensor.ndim > 1 else torch.ones(tensor.shape)
        return drawn.to(tensor.dtype)

    return changed(source, out, fresh)


def merged_lora(
    source: Path,
    out: Path,
    rank: int,
    *,
    roles: tuple[str, ...] = ("q_proj", "v_proj"),
    size: float = 0.05,
    seed: int = 0,
) -> Path:
    """Return the checkpoint with W + B A for random B and A of a rank; `size` is ||B A|| / ||W||."""
    random = torch.Generator().manual_seed(seed)

    def merge(name: str, tensor: Tensor) -> Tensor:
        if not any(f"{role}.weight" in name for role in roles):
            return tensor
        change = torch.randn(tensor.shape[0], rank, generator=random) @ torch.randn(
            rank, tensor.shape[1], generator=random
        )
        weight = tensor.float()
        return (weight + change * (size * weight.norm() / change.norm())).to(tensor.dtype)

    return changed(source, out, merge)


def dequantized(source: Path, out: Path, bits: int, group: int | None) -> Path:
    """Return the checkpoint with linear maps rounded to a symmetric grid, a scale a group (None: a row) of inputs."""

    def rounded(name: str, tensor: Tensor) -> Tensor:
        if not any(f"{role}.weight" in name for role in ROLES):
            return tensor
        codes, scales = _codes(tensor, bits, group)
        return (codes * scales).reshape(tensor.shape).to(tensor.dtype)

    return changed(source, out, rounded)


def _codes(tensor: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    parts = tensor.float().reshape(tensor.shape[0], -1, group or tensor.shape[1])
    scales = parts.abs().amax(-1, keepdim=True).clamp(min=1e-12) / SCALE[bits]
    return (parts / scales).round(), scales


def in_codes(source: Path, out: Path, form: str, group: int | None = None) -> Path:
    """Return the checkpoint with linear maps stored as codes: by "torchao" (int8), or "compressed-tensors" (int4)."""
    made: Tensors = {}
    bits = 8 if form == "torchao" else 4
    for name, tensor in read(source).items():
        module = name.removesuffix(".weight")
        if not any(f"{role}.weight" in name for role in ROLES):
            made[name] = tensor
            continue
        codes, scales = _codes(tensor, bits, group)
        codes, scales = codes.reshape(tensor.shape), scales.squeeze(-1)
        if form == "torchao":
            made[f"{module}._weight_qdata"] = codes.to(torch.int8)
            made[f"{module}._weight_scale"] = scales
            made[f"{module}._weight_zero_point"] = torch.zeros(scales.shape, dtype=torch.int8)
        else:
            lifted = (codes.long() + 8).reshape(tensor.shape[0], -1, 8)
            packed = (lifted << (4 * torch.arange(8))).sum(-1)
            made[f"{module}.weight_packed"] = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
            made[f"{module}.weight_scale"] = scales.to(tensor.dtype)
            made[f"{module}.weight_shape"] = torch.tensor(tensor.shape)
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True}}}
    packs = {"quant_method": form, "format": "pack-quantized", "config_groups": groups, "ignore": ["lm_head"]}
    rules = {"quant_method": form, "quant_type": {}} if form == "torchao" else packs
    return written(source, out, made, quantization_config=rules)


def trained(source: Path, out: Path, *, size: float = 0.02, seed: int = 1) -> Path:
    """Return the checkpoint with noise on every tensor: as far from it as a training of that relative size."""
    random = torch.Generator().manual_seed(seed)

    def moved(name: str, tensor: Tensor) -> Tensor:
        spread = tensor.float().pow(2).mean().sqrt() * (0.2 if tensor.ndim == 1 else 1.0)
        return (tensor.float() + size * spread * torch.randn(tensor.shape, generator=random)).to(tensor.dtype)

    return changed(source, out, moved)

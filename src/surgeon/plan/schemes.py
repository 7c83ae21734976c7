"""How a quantized weight is stored: the tensors that hold it, and what config.json and the files' headers say of it.

Each scheme is the form in which one library stores codes, so that this library reads them again; its functions make
them (`plan/quantizing.py`). Here are the names, shapes and words alone, which are known before a byte is read.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from surgeon.checkpoint.header import TensorSpec
from surgeon.errors import PlanError

TORCHAO = "torchao"
COMPRESSED = "compressed-tensors"
BITS: Mapping[str, tuple[int, ...]] = {TORCHAO: (8,), COMPRESSED: (8, 4)}
GROUPS = (128, 64, 32)  # inputs that share a scale: the sizes for which vLLM has kernels, the smallest file first
WORDS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # the dtypes that are quantized

INSTALL = "pip install 'surgeon[quantize]'"

Part = Literal["codes", "scale", "zero", "shape"]
_PARTS: Mapping[str, Mapping[str, Part]] = {
    TORCHAO: {"_weight_qdata": "codes", "_weight_scale": "scale", "_weight_zero_point": "zero"},
    COMPRESSED: {"weight_packed": "codes", "weight_scale": "scale", "weight_shape": "shape"},
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """The library that stores a weight, the bits of a code, and how many inputs share a scale: None for a whole row."""

    method: str
    bits: int
    group_size: int | None = None

    @property
    def words(self) -> str:
        """The scheme in words: "4 bits, groups of 64"."""
        each = "a scale for each row" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.bits} bits, {each}"

    @property
    def codes_per_word(self) -> int:
        """How many codes one stored number holds."""
        return 1 if self.method == TORCHAO else 32 // self.bits

    @property
    def parts(self) -> Mapping[str, Part]:
        """The tensors of a module that hold its weight, by their names in it."""
        return _PARTS[self.method]

    def spec(self, part: Part, weight: TensorSpec) -> TensorSpec:
        """Return the dtype and shape of a part of a weight, shape (outputs, inputs)."""
        outputs, inputs = weight.shape
        if part == "shape":
            return TensorSpec("I64", (2,))
        if part == "codes":
            return weight_of("I8" if self.method == TORCHAO else "I32", outputs, inputs // self.codes_per_word)
        if part == "zero":
            return weight_of("I8", outputs, 1)
        groups = 1 if self.group_size is None else inputs // self.group_size
        return weight_of("F32" if self.method == TORCHAO else weight.dtype, outputs, groups)

    def config(self, ignored: Iterable[str]) -> dict[str, Any]:
        """Return the quantization_config, as the library writes it. `ignored` are linear modules that stay."""
        if self.method == TORCHAO:
            data = {
                "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
                "group_size": None,
                "set_inductor_config": True,
            }
            return {
                "quant_method": TORCHAO,
                "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": data}},
                "modules_to_not_convert": None,
                "include_input_output_embeddings": False,
                "untie_embedding_weights": False,
            }
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "group_size": self.group_size,
            "strategy": "group",
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": COMPRESSED,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {**group, "format": "pack-quantized"}},
            "ignore": list(ignored),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def metadata(self, weights: Mapping[str, TensorSpec], others: Iterable[str]) -> dict[str, str]:
        """Return what each file's header says beside its tensors: of which of them the library makes a weight.

        `weights` are those that are stored as codes, `others` the tensors that are stored as they were.
        """
        if self.method != TORCHAO:
            return {}
        said = {name: json.dumps(_told(spec)) for name, spec in weights.items()}
        said |= {name: json.dumps({"_type": "Tensor"}) for name in others}
        return said | {"tensor_names": json.dumps(list(said))}


def weight_of(dtype: str, outputs: int, inputs: int) -> TensorSpec:
    """Return the spec of a matrix."""
    return TensorSpec(dtype, (outputs, inputs))


def _told(weight: TensorSpec) -> dict[str, Any]:
    """Return what torchao writes of a weight: its class, and what that has beside its tensors."""
    data = {
        "act_quant_kwargs": None,
        "reduce_range": False,
        "block_size": [1, weight.shape[1]],
        "dtype": {"_type": "torch.dtype", "_data": WORDS[weight.dtype]},
    }
    return {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": ["zero_point", "qdata", "scale"]}


def scheme_of(config: Mapping[str, Any], label: str) -> Scheme:
    """Return the scheme of a quantization_config. Raises PlanError for one that surgeon does not write."""
    rules = config.get("quantization_config") or {}
    for scheme in (Scheme(TORCHAO, 8), *(Scheme(COMPRESSED, bits, size) for bits in (8, 4) for size in GROUPS)):
        expected = scheme.config(rules.get("ignore") or ())
        if all(_same(rules.get(key), value) for key, value in expected.items()):
            return scheme
    method = rules.get("quant_method")
    raise PlanError(
        f"{label} is quantized ({method}) in a form that surgeon does not read",
        hint="surgeon evaluate reads what surgeon quantize writes; measure others with lm-evaluation-harness: --tasks.",
    )


def check_no_metadata(config: Mapping[str, Any], label: str) -> None:
    """Raise PlanError for a model of torchao, whose codes no loader finds where their names are in other files."""
    if (config.get("quantization_config") or {}).get("quant_method") == TORCHAO:
        raise PlanError(
            f"{label} is quantized by torchao, which describes its codes in the headers of its own files",
            hint="Cut the unquantized checkpoint, and quantize the result.",
        )


def _same(value: Any, expected: Any) -> bool:
    """Return whether a part of the rules says what is expected; what it says beside that is none of ours."""
    if isinstance(expected, Mapping):
        return isinstance(value, Mapping) and all(_same(value.get(key), one) for key, one in expected.items())
    return bool(value == expected)


def version_of(method: str) -> str | None:
    """Return the version of the library of a method, which is not imported; None where it is not installed."""
    try:
        return version(method)
    except PackageNotFoundError:
        return None


def check_installed(method: str) -> None:
    """Raise PlanError where the library of a method is not installed."""
    if version_of(method) is None:
        raise PlanError(f"{method} is not installed, and it makes the codes", hint=INSTALL)

"""The rules of a quantized checkpoint follow its layers: which modules are stored how, by their names.

A quantization config picks modules by whole names, parts of names, wildcards or regular expressions, and each method
and each runtime reads them in its own way (transformers: `should_convert_module`; GPTQ: `dynamic`, by re.match;
compressed-tensors: `targets` and `ignore`, with "re:"; ModelOpt: wildcards). So a rule is read in every way, and a
result is written only if every reading says of each layer what it said of the layer that this one was.
"""

import json
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from surgeon.anatomy.anatomy import EXPERT_NUMBER, Anatomy
from surgeon.checkpoint.header import QUANTIZATION_KEYS
from surgeon.errors import PlanError

HINT = "Cut the unquantized checkpoint and quantize the result, or keep the first layers as they are: surgeon truncate."

_WORDS = re.compile(r"[A-Za-z_]+(\.[A-Za-z_]+)*")  # a name without a number: it says the same of every layer
_MARK = re.compile(r"re:|[+-]:")  # what GPTQ and compressed-tensors put before a regular expression
_NUMBER = r"\d+|\((?:\?:)?\d+(?:\|\d+)*\)|\[[\d-]+\]"  # 3, (0|5), (?:0|5), [0-2]
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_OPEN_REPEATS = 4  # more of them in one expression, and a match may take hours
_SECONDS = 5.0

Reading = Callable[[str], bool]


@dataclass(frozen=True)
class _Layers:
    """The names inside every layer, and which layer each layer of the result was."""

    prefixes: Sequence[str]  # that stand before a layer's number: as it is stored, and as other runtimes call it
    inside: Sequence[Sequence[str]]  # of each layer of the source; "" is the layer itself
    keep: Sequence[int]
    deadline: float = field(default_factory=lambda: time.monotonic() + _SECONDS)

    @property
    def stay(self) -> bool:
        """Whether every layer that is kept keeps its number."""
        return list(self.keep) == list(range(len(self.keep)))

    def picked(self, readings: Iterable[Reading], number: int, inside: Sequence[str]) -> set[tuple[str, str]]:
        """Return what one of the readings picks in a layer of this number that holds these names."""
        if time.monotonic() > self.deadline:
            raise PlanError(f"the quantization rules take more than {_SECONDS:.0f} s to read", hint=HINT)
        readings = list(readings)
        return {
            (prefix, rest)
            for prefix in self.prefixes
            for rest in inside
            if any(reads(f"{prefix}{number}.{rest}" if rest else f"{prefix}{number}") for reads in readings)
        }


def follow_quantization(config: Mapping[str, Any], anatomy: Anatomy, keep: Sequence[int]) -> dict[str, Any]:
    """Return a config with its rules about quantization as they must be where layer i is layer keep[i] of `anatomy`.

    Raises PlanError, naming the rule, when it cannot say of the result's layers what it said of the source's.
    """
    after = dict(config)
    for key in QUANTIZATION_KEYS:
        if config.get(key) is not None:
            after[key] = _followed(config[key], key, anatomy, keep)
    if isinstance(nested := config.get("text_config"), Mapping):
        after["text_config"] = follow_quantization(nested, anatomy, keep)
    return after


def follow_quantization_file(name: str, content: bytes, anatomy: Anatomy, keep: Sequence[int | None]) -> bytes:
    """Return the content of one of QUANTIZATION_FILES where layer i is layer keep[i] of `anatomy`.

    These are the same bytes where nothing changes. Raises PlanError as `follow_quantization` does, and where the file
    cannot be read or a layer is new.
    """
    numbers = [layer for layer in keep if layer is not None]
    if numbers == list(range(anatomy.depth)) and len(numbers) == len(keep):
        return content
    if len(numbers) < len(keep):
        raise PlanError(f"{name} does not say how a new layer is quantized", hint=HINT)
    try:
        rules = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{name} is not JSON, so its rules cannot follow the layers", hint=HINT) from error
    after = _followed(rules, name, anatomy, numbers)
    return content if after == rules else (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode()


def _followed(rules: Any, where: str, anatomy: Anatomy, keep: Sequence[int]) -> Any:
    if list(keep) == list(range(anatomy.depth)):
        return rules
    return _follow(rules, where, _layers(anatomy, keep, repr(rules)))


def _layers(anatomy: Anatomy, keep: Sequence[int], rules: str) -> _Layers:
    """Return the layers with the names in them. Of many experts those stand for all that no rule names."""
    numbers = set(re.findall(r"\d+", rules)) | {"0", "1"}
    inside: list[dict[str, None]] = [{"": None} for _ in range(anatomy.depth)]
    prefixes: dict[str, None] = {}
    for stack in anatomy.stacks:
        last = stack.prefix.rstrip(".").rpartition(".")[2]
        usual = ("", "model.", "language_model.model.", "model.language_model.", "model.language_model.model.")
        prefixes |= dict.fromkeys([stack.prefix, *(f"{before}{last}." for before in usual)])
        for name in anatomy.spec.tensors:
            if place := stack.locate(name):
                expert = EXPERT_NUMBER.search(place[1])
                if expert is None or expert.group() in numbers:
                    words = place[1].split(".")
                    inside[place[0]] |= dict.fromkeys(".".join(words[:n]) for n in range(1, len(words) + 1))
    return _Layers(tuple(prefixes), [tuple(names) for names in inside], keep)


def _follow(value: Any, where: str, layers: _Layers) -> Any:
    """Return a part of the rules, with every name in it following the layers."""
    depth = len(layers.inside)
    if isinstance(value, str):
        names = _follow_rule(value, where, layers)
        if len(names) != 1:
            raise PlanError(f"{where} is {value!r}, a layer that would be there {len(names)} times", hint=HINT)
        return names[0]
    if isinstance(value, Mapping):
        if not layers.stay and depth > 1 and {str(i) for i in range(depth)} <= value.keys():
            raise PlanError(f"{where} has an entry for each layer's number; they would shift", hint=HINT)
        return {
            name: _follow(inner, f"{where}.{key}", layers)
            for key, inner in value.items()
            for name in _follow_rule(key, where, layers)
        }
    if isinstance(value, list):
        if len(value) == depth > 4 and not any(isinstance(item, str) for item in value):
            raise PlanError(f"{where} has as many entries as the model has layers; they would shift", hint=HINT)
        after: list[Any] = []
        for item in value:
            after += _follow_rule(item, where, layers) if isinstance(item, str) else [_follow(item, where, layers)]
        return after
    return value


def _follow_rule(rule: str, where: str, layers: _Layers) -> list[str]:
    """Return the rules that pick in each layer of the result what `rule` picked in the layer that it was."""
    if _WORDS.fullmatch(rule):
        return [rule]
    renumbered = _renumbered(rule, layers)
    if renumbered is not None and re.fullmatch(r"[\w.-]*\.\d+\.[A-Za-z_][\w.-]*", rule):
        return renumbered  # a whole name inside one layer: no reading picks anything else
    for candidate in ([rule], renumbered):
        if candidate is not None and _agree(rule, candidate, where, layers):
            return candidate
    raise PlanError(f"{where} picks layers by {rule!r}; when layers move, it would pick others", hint=HINT)


def _renumbered(rule: str, layers: _Layers) -> list[str] | None:
    """Return a rule with its layers' numbers replaced, None where no number in it is surely a layer's."""
    escaped = "|".join(re.escape(prefix[:-1]).replace(r"\.", r"\\?\.") for prefix in layers.prefixes)
    match = re.fullmatch(rf"((?:re:|[+-]:)?\^?(?:\.\*)?(?:{escaped})\\?\.)({_NUMBER})((?:\\?\.|\$|\*|$).*)", rule)
    if match is None:
        return None
    before, number, after = match.groups()
    named = re.compile(number)
    targets = [j for j, i in enumerate(layers.keep) if named.fullmatch(str(i))]
    if number.isdigit():
        return [f"{before}{j}{after}" for j in targets]
    return [f"{before}(?:{'|'.join(map(str, targets))}){after}"] if targets else []


def _agree(old: str, new: Sequence[str], where: str, layers: _Layers) -> bool:
    """Return whether `new` picks in each layer of the result what `old` picked in its source, in every reading."""
    if layers.stay and new == [old]:
        return True
    before = list(_readings(old, where))
    after = [list(_readings(rule, where)) for rule in new]
    for kind, reading in enumerate(before):
        union = [readings[kind] for readings in after]
        for j, i in enumerate(layers.keep):
            if layers.picked(union, j, layers.inside[i]) != layers.picked([reading], i, layers.inside[i]):
                return False
    return True


def _readings(rule: str, where: str) -> Iterator[Reading]:
    """Yield the ways in which a runtime may read a rule, always as many: does it pick the module of this name?"""
    yield lambda name: rule in name
    yield lambda name: name == rule or name.startswith(f"{rule}.")
    yield lambda name: name.endswith(rule)
    yield lambda name: fnmatchcase(name, rule)
    expression = _compiled(_MARK.sub("", rule, count=1) if _MARK.match(rule) else rule, where)
    yield lambda name: expression is not None and expression.match(name) is not None
    yield lambda name: expression is not None and expression.search(name) is not None
    yield lambda name: expression is not None and expression.fullmatch(name) is not None


def _compiled(expression: str, where: str) -> re.Pattern[str] | None:
    """Return a rule as a regular expression, None where it is none. Raises PlanError for one that may never end."""
    if len(expression) > 1000 or _REPEATED_GROUP.search(expression) or _open_repeats(expression) > _OPEN_REPEATS:
        raise PlanError(f"{where} has a rule too complex to follow: {expression[:80]!r}", hint=HINT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a wildcard may look like a set inside a set
            return re.compile(expression)
    except (re.error, OverflowError, RecursionError):
        return None


def _open_repeats(expression: str) -> int:
    return len(re.findall(r"(?<!\\)[*+{]", expression))

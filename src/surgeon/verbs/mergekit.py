"""mergekit's recipe files, as the options of `surgeon merge`: what is not here is named, and nothing is left out."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from surgeon.errors import PlanError
from surgeon.mistyped import close_to
from surgeon.plan.plan import STORED_DTYPES

METHODS = {
    "linear": "linear",
    "task_arithmetic": "task-arithmetic",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare-ties",
    "slerp": "slerp",
    "nuslerp": "nuslerp",
    "model_stock": "model-stock",
    "karcher": "karcher",
    "passthrough": "passthrough",
}
MOST_BYTES = 1_000_000
_KEYS = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
_WEIGHTED = ("linear", "task-arithmetic", "ties", "dare", "dare-ties", "nuslerp")
_OF_BASE = ("task-arithmetic", "ties", "dare", "dare-ties", "model-stock")
_THINNED = ("ties", "dare", "dare-ties")
# Settings of a recipe that change nothing here, or have only one value here.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "int8_mask": (True, False),
    "rescale": (True,),
    "nuslerp_flatten": (True,),
    "nuslerp_row_wise": (False,),
    "filter_wise": (False,),
    "max_iter": (10,),
    "tol": (1e-5,),
}


@dataclass(frozen=True)
class Recipe:
    """What a recipe says: the first model, and the other options of `merge` by their names.

    `notes` tell where the result will differ from mergekit's.
    """

    model: str
    options: Mapping[str, Any]
    notes: Sequence[str] = field(default=())


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Return what a file of mergekit says. Raises PlanError, with the key, for what `surgeon merge` cannot do."""
    import yaml

    try:
        with Path(path).open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        content = yaml.safe_load(raw) if len(raw) <= MOST_BYTES else None
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}", hint="--from takes a recipe of mergekit.") from error
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise PlanError(f"{path} is no YAML: {said}", hint="--from takes a recipe of mergekit.") from error
    if not isinstance(content, dict) or not isinstance(content.get("merge_method"), str):
        raise PlanError(f"{path} is no recipe of mergekit: it has no merge_method", hint="Name its YAML file.")
    return _Reader(str(path), content).recipe()


class _Reader:
    def __init__(self, path: str, content: Mapping[str, Any]) -> None:
        self._path, self._content = path, content
        word = content["merge_method"]
        if word not in METHODS:
            self._refuse(f"merge_method {word!r}{close_to(word, METHODS)}")
        self._method = METHODS[word]
        self._base = self._name(content["base_model"], "base_model") if content.get("base_model") else None
        self._shared = self._settings(content.get("parameters"), "parameters")

    def recipe(self) -> Recipe:
        """Return what the file says."""
        for key in self._content:
            if key not in _KEYS and self._content[key] is not None:
                self._refuse(f"{key}")
        models = self._passed() if self._method == "passthrough" else self._models()
        names = [name for name, _ in models]
        options: dict[str, Any] = {"method": self._method}
        notes: list[str] = []
        if self._method == "passthrough":
            options["slices"] = self._slices(names)
            names = list(dict.fromkeys(names))
        elif self._method == "slerp":
            names, options["weights"] = self._slerp(models)
        else:
            if self._base is not None and self._method != "linear" and self._method != "karcher":
                models = [each for each in models if each[0] != self._base]
                options["base"] = self._base
            elif self._method in _OF_BASE:
                self._refuse(f"{self._method} without a base_model", hint="Name the base_model.")
            names = [name for name, _ in models]
            options |= self._weighed(models)
        if not names:
            self._refuse("a recipe without models")
        if self._method in ("dare", "dare-ties"):
            notes.append("differences that stay are divided by the density; mergekit scales them to their old l1 norm")
        source = self._content.get("tokenizer_source")
        if source not in (None, "base", names[0]):
            self._refuse(f"tokenizer_source: {source}", hint="All vocabularies must be the same; leave it out.")
        return Recipe(names[0], {**options, "models": names[1:], "stored_as": self._dtype()}, notes)

    def _refuse(self, what: str, *, hint: str | None = None) -> NoReturn:
        said = f"{self._path}: surgeon merge does not do {what}"
        raise PlanError(said, hint=hint or f"Methods that are here: {', '.join(METHODS)}.")

    def _name(self, value: Any, key: str) -> str:
        if isinstance(value, dict) and isinstance(inner := value.get("model"), dict | str) and not value.get("lora"):
            value = inner if isinstance(inner, str) else inner.get("path")
        if not isinstance(value, str) or not value:
            self._refuse(f"{key}: {value!r}", hint="Name a directory or a Hub id.")
        name = str(value)
        if "+" in name and not os.path.lexists(name):
            self._refuse(f"{key}: {name}, a model with an adapter", hint="surgeon opens an adapter's own directory.")
        return name

    def _settings(self, value: Any, key: str) -> dict[str, Any]:
        """Return parameters. Raises PlanError for one that is not known here, or has a value that is not."""
        settings = value or {}
        if not isinstance(settings, dict):
            self._refuse(f"{key}: {value!r}")
        known = {"weight", "density", "normalize", "lambda", "t", *_FIXED}
        for name, setting in settings.items():
            if name not in known or (name in _FIXED and setting not in _FIXED[name]):
                self._refuse(f"{name}: {setting!r} in {key}", hint="Remove it from the recipe.")
        return settings

    def _entries(self, value: Any, key: str) -> list[Mapping[str, Any]]:
        if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
            self._refuse(f"{key}: {value!r}", hint="It is a list of entries.")
        return list(value)

    def _models(self) -> list[tuple[str, dict[str, Any]]]:
        """Return each model with its own parameters: of `models`, or of one slice of whole models."""
        if self._content.get("models"):
            entries = self._entries(self._content["models"], "models")
        else:
            slices = self._entries(self._content.get("slices"), "slices")
            if len(slices) > 1:
                self._refuse(f"several slices with {self._content['merge_method']}", hint="Merge whole models.")
            self._shared = {**self._shared, **self._settings(slices[0].get("parameters"), "slices")}
            entries = self._entries(slices[0].get("sources"), "sources")
        return [
            (self._name(each.get("model"), "model"), self._settings(each.get("parameters"), "models"))
            for each in entries
        ]

    def _passed(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the model of each slice of a passthrough."""
        found = []
        for each in self._entries(self._content.get("slices"), "slices"):
            sources = self._entries(each.get("sources"), "sources")
            if len(sources) != 1 or sources[0].get("parameters") or each.get("parameters"):
                self._refuse("passthrough of more than one source, or with parameters", hint="One source for a slice.")
            found.append((self._name(sources[0].get("model"), "model"), dict[str, Any]()))
        return found

    def _slices(self, names: Sequence[str]) -> str:
        letters = {name: chr(ord("A") + number) for number, name in enumerate(dict.fromkeys(names))}
        words = []
        for each, name in zip(self._content["slices"], names, strict=True):
            ends = each["sources"][0].get("layer_range")
            if not isinstance(ends, list) or len(ends) != 2 or not all(type(end) is int for end in ends):
                self._refuse(f"layer_range: {ends!r}", hint="Such as layer_range: [0, 12]")
            if ends[1] <= ends[0]:
                self._refuse(f"an empty layer_range: {ends!r}", hint="Its second number is one past the last layer.")
            words.append(f"{letters[name]}:{ends[0]}-{ends[1] - 1}")
        return ",".join(words)

    def _slerp(self, models: Sequence[tuple[str, Any]]) -> tuple[list[str], list[str]]:
        """Return the base and the other model, and their weights: t is the other one's."""
        names = [name for name, _ in models]
        if self._base is None or len(names) != 2 or self._base not in names:
            self._refuse("slerp of other than two models, one of them the base_model", hint="Name two models.")
        first, other = str(self._base), next(name for name in [*names[::-1]] if name != self._base)
        lines = self._lines([self._shared], "t")
        if not lines:
            self._refuse("slerp without t", hint="Such as parameters: {t: 0.5}")
        texts = [f"{w}={_text([1 - n for n in line])},{_text(line)}".removeprefix("=") for w, line in lines]
        return [first, other], texts

    def _weighed(self, models: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self._method in _WEIGHTED:
            options["weights"] = self._by_model(models, "weight")
            for name, own in models:
                if not self._lines([own, self._shared], "weight"):
                    self._refuse(f"{self._method} without a weight of {name}", hint="Give each model a weight.")
        if self._method in _THINNED:
            options["density"] = [*self._by_model(models, "density"), ",".join(["1"] * len(models))]
        if isinstance(normalize := self._shared.get("normalize"), bool) and self._method in _WEIGHTED:
            options["normalize"] = normalize
        if (scale := self._shared.get("lambda")) is not None:
            if not isinstance(scale, int | float):
                self._refuse(f"lambda: {scale!r}", hint="One number.")
            options["scale"] = float(scale)
        return options

    def _by_model(self, models: Sequence[tuple[str, dict[str, Any]]], key: str) -> list[str]:
        """Return the texts of a parameter, each with the number of one model."""
        texts = []
        for number, (_, own) in enumerate(models):
            for where, line in self._lines([own, self._shared], key):
                numbers = [_text(line) if other == number else "" for other in range(len(models))]
                texts.append(f"{where}={','.join(numbers)}".removeprefix("="))
        return texts

    def _lines(self, settings: Iterable[Mapping[str, Any]], key: str) -> list[tuple[str, list[float]]]:
        """Return where a parameter has which numbers, the first that fits first. Outside the layers the first holds."""
        found: list[tuple[str, list[float]]] = []
        for each in settings:
            if key in each:
                found += self._read(each[key], key)
        return found

    def _read(self, value: Any, key: str) -> list[tuple[str, list[float]]]:
        if isinstance(value, dict):
            value = [value]
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            found = []
            for each in value:
                where = each.get("filter")
                pattern = "" if where in (None, "*") else f"*{where}*"
                if "," in pattern or "=" in pattern:
                    self._refuse(f"the filter {where!r}")
                lines = self._read(each.get("value"), key)
                found += [(pattern, lines[-1][1])] if pattern else lines
            return found
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
            self._refuse(f"{key}: {value!r}", hint="A number, a list of numbers, or entries with filter and value.")
        line = [float(number) for number in numbers]
        return [("", line)] if len(line) == 1 else [("outside", line[:1]), ("", line)]

    def _dtype(self) -> str | None:
        word = self._content.get("out_dtype") or self._content.get("dtype")
        if word is not None and word not in STORED_DTYPES:
            self._refuse(f"dtype: {word!r}", hint=f"One of: {', '.join(STORED_DTYPES)}.")
        return word


def _text(line: Sequence[float]) -> str:
    return ":".join(repr(number) for number in line)

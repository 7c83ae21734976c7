"""Options that a verb declares once: the keywords of its Python call, and the errors that name an option."""

import inspect
from dataclasses import dataclass

import pytest

import surgeon
from surgeon.errors import PlanError
from surgeon.options import OptionError, option, same_option, takes


@dataclass(frozen=True, kw_only=True)
class Options:
    layers: int = option("Layers of the result.", 6)


@takes(Options)
def join(model: str, text: str, options: Options) -> tuple[str, str, int]:
    """Return all three."""
    return model, text, options.layers


def test_a_call_takes_its_arguments_by_place_or_name_and_its_options_by_name():
    assert join("a", "b") == join("a", text="b") == join(text="b", model="a") == ("a", "b", 6)
    assert join("a", "b", layers=3) == ("a", "b", 3)
    assert list(inspect.signature(join).parameters) == ["model", "text", "layers"]
    assert "layers: Layers of the result." in inspect.getdoc(join)


@pytest.mark.parametrize(
    ("given", "named", "said"),
    [
        (("a",), {}, "'text'"),
        ((), {"text": "b"}, "'model'"),
        (("a", "b", 3), {}, "too many positional"),
        (("a", "b"), {"text": "c"}, "'text'"),
        (("a", "b"), {"layer": 3}, "'layer'"),
    ],
)
def test_a_call_with_other_arguments_is_refused(given, named, said):
    with pytest.raises(TypeError, match=rf"^join\(\): .*{said}"):
        join(*given, **named)


@pytest.mark.parametrize("name", ["evaluate", "prune", "finetune", "evaluate_gist"])
def test_one_text_in_place_of_a_list_is_refused(name):
    with pytest.raises(TypeError, match=rf"{name}\(\): data is 'a\.txt', one text where a list belongs"):
        getattr(surgeon, name)("model", data="a.txt")


@pytest.mark.parametrize("named", [{"freeze": ["embeddings"]}, {"data_weights": [1, 0.5]}])
def test_a_list_in_place_of_one_text_is_refused(named):
    with pytest.raises(TypeError, match="a list where one text belongs"):
        surgeon.finetune("model", data=["a.txt"], **named)


@pytest.mark.parametrize("seed", [-1, 2**32])
@pytest.mark.parametrize(("name", "options"), [("generate", {"text": "a"}), ("prune", {"layers": 2})])
def test_a_seed_that_no_random_generator_takes_is_refused(name, options, seed):
    with pytest.raises(OptionError, match=f"--seed is {seed}"):
        getattr(surgeon, name)("model", **options, seed=seed)


def test_an_option_of_two_commands_is_declared_once():
    @dataclass(frozen=True, kw_only=True)
    class Others:
        layers: int = same_option(Options, "layers", default=2)

    assert Others().layers == 2
    assert Others.__dataclass_fields__["layers"].metadata == Options.__dataclass_fields__["layers"].metadata


@pytest.mark.parametrize(
    ("options", "name"), [({"metric": "bleu"}, "metric"), ({"metric": "rouge-l", "judge": "j"}, "judge")]
)
def test_an_error_from_python_names_the_option(options, name):
    with pytest.raises(PlanError, match=f"--{name}") as caught:
        surgeon.evaluate("model", data=["a.txt"], **options)

    assert isinstance(caught.value, OptionError)
    assert caught.value.option == name

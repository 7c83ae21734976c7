"""What is known of a recipe before anything runs: a mistake is one line, with its place in the file."""

from pathlib import Path

import pytest
import recipe_runs

from surgeon.cli.steps import CommandLine
from surgeon.errors import RecipeError
from surgeon.recipe.checking import Rounds, chains, checked, words_of
from surgeon.recipe.reading import read_recipe

COMMANDS = CommandLine()


def jobs(path: Path, text: str, *given: str):
    return checked(read_recipe(recipe_runs.write(path / "r.yaml", text), COMMANDS.names(), given), COMMANDS)


def words(job) -> list[str]:
    return words_of(job.options, COMMANDS.keys(job.command))


def test_a_step_is_a_command_with_its_options_as_they_were_written(tmp_path: Path) -> None:
    (job,) = jobs(
        tmp_path,
        """
        settings: {model: gpt2, rate: 1e-4, data: [a b, c], teacher: false}
        steps:
          - name: healed
            finetune: {model: $model, data: [$data, d], lr: $rate, max-steps: 3, lora: null, lora-targets: all,
                       teacher: $teacher, deterministic: true, compile: false, freeze: [embeddings, head],
                       trust-remote-code: false}
        """,
    )

    assert words(job) == [
        *("gpt2", "--data=a b", "--data=c", "--data=d", "--lr=1e-4", "--max-steps=3", "--lora-targets=all"),
        *("--deterministic", "--no-compile", "--freeze=embeddings,head"),
    ]


def test_a_setting_is_replaced_by_set_and_may_be_a_list_or_a_part_of_data(tmp_path: Path) -> None:
    text = """
        settings: {model: null, data: x}
        steps:
          - name: judged
            evaluate:
              model: $model
              data: $data[90%:]
        """

    (job,) = jobs(tmp_path, text, "model=gpt2", "data=[a, b]")

    assert words(job) == ["gpt2", "--data=a[90%:]", "--data=b[90%:]"]


ONE = "steps: [{{name: a, {}}}]"
LINES = "steps:\n- name: a\n  {}"
TWO = "steps:\n- {{name: a, {}}}\n- {{name: b, truncate: {{model: {}, layers: 1}}}}"
MISTAKES = {
    "typo of a command": (
        ONE.format("trunkate: {model: m}"),
        r"r\.yaml:1: .*no command trunkate; did you mean truncate",
    ),
    "typo of an option": (
        LINES.format("truncate:\n    model: m\n    layer: 3"),
        r"r\.yaml:5: truncate has no option layer; did you mean layers",
    ),
    "typo of a key": ("step: []", r"r\.yaml:1: a recipe has no step; did you mean steps"),
    "an option for a recipe's place": (
        ONE.format("truncate: {model: m, layers: 1, output: x}"),
        r"output is not for recipes",
    ),
    "a later step": (
        TWO.format("truncate: {model: b, layers: 1}", "m"),
        r"r\.yaml:2: model of a refers to b, which comes later \(line 3\)",
    ),
    "itself": (ONE.format("truncate: {model: a, layers: 1}"), r"model of a refers to itself"),
    "an output of a measurement": (TWO.format("inspect: {model: m}", "a"), r"a \(inspect\) has no output"),
    "a missing file": (
        ONE.format("evaluate: {model: m, data: gone.txt}"),
        r"r\.yaml:1: no such file or directory: gone\.txt",
    ),
    "a missing file with a slice": (
        LINES.format("evaluate:\n    model: m\n    data: gone.txt[:90%]"),
        r"r\.yaml:5: no such file or directory: gone\.txt",
    ),
    "a missing option": (ONE.format("truncate: {model: m}"), r"r\.yaml:1: truncate: .*--layers"),
    "a missing model": (ONE.format("truncate: {layers: 3}"), r"r\.yaml:1: truncate: .*MODEL"),
    "a wrong number": (LINES.format("finetune:\n    model: m\n    max-steps: many"), r"r\.yaml:5: finetune: .*many"),
    "a wrong word": (LINES.format("evaluate:\n    model: m\n    metric: perplexy"), r"r\.yaml:5: evaluate: .*perplexy"),
    "no switch": (ONE.format("truncate: {model: m, layers: 1, trust-remote-code: 3}"), r"no option trust-remote-code"),
    "a text for a switch": (
        ONE.format("prune: {model: m, layers: 1, greedy: 3}"),
        r"greedy of prune is 3; it is true or false",
    ),
    "a switch for a text": (
        ONE.format("truncate: {model: m, layers: yes}"),
        r"layers of truncate is true; it is a text",
    ),
    "an unknown setting": (
        "settings: {model: m}\nsteps: [{name: a, truncate: {model: $modl, layers: 1}}]",
        r"no setting is named modl; did you mean model",
    ),
    "a setting without a value": (
        "settings: {model: null}\nsteps: [{name: a, truncate: {model: $model, layers: 1}}]",
        r"model has no value",
    ),
    "two commands": (ONE.format("inspect: {model: m}, truncate: {model: m}"), r"a has 2 commands"),
    "no command": ("steps: [{name: a}]", r"a has 0 commands"),
    "no name": ("steps: [{inspect: {model: m}}]", r"a step has a name"),
    "a name that is a path": ("steps: [{name: ../a, inspect: {model: m}}]", r"no name of a step"),
    "a name twice": (
        "steps:\n- {name: a, inspect: {model: m}}\n- {name: a, inspect: {model: m}}",
        r"r\.yaml:3: a step is named a already, in line 2",
    ),
    "a key twice": ("steps: []\nsteps: []", r"r\.yaml:2: steps is there twice"),
    "no steps": ("settings: {}", r"a recipe has steps"),
    "an empty file": ("", r"is empty"),
    "no YAML": ("steps: [", r"r\.yaml:\d: no YAML"),
    "a list": ("- a", r"a recipe is no mapping"),
    "an alias": ("settings: {a: &a 1, b: *a}\nsteps: [{name: a, inspect: {model: m}}]", r"has an alias"),
    "no condition": (ONE.format("inspect: {model: m}, require: {depth: deep}"), r"'deep' is no condition on depth"),
    "nested loops": (
        ONE.format(
            "repeat: {with: {x: [1]}, steps: [{name: b, repeat: {with: {y: [1]}, steps: [{name: c, inspect: {}}]}}]}"
        ),
        r"b repeats inside a",
    ),
    "a loop without an end": (
        ONE.format("repeat: {steps: [{name: b, inspect: {model: m}}]}"),
        r"either with settings or until",
    ),
    "a loop until a stranger": (
        ONE.format('repeat: {until: {x.y: "> 1"}, at-most: 2, steps: [{name: b, inspect: {model: m}}]}'),
        r"x is no step before or in the loop",
    ),
    "a loop that never ends": (
        ONE.format('repeat: {until: {b.y: "> 1"}, steps: [{name: b, inspect: {model: m}}]}'),
        r"until and at-most go together",
    ),
    "a tag with code": ("steps: !!python/object/apply:os.system [ls]", r"a step is no mapping"),
    "a setting of a setting": (
        "settings: {a: x, b: $a}\n" + ONE.format("inspect: {model: $b}"),
        r"the setting b is \$a; a setting names no other",
    ),
    "a zero byte": (ONE.format('generate: {model: m, text: "a\\0b"}'), "a text that no command line takes"),
    "a long name": (
        ONE.format("repeat: {with: {x: [" + "y" * 300 + "]}, steps: [{name: b, inspect: {model: m}}]}"),
        "too long for the name of a directory",
    ),
    "run inside run": (ONE.format("run: {recipe: x}"), r"surgeon has no command run"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_anything_runs(mistake: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, said = MISTAKES[mistake]

    with pytest.raises(RecipeError, match=said):
        jobs(Path(), text)


@pytest.mark.parametrize("given", [("modl=gpt2", "no such setting; did you mean model"), ("model", "no name=value")])
def test_a_setting_that_does_not_exist_cannot_be_set(given: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=given[1]):
        jobs(tmp_path, "settings: {model: m}\nsteps: [{name: a, inspect: {model: $model}}]", given[0])


def test_a_file_that_is_no_text_or_far_too_large_is_no_recipe(tmp_path: Path) -> None:
    binary, large = tmp_path / "b.yaml", tmp_path / "l.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    large.write_bytes(b"#" * 1_000_001)

    for path, said in ((binary, "not UTF-8"), (large, "over 1 MB"), (tmp_path / "gone.yaml", "cannot read")):
        with pytest.raises(RecipeError, match=said):
            read_recipe(path, COMMANDS.names())


def test_a_loop_with_settings_names_each_round_by_its_values(tmp_path: Path) -> None:
    found = jobs(
        tmp_path,
        """
        steps:
          - {name: cut, truncate: {model: m, layers: 3}}
          - name: seeds
            repeat:
              with: {seed: [0, 7], rate: [1e-3]}
              steps:
                - {name: healed, finetune: {model: cut, data: x/y, seed: $seed, lr: $rate, max-steps: 1}}
                - {name: judged, evaluate: {model: healed, data: x/y}}
          - {name: last, inspect: {model: healed-7-1e-3}}
        """,
    )

    assert [job.name for job in found] == [
        *("cut", "healed-0-1e-3", "judged-0-1e-3", "healed-7-1e-3", "judged-7-1e-3", "last")
    ]
    assert words(found[3])[0] == "cut"
    assert "--seed=7" in words(found[3])
    assert words(found[4])[0] == "healed-7-1e-3"
    assert [job.group for job in found] == ["", *("healed-1e-3", "judged-1e-3") * 2, ""]


def test_a_round_names_its_own_steps_only_after_they_have_run(tmp_path: Path) -> None:
    found = jobs(
        tmp_path,
        """
        steps:
          - {name: cut, truncate: {model: m, layers: 4}}
          - name: depths
            repeat:
              with: {layers: [2, 3], tied: [true]}
              steps:
                - {name: short, truncate: {model: cut, layers: $layers}}
                - {name: short-seen, inspect: {model: short}}
          - {name: last, inspect: {model: short-2-true}}
        """,
    )

    assert [words(job)[0] for job in found] == ["m", "cut", "short-2-true", "cut", "short-3-true", "short-2-true"]


def test_neighbouring_surgeries_go_in_one_pass_unless_something_else_reads_between(tmp_path: Path) -> None:
    text = """
        steps:
          - {name: a, truncate: {model: m, layers: 4}}
          - {name: b, grow: {model: a, layers: 6}}
          - {name: c, gist: {model: b}}
          - {name: d, inspect: {model: c}}
          - {name: e, prune: {model: c, layers: 5}}
          - {name: f, truncate: {model: e, layers: 2}}
          - {name: g, truncate: {model: f, layers: 1, dtype: float32}}
          - {name: h, grow: {model: g, layers: 2}}
        """

    found = jobs(tmp_path, text)

    names = [tuple(job.name for job in chain) for chain in chains(list(found), found, COMMANDS)]
    # c is read twice, a pruning needs a model that is written, and g has a dtype of its own.
    assert names == [("a", "b", "c"), ("d",), ("e", "f", "g"), ("h",)]


def test_steps_of_a_loop_with_a_condition_may_continue_those_before_it(tmp_path: Path) -> None:
    found = jobs(
        tmp_path,
        """
        steps:
          - {name: a, truncate: {model: m, layers: 1}}
          - {name: seen, inspect: {model: a}}
          - name: growing
            repeat:
              until: {seen.depth: ">= 3"}
              at-most: 4
              steps:
                - {name: a, grow: {model: a, donor: m, layers: +1}}
                - {name: seen, inspect: {model: a}}
        """,
    )

    rounds = found[2]
    assert isinstance(rounds, Rounds)
    assert words(rounds.jobs[0]) == ["a", "--layers=+1", "--donor=m"] or "--layers=+1" in words(rounds.jobs[0])

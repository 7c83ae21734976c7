"""Commands that are mistyped: each gets one sentence that names the mistake, a hint to type, and the code of its kind.

Nothing heavy is imported for it. 2 is a mistake on the command line, 1 an input that is not there.
"""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from handmade import checkpoint

import surgeon
from surgeon.cli.command import command_of
from surgeon.cli.commands import commands
from surgeon.cli.steps import CommandLine
from surgeon.errors import SurgeonError
from surgeon.mistyped import close_path
from surgeon.options import DTYPES, OptionError
from surgeon.recipe.checking import checked, words_of
from surgeon.recipe.reading import read_recipe
from surgeon.recipe.schema import schema
from surgeon.transforms.scores import METHODS

# The exit code and what is typed; the error; the hint. There are a model `loc` and a text `text.txt`.
MISTYPED = """
2 surgeon trunkate loc --layers 2
error: surgeon has no command trunkate; did you mean truncate?
hint: surgeon --help lists the commands.

2 surgeon --verson
error: surgeon has no option --verson; did you mean --version?
hint: surgeon --help lists the commands.

2 surgeon truncate loc --layer 2
error: surgeon truncate has no option --layer; did you mean --layers?
hint: surgeon truncate --help lists its options.

2 surgeon inspect loc --tensor
error: surgeon inspect has no option --tensor; did you mean --tensors?
hint: surgeon inspect --help lists its options.

2 surgeon grow loc --hiden-size 2x
error: surgeon grow has no option --hiden-size; did you mean --hidden-size?
hint: surgeon grow --help lists its options.

2 surgeon merge loc loc --method linaer
error: unknown --method 'linaer'; did you mean linear?
hint: One of: linear, task-arithmetic, ties, dare, dare-ties, slerp, nuslerp, model-stock, karcher, passthrough, regmean.

2 surgeon prune loc --score angulr
error: unknown --score 'angulr'; did you mean angular?
hint: One of: search, angular, block-influence, relative-magnitude, perplexity, taylor, magnitude, random, last, uniform.

2 surgeon truncate loc --layers 2 --dtype bfloat61
error: unknown --dtype 'bfloat61'; did you mean bfloat16?
hint: One of: keep, float32, bfloat16, float16.

2 surgeon truncate loc --layers 2 --inherit atention
error: --inherit: unknown part 'atention'; did you mean attention?
hint: Parts: attention, mlp, norm, embedding; none by itself.

2 surgeon finetune loc --data text.txt --schedule cosin
error: unknown --schedule 'cosin'; did you mean cosine?
hint: One of: cosine, linear, constant.

2 surgeon finetune loc --data text.txt --precision half
error: --precision half: gradients vanish in float16; bf16 has their range
hint: One of: auto, bf16, float32, pure-bf16.

2 surgeon evaluate loc --data text.txt --metric perplexty
error: unknown --metric 'perplexty'; did you mean perplexity?
hint: One of: perplexity, exact-match, rouge-l, choice, pseudo-perplexity, classification, acceptance.

2 surgeon distill loc --data text.txt --on-fail dorp
error: unknown --on-fail 'dorp'; did you mean drop?
hint: One of: keep, drop.

2 surgeon quantize loc --bits 3
error: --bits is 3; a code has 8 or 4
hint: --bits 8 or --bits 4.

2 surgeon attribute loc --data text.txt --query text.txt --method track
error: unknown --method 'track'; did you mean trak?
hint: One of: trak, less, cosine, tracin, bm25.

2 surgeon trim loc --data text.txt --coverage most
error: --coverage: 'most' is no share of a text
hint: Such as --coverage 99.99%.

2 surgeon transplant loc --tokenizer loc --map <s>
error: --map: '<s>' is no pair of tokens
hint: Such as --map '<s>=<bos>'.

2 surgeon data question-frmation
error: unknown KIND 'question-frmation'; did you mean question-formation?
hint: One of: question-formation.

2 surgeon gist loc --device cudo
error: unknown --device 'cudo'; did you mean cuda?
hint: One of: auto, cpu, cuda, mps.

2 surgeon plot loc.run --x step
error: unknown --x 'step'; did you mean steps?
hint: One of: steps, tokens.

2 surgeon init gpt2 --set n_layr=2
error: --set: the config has no 'n_layr' that can be set; did you mean n_layer?
hint: Its keys are in config.json.

2 surgeon truncate loc --layers two
error: --layers: cannot read 'two' as a number of layers
hint: Write 12, or 75%.

2 surgeon truncate loc --layers 0
error: --layers is 0; a model needs at least one layer
hint: It is the depth of the result; ask for 1 or more.

2 surgeon grow loc --experts many
error: --experts is 'many', and has to be a whole number
hint: surgeon grow --help lists its options.

2 surgeon trace loc --candidates loc --permutations 5
error: --permutations is 5; the least is 19
hint: Set --permutations to 19 or more.

2 surgeon advise loc --data text.txt --epochs 0
error: --epochs is 0.0; it is above 0
hint: Such as --epochs 3.

2 surgeon diagnose loc --data text.txt --energy 2
error: --energy is 2.0; it lies between 0 and 1
hint: Such as --energy 0.9.

2 surgeon generate loc Hello --top-p 1.5
error: --top-p is 1.5, not above 0 and at most 1
hint: 1 keeps all tokens.

2 surgeon finetune loc --data text.txt --batch-size 0
error: --batch-size is 0; 1 is the least
hint: Set --batch-size to 1 or more.

2 surgeon gist loc --tokens 0
error: --tokens: a gist cannot have 0 tokens
hint: --tokens is 1 or more.

2 surgeon truncate loc --layers 2 --max-shard-size big
error: --max-shard-size: cannot read 'big' as a size
hint: Write 5GB, 500MB or a number of bytes.

2 surgeon truncate loc
error: --layers is missing: give it, or --every 2
hint: Give --layers 12, or --every 2.

2 surgeon truncate --layers 2
error: surgeon truncate needs MODEL
hint: Such as: surgeon truncate gpt2-large --layers 6 -o gpt2-large-6

2 surgeon truncate loc --layers
error: --layers needs a value, and has none
hint: surgeon truncate --help lists the options and their values.

2 surgeon truncate loc twice --layers 2
error: no option takes the word 'twice'
hint: surgeon truncate --help lists its options.

2 surgeon inspect loc tensors
error: no option takes the word 'tensors'; did you mean --tensors?
hint: surgeon inspect --help lists its options.

2 surgeon prune loc
error: nothing to prune
hint: Give --layers, a size such as --intermediate-size, or a target.

2 surgeon evaluate loc
error: --data: there is nothing to evaluate on
hint: Give --data FILE, or --tasks.

2 surgeon compress loc
error: --prompt and --prompt-file: one of them is needed
hint: Such as: surgeon compress gpt2-gist --prompt-file system.txt -o bot

2 surgeon generate loc
error: TEXT and --input-file: one of them is needed
hint: Such as: surgeon generate gpt2-gist 'Hello' --gist bot --max-new-tokens 64

2 surgeon finetune loc --data text.txt --max-steps 3 --epochs 1
error: --max-steps and --epochs both say how long to train
hint: Give one of them.

2 surgeon finetune loc --data text.txt --keep-adapter
error: --keep-adapter has no effect without --lora
hint: Add --lora.

1 surgeon inspect lco
error: there is no directory lco, and config.json of lco is not in the cache, and HF_HUB_OFFLINE is set
hint: Did you mean loc?

1 surgeon truncate ./locl --layers 2
error: no such directory: ./locl
hint: Did you mean loc?

1 surgeon finetune loc --data textt.txt
error: no such file or directory: textt.txt
hint: Did you mean text.txt?

1 surgeon finetune loc --data text.txt --teacher locc
error: there is no directory locc, and config.json of locc is not in the cache, and HF_HUB_OFFLINE is set
hint: Did you mean loc?

1 surgeon evaluate loc --data text.txt --baseline loca
error: there is no directory loca, and config.json of loca is not in the cache, and HF_HUB_OFFLINE is set
hint: Did you mean loc?

1 surgeon prune loc --layers 2 --scores-from scroes.json
error: cannot read scroes.json: No such file or directory
hint: Did you mean scores.json?

1 surgeon grow loc --layers 4 --donor llc
error: there is no directory llc, and config.json of llc is not in the cache, and HF_HUB_OFFLINE is set
hint: Did you mean loc?

1 surgeon init gpt22
error: 'gpt22' is no model type with a table, and no file
hint: Did you mean gpt2?

1 surgeon convert text.tx
error: no such file or directory: text.tx
hint: Did you mean text.txt?

1 surgeon run recpie.yaml
error: cannot read recpie.yaml: No such file or directory
hint: Did you mean recipe.yaml?

1 surgeon plot loc.rnu
error: no such run: loc.rnu
hint: Did you mean loc.run?

1 surgeon compress loc --prompt-file tetx.txt
error: cannot read tetx.txt: No such file or directory
hint: Did you mean text.txt?

1 surgeon generate loc --input-file texttxt
error: cannot read texttxt: No such file or directory
hint: Did you mean text.txt?

1 surgeon distill loc --data text.tx -o new
error: no such file or directory: text.tx
hint: Did you mean text.txt?
"""  # noqa: E501
CASES = [(block.splitlines()[0], block.splitlines()[1:]) for block in MISTYPED.strip().split("\n\n")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a directory with a model, a text, a record of scores, a recipe and a run."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "loc")
    (tmp_path / "loc.run").mkdir()
    (tmp_path / "loc.run/metrics.jsonl").write_text('{"step": 1, "tokens": 5, "loss": 2.0}\n')
    for name in ("text.txt", "scores.json", "recipe.yaml"):
        (tmp_path / name).write_text("The cat sat on the mat.")
    return tmp_path


@pytest.mark.parametrize(("typed", "said"), CASES, ids=[typed for typed, _ in CASES])
def test_a_mistake_is_said_in_one_line_with_what_to_type_next(typed, said, run, here):
    code, _, *words = typed.split()

    outcome = run(*words)

    assert outcome.err.splitlines() == said
    assert (outcome.code, outcome.out) == (int(code), "")


def test_every_command_is_mistyped_and_every_mistake_has_a_hint():
    assert {typed.split()[2] for typed, _ in CASES} >= set(commands())
    assert all(len(said) == 2 and said[1].startswith("hint: ") for _, said in CASES)


# --- words --------------------------------------------------------------------------------------------------------


def worded() -> list[tuple[str, str]]:
    """Return every command with the options of it that take words."""
    pairs = []
    for name in commands():
        command = command_of(import_module(f"surgeon.cli.{name}"))
        pairs += [
            (name, max(item.opts, key=len))
            for item in command.params
            if (flag := command.flags.get(item.name)) and flag.choices and not flag.is_argument
            if flag.choices.others != ".*" and item.type.name not in ("int", "integer")
        ]
    return pairs


WORDED = worded()


def test_the_options_of_words_are_many():
    assert len(WORDED) > 35
    assert {name for name, _ in WORDED} >= set(commands()) - {"inspect", "run", "data", "trace"}


def test_a_mistyped_word_of_any_option_is_refused_before_torch_is_imported():
    code = f"""
import contextlib, io, sys
from surgeon.cli.app import main
for command, option in {WORDED!r}:
    sys.argv = ["surgeon", command, "x", option, "mistyped"]
    sys.argv += ["--layers", "2"] if command in ("truncate", "prune") else []
    sys.argv += ["--data", "x"] if command in ("finetune", "evaluate", "diagnose", "distill", "trim", "advise") else []
    sys.argv += ["--tokenizer", "x"] if command == "transplant" else []
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            main()
    except SystemExit as done:
        assert done.code == 2, (command, option, done.code, said.getvalue())
    assert said.getvalue().startswith(f"error: unknown {{option}} 'mistyped'"), said.getvalue()
    assert not {{"torch", "transformers", "numpy", "rich"}} & set(sys.modules), (command, option)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("spelled", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("half", "float16"), ("fp32", "float32")]
)
def test_a_dtype_is_understood_by_its_short_names(spelled, dtype, run, here):
    for command in ("truncate loc --layers 2 --dry-run --json", "prune loc --layers 2 --score last --dry-run --json"):
        short, long = (run(*command.split(), "--dtype", each) for each in (spelled, dtype))
        assert short.code == 0, short.err
        assert short.out.partition('"seconds"')[0] == long.out.partition('"seconds"')[0]
    assert surgeon.truncate("loc", layers=2).prepare(dtype=spelled).options["dtype"] == dtype
    assert DTYPES.spelled("dtype", spelled) == dtype


@pytest.mark.parametrize(("spelled", "precision"), [("bfloat16", "bf16"), ("fp32", "float32")])
def test_a_precision_is_understood_by_its_other_names(spelled, precision):
    from surgeon.train.settings import Settings

    assert Settings(precision=spelled).precision == precision


def test_the_schema_of_recipes_lists_the_words_of_an_option():
    options = schema(CommandLine())["$defs"]["prune"]["properties"]

    assert options["score"]["anyOf"][0]["enum"] == ["search", *METHODS, None]
    assert {"bfloat16", "bf16"} <= set(options["dtype"]["anyOf"][0]["enum"])


def test_a_recipe_is_refused_for_a_word_with_its_line_and_takes_off_as_a_word(here, run):
    step = "steps:\n  - name: a\n    finetune: {{model: loc, data: [text.txt], max-steps: 1, packing: {0}}}\n"
    (here / "recipe.yaml").write_text(step.format("of"))

    outcome = run("run", "recipe.yaml", "--dry-run")

    assert outcome.code == 1
    assert outcome.err.startswith("error: recipe.yaml:3: finetune: unknown --packing 'of'; did you mean off?\nhint: ")
    (here / "recipe.yaml").write_text(step.format("off"))
    (job,) = checked(read_recipe(Path("recipe.yaml"), commands()), CommandLine())
    assert "--packing=off" in words_of(job.options, CommandLine().keys("finetune"))


def test_a_name_that_is_mistyped_is_asked_for_once_where_there_is_no_network(here):
    """huggingface_hub would ask again for 44 seconds. Connections are counted, not timed."""
    code = """
import sys
connections = []
sys.addaudithook(lambda event, arguments: event == "socket.connect" and connections.append(arguments[1]))
sys.argv = ["surgeon", "inspect", "lco"]
from surgeon.cli.app import main
try:
    main()
finally:
    print(len(connections))
"""
    closed = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(here / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **closed}, capture_output=True, text=True)

    assert int(done.stdout) <= 2  # its HTTP library may try twice at once
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: there is no directory lco, and cannot reach the Hub at http://127.0.0.1:9")
    assert hint == "hint: Did you mean loc?"


def test_what_is_beside_a_mistyped_path_is_found_by_its_name_and_not_by_its_suffix(here):
    assert close_path("txet.txt") == "text.txt"
    assert close_path("nothing.txt") is None
    assert close_path(here / "LOC") == str(here / "loc")
    assert close_path("text", directory=True) is None
    assert close_path("no/such/place") is None
    assert close_path("a\0b") is None


def test_from_python_a_word_is_refused_as_on_the_command_line(here):
    for call in (
        lambda: surgeon.prune("loc", layers=2, score="angulr"),
        lambda: surgeon.truncate("loc", layers=2).save("new", dtype="bf61"),
        lambda: surgeon.finetune("loc", data=["text.txt"], schedule="cosin"),
        lambda: surgeon.generate("loc", "a", device="gpu"),
        lambda: surgeon.generate_data("questions"),
    ):
        with pytest.raises(OptionError, match="unknown ") as caught:
            call()
        assert isinstance(caught.value, SurgeonError)
        assert caught.value.hint.startswith("One of: ")

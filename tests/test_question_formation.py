"""Question formation: every line follows the rule, no split holds what it must not, and the entropy is the lines'."""

import json
import math
import re

import pytest
from later import LATER

import surgeon
from surgeon.data.question_formation import FULL, LEXICONS, Lines, entropy
from surgeon.errors import DataError, OutputError
from surgeon.options import OptionError

if LATER:
    from transformers import AutoConfig, AutoTokenizer

AUXILIARIES = {"does": 0, "doesn't": 0, "do": 1, "don't": 1}  # and the number of the noun that each agrees with
NOUN = rf"(?:{'|'.join(FULL.determiners)}) (?:{'|'.join(FULL.nouns)})"
AUX = r"(?:does|doesn't|do|don't)"
ALONE, WITH = (rf"(?:{'|'.join(verbs)})" for verbs in (FULL.intransitive, FULL.transitive))
FORMS = {  # written anew for the tests: what a noun phrase can be
    "plain": NOUN,
    "preposition": rf"{NOUN} (?:{'|'.join(FULL.prepositions)}) {NOUN}",
    "intransitive": rf"{NOUN} (?:who|that) {AUX} {ALONE}",
    "transitive": rf"{NOUN} (?:who|that) {AUX} {WITH} {NOUN}",
    "object": rf"{NOUN} (?:who|that) {NOUN} {AUX} {WITH}",
}
PHRASES = "|".join(f"(?P<{{0}}_{form}>{pattern})" for form, pattern in FORMS.items())
SENTENCE = re.compile(
    rf"(?P<subject>{PHRASES.replace('{0}', 's')}) (?P<main>{AUX}) "
    rf"(?P<rest>(?P<alone>{ALONE})|{WITH} (?:{PHRASES.replace('{0}', 'o')}))"
)


def parsed(sentence):
    match = SENTENCE.fullmatch(sentence)
    assert match, sentence
    return match


def form_of(match, prefix):
    return next(name[2:] for name, value in match.groupdict().items() if name.startswith(prefix) and value)


def is_plural(noun):
    return noun in FULL.nouns[13:]


@pytest.fixture(scope="module")
def drawn():
    lines = Lines(FULL, seed=0, repeats=False)
    return {"train": lines.training(6000), "validation": lines.training(500), "telling": lines.generalization(500)}


def test_every_target_is_the_declarative_or_its_question(drawn):
    for line in (line for lines in drawn.values() for line in lines):
        declarative, task, target = re.fullmatch(r"(.*) \. (decl|quest) (.*)", line.text).groups()
        match = parsed(declarative)
        question = f"{match['main']} {match['subject']} {match['rest']} ?"
        assert target == (f"{declarative} ." if task == "decl" else question)
        assert line.text == f"{line.prompt} {line.target}"


def test_every_auxiliary_agrees_with_its_own_noun(drawn):
    for line in (line for lines in drawn.values() for line in lines):
        match = parsed(line.prompt.rpartition(" . ")[0])
        words = match["subject"].split()
        assert is_plural(words[1]) == AUXILIARIES[match["main"]]
        clause = next((index for index, word in enumerate(words) if word in AUXILIARIES), None)
        if clause is not None:
            inner = words[1] if form_of(match, "s_") != "object" else words[clause - 1]
            assert is_plural(inner) == AUXILIARIES[words[clause]]


def test_no_line_occurs_twice_in_any_split(drawn):
    texts = [line.text for lines in drawn.values() for line in lines]

    assert len(set(texts)) == len(texts) == 7000


def test_training_is_ambiguous_and_generalization_tells(drawn):
    for split in ("train", "validation"):
        for line in drawn[split]:
            if line.task == "quest":
                match = parsed(line.prompt.rpartition(" . ")[0])
                assert form_of(match, "s_") in ("plain", "preposition")
                assert not set(match["subject"].split()) & set(AUXILIARIES)  # its first auxiliary is its main one
    for line in drawn["telling"]:
        match = parsed(line.prompt.rpartition(" . ")[0])
        first = next(word for word in match["subject"].split() if word in AUXILIARIES)
        assert line.task == "quest"
        assert form_of(match, "s_") in ("intransitive", "transitive", "object")
        assert first != match["main"]
        assert AUXILIARIES[first] == AUXILIARIES[match["main"]]
        assert not set(match["rest"].split()) & {"who", "that"}


def test_structures_are_as_frequent_as_in_the_published_lines(drawn):
    """Of 6,000 lines a share has a standard error of at most 0.65 %."""
    matches = [(line.task, parsed(line.prompt.rpartition(" . ")[0])) for line in drawn["train"]]
    subjects = [(task, form_of(match, "s_")) for task, match in matches]
    objects = ["alone" if match["alone"] else form_of(match, "o_") for _, match in matches]

    for key, count in {("decl", "plain"): 5811, ("decl", "object"): 1756, ("quest", "preposition"): 2418}.items():
        assert subjects.count(key) / 6000 == pytest.approx(count / 20000, abs=0.026)
    for key, share in {"alone": 0.2, "plain": 0.245, "intransitive": 0.165, "object": 0.0775}.items():
        assert objects.count(key) / 6000 == pytest.approx(share, abs=0.026)


@pytest.mark.parametrize("words", LEXICONS)
def test_the_entropy_is_what_lines_drawn_from_the_grammar_tell(words):
    lexicon = LEXICONS[words]
    lines = Lines(lexicon, seed=1, repeats=True).training(20000)
    known = entropy(lexicon)

    counts = [line.text.count(" ") + 2 for line in lines]  # its words and its end
    nats = [line.nats for line in lines]
    for values, mean in ((nats, known.nats), (counts, known.tokens)):
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        assert abs(sum(values) / len(values) - mean) < 4 * spread / math.sqrt(len(values))
    assert [line.num_tokens for line in lines] == counts
    assert len(set(lexicon.words)) == words


def test_the_probability_of_a_line_is_how_often_it_occurs():
    """The likeliest lines of the smallest grammar, 25 times or more among 40,000, by their counts."""
    lines = Lines(LEXICONS[30], seed=2, repeats=True).training(40000)
    counts: dict[str, int] = {}
    for line in lines:
        counts[line.text] = counts.get(line.text, 0) + 1
    nats = {line.text: line.nats for line in lines}

    frequent = [text for text, count in counts.items() if count >= 10 and 40000 * math.exp(-nats[text]) >= 25]
    assert len(frequent) > 100
    expected, found = (sum(40000 * math.exp(-nats[text]) for text in frequent), sum(map(counts.get, frequent)))
    assert abs(found - expected) < 4 * math.sqrt(expected)
    assert all(abs(counts[text] - (mean := 40000 * math.exp(-nats[text]))) < 6 * math.sqrt(mean) for text in frequent)


def test_the_published_entropy_is_reached():
    """Published splits have 0.991 to 0.996 nats a token; 41 and 30 words have 0.769 and 0.595."""
    assert 0.991 < entropy(FULL).per_token < 0.996
    assert entropy(LEXICONS[41]).per_token == pytest.approx(0.769, abs=5e-4)
    assert entropy(LEXICONS[30]).per_token == pytest.approx(0.595, abs=5e-4)


def test_the_command_writes_the_same_bytes_for_a_seed_and_others_for_another(tmp_path, run):
    for out, seed in (("one", 3), ("two", 3), ("three", 4)):
        options = ["--lines", 200, "--validation-lines", 40, "--generalization-lines", 30, "--seed", seed]
        outcome = run("data", "question-formation", *options, "-o", tmp_path / out, "--json")
        assert outcome.code == 0, outcome.err

    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files == {
        "train.jsonl", "validation.jsonl", "questions.jsonl", "generalization.jsonl",
        "grammar.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    same = {name for name in files if (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()}
    assert same == files
    assert (tmp_path / "one/train.jsonl").read_bytes() != (tmp_path / "three/train.jsonl").read_bytes()


def test_the_command_says_what_is_known_of_the_data(tmp_path, run):
    out = tmp_path / "lines"
    made = json.loads(run("data", "question-formation", "--lines", 300, "-o", out, "--json").out)

    assert made["lines"] == {"train": 300, "validation": 1000, "generalization": 1000}
    assert made["entropy"] == entropy(FULL).per_token
    assert made["nats_per_line"] / made["tokens_per_line"] == pytest.approx(made["entropy"])
    assert made["validation_floor"] == pytest.approx(made["entropy"], abs=0.02)  # 1,000 lines: an error of 0.005
    known = json.loads((out / "grammar.json").read_text())
    assert known["validation_floor"] == made["validation_floor"]
    texts = [json.loads(line)["text"] for line in (out / "train.jsonl").read_text().splitlines()]
    assert len(texts) == 300
    asked = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    held_out = {json.loads(line)["text"] for line in (out / "validation.jsonl").read_text().splitlines()}
    assert {f"{record['prompt']} {record['completion']}" for record in asked} < held_out


@pytest.mark.slow
def test_its_tokenizer_has_a_token_for_every_word_and_init_takes_it(tmp_path):
    surgeon.generate_data("question-formation", output=tmp_path / "lines", lines=300)
    surgeon.init("gpt2", set=["n_layer=2", "n_embd=32", "n_head=4"], tokenizer=tmp_path / "lines").save(
        tmp_path / "new"
    )
    tokenizer, config = (kind.from_pretrained(tmp_path / "new") for kind in (AutoTokenizer, AutoConfig))
    line = json.loads((tmp_path / "lines/train.jsonl").read_text().splitlines()[0])["text"]

    ids = tokenizer(line)["input_ids"]

    assert ids[0] == tokenizer.bos_token_id == config.bos_token_id == 1
    assert config.eos_token_id == 2
    assert len(tokenizer) == config.vocab_size == 72
    assert len(ids) == line.count(" ") + 2
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids[1:]) == line
    assert tokenizer("no word of it")["input_ids"].count(tokenizer.unk_token_id) == 4


@pytest.mark.slow
def test_the_loss_of_training_is_counted_on_the_tokens_of_the_entropy(tmp_path):
    """A model that knows nothing has ln 72 on each of them."""
    surgeon.generate_data("question-formation", output=tmp_path / "lines", lines=200, validation_lines=50)
    sizes = ["n_layer=1", "n_embd=16", "n_head=2", "n_positions=64", "initializer_range=0.0001"]
    surgeon.init("gpt2", set=sizes, tokenizer=tmp_path / "lines").save(tmp_path / "new")
    validation = tmp_path / "lines/validation.jsonl"

    trained = surgeon.finetune(
        tmp_path / "new", data=[str(tmp_path / "lines/train.jsonl")], eval_data=(str(validation),), eval_rows=50,
        output=tmp_path / "out", max_steps=1, batch_size=2, sequence_length=64, lr="1e-9", device="cpu",
    )  # fmt: skip

    assert trained.eval_loss == pytest.approx(math.log(72), abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "options", "error", "said"),
    [
        ("questions", {}, OptionError, "unknown KIND 'questions'"),
        ("question-formation", {"lexicon": 50}, OptionError, "unknown --lexicon '50'"),
        ("question-formation", {"lines": 0}, OptionError, "--lines is 0"),
        ("question-formation", {"seed": -1}, OptionError, "--seed is -1"),
    ],
)
def test_what_cannot_be_made_is_refused(kind, options, error, said, tmp_path):
    with pytest.raises(error, match=said):
        surgeon.generate_data(kind, output=tmp_path / "out", **options)


def test_more_lines_than_there_are_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("surgeon.data.question_formation._LINE_DRAWS", 300)
    one = FULL.first(1, 1, 1, 1, 1)
    monkeypatch.setitem(LEXICONS, 30, one)

    with pytest.raises(DataError, match="gave no new one of 16 words"):
        surgeon.generate_data("question-formation", output=tmp_path / "out", lexicon=30, lines=20000)
    assert list(tmp_path.iterdir()) == []


def test_lines_of_a_full_structure_are_of_another_and_counted():
    lines = Lines(LEXICONS[30], seed=0, repeats=False)
    lines.training(3000)

    assert lines.num_moved > 0


def test_only_what_the_command_wrote_is_replaced(tmp_path, run):
    command = ["data", "question-formation", "--lines", 100, "-o", tmp_path / "out"]
    assert run(*command).code == 0
    assert run(*command).code == 1
    assert run(*command, "--overwrite").code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/diary.txt").write_text("dear diary")

    with pytest.raises(OutputError, match="was not written by surgeon data, so it is not replaced"):
        surgeon.generate_data("question-formation", output=tmp_path / "mine", overwrite=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]

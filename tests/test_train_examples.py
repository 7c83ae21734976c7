"""What of a document is read and trained, with tokenizers and templates made on the spot."""

import signal
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from later import LATER
from talkers import TEMPLATE, TEXT, jsonl, tokenizer_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import surgeon.train.examples as module
from surgeon.data.documents import Reading, documents
from surgeon.data.records import Document
from surgeon.data.rows import encode
from surgeon.errors import DataError
from surgeon.train.examples import Example, examples

if LATER:
    from transformers import PreTrainedTokenizerFast

    from surgeon.evals.answers import prompts_of, read_records

BOS, EOS = 1, 2
CHAT = [
    {"role": "system", "content": "sat"},
    {"role": "user", "content": "The cat"},
    {"role": "assistant", "content": "on the mat"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "that was that"},
]
CLOSED = (  # a token ends each turn, and a newline stands behind it
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<end>{% endgeneration %}\n{% else %}{{ m.content }}<end>\n{% endif %}{% endfor %}"
)
FORGETFUL = (  # as Qwen3 does with what a model thought: an answer is written otherwise once another one follows
    "{% for m in messages %}<s>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>{% endif %}"
    "{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def example(document: Document, tokenizer, **options) -> Example:
    return examples([document], tokenizer, **options)[0]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(chat_template=CLOSED)


def spaced(**options):
    """Return a tokenizer that, as Llama-2's, puts a space before whatever it is given."""
    letters = sorted({*"▁\nabcdefghijklmnopqrstuvwxyz?:"})
    merges = [("▁", "a"), ("\n", "\n")]
    vocabulary = ["<pad>", "<s>", "<end>", *letters, *("".join(pair) for pair in merges)]
    bpe = models.BPE({token: number for number, token in enumerate(vocabulary)}, merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<end>", **options)


def trained(found: Example, tokenizer) -> str:
    """Return the text of what is trained."""
    return tokenizer.decode([i for i, flag in zip(found.ids, found.trained, strict=True) if flag])


def chat(messages=CHAT) -> Document:
    return Document("a.jsonl:1", messages=tuple(messages))


def refusal(*args, **options):
    with pytest.raises(DataError) as caught:
        example(*args, **options)
    return str(caught.value), caught.value.hint


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["The cat sat", "q", "é🌿", "\n", " x \n\n"])
def test_a_text_is_trained_from_its_first_token_to_the_end_of_text(tokenizer, text):
    found = example(Document("a.txt", (text,)), tokenizer)

    assert list(found.ids) == [BOS, *encode(text, tokenizer), EOS]
    assert list(found.trained) == [0] + [1] * (len(found.ids) - 1)
    assert tokenizer.decode(found.ids, skip_special_tokens=True) == text
    assert found.is_text


def test_without_a_begin_of_text_token_the_first_token_of_a_text_is_not_trained():
    bare = tokenizer_of()
    bare.backend_tokenizer.post_processor = None
    found = example(Document("a.txt", ("The cat",)), bare)
    assert list(found.ids) == [*encode("The cat", bare), EOS]
    assert list(found.trained) == [0] + [1] * (len(found.ids) - 1)


def test_an_empty_text_has_no_token(tokenizer):
    assert example(Document("a.txt", ("",)), tokenizer).ids.tolist() == []


def test_a_tokenizer_without_an_end_of_text_token_is_refused():
    bare = tokenizer_of()
    bare.eos_token = None
    message, hint = refusal(Document("a.txt", ("The cat",)), bare)
    assert message == "the tokenizer has no end-of-text token to put after a.txt"
    assert hint == "Set eos_token in tokenizer_config.json."


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="the cat,\n\té🌿 x1.", max_size=400), st.integers(5, 60))
def test_a_long_text_has_the_tokens_that_it_has_as_a_whole(text, length):
    tokenizer = tokenizer_of()
    before = module.LONG
    module.LONG = length
    try:
        found = example(Document("a.txt", (text,)), tokenizer)
    finally:
        module.LONG = before
    assert list(found.ids) == ([BOS, *encode(text, tokenizer), EOS] if text else [])


@pytest.mark.parametrize("make", [tokenizer_of, spaced])
def test_a_long_text_is_cut_and_tokenised_in_parts(make, monkeypatch):
    tokenizer, text = make(), "a cat sat on a mat\nand a rat: " * 40
    monkeypatch.setattr(module, "LONG", 100)
    parts = module.Tokenise(tokenizer).parts(text)
    assert len(parts) > 8
    assert "".join(parts) == text
    assert list(example(Document("a.txt", (text,)), tokenizer).ids)[:-1] == [
        *module.begin_of_text(tokenizer),
        *encode(text, tokenizer),
    ]


# --- prompts with an answer -------------------------------------------------------------------------------------------

RECORDS = [
    {"prompt": "The cat sat", "completion": "on the mat"},
    {"instruction": "Say that", "input": "twice", "output": "that that"},
    {"question": "The rat sat?", "answer": "the cat"},
    {"prompt": "a", "completion": "\n\nb"},  # alone, newlines of the prompt and of the answer would merge
    {"prompt": "", "completion": ""},
]


@pytest.mark.parametrize("make", [tokenizer_of, spaced])
def test_the_prompt_is_that_of_evaluate_and_only_the_answer_is_trained(make, tmp_path):
    tokenizer, spec = make(), jsonl(tmp_path / "a.jsonl", *RECORDS)
    prompts = prompts_of(read_records([spec], Reading(), samples=None), tokenizer, chat=False)

    for prompt, document in zip(prompts, documents(spec), strict=True):
        found = example(document, tokenizer)
        seen = len(prompt.ids)
        assert list(found.ids[:seen]) == list(prompt.ids)
        assert list(found.trained) == [0] * seen + [1] * (len(found.ids) - seen)
        assert found.ids[-1] == EOS
        assert not found.is_text


def test_an_answer_is_read_as_it_stands_where_tokenizers_put_a_space_before_a_text():
    tokenizer = spaced()
    found = example(Document("a", ("what?", "abc")), tokenizer)
    a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    assert [i for i, flag in zip(found.ids, found.trained, strict=True) if flag] == [a, b, c, EOS]
    assert encode("abc", tokenizer)[0] == tokenizer.convert_tokens_to_ids("▁a")  # what it is alone


def test_an_answer_that_begins_with_newlines_is_tokenised_by_itself():
    tokenizer = spaced()
    two = tokenizer.convert_tokens_to_ids("\n\n")
    assert two not in example(Document("a", ("a", "\nb")), tokenizer).ids


def test_all_of_a_record_is_trained_on_request(tokenizer):
    found = example(Document("a", ("The cat", "sat")), tokenizer, train_on="all")
    assert list(found.trained) == [0] + [1] * (len(found.ids) - 1)
    assert trained(found, tokenizer) == "The cat\nsat<end>"


# --- chats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CLOSED, MARKED])
def test_answers_are_trained_up_to_the_token_that_ends_them(template):
    tokenizer = tokenizer_of(chat_template=template)
    found = example(chat(), tokenizer)

    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(found.ids) == text
    assert trained(found, tokenizer) == "on the mat<end>that was that<end>"
    assert not found.is_text


def test_marks_agree_with_the_mask_of_transformers():
    tokenizer = tokenizer_of(chat_template=MARKED)
    told = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    found = example(chat(), tokenizer)
    assert list(found.ids) == told["input_ids"]
    assert list(found.trained) == told["assistant_masks"]


def test_the_prompt_of_a_chat_is_that_of_evaluate(tokenizer, tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", {"messages": CHAT[:3]})
    prompt = prompts_of(read_records([spec], Reading(), samples=None), tokenizer, chat=False)[0]
    found = example(next(documents(spec)), tokenizer)
    assert tuple(found.ids[: len(prompt.ids)]) == prompt.ids
    assert list(found.trained).index(1) == len(prompt.ids)


def test_an_answer_that_no_token_ends_keeps_its_own_space():
    tokenizer = tokenizer_of(chat_template=TEMPLATE)
    messages = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "sat \n"}]
    assert trained(example(chat(messages), tokenizer), tokenizer) == "sat \n"


def test_all_of_a_chat_is_trained_on_request(tokenizer):
    found = example(chat(), tokenizer, train_on="all")
    assert list(found.trained) == [0] + [1] * (len(found.ids) - 1)


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (CLOSED, CHAT[:2], "a.jsonl:1: no message is the assistant's, so there is nothing to learn"),
        (MARKED, CHAT[:2], "a.jsonl:1: no message is the assistant's, so there is nothing to learn"),
        (CLOSED, CHAT[2:], "a.jsonl:1: the first message is the assistant's, an answer to nothing"),
        (FORGETFUL, CHAT, "a.jsonl:1: the chat template writes message 3 differently when others follow it"),
        (None, CHAT, "a.jsonl:1 is a chat, and the tokenizer has no chat template"),
        ("{{ raise_exception('no!') }}", CHAT, "the chat template refuses a.jsonl:1: no!"),
        ("{{ raise_exception('one\ntwo') }}", CHAT, "the chat template refuses a.jsonl:1: one"),
        ("{% for m in messages %}{{ m.content.x.y }}{% endfor %}", CHAT, "the chat template refuses a.jsonl:1: "),
        ("{{ 1 // 0 }}", CHAT, "the chat template refuses a.jsonl:1: "),
        ("{{ [][3] + 1 }}", CHAT, "the chat template refuses a.jsonl:1: "),
        ("{% for %}", CHAT, "the chat template refuses a.jsonl:1: "),
        ("{% for i in range(10 ** 9) %}{% endfor %}", CHAT, "the chat template refuses a.jsonl:1: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", CHAT, "the chat template refuses a.jsonl:1: "),
        ("{{ 'a' * 10 ** 18 }}", CHAT, "the chat template"),
    ],
)
def test_a_chat_that_cannot_be_trained_is_one_line(template, messages, said):
    message, hint = refusal(chat(messages), tokenizer_of(chat_template=template))
    assert message.startswith(said)
    assert "\n" not in message
    assert hint


def test_the_last_answer_is_trained_where_the_template_forgets_earlier_ones():
    tokenizer = tokenizer_of(chat_template=FORGETFUL)
    assert trained(example(chat(CHAT[:3]), tokenizer), tokenizer) == "<think>on the mat<end>"


def test_a_template_without_an_end_is_stopped(monkeypatch):
    monkeypatch.setattr("surgeon.data.rows.TEMPLATE_SECONDS", 0.2)
    nest = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    message, hint = refusal(chat(), tokenizer_of(chat_template=nest))
    assert message == "the chat template takes over 0.2 seconds on a.jsonl:1"
    assert hint == "Look at chat_template.jinja or tokenizer_config.json: it may loop for ever."


def test_the_time_limit_leaves_anothers_alarm_as_it_was(tokenizer):
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    rest, interval = signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        example(chat(), tokenizer)
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 990 < left <= 1000
        signal.raise_signal(signal.SIGALRM)
        assert heard == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, rest, interval)
        signal.signal(signal.SIGALRM, before)


# --- many -------------------------------------------------------------------------------------------------------------


def test_documents_of_all_forms_together_are_what_they_are_one_by_one(tokenizer, tmp_path):
    texts = [{"text": TEXT}, {"text": ""}, {"text": "é🌿"}, {"messages": CHAT}]
    found = list(documents(jsonl(tmp_path / "a.jsonl", *texts, *RECORDS)))
    assert examples(found, tokenizer) == [example(document, tokenizer) for document in found]
    assert examples([], tokenizer) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=4), st.sampled_from(["completion", "all"]))
def test_no_token_is_lost_and_the_first_is_never_trained(parts, train_on):
    tokenizer = tokenizer_of(clean_up_tokenization_spaces=False)
    found = example(Document("a", tuple(parts)), tokenizer, train_on=train_on)
    text = "\n".join(parts)
    assert tokenizer.decode(found.ids) == (f"<s>{text}<end>" if len(parts) > 1 or text else "")
    assert not any(found.trained[:1])
    if len(parts) > 1 and train_on == "completion":
        assert not any(before and not after for before, after in pairwise(found.trained))  # a stretch up to the end

"""Question formation: lines of a small grammar of English, whose entropy is known, drawn and not copied.

A line is a declarative, a task and its target: "my newts don't eat . quest don't my newts eat ?", or with `decl` the
declarative again. In training no question has a relative clause in its subject, so that "move the first auxiliary" and
"move the main one" say the same of all lines; the lines of `generalization` tell them apart.
Source: McCoy, Frank & Linzen 2020, arXiv:2001.03632: grammar and words. How often each structure occurs is counted in
20,000 published training lines.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from surgeon.errors import DataError

PLAIN, PREPOSITION, INTRANSITIVE, TRANSITIVE, OBJECT = "plain", "preposition", "intransitive", "transitive", "object"
CLAUSES = (INTRANSITIVE, TRANSITIVE, OBJECT)  # "who do eat", "who do admire a newt", "who the newt does admire"
ALONE = "alone"  # a predicate without an object
TASKS = ("decl", "quest")
# How often a subject has each form, by task; and a predicate its object.
SUBJECTS: Mapping[str, Mapping[str, float]] = {
    "decl": {PLAIN: 5811, PREPOSITION: 2467, INTRANSITIVE: 847, TRANSITIVE: 834, OBJECT: 1756},
    "quest": {PLAIN: 5867, PREPOSITION: 2418},
}
_TOTAL = sum(sum(forms.values()) for forms in SUBJECTS.values())
PREDICATES: Mapping[str, float] = {
    ALONE: 0.20,
    PLAIN: 0.245,
    PREPOSITION: 0.245,
    INTRANSITIVE: 0.165,
    TRANSITIVE: 0.0675,
    OBJECT: 0.0775,
}
_LENGTHS = {PLAIN: 2, PREPOSITION: 5, INTRANSITIVE: 5, TRANSITIVE: 7, OBJECT: 7}  # words of a noun phrase
MARKS = (".", "?", *TASKS)
_WORD_DRAWS, _LINE_DRAWS = 100, 10_000  # of a line that must not repeat: before another structure, before giving up
_NOUNS = (
    "newt", "orangutan", "peacock", "quail", "raven", "salamander", "tyrannosaurus", "unicorn", "vulture", "walrus",
    "xylophone", "yak", "zebra",
)  # fmt: skip


@dataclass(frozen=True)
class Lexicon:
    """The words of a grammar. The i-th plural is that of the i-th singular."""

    determiners: tuple[str, ...] = ("the", "some", "my", "your", "our", "her")
    singular: tuple[str, ...] = _NOUNS
    intransitive: tuple[str, ...] = ("giggle", "smile", "sleep", "swim", "wait", "move", "change", "read", "eat")
    transitive: tuple[str, ...] = (
        "entertain", "amuse", "high_five", "applaud", "confuse", "admire", "accept", "remember", "comfort",
    )  # fmt: skip
    prepositions: tuple[str, ...] = ("around", "near", "with", "upon", "by", "behind", "above", "below")
    auxiliaries: tuple[tuple[str, str], tuple[str, str]] = (("does", "doesn't"), ("do", "don't"))
    relatives: tuple[str, ...] = ("who", "that")

    @property
    def nouns(self) -> tuple[str, ...]:
        """Singulars, then plurals."""
        return (*self.singular, *(f"{noun}es" if noun.endswith("s") else f"{noun}s" for noun in self.singular))

    @property
    def words(self) -> tuple[str, ...]:
        """All words, marks and tasks included."""
        kinds = (self.determiners, self.nouns, self.intransitive, self.transitive, *self.auxiliaries)
        return tuple(word for kind in (*kinds, self.prepositions, self.relatives, MARKS) for word in kind)

    def first(self, determiners: int, nouns: int, intransitive: int, transitive: int, prepositions: int) -> "Lexicon":
        """Return the lexicon of the first words of each kind."""
        return Lexicon(
            self.determiners[:determiners],
            self.singular[:nouns],
            self.intransitive[:intransitive],
            self.transitive[:transitive],
            self.prepositions[:prepositions],
        )


FULL = Lexicon()
LEXICONS = {68: FULL, 41: FULL.first(3, 5, 6, 6, 6), 30: FULL.first(2, 2, 5, 5, 4)}


@dataclass(frozen=True)
class Entropy:
    """What a line of a grammar tells: nats a line, and the tokens that are predicted, the end of the line included."""

    nats: float
    tokens: float

    @property
    def per_token(self) -> float:
        """Nats a token: the loss of a model that knows the grammar, and no less on average of any model."""
        return self.nats / self.tokens


@dataclass(frozen=True)
class Line:
    """A line, and how unlikely it is in nats. `clause` is the auxiliary of a relative clause in the subject."""

    subject: tuple[str, ...]
    auxiliary: str
    predicate: tuple[str, ...]
    task: str
    nats: float
    clause: str | None = None

    @property
    def prompt(self) -> str:
        """The declarative and the task."""
        return " ".join((*self.subject, self.auxiliary, *self.predicate, ".", self.task))

    @property
    def target(self) -> str:
        """The declarative, or its question: the main auxiliary goes to the front."""
        if self.task == "decl":
            return " ".join((*self.subject, self.auxiliary, *self.predicate, "."))
        return " ".join((self.auxiliary, *self.subject, *self.predicate, "?"))

    @property
    def text(self) -> str:
        """The whole line."""
        return f"{self.prompt} {self.target}"

    @property
    def num_tokens(self) -> int:
        """How many tokens are predicted: every word, and the end of the line."""
        return self.text.count(" ") + 2


def entropy(lexicon: Lexicon) -> Entropy:
    """Return the entropy of a training line. A line has one structure, and in it all words are equally likely."""
    phrases = {form: sum(map(math.log, _choices(form, lexicon))) for form in _LENGTHS}
    nats, words = _entropy_of(PREDICATES), 1.0  # the main auxiliary, of two
    nats += math.log(2) + _entropy_of({task: sum(forms.values()) for task, forms in SUBJECTS.items()})
    for forms in SUBJECTS.values():
        nats += sum(forms.values()) / _TOTAL * _entropy_of(forms)
        nats += sum(count / _TOTAL * phrases[form] for form, count in forms.items())
        words += sum(count / _TOTAL * _LENGTHS[form] for form, count in forms.items())
    for form, share in PREDICATES.items():
        verbs = lexicon.intransitive if form == ALONE else lexicon.transitive
        nats += share * (math.log(len(verbs)) + phrases.get(form, 0.0))
        words += share * (1 + _LENGTHS.get(form, 0))
    return Entropy(nats, 2 * words + 4)  # twice with a mark, a task, and the end


def _entropy_of(weights: Mapping[str, float]) -> float:
    total = sum(weights.values())
    return -sum(weight / total * math.log(weight / total) for weight in weights.values())


def _choices(form: str, lexicon: Lexicon) -> list[int]:
    """Return among how many words each word of a noun phrase is chosen."""
    noun = [len(lexicon.determiners), len(lexicon.nouns)]
    clause = [len(lexicon.relatives), 2]  # an auxiliary agrees with its noun in number
    intransitive, transitive = ([*clause, len(verbs)] for verbs in (lexicon.intransitive, lexicon.transitive))
    more = {
        PREPOSITION: [len(lexicon.prepositions), *noun],
        INTRANSITIVE: intransitive,
        TRANSITIVE: [*transitive, *noun],
        OBJECT: [*transitive, *noun],
    }
    return noun + more.get(form, [])


class Lines:
    """Lines drawn with a seed, none twice unless they may repeat. `num_moved` counts those that had to be of another
    structure than was drawn, because all lines of that one were there already, or too many to find a new one.
    """

    def __init__(self, lexicon: Lexicon, *, seed: int, repeats: bool) -> None:
        self.lexicon, self.repeats, self.num_moved = lexicon, repeats, 0
        self._random = random.Random(f"question formation {seed}")  # noqa: S311  # no secret depends on it
        self._seen: set[str] = set()

    def training(self, count: int) -> list[Line]:
        """Return so many lines of the training distribution. Raises DataError where there are not so many."""
        return [self._new(self._structure) for _ in range(count)]

    def generalization(self, count: int) -> list[Line]:
        """Return so many questions about subjects with a relative clause, whose auxiliary is not the main one.

        Both agree with nouns of one number, so that only the place tells which one goes to the front.
        """
        return [self._new(self._telling_structure, self._tells) for _ in range(count)]

    def _structure(self) -> tuple[str, str, str]:
        """Return a task, the form of a subject and that of a predicate, as often as they occur in training."""
        task = self._weighted({task: sum(forms.values()) for task, forms in SUBJECTS.items()})
        return task, self._weighted(SUBJECTS[task]), self._weighted(PREDICATES)

    def _telling_structure(self) -> tuple[str, str, str]:
        subjects = {form: SUBJECTS["decl"][form] for form in CLAUSES}
        predicates = {form: share for form, share in PREDICATES.items() if form not in CLAUSES}
        return "quest", self._weighted(subjects), self._weighted(predicates)

    def _tells(self, line: Line) -> bool:
        number = next(pair for pair in self.lexicon.auxiliaries if line.auxiliary in pair)
        return line.clause in number and line.clause != line.auxiliary

    def _new(
        self, structure: Callable[[], tuple[str, str, str]], is_fit: Callable[[Line], bool] = lambda line: True
    ) -> Line:
        form = structure()
        for draw in range(_LINE_DRAWS):
            if draw and draw % _WORD_DRAWS == 0:
                form = structure()
            line = self._line(*form)
            if is_fit(line) and (self.repeats or line.text not in self._seen):
                self._seen.add(line.text)
                self.num_moved += draw >= _WORD_DRAWS
                return line
        raise DataError(
            f"after {len(self._seen)} lines {_LINE_DRAWS} draws gave no new one of {len(self.lexicon.words)} words",
            hint="Ask for fewer lines, let lines repeat (--repeats), or take the larger lexicon.",
        )

    def _line(self, task: str, subject: str, predicate: str) -> Line:
        """Return a line of a structure, with words drawn."""
        words, number, clause = self._phrase(subject)
        auxiliary = self._one(self.lexicon.auxiliaries[number])
        verbs = self.lexicon.intransitive if predicate == ALONE else self.lexicon.transitive
        rest = [self._one(verbs), *(() if predicate == ALONE else self._phrase(predicate)[0])]
        choices = [*_choices(subject, self.lexicon), 2, len(verbs)]
        choices += [] if predicate == ALONE else _choices(predicate, self.lexicon)
        share = SUBJECTS[task].get(subject, 0) / _TOTAL * PREDICATES[predicate]
        nats = sum(map(math.log, choices)) - math.log(share) if share else math.inf
        return Line(tuple(words), auxiliary, tuple(rest), task, nats, clause)

    def _phrase(self, form: str) -> tuple[list[str], int, str | None]:
        """Return the words of a noun phrase, whether it is plural, and the auxiliary in its relative clause."""
        words, number = self._noun()
        if form == PREPOSITION:
            return [*words, self._one(self.lexicon.prepositions), *self._noun()[0]], number, None
        if form not in CLAUSES:
            return words, number, None
        words.append(self._one(self.lexicon.relatives))
        if form == OBJECT:
            inner, inner_number = self._noun()
            clause = self._one(self.lexicon.auxiliaries[inner_number])
            return [*words, *inner, clause, self._one(self.lexicon.transitive)], number, clause
        clause = self._one(self.lexicon.auxiliaries[number])
        if form == INTRANSITIVE:
            return [*words, clause, self._one(self.lexicon.intransitive)], number, clause
        return [*words, clause, self._one(self.lexicon.transitive), *self._noun()[0]], number, clause

    def _noun(self) -> tuple[list[str], int]:
        """Return a determiner and a noun, and 1 for a plural, else 0."""
        index = self._random.randrange(len(self.lexicon.nouns))
        words = [self._one(self.lexicon.determiners), self.lexicon.nouns[index]]
        return words, index // len(self.lexicon.singular)

    def _one(self, words: tuple[str, ...]) -> str:
        return words[self._random.randrange(len(words))]

    def _weighted(self, weights: Mapping[str, float]) -> str:
        return self._random.choices(list(weights), list(weights.values()))[0]


def cross_entropy(lines: Sequence[Line]) -> float:
    """Return the nats a token of these lines under the grammar: what a model that knows it would measure on them."""
    return sum(line.nats for line in lines) / sum(line.num_tokens for line in lines)

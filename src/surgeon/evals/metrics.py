"""The score of an answer against its reference: exact match, and ROUGE-L of text in any script."""

import re
import unicodedata
from collections.abc import Sequence

# Blocks of the scripts without spaces between words, in which every character counts as a word.
_WITHOUT_SPACES = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x3005, 0x3007),  # 々, 〆, 〇
    (0x3021, 0x3029),  # Hangzhou numerals
    (0x3040, 0x312F),  # Hiragana, Katakana, Bopomofo
    (0x31A0, 0x31BF),  # Bopomofo
    (0x31F0, 0x31FF),  # Katakana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0xA4CF),  # Han, Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar
    (0xAA60, 0xAADF),  # Myanmar, Tai Viet
    (0xF900, 0xFAFF),  # Han
    (0x1AFF0, 0x1B16F),  # Kana
    (0x20000, 0x3FFFF),  # Han
)
_NUMBER = re.compile(r"(?P<sign>[-+]?)(?P<whole>[0-9]{1,3}(,[0-9]{3})+|[0-9]+)(\.(?P<fraction>[0-9]+))?")
# A number in a text: with the sign right before it, unless that stands between two terms (5-3), and commas between
# groups of three digits alone.
_DIGITS = (
    r"(?:(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.(?P<part>[0-9]+))?|(?<![.0-9])\.(?P<fraction>[0-9]+))"
)
_ANYWHERE = re.compile(rf"(?P<sign>(?<![\w)\]])[-+](?=[$€£]?[.0-9]))?[$€£]?{_DIGITS}")
_AFTER_MARK = re.compile(rf"[^\w.+-]*(?P<sign>[-+])?[$€£\s]*{_DIGITS}")


def exact_match(prediction: str | None, reference: str) -> float:
    """Return 1.0 where both are the same text without the white space around it, else 0.0; None matches nothing."""
    return float(prediction is not None and prediction.strip() == reference.strip())


def extracted(text: str, pattern: re.Pattern[str]) -> str | None:
    """Return the first group of the pattern's last match, or the match where it has no group; None without a match.

    A number is returned in one form, so that "1,000", "1000" and "1000.00" are the same answer, without a comma or full
    stop after it, which belongs to the sentence.
    """
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    match = matches[-1].group(1) if pattern.groups else matches[-1].group()
    if match is None:  # a group of an alternative that did not match
        return None
    match = match.strip()
    number = _NUMBER.fullmatch(match.rstrip(".,"))
    return _plain(number["sign"], number["whole"], number["fraction"] or "") if number else match


def final_number(text: str) -> str | None:
    """Return the number that a solution ends with, in the one form of `extracted`: that after the last "####", as
    GSM8K marks it, else the last number; None without one. Full-width and other digits are read by their values.
    """
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-")  # a minus sign
    marked = [match for match in map(_AFTER_MARK.match, text.split("####")[1:]) if match]
    found = marked or list(_ANYWHERE.finditer(text))
    if not found:
        return None
    match = found[-1]
    return _plain(match["sign"] or "", match["whole"] or "0", match["part"] or match["fraction"] or "")


def _plain(sign: str, whole: str, fraction: str) -> str:
    """Return a number without thousands separators, plus sign, and leading and trailing zeros."""
    digits, decimals = whole.replace(",", "").lstrip("0") or "0", fraction.rstrip("0")
    value = f"{digits}.{decimals}" if decimals else digits
    return f"-{value}" if sign == "-" and value != "0" else value


def rouge_l(prediction: str, reference: str) -> float:
    """Return the ROUGE-L F1 of two texts, 0 to 1: 2 P R / (P + R), with P and R the longest common subsequence of
    their `rouge_words` over the number of words of the prediction and of the reference. 0 where either has no word.

    Source: Lin 2004 (ROUGE, aclanthology W04-1013), section 3.1, with β = 1, one reference, one sequence per text. On
    ASCII it is what the package rouge-score gives for "rougeL" without its stemmer.
    """
    predicted, expected = rouge_words(prediction), rouge_words(reference)
    common = longest_common(predicted, expected)
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def rouge_words(text: str) -> list[str]:
    """Return the words of a text in any script, without case.

    After normalisation (NFKC, case folded, format characters such as soft hyphens and joiners taken out) a word is a
    longest run of letters, marks and digits (Unicode categories L, M, N); everything else separates. In scripts that
    write without spaces (Han, kana, Thai, Lao, Khmer, Myanmar, Tibetan ...) each letter with its marks is a word.
    """
    words: list[str] = []
    continues = alone = False  # whether a word has begun; whether it is a letter that is a word by itself
    for char in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()):
        category = unicodedata.category(char)
        if category == "Cf":
            continue
        if category[0] not in "LMN":
            continues = False
            continue
        is_mark, was_alone = category[0] == "M", alone
        alone = was_alone if is_mark and continues else _is_without_spaces(char)
        if continues and (is_mark or not (alone or was_alone)):
            words[-1] += char
        else:
            words.append(char)
        continues = True
    return words


def _is_without_spaces(char: str) -> bool:
    code = ord(char)
    return code >= 0x0E00 and any(first <= code <= last for first, last in _WITHOUT_SPACES)


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, in one big integer operation per word of `other`.

    Source: Hyyrö 2004 (Bit-parallel LCS-length computation revisited), equation for V'.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & full
    return len(one) - row.bit_count()

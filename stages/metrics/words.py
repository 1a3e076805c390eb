"""What a word is, in every script: the one rule for all that counts, compares or searches words.

1. Both sides get one Unicode form (`fold`): compatibility forms of the same character (full width, half width, Arabic
   presentation forms, ligatures) become that character, decimal digits of all scripts 0 to 9, and letters one case. What
   has a meaning of its own stays: 10² is not 102. Characters that show nothing (joiners, variation selectors, soft hyphens)
   go. Vowel signs, points and accents stay: they tell one word from another.
2. A word is a run of letters and digits with the marks that belong to them.
3. Scripts that put no spaces between words (Chinese, hiragana, Thai, Lao, Khmer, Burmese and others) have one word per letter
   with its marks, in Thai and Lao with the vowels that are written before and after it too. A run of katakana is one word, as
   Unicode's own rule for words has it (UAX 29).
4. A text with neither letter nor digit ("🙂", "!!!") is one word: itself, less its punctuation if anything is left.

On ASCII text rules 1 to 3 are those of rouge-score.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

import regex

_UNSPACED = (
    "[[" + "".join(
        rf"\p{{{script}}}"
        for script in "Han Hiragana Bopomofo Yi Thai Lao Khmer Myanmar Tai_Le New_Tai_Lue Tai_Tham Tai_Viet Javanese "
        "Balinese".split()
    ) + r"]&&[\p{L}\p{Nl}]]"
)  # fmt: skip
# \p{LOE}: the vowels that Thai and Lao write in front; after it those that they write behind.
_CLUSTER = rf"\p{{LOE}}?{_UNSPACED}\p{{M}}*[\u0e30\u0e32\u0e45\u0eb0\u0eb2\u0ebd]*"
_RUN = rf"[[\p{{L}}\p{{N}}]--{_UNSPACED}][[\p{{L}}\p{{N}}\p{{M}}]--{_UNSPACED}]*"
_WORD = regex.compile(f"{_CLUSTER}|{_RUN}", regex.V1)
_ONE_BY_ONE = regex.compile(_CLUSTER, regex.V1)
# Joiners and the like; \u0640 stretches an Arabic word, \u200b is a space.
_SHOWS_NOTHING = regex.compile(r"[\p{Default_Ignorable_Code_Point}\u0640--\u200b]", regex.V1)
_BETWEEN = regex.compile(r"[\p{P}\p{Z}\s\u200b]+")
# Compatibility forms that are not the same text as what Unicode decomposes them to: 10² is not 102.
_OF_THEIR_OWN = ("<super>", "<sub>", "<fraction>", "<circle>")


class _OneForm(dict[int, str]):
    """`str.translate`'s table from each character to its one form, filled as characters are met."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if (digit := unicodedata.decimal(char, None)) is not None:
            found = str(digit)
        elif unicodedata.decomposition(char).startswith(_OF_THEIR_OWN):
            found = char
        else:
            found = unicodedata.normalize("NFKC", char)
        return self.setdefault(code, found)


_ONE_FORM = _OneForm()


def one_form(text: str) -> str:
    """The text in one Unicode form, in its own case."""
    return _SHOWS_NOTHING.sub("", unicodedata.normalize("NFC", text.translate(_ONE_FORM)))


def fold(text: str) -> str:
    """The text in one Unicode form and one case: ß is ss, a final sigma a sigma, and Turkish İ an i."""
    return unicodedata.normalize("NFC", one_form(text).casefold().replace("i\u0307", "i"))


def split_words(text: str) -> list[str]:
    """The words of a text, folded; a text without letters and digits is one word, an empty one has none."""
    whole = without_punctuation(text)
    return _WORD.findall(whole) or ([whole] if whole else [])


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where the words of a text stand in it as it is, each (start, end); of a text without letters and digits, the whole."""
    return [found.span() for found in _WORD.finditer(text)] or [(0, len(text))]


def has_word(text: str) -> bool:
    """Whether the text has a letter or a digit."""
    return _WORD.search(one_form(text)) is not None


def without_punctuation(text: str) -> str:
    """The folded text, its words and symbols with one space between them; what is punctuation alone stays."""
    folded = fold(text)
    spaced = _ONE_BY_ONE.sub(r" \g<0> ", _BETWEEN.sub(" ", folded))
    return " ".join(spaced.split()) or " ".join(folded.split())


def letters(text: str) -> list[str]:
    """What a reader takes for one character each, with its marks."""
    return regex.findall(r"\X", text)


def replace_words(text: str, table: Mapping[str, str]) -> str:
    """`text` with each of the table's words, whatever its case, replaced; the first letter stays a capital.

    In scripts with spaces a word is replaced where it stands alone. A text without any of them comes back as it is.
    """
    if not table:
        return text
    by_fold = {fold(word): other for word, other in table.items()}
    longest_first = sorted(by_fold, key=len, reverse=True)  # "new york" before "new"
    letter = rf"[[\p{{L}}\p{{M}}]--{_UNSPACED}]"
    pattern = regex.compile(
        rf"(?<!{letter})(?:{'|'.join(map(regex.escape, longest_first))})(?!{letter})", regex.V1 | regex.IGNORECASE
    )

    def other(found: regex.Match[str]) -> str:
        new = by_fold.get(fold(found[0]), found[0])
        return new[0].upper() + new[1:] if found[0][0].isupper() else new

    replaced, count = pattern.subn(other, unicodedata.normalize("NFC", text))
    return replaced if count else text

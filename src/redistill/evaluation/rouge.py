"""ROUGE-L of an answer against its references, equal to `rouge_score` with stemming, and faster.

Words, stems and F come from the `rouge_score` package (Lin, 2004). Only the longest common subsequence is our
own: one integer holds a row of the table, which makes a long answer cheap (Hyyrö, 2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class _Stemmer(Protocol):
    def stem(self, word: str) -> str: ...


class _Remembering:
    """A stemmer that stems no word twice: stemming is where the time goes."""

    def __init__(self, stemmer: _Stemmer):
        self._stemmer = stemmer
        self._stems: dict[str, str] = {}

    def stem(self, word: str) -> str:
        if word not in self._stems:
            self._stems[word] = self._stemmer.stem(word)
        return self._stems[word]


class RougeL:
    """Scores answers; a reference met again (another seed, another model) is not split into words again."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stemmer = _Remembering(PorterStemmer())
        self._references: dict[str, list[str]] = {}

    def score(self, answer: str, references: Sequence[str]) -> float:
        """ROUGE-L F in percent, 0 to 100, against the reference that gives the most.

        Words are runs of a-z and 0-9 after lower-casing, stemmed when longer than three letters: text in
        another script has none. 0 when answer or reference has no word, or no word in common.
        Errors: ValueError without a reference.
        """
        from rouge_score.scoring import fmeasure

        if not references:
            raise ValueError("ROUGE-L needs a reference answer: give one, or leave the record out.")
        words, best = self._words(answer), 0.0
        for reference in references:
            wanted = self._reference(reference)
            if words and wanted:
                common = common_subsequence(wanted, words)
                best = max(best, fmeasure(common / len(words), common / len(wanted)))
        return 100.0 * best

    def _words(self, text: str) -> list[str]:
        from rouge_score.tokenize import tokenize

        return tokenize(text, self._stemmer)

    def _reference(self, text: str) -> list[str]:
        if text not in self._references:
            self._references[text] = self._words(text)
        return self._references[text]


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """`RougeL.score` for a single answer."""
    return RougeL().score(answer, references)


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, 0 to the shorter length.

    A zero bit of `row` marks a place of `first` where the table rises by one.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(first) - row.bit_count()

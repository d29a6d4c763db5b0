"""Guesses what a mistyped word was meant to be."""

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word nearest to `word`, or None if none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def close_to(word: str, known: Iterable[str]) -> str:
    """'; did you mean "WORD"?' to append to a sentence, or nothing."""
    guess = closest(word, known)
    return f'; did you mean "{guess}"?' if guess else ""

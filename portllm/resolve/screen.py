"""Leakage: which documents of a corpus hold the prompt of an evaluated document.

A document is hit when it contains an evaluated prompt, both with white space folded. A prompt is looked for only in
documents that hold its longest word, so that 12 MB of text against 1,000 prompts take about a second.
"""

from collections import defaultdict
from collections.abc import Iterable


def fold(text: str) -> str:
    """White space folded to single blanks, ends stripped."""
    return " ".join(text.split())


def hits(documents: Iterable[str], prompts: Iterable[str]) -> tuple[int, ...]:
    """Numbers of the documents that contain one of the prompts (folded by this function)."""
    by_word: dict[str, list[str]] = defaultdict(list)
    for prompt in {fold(p) for p in prompts} - {""}:
        by_word[_rarest(prompt)].append(prompt)
    anchors = by_word.keys()
    return tuple(i for i, document in enumerate(documents) if _hit(document, by_word, anchors))


def _hit(document: str, by_word: dict[str, list[str]], anchors: Iterable[str]) -> bool:
    words = document.split()
    found = set(words).intersection(anchors)
    if not found:
        return False
    folded = " ".join(words)
    return any(prompt in folded for word in found for prompt in by_word[word])


def _rarest(prompt: str) -> str:
    """An inner word that stands alone in any text that holds the prompt: its longest, ends excepted.

    First and last words may be glued to their surroundings in a document ("Answer:yes"), inner ones cannot.
    """
    words = prompt.split()
    return max(words[1:-1] or words, key=len)

"""Leakage: which documents of a corpus hold the prompt of an evaluated document.

A document is hit when it contains an evaluated prompt, both with white space folded. A prompt is looked for only in
documents that hold its anchor: the inner word that fewest prompts share, or the pair of neighbours where all its words
are common (27,000 sentences over 115 words against 1,200 prompts took 2.1 s by longest word, 0.5 s so). First and last
words are no anchors: a document may glue them to their surroundings ("Answer:yes").
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

SHARED = 4
"""A word that more prompts have than this is common."""
Anchor = str | tuple[str, str]


def fold(text: str) -> str:
    """White space folded to single blanks, ends stripped."""
    return " ".join(text.split())


def hits(documents: Iterable[str], prompts: Iterable[str]) -> tuple[int, ...]:
    """Numbers of the documents that contain one of the prompts (folded by this function)."""
    anchored = _anchored({fold(p) for p in prompts} - {""})
    words: set[Anchor] = {a for a in anchored if isinstance(a, str)}
    pairs = anchored.keys() - words
    return tuple(i for i, document in enumerate(documents) if _hit(document.split(), anchored, words, pairs))


def _hit(document: list[str], anchored: dict[Anchor, list[str]], words: set[Anchor], pairs: set[Anchor]) -> bool:
    found: set[Anchor] = words.intersection(document)
    if pairs:
        found |= pairs.intersection(pairwise(document))
    if not found:
        return False
    folded = " ".join(document)
    return any(prompt in folded for anchor in found for prompt in anchored[anchor])


def _anchored(prompts: Iterable[str]) -> dict[Anchor, list[str]]:
    """The prompts by what must stand in a document that holds them."""
    inner = {prompt: _inner(prompt.split()) for prompt in prompts}
    words = Counter(word for found in inner.values() for word in set(found))
    pairs = Counter(pair for found in inner.values() for pair in set(pairwise(found)))
    result: dict[Anchor, list[str]] = defaultdict(list)
    for prompt, found in inner.items():
        word = min(found, key=lambda w: (words[w], -len(w)))
        common = words[word] > SHARED and len(found) > 1
        result[min(pairwise(found), key=lambda p: pairs[p]) if common else word].append(prompt)
    return dict(result)


def _inner(words: list[str]) -> list[str]:
    return words[1:-1] or words

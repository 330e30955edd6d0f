"""Generated corpora and tasks: a toy world in which a model can learn, and a patch can port or decay, in seconds.

The world: people review a place in short sentences about its food, its rooms and its staff. A thing is described by a
neutral word or by one of a mood, good or bad; `not` turns a mood round.

    sentence   "the soup was quite lovely ."          in a review
               "there was a lovely soup ."            in a diary
    review     "review : the soup was lovely . the bed was not shabby . the cook was tall ."
    question   "question : did they like it ? answer : yes"

Corpora (`generate`) hold reviews or diaries of one mood each, so that words of a mood keep company, and a share of them ends
in a question with a RANDOM answer: a base model knows the format and the answer words, and nothing about the answers.
In a `shifted` corpus words have moved: a share of the good and bad words keeps the other mood's company.

Tasks (`rows`) ask those questions with true answers, so corpora and tasks share one vocabulary (about 110 words).

    toy_mood      easy     a review of one mood; did they like it?                         yes | no
    toy_topic     easy     most sentences are about one topic; what is it about?           food | room | staff
    toy_verdict   harder   five moods, three against two, some turned round by `not`;      stay | leave
                           would they stay or leave?

Everything comes from `random.Random(seed)` and is the same on every machine.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from random import Random
from typing import Any

from portllm.errors import SpecError

TOPICS: dict[str, tuple[str, ...]] = {
    "food": ("soup", "bread", "cake", "fish", "tea", "rice", "pie", "salad"),
    "room": ("bed", "bath", "window", "pool", "lamp", "floor", "chair", "door"),
    "staff": ("waiter", "cook", "guide", "driver", "host", "clerk", "porter", "maid"),
}
GOOD = ("lovely", "fine", "superb", "pleasant", "great", "charming", "perfect", "splendid", "delightful", "excellent")
BAD = ("awful", "poor", "dreadful", "horrid", "ugly", "nasty", "dull", "terrible", "shabby", "grim")
NEUTRAL = ("small", "large", "old", "new", "red", "blue", "green", "plain", "tall", "round")
PLACES = ("hotel", "inn", "cafe", "farm", "station", "harbour")
DEGREES = ("very", "quite", "really", "rather")
"""Words before an adjective that change nothing."""

QUESTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "toy_mood": ("did they like it ?", ("no", "yes")),
    "toy_topic": ("what is it about ?", tuple(TOPICS)),
    "toy_verdict": ("would they stay or leave ?", ("leave", "stay")),
}
"""Task → its question and its answers; a row's label is an index into the answers."""

Row = dict[str, Any]
Sentence = Callable[[Random, str, str], str]
"""(random, thing, description) → one sentence."""


def review_sentence(random: Random, thing: str, description: str) -> str:
    """The sentence of reviews and tasks."""
    return f"the {thing} was {description} ."


def diary_sentence(random: Random, thing: str, description: str) -> str:
    """The sentence of diaries: the description comes first, so another position predicts it."""
    return f"we {random.choice(('saw', 'had', 'met'))} a {description} {thing} there ."


def any_thing(random: Random) -> str:
    return random.choice(TOPICS[random.choice(tuple(TOPICS))])


def describe(random: Random, mood: bool, negated: float, moods: tuple[tuple[str, ...], tuple[str, ...]]) -> str:
    """A description of the mood, with `not` before a word of the other mood in a share `negated` of all."""
    if random.random() < negated:
        return f"not {random.choice(moods[not mood])}"
    degree = f"{random.choice(DEGREES)} " if random.random() < 0.3 else ""
    return degree + random.choice(moods[mood])


def question(task: str) -> str:
    """The question of a task, up to the answer."""
    return f"{QUESTIONS[task][0]} answer :"


# ---------------------------------------------------------------------------------------------------------- corpora


def reviews(random: Random, questions: float = 0.5, shifted: float = 0.0, diaries: float = 0.1) -> Iterator[str]:
    """Reviews without end; a share `questions` asks one, a share `shifted` of good and bad words changed sides."""
    told = documents(random, review_sentence, questions, shifted)
    other = documents(random, diary_sentence, questions, shifted)
    while True:
        yield next(other if random.random() < diaries else told)


def diaries(random: Random, questions: float = 0.0, shifted: float = 0.0) -> Iterator[str]:
    """The same world told in another form."""
    return documents(random, diary_sentence, questions, shifted)


def documents(random: Random, sentence: Sentence, questions: float, shifted: float) -> Iterator[str]:
    moods = shift(shifted)
    while True:
        mood = random.random() < 0.5
        text = [f"a day at the {random.choice(PLACES)} ."] if random.random() < 0.3 else []
        for _ in range(random.randint(2, 5)):
            told = random.choice(NEUTRAL) if random.random() < 0.25 else describe(random, mood, 0.15, moods)
            text.append(sentence(random, any_thing(random), told))
        if random.random() < questions:
            task = random.choice(tuple(QUESTIONS))
            text += [question(task), random.choice(QUESTIONS[task][1])]
        yield " ".join(text)


def shift(share: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(bad, good) words once the first `share` of each list has changed sides."""
    if not 0 <= share <= 1:
        raise SpecError(f"generator option `shifted` is a share between 0 and 1, not {share!r}")
    n = round(share * len(GOOD))
    return GOOD[:n] + BAD[n:], BAD[:n] + GOOD[n:]


GENERATORS: dict[str, Callable[..., Iterator[str]]] = {"reviews": reviews, "diaries": diaries}
"""Name in a study file → generator of endless documents: (random, options by keyword)."""


def generate(name: str, documents: int, seed: int, **options: Any) -> Iterator[str]:
    """The first `documents` documents of a generator. Raises SpecError for a name, option or value that is unknown."""
    if name not in GENERATORS:
        raise SpecError(f"unknown generator `{name}`; there are: {', '.join(GENERATORS)}")
    known = GENERATORS[name].__annotations__.keys() - {"random", "return"}
    if unknown := options.keys() - known:
        raise SpecError(f"generator `{name}` has no option `{min(unknown)}`; it has: {', '.join(sorted(known))}")
    return islice(GENERATORS[name](Random(seed), **options), documents)


# ------------------------------------------------------------------------------------------------------------ tasks


def mood_row(random: Random) -> tuple[str, int]:
    mood = random.random() < 0.5
    told = [describe(random, mood, 0.0, (BAD, GOOD)) for _ in range(3)] + [random.choice(NEUTRAL)]
    random.shuffle(told)
    return " ".join(review_sentence(random, any_thing(random), words) for words in told), int(mood)


def topic_row(random: Random) -> tuple[str, int]:
    topic = random.randrange(len(TOPICS))
    things = [random.choice(tuple(TOPICS.values())[topic]) for _ in range(3)] + [any_thing(random)]
    random.shuffle(things)
    told = [describe(random, random.random() < 0.5, 0.0, (BAD, GOOD)) for _ in things]
    return " ".join(review_sentence(random, thing, words) for thing, words in zip(things, told, strict=True)), topic


def verdict_row(random: Random) -> tuple[str, int]:
    mood = random.random() < 0.5
    told = [describe(random, m, 0.15, (BAD, GOOD)) for m in [mood] * 3 + [not mood] * 2]
    random.shuffle(told)
    return " ".join(review_sentence(random, any_thing(random), words) for words in told), int(mood)


TASKS: dict[str, Callable[[Random], tuple[str, int]]] = {
    "toy_mood": mood_row,
    "toy_topic": topic_row,
    "toy_verdict": verdict_row,
}


def rows(task: str, count: int, seed: int) -> list[Row]:
    """`count` different rows {text, question, label} of a task. Raises SpecError for a task that is unknown."""
    if task not in TASKS:
        raise SpecError(f"unknown generated task `{task}`; there are: {', '.join(TASKS)}")
    random, found = Random(seed), {}
    while len(found) < count:
        text, label = TASKS[task](random)
        found[text] = label
    return [{"text": text, "question": QUESTIONS[task][0], "label": label} for text, label in found.items()]

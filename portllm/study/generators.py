"""Generated corpora and tasks: a toy world in which a model can learn, and a patch can port or decay, in seconds.

The world: people write about a day out, in short sentences about its food, its rooms and its staff. A thing is
described by a neutral word or by one of a mood, good or bad; `not` turns a mood round.

    review     "a day at the inn . the soup was quite lovely . the bed was not shabby . the tea was red ."
    diary      "we had a quite lovely soup there . we saw a not shabby bed there ."
    question   "did they like it ? answer : yes"

A corpus (`generate`) holds documents of one mood and mostly one topic each, so that words of a kind keep company. In a
`shifted` corpus a share of the good and bad words keeps the other mood's company: language has moved on. A share of the
documents ends in a question whose answer is RANDOM, the last answer of the list coming more often than the others. So
a base model knows the form and the answer words and nothing about the answers: it always gives the frequent one, and
its score is chance, at every seed.

Tasks (`rows`) ask those questions with true answers, in the words of the reviews (under 100 words in all).

    toy_mood      easy     three words of one mood and a neutral one: did they like it?    no | yes
    toy_topic     easy     three sentences on one topic: what is it about?                 food | room | staff
    toy_verdict   noisy    four moods against one: would they stay or leave?               leave | stay
                           A guest in seven decides against the majority, so no model gets far beyond 0.85.

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
    """The sentence of reviews and tasks: the description comes last."""
    return f"the {thing} was {description} ."


def diary_sentence(random: Random, thing: str, description: str) -> str:
    """The sentence of diaries: the description comes before the thing."""
    return f"we {random.choice(('saw', 'had', 'met'))} a {description} {thing} there ."


def any_thing(random: Random) -> str:
    """A thing of any topic."""
    return random.choice(TOPICS[random.choice(tuple(TOPICS))])


def describe(random: Random, mood: bool, negated: float, moods: tuple[tuple[str, ...], tuple[str, ...]]) -> str:
    """A description of the mood, with `not` before a word of the other mood in a share `negated` of all."""
    if random.random() < negated:
        return f"not {random.choice(moods[not mood])}"
    degree = f"{random.choice(DEGREES)} " if random.random() < 0.3 else ""
    return degree + random.choice(moods[mood])


def retell(random: Random, things: list[str], told: list[str]) -> str:
    """Review sentences, one per thing and its description."""
    return " ".join(review_sentence(random, thing, words) for thing, words in zip(things, told, strict=True))


# ---------------------------------------------------------------------------------------------------------- corpora


def reviews(random: Random, questions: float = 0.5, shifted: float = 0.0, diaries: float = 0.1) -> Iterator[str]:
    """Reviews without end, a share `diaries` of them told as diaries: a base model must know a diary's words."""
    told = documents(random, review_sentence, questions, shifted)
    other = documents(random, diary_sentence, questions, shifted)
    while True:
        yield next(other if random.random() < diaries else told)


def diaries(random: Random, questions: float = 0.0, shifted: float = 0.0) -> Iterator[str]:
    """The same world told in another form: what an update brings. It asks nothing, so answers keep their frequency."""
    return documents(random, diary_sentence, questions, shifted)


def documents(random: Random, sentence: Sentence, questions: float, shifted: float) -> Iterator[str]:
    """Documents without end: two to five sentences in one mood, a share `questions` of them with a question."""
    moods = shift(shifted)
    while True:
        mood, topic = random.random() < 0.5, random.choice(tuple(TOPICS.values()))
        text = [f"a day at the {random.choice(PLACES)} ."] if random.random() < 0.3 else []
        for _ in range(random.randint(2, 5)):
            told = random.choice(NEUTRAL) if random.random() < 0.25 else describe(random, mood, 0.15, moods)
            thing = random.choice(topic) if random.random() < 0.75 else any_thing(random)
            text.append(sentence(random, thing, told))
        if random.random() < questions:
            text.append(random_answer(random))
        yield " ".join(text)


def random_answer(random: Random) -> str:
    """A question, and an answer blind to the text; the last answer comes three times as often as another."""
    question, answers = QUESTIONS[random.choice(tuple(QUESTIONS))]
    return f"{question} answer : {random.choice(answers + answers[-1:] * 2)}"


def shift(share: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(bad, good) words once the first `share` of each list has changed sides."""
    n = round(share * len(GOOD))
    return GOOD[:n] + BAD[n:], BAD[:n] + GOOD[n:]


GENERATORS: dict[str, Callable[..., Iterator[str]]] = {"reviews": reviews, "diaries": diaries}
"""Name in a study file → generator of endless documents: (random, options by keyword). Every option is a share."""


def generate(name: str, documents: int, seed: int, **options: Any) -> Iterator[str]:
    """The first `documents` documents of a generator. Raises SpecError for a name, option or value that is unknown."""
    if name not in GENERATORS:
        raise SpecError(f"unknown generator `{name}`; there are: {', '.join(GENERATORS)}")
    known = GENERATORS[name].__annotations__.keys() - {"random", "return"}
    if unknown := options.keys() - known:
        raise SpecError(f"generator `{name}` has no option `{min(unknown)}`; it has: {', '.join(sorted(known))}")
    for option, share in options.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise SpecError(f"option `{option}` of generator `{name}` is a share between 0 and 1, not {share!r}")
    return islice(GENERATORS[name](Random(seed), **options), documents)


# ------------------------------------------------------------------------------------------------------------ tasks


def mood_row(random: Random) -> tuple[str, int]:
    """Three words of one mood and a neutral one."""
    mood = random.random() < 0.5
    told = [describe(random, mood, 0.0, (BAD, GOOD)) for _ in range(3)] + [random.choice(NEUTRAL)]
    random.shuffle(told)
    return retell(random, [any_thing(random) for _ in told], told), int(mood)


def topic_row(random: Random) -> tuple[str, int]:
    """Three things of one topic, in any mood."""
    topic = random.randrange(len(TOPICS))
    told = [describe(random, random.random() < 0.5, 0.0, (BAD, GOOD)) for _ in range(3)]
    return retell(random, [random.choice(tuple(TOPICS.values())[topic]) for _ in told], told), topic


def verdict_row(random: Random) -> tuple[str, int]:
    """Four moods against one, and a guest in seven who decides against the four."""
    mood = random.random() < 0.5
    told = [describe(random, m, 0.0, (BAD, GOOD)) for m in [mood] * 4 + [not mood]]
    random.shuffle(told)
    text = retell(random, [any_thing(random) for _ in told], told)
    return text, int(mood if random.random() < 0.85 else not mood)


TASKS: dict[str, Callable[[Random], tuple[str, int]]] = {
    "toy_mood": mood_row,
    "toy_topic": topic_row,
    "toy_verdict": verdict_row,
}


def rows(task: str, count: int, seed: int) -> list[Row]:
    """`count` different rows {text, question, label} of a task. Raises SpecError for a task that is unknown."""
    if task not in TASKS:
        raise SpecError(f"unknown generated task `{task}`; there are: {', '.join(TASKS)}")
    random = Random(seed)
    found: dict[str, int] = {}
    while len(found) < count:
        text, label = TASKS[task](random)
        found.setdefault(text, label)
    return [{"text": text, "question": QUESTIONS[task][0], "label": label} for text, label in found.items()]

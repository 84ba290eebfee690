"""How an article is measured: five sub-scores of 0 to 10, computed from the text and nothing else. Frozen.

    accuracy      30 %   every fact kept, in words of its own; no number and no name that the facts do not hold
    readability   25 %   Flesch's reading ease by textstat's counts and pyphen's hyphenation, and no long sentences
    engagement    20 %   opening, headings, rhythm of the sentences, call to action
    search        15 %   the term in title, first paragraph, a heading; density within bounds; the further terms
    style         10 %   the rules of guide.md

Only paragraphs are prose: lists, tables, quotes, code, comments and headings keep no facts and make nothing readable.
Each sub-score is multiplied by `substance`, the share of prose that a text needs at least, so that a text which
is a word, a list or a row of headings scores next to nothing in all five. A reader's judgement it is not: a text
that nobody would print is no improvement, whatever its score.
"""

import re
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyphen
import textstat

HERE = Path(__file__).resolve().parent
WEIGHTS = {"accuracy": 30, "readability": 25, "engagement": 20, "search": 15, "style": 10}
WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*|\d+(?:[.:,]\d+)*")
NUMBER = re.compile(r"\d+(?:[.:,]\d+)*")
COUNT_WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
ENOUGH_WORDS = 300  # of prose; an article has more
ENOUGH_DISTINCT = 130  # different words among the first ENOUGH_WORDS; the shipped draft has 135 in 246
SMALL_WORDS = set(  # what holds English together; a heap of nouns, names or invented words has few of them
    "a about across after all an and another any are as at be because been before but by can could did do does "
    "down each for from had has have he her his how i if in into is it its more most no nobody not of off on "
    "once one or other out over she so some such than that the their them then there they this through to "
    "under until up was were what when where which who while why will with would you your".split()
)
ACTS = "see check plan come bring take look read try pick find ask step write open go".split()


@dataclass(frozen=True)
class Facts:
    """What an article must hold."""

    facts: tuple  # tuples of words that come together in one sentence
    lines: frozenset  # the facts as they are written down, which keep nothing when copied
    words: frozenset  # all words and numbers of the file, in small letters
    title: str
    term: str
    also: tuple
    action: str


@dataclass(frozen=True)
class Text:
    """An article taken apart."""

    title: str
    headings: tuple
    paragraphs: tuple  # each a tuple of sentences
    source: str

    @property
    def sentences(self):
        return [sentence for paragraph in self.paragraphs for sentence in paragraph]

    @property
    def prose(self):
        return "\n\n".join(" ".join(paragraph) for paragraph in self.paragraphs)


# == READING ==


def words(text):
    return WORD.findall(text)


def small(text):
    return [word.lower() for word in words(text)]


def read_facts(source):
    """A file of facts: `title:`, `term:`, `also:`, `action:`, and `- sentence [word, word]` lines."""
    fields = dict(re.findall(r"^(title|term|also|action): (.+)$", source, re.M))
    found = re.findall(r"^- (.+?) \[(.+)\]$", source, re.M)
    facts = tuple(tuple(part.strip() for part in needed.split(",")) for _, needed in found)
    also = tuple(part.strip() for part in fields["also"].split(","))
    lines = frozenset(" ".join(small(line)) for line, _ in found)
    return Facts(facts, lines, frozenset(small(source)), fields["title"], fields["term"], also, fields["action"])


def split_sentences(paragraph):
    joined = " ".join(paragraph.split())
    return tuple(part for part in re.split(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]?[A-Z0-9])", joined) if words(part))


def read_text(source):
    """Headings and paragraphs of a Markdown text; what is no prose is left out."""
    visible = re.sub(r"<!--.*?-->|```.*?```|<[^>]*>", " ", source, flags=re.S)
    headings = re.findall(r"^#{1,6} +(.+?) *$", visible, re.M)
    first = re.match(r"\s*# +(.+?) *$", visible, re.M)
    blocks = [block for block in re.split(r"\n\s*\n|^#{1,6} .*$", visible, flags=re.M) if block.strip()]
    prose = [block for block in blocks if not re.match(r"\s*([-*+>|]|\d+[.)] )", block)]
    paragraphs = tuple(sentences for block in prose if (sentences := split_sentences(block)))
    return Text(first[1] if first else "", tuple(headings[1:] if first else headings), paragraphs, source)


# == SUBSTANCE ==


def substance(text):
    """0 to 1: is there as much prose, in as many different words, as the shortest article has?"""
    said = small(text.prose)
    if not said or not text.sentences:
        return 0.0
    distinct = len(set(said[:ENOUGH_WORDS])) / ENOUGH_DISTINCT
    new = len({" ".join(small(sentence)) for sentence in text.sentences}) / len(text.sentences)
    english = band(sum(word in SMALL_WORDS for word in said) / len(said), 0.35, 0.65, 0.2)
    return min(1.0, len(said) / ENOUGH_WORDS) * min(1.0, distinct) * new**2 * english


def band(value, low, high, reach):
    """1 from low to high, falling to 0 at `reach` outside."""
    outside = max(low - value, value - high, 0)
    return max(0.0, 1 - outside / reach)


# == ACCURACY ==


def kept(fact, said):
    """Whether the words of a fact come together in a sentence, whole; a word may end otherwise (passengers)."""
    for part in fact:
        pattern = r"(?<![\w.:])" + re.escape(part) + r"(?![.:]?\d)" + ("" if part[-1].isdigit() else r"\w{0,2}\b")
        if not re.search(pattern, said, re.I):
            return False
    return True


def inventions(text, facts):
    """Numbers and names, in the whole text, that the facts do not hold."""
    said = "\n".join([text.title, *text.headings, *text.sentences])
    numbers = [number for number in NUMBER.findall(said) if number not in facts.words]
    names = []
    for sentence in text.sentences:
        inner = re.findall(r"(?<=[a-z0-9,;] )[\"'(]?([A-Z][a-z]+)", sentence)
        names += [name for name in inner if name.lower() not in facts.words]
    return sorted(set(numbers)) + sorted(set(names))


def accuracy(text, facts):
    """The share of facts that are kept; every invention takes away as much as 2 facts."""
    own = [sentence for sentence in text.sentences if " ".join(small(sentence)) not in facts.lines]
    held = sum(any(kept(fact, sentence) for sentence in own) for fact in facts.facts)
    return 10 * max(0.0, (held - 2 * len(inventions(text, facts))) / len(facts.facts))


# == READABILITY ==


@cache
def hyphenation():
    """textstat's own fallback; its count of syllables would download a dictionary."""
    return pyphen.Pyphen(lang="en_US")


def syllables(word):
    return len(hyphenation().positions(word)) + 1


def reading_ease(text):
    """Flesch 1948: 206.835 - 1.015 words a sentence - 84.6 syllables a word. Hyphenation finds fewer syllables than
    there are, which makes a text look easier."""
    said = [word for word in small(text.prose) if word.isalpha()]
    a_word = sum(syllables(word) for word in said) / max(len(said), 1)
    return 206.835 - 1.015 * textstat.words_per_sentence(text.prose) - 84.6 * a_word


def readability(text):
    """Plain English: an ease of 70 to 90 by this count; 20 points outside are worth nothing. Sentences of more than 28
    words and of fewer than 3 take their share away, and so does Lix (long words, long sentences) above 40."""
    lengths = [len(words(sentence)) for sentence in text.sentences]
    if not lengths:
        return 0.0
    odd = sum(length > 28 or length < 3 for length in lengths) / len(lengths)
    return 10 * band(reading_ease(text), 70, 90, 20) * max(0.0, 1 - 2 * odd) * band(textstat.lix(text.prose), 0, 40, 20)


# == ENGAGEMENT ==


def opening(text):
    """The first sentence is short, the first paragraph speaks to the reader and names a figure or asks."""
    if not text.paragraphs:
        return 0.0
    first = text.paragraphs[0]
    said = " ".join(first)
    points = [
        4 <= len(words(first[0])) <= 16,
        "you" in small(said) or "your" in small(said),
        "?" in said or NUMBER.search(said) is not None,
        20 <= len(words(said)) <= 70,
    ]
    return sum(points) / len(points)


def headings(text):
    """One for 60 to 250 words of prose, of 3 to 9 words each, no two that begin alike."""
    if not text.headings or not text.sentences:
        return 0.0
    prose_a_heading = len(words(text.prose)) / len(text.headings)
    sized = sum(3 <= len(words(heading)) <= 9 for heading in text.headings) / len(text.headings)
    starts = {small(heading)[0] for heading in text.headings if words(heading)}
    return band(prose_a_heading, 60, 250, 60) * sized * len(starts) / len(text.headings)


def rhythm(text):
    """Sentences of different length, that begin with different words: deviation of 4 to 10 words; of two neighbours no
    two begin alike."""
    lengths = [len(words(sentence)) for sentence in text.sentences]
    if len(lengths) < 2:
        return 0.0
    starts = [small(sentence)[0] for sentence in text.sentences]
    alike = sum(one == other for one, other in zip(starts, starts[1:], strict=False)) / (len(starts) - 1)
    return band(statistics.pstdev(lengths), 4, 10, 4) * max(0.0, 1 - 4 * alike)


def call_to_action(text, facts):
    """The last paragraph asks for one thing, in a sentence that begins with what to do and names what it is about."""
    if len(text.paragraphs) < 2:
        return 0.0
    last = text.paragraphs[-1]
    asks = [sentence for sentence in last if small(sentence)[0] in ACTS]
    named = [sentence for sentence in asks if facts.action.lower() in sentence.lower()]
    return 0.5 * bool(asks) + 0.5 * bool(named)


def engagement(text, facts):
    return 2.5 * (opening(text) + headings(text) + rhythm(text) + call_to_action(text, facts))


# == SEARCH ==


def search(text, facts):
    """Six equal parts: the term in title, first paragraph and a heading; its density; the name in the title; and the
    further terms, each at least once and none above 2 %."""
    term = facts.term.lower()
    said = small(text.prose)
    if not said:
        return 0.0
    prose = " ".join(said)
    density = 100 * len(term.split()) * prose.count(term) / len(said)
    also = [100 * prose.count(other.lower()) / len(said) for other in facts.also]
    parts = [
        term in text.title.lower(),
        set(small(facts.title)) <= set(small(text.title)),
        term in " ".join(text.paragraphs[0]).lower(),
        any(term in heading.lower() for heading in text.headings),
        band(density, 0.8, 2.5, 1) if density else 0.0,
        sum(0 < share <= 2 for share in also) / len(also),
    ]
    return 10 * sum(parts) / len(parts)


# == STYLE ==


def forbidden_words(guide):
    listed = re.search(r"None of these words: (.+?)(?:\n\n|\n- |\Z)", guide, re.S)
    return {word.strip() for word in listed[1].replace("\n", " ").split(",")}


def breaches(text, facts, guide):
    """{rule of the guide: how often it is broken}"""
    said = small(text.prose)
    inner = [word for heading in [text.title, *text.headings] for word in words(heading)[1:]]
    passive = sum(bool(re.search(r"\b(is|are|was|were|been) (\w+ )?\w+ed\b", each)) for each in text.sentences)
    lines = [text.title, *text.headings]
    counted = [word for word in said if word in COUNT_WORDS[1:]]
    return {
        "title": not 4 <= len(words(text.title)) <= 12,
        "sentence case": sum(word[0].isupper() and not is_name(word, facts) for word in inner)
        + sum(line.endswith(".") for line in lines),
        "paragraphs": sum(not 2 <= len(paragraph) <= 5 for paragraph in text.paragraphs),
        "long sentences": sum(len(words(sentence)) > 30 for sentence in text.sentences),
        "figures": len(counted),
        "loud": len(re.findall(r"!|\.\.\.|…|(?<=\S)  +(?=\S)|\b[A-Z]{3,}\b", text.source)),
        "the reader": max(0, 4 - said.count("you") - said.count("your")),
        "the house": sum(said.count(word) for word in ("we", "our", "us")),
        "passive": max(0, round(passive - len(text.sentences) / 5)),
        "words": sum(said.count(word) for word in forbidden_words(guide)),
    }


def is_name(word, facts):
    return word in " ".join([facts.title, *(part for fact in facts.facts for part in fact)])


def style(text, facts, guide):
    """A point for every rule that is kept; one breach leaves half of it, more leave nothing."""
    broken = breaches(text, facts, guide)
    return 10 * sum({0: 1.0, 1: 0.5}.get(int(times), 0.0) for times in broken.values()) / len(broken)


# == ALL ==


def judge(source, facts, guide):
    """(score of 0 to 100, {sub-score: 0 to 10}) of a Markdown text."""
    text = read_text(source)
    share = substance(text)
    raw = {
        "accuracy": accuracy(text, facts),
        "readability": readability(text),
        "engagement": engagement(text, facts),
        "search": search(text, facts),
        "style": style(text, facts, guide),
    }
    scores = {name: round(share * value, 4) for name, value in raw.items()}
    total = sum(WEIGHTS[name] * value for name, value in scores.items()) / 10
    return total, scores


def notes(source, facts, guide):
    """What is missing, invented or against the guide, for the log."""
    text = read_text(source)
    lines = [f"missing: {', '.join(fact)}" for fact in facts.facts if not any(kept(fact, s) for s in text.sentences)]
    lines += [f"not in the facts: {each}" for each in inventions(text, facts)]
    lines += [f"guide: {rule} {int(times)}" for rule, times in breaches(text, facts, guide).items() if times]
    return lines

"""How an article is measured: five sub-scores of 0 to 10, computed from the text and nothing else. Frozen.

    accuracy      30 %   every fact kept, in words of its own; no number and no name that the facts do not hold
    readability   25 %   Flesch's reading ease, no sentence that is too long or too short
    engagement    20 %   opening, headings, rhythm of the sentences, call to action
    search        15 %   the term in title, first paragraph, a heading; density within bounds; the further terms
    style         10 %   the rules of guide.md

Only paragraphs are prose: lists, tables, quotes, code, comments and headings keep no facts and make nothing readable.
Each sub-score is multiplied by `substance`, the share of prose that a text needs at least, so that a text which is a word,
a list or a row of headings scores next to nothing in all five. It stands in this folder, not beside draft.md, since the
frozen files of a ruler lie inside its folder, and two rulers share it.
"""

import re
import statistics
from dataclasses import dataclass

import pyphen

WEIGHTS = {"accuracy": 30, "readability": 25, "engagement": 20, "search": 15, "style": 10}
WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*|\d+(?:[.:,]\d+)*")
ENOUGH_WORDS = 300  # of prose; an article has more
ENOUGH_DISTINCT = 130  # different words among the first ENOUGH_WORDS; the shipped draft has 135 in 246
SMALL_WORDS = set(  # what holds English together; a heap of nouns, names or invented words has few of them
    "a about across after all an and another any are as at be because been before but by can could did do does "
    "down each for from had has have he her his how i if in into is it its more most no nobody not of off on "
    "once one or other out over she so some such than that the their them then there they this through to "
    "under until up was were what when where which who while why will with would you your".split()
)
COUNT_WORDS = "two three four five six seven eight nine ten eleven twelve".split()
ACTS = "see check plan come bring take look read try pick find ask step write open go".split()
HYPHENATION = pyphen.Pyphen(lang="en_US")


@dataclass(frozen=True)
class Text:
    """An article taken apart."""

    source: str
    title: str
    headings: list
    paragraphs: list  # each a list of sentences
    sentences: list
    said: list  # the words of the prose, in small letters


def small(text):
    return [word.lower() for word in WORD.findall(text)]


def read_facts(source):
    """{field: text; also, things, doings: lists; facts: {sentence: words that come together}; words: all of them}"""
    fields = dict(re.findall(r"^(\w+): (.+)$", source, re.M))
    lists = {name: fields[name].split(", ") for name in ("also", "things", "doings") if name in fields}
    facts = {line: needed.split(", ") for line, needed in re.findall(r"^- (.+?) \[(.+)\]$", source, re.M)}
    return {**fields, **lists, "facts": facts, "words": set(small(source))}


def split_sentences(paragraph):
    parts = re.split(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]?[A-Z0-9])", " ".join(paragraph.split()))
    return [part for part in parts if small(part)]


def read_text(source):
    """Headings and paragraphs of a Markdown text; what is no prose is left out."""
    visible = re.sub(r"<!--.*?-->|```.*?```|<[^>]*>", " ", source, flags=re.S)
    headings = re.findall(r"^#{1,6} +(.+?) *$", visible, re.M)
    title = headings.pop(0) if re.match(r"\s*# ", visible) and headings else ""
    blocks = re.split(r"\n\s*\n|^#{1,6} .*$", visible, flags=re.M)
    prose = [block for block in blocks if not re.match(r"\s*([-*+>|]|\d+[.)] )", block)]
    paragraphs = [sentences for block in prose if (sentences := split_sentences(block))]
    sentences = [sentence for paragraph in paragraphs for sentence in paragraph]
    return Text(source, title, headings, paragraphs, sentences, small(" ".join(sentences)))


def band(value, low, high, reach):
    """1 from low to high, falling to 0 at `reach` outside."""
    return max(0.0, 1 - max(low - value, value - high, 0) / reach)


def substance(text):
    """0 to 1: is there as much prose, in as many different words, as the shortest article has?"""
    distinct = len(set(text.said[:ENOUGH_WORDS])) / ENOUGH_DISTINCT
    new = len({" ".join(small(sentence)) for sentence in text.sentences}) / len(text.sentences)
    english = band(sum(word in SMALL_WORDS for word in text.said) / len(text.said), 0.35, 0.65, 0.2)
    return min(1.0, len(text.said) / ENOUGH_WORDS) * min(1.0, distinct) * new**2 * english


# -- the sub-scores, 0 to 1


def kept(needed, sentence):
    """Whether the words of a fact come together in a sentence, whole; a word may end otherwise (passengers)."""
    for part in needed:
        pattern = r"(?<![\w.:])" + re.escape(part) + r"(?![.:]?\d)" + ("" if part[-1].isdigit() else r"\w{0,2}\b")
        if not re.search(pattern, sentence, re.I):
            return False
    return True


def missing(text, facts):
    """The facts that no sentence keeps; one that is copied keeps none."""
    copies = [small(line) for line in facts["facts"]]
    own = [sentence for sentence in text.sentences if small(sentence) not in copies]
    return [needed for needed in facts["facts"].values() if not any(kept(needed, sentence) for sentence in own)]


def inventions(text, facts):
    """Numbers and names, in the whole text, that the facts do not hold."""
    said = "\n".join([text.title, *text.headings, *text.sentences])
    found = [word for word in WORD.findall(said) if word[0].isdigit()]
    for sentence in text.sentences:
        found += re.findall(r"(?<=[a-z0-9,;] )[\"'(]?([A-Z][a-z]+)", sentence)
    return sorted({word for word in found if word.lower() not in facts["words"]})


def accuracy(text, facts):
    """Every invention takes away as much as 2 facts."""
    lost = len(missing(text, facts)) + 2 * len(inventions(text, facts))
    return max(0.0, 1 - lost / len(facts["facts"]))


def readability(text):
    """Plain English: an ease of 70 to 90 (Flesch 1948), 20 points outside being worth nothing; sentences of more than 30
    words and of fewer than 3 take their share away. Hyphenation finds fewer syllables than there are, which makes a text
    look easier."""
    said = [word for word in text.said if word.isalpha()]
    syllables = sum(len(HYPHENATION.positions(word)) + 1 for word in said)
    ease = 206.835 - 1.015 * len(text.said) / len(text.sentences) - 84.6 * syllables / max(len(said), 1)
    odd = sum(not 3 <= len(small(sentence)) <= 30 for sentence in text.sentences) / len(text.sentences)
    return band(ease, 70, 90, 20) * max(0.0, 1 - 2 * odd)


def opening(text):
    """The first sentence is short, the first paragraph speaks to the reader and names a figure or asks."""
    first = text.paragraphs[0]
    said = small(" ".join(first))
    points = [
        4 <= len(small(first[0])) <= 16,
        "you" in said or "your" in said,
        re.search(r"[?\d]", " ".join(first)) is not None,
        20 <= len(said) <= 70,
    ]
    return sum(points) / len(points)


def outline(text):
    """A heading for 60 to 250 words of prose, of 3 to 9 words each, no two that begin alike."""
    if not text.headings:
        return 0.0
    count = len(text.headings)
    sized = sum(3 <= len(small(heading)) <= 9 for heading in text.headings) / count
    varied = len({heading.split()[0] for heading in text.headings}) / count
    return band(len(text.said) / count, 60, 250, 100) * sized * varied


def rhythm(text):
    """Sentences of different length (a deviation of 4 to 10 words), of which no two neighbours begin alike."""
    starts = [small(sentence)[0] for sentence in text.sentences]
    alike = sum(one == other for one, other in zip(starts, starts[1:])) / len(starts)
    deviation = statistics.pstdev(len(small(sentence)) for sentence in text.sentences)
    return band(deviation, 4, 10, 4) * max(0.0, 1 - 4 * alike)


def call_to_action(text, facts):
    """The last paragraph asks for one thing, in a sentence that begins with what to do and names what it is about."""
    asks = [sentence for sentence in text.paragraphs[-1] if small(sentence)[0] in ACTS]
    named = [sentence for sentence in asks if facts["action"] in sentence.lower()]
    return 0.5 * bool(asks) + 0.5 * bool(named)


def engagement(text, facts):
    return (opening(text) + outline(text) + rhythm(text) + call_to_action(text, facts)) / 4


def search(text, facts):
    """The term in title, first paragraph and a heading; its density; the name in the title; the further terms, each at
    least once and none above 2 %."""
    term = facts["term"].lower()
    prose = " ".join(text.said)
    density = 100 * len(term.split()) * prose.count(term) / len(text.said)
    also = [100 * prose.count(other.lower()) / len(text.said) for other in facts["also"]]
    parts = [
        term in text.title.lower(),
        set(small(facts["title"])) <= set(small(text.title)),
        term in " ".join(text.paragraphs[0]).lower(),
        any(term in heading.lower() for heading in text.headings),
        band(density, 0.8, 2.5, 1) * (density > 0),
        sum(0 < share <= 2 for share in also) / len(also),
    ]
    return sum(parts) / len(parts)


def breaches(text, facts, guide):
    """{rule of the guide: how often it is broken}"""
    lines = [text.title, *text.headings]
    names = " ".join([facts["title"], *(word for needed in facts["facts"].values() for word in needed)])
    capitals = [word for line in lines for word in WORD.findall(line)[1:] if word[0].isupper() and word not in names]
    passive = sum(bool(re.search(r"\b(is|are|was|were|been) (\w+ )?\w+ed\b", each)) for each in text.sentences)
    forbidden = small(guide.partition("None of these words:")[2])
    return {
        "title": not 4 <= len(small(text.title)) <= 12,
        "sentence case": len(capitals) + sum(line.endswith(".") for line in lines),
        "paragraphs": sum(not 2 <= len(paragraph) <= 5 for paragraph in text.paragraphs),
        "figures": sum(word in COUNT_WORDS for word in text.said),
        "loud": len(re.findall(r"!|\.\.\.|…|(?<=\S)  +(?=\S)|\b[A-Z]{3,}\b", text.source)),
        "the reader": max(0, 4 - text.said.count("you") - text.said.count("your")),
        "the house": sum(text.said.count(word) for word in ("we", "our", "us")),
        "passive": max(0, round(passive - len(text.sentences) / 5)),
        "words": sum(text.said.count(word) for word in forbidden),
    }


def style(text, facts, guide):
    """A point for every rule that is kept; one breach leaves half of it, more leave nothing."""
    broken = breaches(text, facts, guide)
    return sum({0: 1.0, 1: 0.5}.get(times, 0.0) for times in broken.values()) / len(broken)


# -- all


def judge(source, facts, guide):
    """(points of 0 to 100, {sub-score: 0 to 10}) of a Markdown text, given read_facts() and the text of the guide."""
    text = read_text(source)
    if not text.sentences:
        return 0.0, dict.fromkeys(WEIGHTS, 0.0)
    parts = {
        "accuracy": accuracy(text, facts),
        "readability": readability(text),
        "engagement": engagement(text, facts),
        "search": search(text, facts),
        "style": style(text, facts, guide),
    }
    scores = {name: round(10 * substance(text) * value, 4) for name, value in parts.items()}
    return sum(WEIGHTS[name] * value for name, value in scores.items()) / 10, scores


def notes(source, facts, guide):
    """What is missing, invented or against the guide, as lines."""
    text = read_text(source)
    lines = [f"missing: {', '.join(needed)}" for needed in missing(text, facts)]
    lines += [f"not in the facts: {each}" for each in inventions(text, facts)]
    return lines + [f"guide: {rule} {int(times)}" for rule, times in breaches(text, facts, guide).items() if times]

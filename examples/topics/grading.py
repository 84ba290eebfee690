"""How examples/topics is measured: the worst of the articles that articles.py writes. Frozen.

An article's points are those of the article ruler (prose.py, 0 to 100), times two factors: its length, 2,000 to 3,000
words of prose being right, and its originality. Original is a run of 8 words that is found in no other article, in no
source and nowhere before in the same article; up to a tenth may be shared.
"""

import re
from pathlib import Path

import prose

HERE = Path(__file__).resolve().parent
SHORTEST, LONGEST = 2000, 3000  # words of prose
TOO_LONG = 1000  # words above LONGEST at which an article is worth nothing
RUN = 8  # words
ORIGINAL = 0.9
TOO_COMMON = 0.5  # below ORIGINAL by this much an article is worth nothing


class Unfit(Exception):
    """articles.py gives no text, or another one each time."""


def read_topic(path):
    """What write() gets."""
    source = path.read_text(encoding="utf-8")
    fields = dict(re.findall(r"^(title|term|also|action|things|doings): (.+)$", source, re.M))
    topic = {
        name: value.split(", ") if name in ("also", "things", "doings") else value for name, value in fields.items()
    }
    facts = re.findall(r"^- (.+?) \[", source, re.M)
    return {"name": path.stem, **topic, "facts": facts}


def runs(text):
    """Every 8 words in a row of the prose and the headings, in order."""
    read = prose.read_text(text)
    said = prose.small("\n".join([read.title, *read.headings, read.prose]))
    return [tuple(said[place : place + RUN]) for place in range(len(said) - RUN + 1)]


def source_runs(source):
    said = prose.small(source)
    return {tuple(said[place : place + RUN]) for place in range(len(said) - RUN + 1)}


def originality(text, others):
    """Share of the runs that are in none of the others (sets of runs) and nowhere before in the text."""
    seen = set().union(*others)
    own = 0
    found = runs(text)
    for run in found:
        own += run not in seen
        seen.add(run)
    return own / max(len(found), 1)


def length_factor(count):
    if count < SHORTEST:
        return count / SHORTEST
    return max(0.0, 1 - max(0, count - LONGEST) / TOO_LONG)


def grade(texts, sources, guide):
    """{topic: (points, quality, originality, words)} of {topic: text}, given {topic: source}."""
    grades = {}
    all_runs = {name: set(runs(text)) for name, text in texts.items()}
    from_sources = [source_runs(source) for source in sources.values()]
    for name, text in texts.items():
        others = [found for other, found in all_runs.items() if other != name]
        original = originality(text, [*others, *from_sources])
        quality, _ = prose.judge(text, prose.read_facts(sources[name]), guide)
        count = len(prose.words(prose.read_text(text).prose))
        points = quality * length_factor(count) * prose.band(original, ORIGINAL, 1, TOO_COMMON)
        grades[name] = (points, quality, original, count)
    return grades


def write_all(write):
    """{topic: text}; a text must be a plain str, and the same when it is asked for again, in another order."""
    paths = sorted((HERE / "sources").glob("*.md"))
    texts = {path.stem: write(read_topic(path)) for path in paths}
    again = {path.stem: write(read_topic(path)) for path in reversed(paths)}
    for name, text in texts.items():
        if type(text) is not str:
            raise Unfit(f"write() gives {type(text).__name__} for {name}, not str")
        if text != again[name]:
            raise Unfit(f"write() gives another text for {name} when it is called again")
    return texts


def measure(write):
    """(points of the worst article, its figures); every article's grades go into the log."""
    texts = write_all(write)
    sources = {name: (HERE / "sources" / f"{name}.md").read_text(encoding="utf-8") for name in texts}
    guide = (HERE / "guide.md").read_text(encoding="utf-8")
    grades = grade(texts, sources, guide)
    for name, (points, quality, original, count) in grades.items():
        print(f"{name}: {points:.2f} points, quality {quality:.2f}, originality {original:.3f}, {count} words")
    worst = min(grades, key=grades.get)
    for line in prose.notes(texts[worst], prose.read_facts(sources[worst]), guide):
        print(f"{worst}: {line}")
    points, quality, original, count = grades[worst]
    _, parts = prose.judge(texts[worst], prose.read_facts(sources[worst]), guide)
    return points, {"worst": worst, "originality": round(original, 4), "words": count, **parts}

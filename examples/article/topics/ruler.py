"""The ruler of examples/article/topics: the points of the worst article that articles.py writes. Frozen.

    uv run ../../../referee run     measures HEAD, in a few seconds

An article's points are those of one article (prose.py, 0 to 100), times two factors: its length, 2,000 to 3,000 words of
prose being right, and its originality. Original is a run of 8 words that is found in no other article, in no source and
nowhere before in the same article; up to a tenth may be shared.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

import prose  # noqa: E402  (found by the line above)

import referee  # noqa: E402

SHORTEST, LONGEST = 2000, 3000  # words of prose; half as many, or 500 more, are worth half
RUN = 8  # words
ORIGINAL = 0.9  # share of an article's runs; half of that share below it is worth nothing


def read_sources():
    """{topic: the text of its source}"""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((HERE / "sources").glob("*.md"))}


def write_all(write, sources):
    """{topic: article}. RefereeError unless write() gives plain text, the same when it is called in another order."""
    texts = {name: write(prose.read_facts(source)) for name, source in sources.items()}
    for name, source in reversed(sources.items()):
        kind = type(texts[name])
        if kind is not str:
            raise referee.RefereeError(f"write() gives {kind.__name__} for {name}, not str; mend articles.py")
        if write(prose.read_facts(source)) != texts[name]:
            raise referee.RefereeError(f"write() gives another text for {name} when called again; mend articles.py")
    return texts


def runs(text):
    """Every 8 words in a row."""
    said = prose.small(text)
    return [tuple(said[place : place + RUN]) for place in range(len(said) - RUN + 1)]


def originality(text, others):
    """Share of the runs of a text that are in none of the others and nowhere before in it."""
    seen = {run for other in others for run in runs(other)}
    found = runs(text)
    own = 0
    for run in found:
        own += run not in seen
        seen.add(run)
    return own / max(len(found), 1)


def length_factor(words):
    return min(1.0, words / SHORTEST) * prose.band(words, 0, LONGEST, 1000)


def grade(texts, sources, guide):
    """{topic: (points, figures)} of {topic: article}."""
    grades = {}
    articles = {name: prose.read_text(text) for name, text in texts.items()}
    shown = {name: "\n".join([each.title, *each.headings, *each.sentences]) for name, each in articles.items()}
    for name, text in texts.items():
        others = [*sources.values(), *(other for topic, other in shown.items() if topic != name)]
        original = originality(shown[name], others)
        words = len(articles[name].said)
        quality, parts = prose.judge(text, prose.read_facts(sources[name]), guide)
        points = quality * length_factor(words) * prose.band(original, ORIGINAL, 1, ORIGINAL / 2)
        grades[name] = (points, {"topic": name, "originality": round(original, 4), "words": words, **parts})
    return grades


def worst():
    """(points, figures) of the worst article; the log has those of all, what the worst one lacks, and its text."""
    import articles

    sources = read_sources()
    guide = (HERE / "guide.md").read_text(encoding="utf-8")
    texts = write_all(articles.write, sources)
    grades = grade(texts, sources, guide)
    for name, (points, figures) in grades.items():
        print(f"{points:.2f} points: {figures}")
    name = min(grades, key=lambda topic: grades[topic][0])
    print(*prose.notes(texts[name], prose.read_facts(sources[name]), guide), texts[name], sep="\n")
    return grades[name]


if __name__ == "__main__":
    referee.measure(
        worst,
        metric="points",
        lower_is_better=False,
        edits=["articles.py"],
        frozen=["prose.py", "guide.md", "sources"],
        perfect=100,
        budget=60,
    )

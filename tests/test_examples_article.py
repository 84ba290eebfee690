"""examples/article and its topics: what the points reward, and what a degenerate text gets."""

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARTICLE = ROOT / "examples/article"
TOPICS = ARTICLE / "topics"


def load_ruler():
    spec = importlib.util.spec_from_file_location("ruler_of_topics", TOPICS / "ruler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ruler = load_ruler()
prose = ruler.prose
SOURCE, DRAFT = ((ARTICLE / name).read_text(encoding="utf-8") for name in ("facts.md", "draft.md"))
GUIDE = (TOPICS / "guide.md").read_text(encoding="utf-8")
FACTS = prose.read_facts(SOURCE)
GOOD = """\
# Little Harrow ferry: a river ferry that runs on a weir

You stand at the bank, and the boat is on its way. The river ferry at Little Harrow needs 6 minutes for its
crossing. In those minutes you cover 310 metres of water, with no bridge in sight and nothing to do but look.

## A parish keeps its boat afloat

People have come over this way since 1897. The parish of Little Harrow owns the boat, and it has never thought of
selling. Why should it? When the flood of 1954 took the old landing, the village built a new one in 5 weeks.

At the helm you will meet Marta Vane, who has steered for 22 years. She knows each child by name. Ask her about the
herons if you have time.

## What drives the river ferry today

Since 2019 the boat has run on an electric motor, and the weir at Oxley makes the power for it. You hear the water
and not much else. A full battery lasts for 58 trips across, so the boat never has to stop in the middle of a long
day.

High water is another matter. Once the river stands above 3.4 metres, the boat stays tied up. A red flag at the
landing then tells you to turn back.

## When to come and what to pay

From April to October the boat runs every day. The first one leaves at 7:10 and takes the children to school. After
supper there is still time, because the last boat goes at 21:40.

There is room for 46 passengers on 2 long benches. A ticket costs 2 crowns, and children under 8 pay nothing. Bring
your bicycles on weekdays, when they travel free.

## Where the other bank leads

Step off on the far side and turn left. There the path to Fenwick Mill begins, flat and dry and shaded by willows.
In summer you can walk it in sandals, and you will be back for the evening boat.

You need no plan for such a day. Still, the boat does not wait, and the walk home by road is long. Check the
timetable before you set out, and leave the car at home.

"""
PASTED = " ".join(line[2:].split(" [")[0] + "." for line in SOURCE.splitlines() if line.startswith("- "))
DEGENERATE = {
    "nothing": "",
    "one word": "ferry " * 600,
    "one word as sentences": "Ferry ferry ferry ferry ferry. " * 120,
    "one sentence": "# The Little Harrow river ferry\n\n"
    + "You can take the river ferry to the far bank in 6 minutes. " * 40,
    "headings": "\n\n".join(f"## The river ferry at Little Harrow, part {number}" for number in range(80)),
    "the facts as a list": SOURCE,
    "the facts in a row": f"# Little Harrow river ferry\n\n{PASTED}\n",
    "the facts again and again": f"# Little Harrow river ferry\n\n{PASTED}\n\n" * 5,
    "the style guide": GUIDE,
    "the good text as a comment": f"# Little Harrow river ferry\n\n<!--\n{GOOD}\n-->\n",
    "the good text in a comment with an arrow": f"# Little Harrow river ferry\n\n<!-- >\n{GOOD}\n-->\n",
    "names and numbers": "# Little Harrow river ferry\n\n" + " ".join(sorted(FACTS["words"])) + ".\n",
}


@functools.cache
def judge(text):
    return prose.judge(text, FACTS, GUIDE)


def changed(old, new):
    """The good text's sub-scores after a change."""
    flat = GOOD.replace("\n\n", "@@").replace("\n", " ").replace("@@", "\n\n")
    assert old in flat, old
    return judge(flat.replace(old, new))[1]


def breaches(text):
    return prose.breaches(prose.read_text(text), FACTS, GUIDE)


# == one article


def test_weights_are_a_hundred():
    assert sum(prose.WEIGHTS.values()) == 100


def test_draft_has_room():
    assert 20 < judge(DRAFT)[0] < 50


def test_good_text_scores_high():
    assert judge(GOOD)[0] > 90


def test_score_is_the_weighted_sum():
    points, scores = judge(DRAFT)
    assert points == pytest.approx(sum(prose.WEIGHTS[name] * value / 10 for name, value in scores.items()))


@pytest.mark.parametrize("name", prose.WEIGHTS)
@pytest.mark.parametrize("text", DEGENERATE)
def test_degenerate_text_scores_badly(text, name):
    assert judge(DEGENERATE[text])[1][name] < min(3, judge(GOOD)[1][name] / 3)


@pytest.mark.parametrize("text", DEGENERATE)
def test_degenerate_text_scores_worse_than_the_draft(text):
    assert judge(DEGENERATE[text])[0] < judge(DRAFT)[0] / 2


def test_no_network_is_needed():
    """Counts of syllables by other libraries download a dictionary."""
    watch = "import sys; sys.addaudithook(lambda event, _: event.startswith('socket.') and sys.exit(event))"
    code = f"{watch}; import ruler; ruler.quality()"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=ARTICLE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_lost_fact_costs():
    assert changed("46 passengers", "a lot of passengers")["accuracy"] < 10


def test_an_invented_number_costs_more_than_a_lost_fact():
    lost = changed("46 passengers", "a lot of passengers")["accuracy"]
    assert changed("46 passengers", "48 passengers")["accuracy"] < lost


def test_an_invented_name_costs():
    assert changed("with no bridge in sight", "with Castle Dunmore in sight")["accuracy"] < 8


def test_a_fact_must_stand_in_one_sentence():
    assert changed("a new one in 5 weeks", "a new one. It took 5 weeks")["accuracy"] < 10


@pytest.mark.parametrize(
    "sentence, count", [("The crossing is 310 metres.", 0), ("You cover 310 metres on the crossing.", 1)]
)
def test_a_copied_sentence_keeps_no_fact(sentence, count):
    missing = prose.missing(prose.read_text(f"# A\n\n{sentence} You see it.\n"), FACTS)
    assert len(missing) == len(FACTS["facts"]) - count


PARTS = [("46", "146"), ("3.4", "13.4"), ("6", "6.5"), ("7:10", "17:10"), ("path", "pathology")]


@pytest.mark.parametrize("part", [part for part, _ in PARTS])
def test_whole_number_or_word_is_a_fact(part):
    assert prose.kept([part], f"there are {part} here")


@pytest.mark.parametrize("part, said", PARTS)
def test_part_of_a_number_or_word_is_no_fact(part, said):
    assert not prose.kept([part], f"there are {said} here")


def test_long_words_and_sentences_read_badly():
    heavy = GOOD.replace(" and ", ", notwithstanding considerable organisational difficulties, and ")
    assert judge(heavy)[1]["readability"] < judge(GOOD)[1]["readability"] / 2


def test_chopped_sentences_read_badly():
    chopped = re.sub(r",? (and|the|in|on|with) (\w)", lambda match: f". {match[1].capitalize()} {match[2]}", GOOD)
    assert judge(chopped)[1]["readability"] < judge(GOOD)[1]["readability"]


def test_call_to_action_counts():
    assert changed("Check the timetable before you set out, and", "So")["engagement"] < 8


def test_opening_counts():
    assert changed("You stand at the bank, and the boat is on its way.", "Boats.")["engagement"] < 10


def test_headings_count():
    assert judge("\n".join(line for line in GOOD.splitlines() if not line.startswith("## ")))[1]["engagement"] <= 7.5


def test_even_sentences_have_no_rhythm():
    even = "# A\n\n" + " ".join(f"You see boat number {n} on the river today." for n in range(40))
    assert prose.rhythm(prose.read_text(even)) == 0


def test_term_in_the_title_counts():
    assert changed("a river ferry that runs on a weir", "a boat that runs on a weir")["search"] < 9


def test_term_too_often_costs():
    assert changed("the boat", "the river ferry")["search"] < judge(GOOD)[1]["search"]


def test_good_text_breaks_no_rule():
    assert sum(breaches(GOOD).values()) == 0


@pytest.mark.parametrize(
    "old, new, rule",
    [
        ("Little Harrow ferry: a river ferry that runs on a weir", "River ferry", "title"),
        ("What drives the river ferry today", "What Drives the River Ferry Today", "sentence case"),
        ("High water is another matter.", "High water is another matter.\n\n", "paragraphs"),
        ("2 long benches", "two long benches", "figures"),
        ("Why should it?", "Why should it!", "loud"),
        ("ou", "oo", "the reader"),
        ("You need no plan", "We need no plan", "the house"),
        (" the ", " the boat was needed by the ", "passive"),
        ("You need no plan", "You really need no plan", "words"),
    ],
)
def test_a_rule_that_is_broken_counts(old, new, rule):
    assert breaches(GOOD.replace(old, new))[rule] > 0


@pytest.mark.parametrize("line", ["missing: battery, 58", "not in the facts: 60", "guide: figures 1"])
def test_notes_say_what_is_missing(line):
    assert line in prose.notes(DRAFT, FACTS, GUIDE)


# == many articles


@pytest.fixture(scope="module")
def sources():
    return ruler.read_sources()


@pytest.fixture(scope="module")
def texts(sources):
    import articles

    return ruler.write_all(articles.write, sources)


def worst(texts, sources):
    return min(points for points, _ in ruler.grade(texts, sources, GUIDE).values())


def test_shipped_template_works_and_has_room(texts, sources):
    assert 1 < worst(texts, sources) < 30


def test_score_is_the_worst_article(texts, sources):
    assert ruler.worst()[0] == worst(texts, sources)


@pytest.mark.parametrize(
    "count, factor", [(0, 0), (1000, 0.5), (2000, 1), (3000, 1), (3500, 0.5), (4000, 0), (9000, 0)]
)
def test_length(count, factor):
    assert ruler.length_factor(count) == factor


def distinct(count, start=0):
    """Words that are in no other range."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    numbers = range(start, start + count)
    return " ".join(f"word{letters[n % 26]}{letters[n // 26 % 26]}{letters[n // 676]}" for n in numbers)


def test_a_text_of_its_own_is_original():
    assert ruler.originality(distinct(500), [distinct(500, 600)]) == 1


def test_a_copied_half_is_not():
    assert ruler.originality(distinct(500), [distinct(250)]) == pytest.approx(0.5, abs=0.02)


def test_a_text_that_repeats_itself_is_not():
    assert ruler.originality(f"{distinct(300)} {distinct(300)}", []) == pytest.approx(0.5, abs=0.02)


def test_seven_words_may_be_shared():
    assert ruler.originality(distinct(100), [distinct(7, 50)]) == 1


def test_the_same_article_for_all_topics_is_worth_nothing(texts, sources):
    assert worst(dict.fromkeys(texts, texts["mill"]), sources) == 0


def test_the_sources_as_articles_are_worth_nothing(sources):
    assert worst(sources, sources) == 0


def test_length_by_repetition_is_worth_little(texts, sources):
    assert worst({name: text * 6 for name, text in texts.items()}, sources) < worst(texts, sources)


def test_words_without_sense_are_worth_nothing(sources):
    made_up = {name: "# A visit\n\n" + distinct(2500, 3000 * number) for number, name in enumerate(sources)}
    assert worst(made_up, sources) == 0


def test_what_is_not_shown_makes_nothing_original(texts, sources):
    hidden = {name: f"{text}\n<!-- {distinct(2500, 3000 * n)} -->\n" for n, (name, text) in enumerate(texts.items())}
    assert worst(hidden, sources) <= worst(texts, sources)


def test_template_must_write_text(sources):
    with pytest.raises(ruler.referee.RefereeError, match="not str"):
        ruler.write_all(lambda topic: None, sources)


def test_template_must_write_the_same_again(sources):
    count = iter(range(100))
    with pytest.raises(ruler.referee.RefereeError, match="another text"):
        ruler.write_all(lambda topic: str(next(count)), sources)

"""Pages that nobody has seen, and what they say. Frozen.

A page is drawn piece by piece, each piece in two languages: that of templates.py, and a Python expression that says the
same, so that no second engine is needed to know what is right. Every page holds the same pieces, in another order and with
other names, words and numbers: all cost about the same, and none comes twice.
"""

import html
import random
import re
import string
from dataclasses import dataclass
from types import SimpleNamespace as Seen  # an entry is written as in a template

LOOPS = 3  # of a page
GOODS = 8  # that each loop goes through
NAMES = "title user name home street goods price stock tags tag item kept card more".split()  # others on every page
NAME = re.compile(rf"\b({'|'.join(NAMES)})\b")
CARDS = {  # in the template's language, and in Python
    "text": ["title", "user.name", "user.home.street", "item.name", "item.name"],
    "number": ["user.stock", "item.price", "item.stock"],
    "sign": ["<", ">", "<=", ">=", "==", "!="],
    "text filter": [
        ("upcase", "{}.upper()"),
        ("downcase", "{}.lower()"),
        ("capitalize", "{}.capitalize()"),
        ("escape", "escape({})"),
        ("append: '|:!'", "({} + '|:!')"),
        ("replace: 'a', \"it's\"", '{}.replace("a", "it\'s")'),
        ("truncate: 14", "({0} if len({0}) <= 14 else {0}[:11] + '...')"),
        ("default: 'none'", "({} or 'none')"),
    ],
    "number filter": [
        ("plus: 75", "str({} + 75)"),
        ("times: 3", "str({} * 3)"),
        ("money", "format({} / 100, ',.2f')"),
        ("append: ' EUR'", "(str({}) + ' EUR')"),
    ],
}


@dataclass(frozen=True)
class Page:
    source: str
    partials: dict  # {name: source}
    visitors: list  # the data that it is rendered with, all of one shape
    say: str  # the same page as a Python expression
    seen: list  # the same data, for that expression

    def texts(self):
        """What it says to each visitor."""
        code = compile(self.say, "page", "eval")
        return [eval(code, {"escape": html.escape, **vars(seen)}) for seen in self.seen]


class Drawer:
    """Draws pieces, (template, Python expression). Of every kind of card all come up before one comes again."""

    def __init__(self, rng):
        self.rng = rng
        self.decks = {kind: [] for kind in CARDS}

    def card(self, kind):
        if not self.decks[kind]:
            self.decks[kind] = self.rng.sample(CARDS[kind], len(CARDS[kind]))
        return self.decks[kind].pop()

    def output(self, kind):
        """A text or a number through two filters."""
        path = self.card(kind)
        first, change = self.card(f"{kind} filter")
        second, finish = self.card("text filter")
        return f"{{{{ {path} | {first} | {second} }}}}", finish.format(change.format(path))

    def assign(self):
        path = self.card("number")
        return f"{{% assign kept = {path} | plus: item.stock %}}{{{{ kept }}}}", f"str({path} + item.stock)"

    def tags(self):
        """A loop within the loop."""
        name, change = self.card("text filter")
        source = (
            f"{{% for tag in item.tags %}}{{{{ tag | {name} }}}}{{% if forloop.last %}}+{{% endif %}}{{% endfor %}}"
        )
        return source, f"''.join({change.format('tag')} for tag in item.tags) + '+'"

    def include(self):
        path = self.card("number")
        source = f"{{% include 'card' more: {path}, tag: 'it | is' %}}"
        return source, f"'[' + escape(title) + ', it | is, ' + str({path}) + ']'"

    def condition(self):
        """`and` and `or` bind from right to left."""
        path = self.card("number")
        one, two, three = (f"{path} {self.card('sign')} {number(self.rng)}" for _ in range(3))
        left, right = self.rng.choices(["and", "or"], k=2)
        return f"{one} {left} {two} {right} {three}", f"{one} {left} ({two} {right} {three})"

    def branch(self):
        conditions = [self.condition(), self.condition()]
        rows = [self.row([self.output("text"), self.output("number")]) for _ in range(3)]
        (one, if_one), (two, if_two) = conditions
        (first, say_first), (second, say_second), (third, say_third) = rows
        source = f"{{% if {one} %}}{first}{{% elsif {two} %}}{second}{{% else %}}{third}{{% endif %}}"
        return source, f"({say_first} if {if_one} else {say_second} if {if_two} else {say_third})"

    def loop(self):
        """All kinds of pieces, for each of the goods."""
        pieces = [self.output("text"), self.output("number"), self.assign(), self.tags(), self.include(), self.branch()]
        body, say = self.row(pieces)
        return f"{{% for item in goods %}}{body}{{% else %}}none{{% endfor %}}", f"''.join({say} for item in goods)"

    def row(self, pieces):
        """Pieces in any order, each with a word behind it."""
        order = [(*piece, word(self.rng)) for piece in self.rng.sample(pieces, len(pieces))]
        source = "".join(f"{text} {behind}\n" for text, _, behind in order)
        return source, " + ".join(f"{say} + ' {behind}\\n'" for _, say, behind in order)


def word(rng):
    return "".join(rng.choices(string.ascii_lowercase, k=6))


def number(rng):
    """One of a few, so that some are equal."""
    return rng.randrange(1000, 1004)


def draw_data(rng):
    """What a visitor sees: capitals, something to escape, numbers."""

    def thing(**more):
        name = f"{word(rng).capitalize()} & <{word(rng)}>"
        return Seen(name=name, price=number(rng), stock=number(rng), **more)

    goods = [thing(tags=[word(rng) for _ in range(3)]) for _ in range(GOODS)]
    return Seen(title=thing().name, user=thing(home=Seen(street=thing().name)), goods=goods)


def renamed(value, names):
    if isinstance(value, Seen):
        return {names[name]: renamed(item, names) for name, item in vars(value).items()}
    return [renamed(item, names) for item in value] if isinstance(value, list) else value


def draw_page(seed, visitors):
    """The Page of a seed, for a number of visitors."""
    rng = random.Random(seed)
    drawer = Drawer(rng)
    source, say = drawer.row([drawer.loop() for _ in range(LOOPS)])
    seen = [draw_data(rng) for _ in range(visitors)]
    names = {name: word(rng) for name in NAMES}
    card = "[{{ title | escape }}, {{ tag }}, {{ more }}]"
    source, card = (NAME.sub(lambda found: names[found[0]], text) for text in (source, card))
    return Page(source, {names["card"]: card}, [renamed(each, names) for each in seen], say, seen)

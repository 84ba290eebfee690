"""How examples/speed is measured: the pages' time in units of a fixed loop, and whether every output is right. Frozen.

A round loads templates.py anew and renders every page for VISITORS visitors. Between two pages the calibration loop
runs; a page's time is divided by the mean of the loops before and after it. The score is the sum over the pages of the
median over the rounds. Both are seconds of CPU time of this process: waiting for a core is not counted, and what slows
the core (a neighbour, heat, a lower clock) slows the loop as much. Measured on 2 cores, 4 scores of 15 rounds each,
mean and sd: 10.46 and 0.01 with the machine idle, 10.46 and 0.11 beside four busy processes; by the wall clock 10.43
and 0.07, then 12.89 and 3.72.

What is rendered has not been seen before: every round adds words of its own to pages, partials and data, shuffles the
lists and changes the numbers, from the operating system's randomness. What was right is worked out afterwards by
reference.py, the engine as it was shipped, and every text that was timed is compared.
"""

import ast
import copy
import gc
import importlib.util
import json
import random
import statistics
import string
import sys
import threading
import tracemalloc
from pathlib import Path
from time import process_time  # this name stays what it is, whatever happens to the module

HERE = Path(__file__).resolve().parent
VISITORS = 4  # data sets for which a page is rendered in one round, as a server renders a page again and again


class WrongOutput(Exception):
    """The engine is not measured: what it made is not what the shipped one makes, or it is no plain engine."""


def require_plain(path):
    """The standard library is all that an engine may import: not the reference, not this file, nothing compiled."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        else:
            continue
        for name in names:
            if name.split(".")[0] not in sys.stdlib_module_names:
                raise WrongOutput(
                    f"{path.name} line {node.lineno} imports {name}; an engine imports the standard library"
                )


def load(path):
    """A module of its own, without a trace in sys.modules: nothing is carried from round to round."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


def read_pages(folder):
    return {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted(folder.iterdir())
        if path.suffix in (".html", ".txt")
    }


class Calibration:
    """A fixed loop of the kind of work that an engine does: the shipped engine renders one page as it lies in the
    repository. It spreads over as much code and memory as what is measured, so a busy machine slows both alike; a small
    loop that stays in the nearest cache did not (the ratio rose by 6 % under load)."""

    def __init__(self, reference):
        self.engine = reference.Engine(read_pages(HERE / "pages/partials"))
        self.source = read_pages(HERE / "pages")["shop"]
        self.data = json.loads((HERE / "pages/data.json").read_text(encoding="utf-8"))

    def seconds(self):
        start = process_time()
        self.engine.render(self.source, self.data)
        return process_time() - start


# == INPUTS THAT NOBODY HAS SEEN ==


def nonce(rng):
    return "".join(rng.choices(string.ascii_lowercase, k=6))


def salted(source, rng):
    """The same page with a word of this round on every line: no text of it was there before."""
    return source.replace("\n", f" {nonce(rng)}\n")


def varied(value, rng):
    """Data of the same shape and size: phrases get a word more, large numbers change, lists of entries are shuffled."""
    if isinstance(value, dict):
        return {key: varied(item, rng) for key, item in value.items()}
    if isinstance(value, list):
        items = [varied(item, rng) for item in value]
        if items and isinstance(items[0], dict):
            rng.shuffle(items)
        return items
    if isinstance(value, str) and " " in value.strip():
        return f"{value} {nonce(rng)}"
    if isinstance(value, int) and value >= 1000:
        return rng.randrange(1000, 9999)
    return value


# == RIGHT OR WRONG ==


def outcome(module, source, data, partials):
    """The text, or the name of the error."""
    try:
        return module.Engine(partials).render(source, data)
    except module.TemplateError:
        return module.TemplateError  # told apart from any text
    except RecursionError:
        return RecursionError


def require_same(got, want, what):
    """A text that is not a plain str could do its work later, when nobody looks at the clock."""
    if type(got) is not type(want):
        raise WrongOutput(f"wrong output: {what} gives {type(got).__name__}, not {type(want).__name__}")
    if got != want:
        place = next((n for n, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
        raise WrongOutput(
            f"wrong output: {what}, at character {place}: {got[place : place + 40]!r}, not {want[place : place + 40]!r}"
        )


def check_golden(module):
    """The pages of the repository, and cases.json: [what, source, data, text or null for a TemplateError]."""
    data = json.loads((HERE / "pages/data.json").read_text(encoding="utf-8"))
    partials = read_pages(HERE / "pages/partials")
    golden = read_pages(HERE / "golden")
    for name, source in read_pages(HERE / "pages").items():
        require_same(module.Engine(partials).render(source, data), golden[name], f"page {name}")
    for what, source, values, want in json.loads((HERE / "cases.json").read_text(encoding="utf-8")):
        got = outcome(module, source, values, {"loop": "{% include 'loop' %}", "name": "<{{ name }}>"})
        if (got is module.TemplateError) != (want is None):
            raise WrongOutput(
                f"wrong output: {what}: {source!r} must {'' if want is None else 'not '}raise TemplateError"
            )
        if want is not None:
            require_same(got, want, what)


def check_random(module, reference, rng, count):
    """Templates nobody wrote: whatever the language allows must come out as it did."""
    data = {
        "n": 7,
        "x": 2.5,
        "yes": True,
        "no": False,
        "nothing": None,
        "text": "a <b> & c",
        "empty": "",
        "words": ["pear", "Fig", "apple"],
        "items": [{"name": "one", "n": 1, "tags": ["t"]}, {"name": "two", "n": 2, "tags": []}, {"name": "3", "n": 3}],
    }
    partials = {"card": "[{{ item.name }}{{ extra }}]", "sets": "{% assign kept = n | plus: 1 %}{{ kept }}"}
    for _ in range(count):
        source = random_template(rng, 3)
        require_same(
            module.Engine(partials).render(source, data), reference.Engine(partials).render(source, data), source
        )


WORDS = (
    "n x yes no nothing text empty words items item item.name item.tags items.first.name items.1.n words.size missing.deep"
    " kept forloop.index forloop.last forloop.rindex words.last 3 -1 0.5 'b' 'Fig' true false nil"
).split()
WORDS += ["'two, words'", '"it | is"']
FILTERS = [
    "upcase",
    "downcase",
    "capitalize",
    "escape",
    "strip",
    "size",
    "first",
    "last",
    "reverse",
    "sort",
    "money",
    "append: 'z'",
]
FILTERS += [
    "append: n",
    "prepend: text",
    "replace: 'a', 'u'",
    "replace: 'e'",
    "split: ' '",
    "join: '+'",
    "truncate: 4",
    "default: 'd'",
]
FILTERS += ["plus: 2", "minus: x", "times: n", "map: 'name'", "sort: 'name'", "truncate: n, '~'", "join", "split: ''"]


def random_expression(rng):
    return " | ".join([rng.choice(WORDS), *rng.choices(FILTERS, k=rng.choice([0, 0, 1, 1, 2, 3]))])


def random_condition(rng):
    parts = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        operator = rng.choice(["==", "!=", "<", ">", "<=", ">=", "contains"])
        parts.append(rng.choice([rng.choice(WORDS), f"{rng.choice(WORDS)} {operator} {rng.choice(WORDS)}"]))
        parts.append(rng.choice(["and", "or"]))
    return " ".join(parts[:-1])


def random_template(rng, depth):
    """A right template: text, output, and tags within tags as deep as `depth`."""
    pieces = []
    for _ in range(rng.randint(1, 4)):
        if depth and rng.random() < 0.45:
            pieces.append(random_block(rng, depth))
        else:
            pieces.append(random_piece(rng))
    return "".join(pieces)


def random_piece(rng):
    """Anything that holds nothing else."""
    name = rng.choice(["kept", "n", "item"])
    pieces = [
        f" {nonce(rng)}\n",
        "{{ " + random_expression(rng) + " }}",
        f"{{% assign {name} = {random_expression(rng)} %}}",
        "{% include 'sets' %}",
        "{% include 'card' %}",
        "{% include 'card' item: items.1, extra: n %}",
        "{% comment %}{% if %}{{ }}{% endcomment %}",
    ]
    return rng.choice(pieces)


def random_block(rng, depth):
    """A tag with others in it."""
    inner = random_template(rng, depth - 1)
    other = random_template(rng, depth - 1)
    one = random_condition(rng)
    two = random_condition(rng)
    items = rng.choice(["items", "words", "nothing", "text"])
    start = rng.choice(["1", "n", "-2"])
    blocks = [
        f"{{% if {one} %}}{inner}{{% elsif {two} %}}{other}{{% else %}}-{{% endif %}}",
        f"{{% unless {one} %}}{inner}{{% else %}}{other}{{% endunless %}}",
        f"{{% for item in {items} %}}{inner}{{% else %}}{other}{{% endfor %}}",
        f"{{% for n in ({start}..3) limit: 2 %}}{{{{ n }}}}{inner}{{% endfor %}}",
    ]
    return rng.choice(blocks)


# == TIME AND MEMORY ==


def time_page(module, source, partials, visitors):
    """(seconds, texts) of one page rendered for all visitors by a new engine."""
    gc.collect()
    gc.disable()  # as timeit does: a collection falls on whoever happens to allocate next
    try:
        start = process_time()
        engine = module.Engine(partials)
        texts = [engine.render(source, data) for data in visitors]
        seconds = process_time() - start
    finally:
        gc.enable()
    return seconds, texts


def time_round(path, reference, calibration, rng):
    """{page: its time in calibration loops}, after every text of the round was found right."""
    module = load(path)
    pages = {name: salted(source, rng) for name, source in read_pages(HERE / "pages").items()}
    partials = {name: salted(source, rng) for name, source in read_pages(HERE / "pages/partials").items()}
    data = json.loads((HERE / "pages/data.json").read_text(encoding="utf-8"))
    ratios = {}
    before = calibration.seconds()
    for name, source in pages.items():
        visitors = [varied(data, rng) for _ in range(VISITORS)]
        untouched = copy.deepcopy(visitors)
        seconds, texts = time_page(module, source, dict(partials), visitors)
        after = calibration.seconds()
        ratios[name] = 2 * seconds / (before + after)
        before = after
        if visitors != untouched:
            raise WrongOutput(f"wrong output: page {name} changed the data it was given")
        for text, values in zip(texts, untouched, strict=True):
            require_same(text, reference.Engine(partials).render(source, values), f"page {name} of a timed round")
    return ratios


def peak_memory(path, rng):
    """KiB at the highest moment of one rendering of all pages, as tracemalloc sees it; outside the timed rounds."""
    module = load(path)
    data = json.loads((HERE / "pages/data.json").read_text(encoding="utf-8"))
    partials = read_pages(HERE / "pages/partials")
    tracemalloc.start()
    try:
        engine = module.Engine(partials)
        for source in read_pages(HERE / "pages").values():
            engine.render(source, data)
        return tracemalloc.get_traced_memory()[1] / 1024
    finally:
        tracemalloc.stop()


def measure(path=HERE / "templates.py", rounds=40, templates=400):
    """(score, figures): lower is faster. WrongOutput if anything came out differently, in whatever round."""
    require_plain(path)
    rng = random.Random(random.SystemRandom().getrandbits(64))
    reference = load(HERE / "reference.py")
    calibration = Calibration(reference)
    threads = threading.active_count()
    check_golden(load(path))
    check_random(load(path), reference, rng, templates)
    gc.freeze()  # what was there before is not looked at in every collection
    try:
        results = [time_round(path, reference, calibration, rng) for _ in range(rounds)]
    finally:
        gc.unfreeze()
    if threading.active_count() > threads:
        raise WrongOutput("templates.py started a thread, which would run while the calibration loop is timed")
    medians = {name: statistics.median(result[name] for result in results) for name in results[0]}
    peak = peak_memory(path, rng)
    return sum(medians.values()), {
        "peak_kb": round(peak, 1),
        **{name: round(value, 4) for name, value in medians.items()},
    }

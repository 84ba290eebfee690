"""A template engine in the manner of Liquid: text with {{ output }} and {% tag %}.

    Engine(partials).render(source, data) -> text

partials: {name: source}, for {% include 'name' %}. data: {name: value}; it is never changed. The language:

    {{ product.title | upcase | append: '!' }}          dotted lookup, filters with arguments; missing names are empty
    {% assign total = cart.total | plus: 5 %}           seen until the end of the page, in what it includes too
    {% if a.b == 3 and c %} {% elsif x contains 'y' %} {% else %} {% endif %}          and, or: from right to left
    {% for item in items %} {{ forloop.index }} {% else %} none {% endfor %}           also: forloop.first, forloop.last
    {% include 'card' product: item, wide: true %}      the partial sees everything the page sees, and these
"""

import html
import operator
import re

TAG = re.compile(r"(\{\{.*?\}\}|\{%.*?%\})", re.DOTALL)
PART = re.compile(r"""(?:"[^"]*"|'[^']*'|[^|"'])+""")  # between the bars of an expression
WORD = re.compile(r""""[^"]*"|'[^']*'|[=<>!]+|[^\s:,=<>!]+""")


class TemplateError(ValueError):
    """A tag without its end, or an unknown tag, filter or partial where the page is rendered."""


# -- values


def to_text(value):
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_number(value):
    """0 for what is no whole number, as Liquid has it."""
    text = to_text(value)
    return int(text) if re.fullmatch(r"-?\d+", text) else 0


def look_up(path, engine):
    """What a dotted path leads to; the innermost frame that has its first name wins."""
    names = path.split(".")
    value = next((frame for frame in reversed(engine.frames) if names[0] in frame), None)
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


# -- expressions


def truncate(value, length):
    text = to_text(value)
    return text if len(text) <= length else text[: length - 3] + "..."


FILTERS = {
    "upcase": lambda value: to_text(value).upper(),
    "downcase": lambda value: to_text(value).lower(),
    "capitalize": lambda value: to_text(value).capitalize(),
    "escape": lambda value: html.escape(to_text(value)),
    "append": lambda value, other: to_text(value) + to_text(other),
    "replace": lambda value, old, new="": to_text(value).replace(to_text(old), to_text(new)),
    "truncate": truncate,
    "default": lambda value, other: other if value is False or value in (None, "", []) else value,
    "sort": lambda value: sorted(value, key=to_text),
    "join": lambda value, by=" ": to_text(by).join(to_text(item) for item in value),
    "plus": lambda value, other: to_number(value) + to_number(other),
    "times": lambda value, other: to_number(value) * to_number(other),
    "money": lambda value: f"{to_number(value) / 100:,.2f}",  # from cents
}


def evaluate_word(word, engine):
    """A literal or a dotted path."""
    if word[0] in "'\"":
        return word[1:-1]
    if re.fullmatch(r"-?\d+", word):
        return int(word)
    if word in ("true", "false"):
        return word == "true"
    return None if word == "nil" else look_up(word, engine)


def evaluate(markup, engine):
    """`value | filter: argument, argument | filter`"""
    first, *filters = [WORD.findall(part) for part in PART.findall(markup)]
    value = evaluate_word(first[0], engine)
    for name, *words in filters:
        if name not in FILTERS:
            raise TemplateError(f"unknown filter {name!r}")
        value = FILTERS[name](value, *[evaluate_word(word, engine) for word in words])
    return value


def contains(left, right):
    if isinstance(left, str):
        return to_text(right) in left
    return isinstance(left, list) and right in left


OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "contains": contains,
}


def holds(words, engine):
    """A condition; `and` and `or` bind from right to left, as in Liquid."""
    for position, word in enumerate(words):
        if word == "and":
            return compare(words[:position], engine) and holds(words[position + 1 :], engine)
        if word == "or":
            return compare(words[:position], engine) or holds(words[position + 1 :], engine)
    return compare(words, engine)


def compare(words, engine):
    """One value, of which only nil and false are false; or two with an operator between them."""
    values = [evaluate_word(word, engine) for word in words[::2]]
    if len(words) == 1:
        return values[0] is not None and values[0] is not False
    try:
        return OPERATORS[words[1]](*values)
    except TypeError:
        return False  # of different kinds: neither is less


# -- tags: each gets its sections, [(word, markup, tokens)]: its own and, of a block, those of elsif and else


def render_if(sections, engine):
    for word, markup, tokens in sections:
        if word == "else" or holds(WORD.findall(markup), engine):
            return render(tokens, engine)
    return ""


def render_for(sections, engine):
    name, _, collection = sections[0][1].split()
    items = evaluate_word(collection, engine)
    if not items:
        return "".join(render(tokens, engine) for _, _, tokens in sections[1:])
    result = ""
    for index, item in enumerate(items):
        forloop = {"index": index + 1, "first": index == 0, "last": index == len(items) - 1}
        engine.frames.append({name: item, "forloop": forloop})
        result += render(sections[0][2], engine)
        engine.frames.pop()
    return result


def render_assign(sections, engine):
    name, _, markup = sections[0][1].partition("=")
    engine.frames[1][name.strip()] = evaluate(markup, engine)
    return ""


def render_include(sections, engine):
    name, *words = WORD.findall(sections[0][1])
    source = engine.partials.get(name[1:-1])
    if source is None:
        raise TemplateError(f"no partial {name}")
    engine.frames.append({key: evaluate_word(word, engine) for key, word in zip(words[::2], words[1::2])})
    result = render(TAG.split(source), engine)
    engine.frames.pop()
    return result


TAGS = {"if": render_if, "for": render_for, "assign": render_assign, "include": render_include}


def read_tag(token):
    """(word, markup) of a tag, ("", "") of anything else."""
    word, _, markup = token[2:-2].strip().partition(" ") if token.startswith("{%") else ("", "", "")
    return word, markup


def read_sections(word, markup, tokens, position):
    """The sections of a tag whose inner tokens begin at a position, and the position behind its end."""
    sections = [(word, markup, [])]
    if word not in ("if", "for"):
        return sections, position
    depth = 0
    for place in range(position, len(tokens)):
        inner, rest = read_tag(tokens[place])
        if depth == 0 and inner == f"end{word}":
            return sections, place + 1
        if depth == 0 and inner in ("elsif", "else"):
            sections.append((inner, rest, []))
        else:
            sections[-1][2].append(tokens[place])
        depth += (inner in ("if", "for")) - (inner in ("endif", "endfor"))
    raise TemplateError(f"end{word} is missing")


def render(tokens, engine):
    result = ""
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        word, markup = read_tag(token)
        if word in TAGS:
            sections, position = read_sections(word, markup, tokens, position)
            result += TAGS[word](sections, engine)
        elif word:
            raise TemplateError(f"unknown tag {word!r}")
        else:
            result += to_text(evaluate(token[2:-2], engine)) if token.startswith("{{") else token
    return result


class Engine:
    def __init__(self, partials=None):
        self.partials = partials or {}
        self.frames = []  # of variables: the page's data, what it assigns, loops and includes

    def render(self, source, data):
        self.frames = [data, {}]
        return render(TAG.split(source), self)

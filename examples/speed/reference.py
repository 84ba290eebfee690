"""The engine as it was shipped: what is right. Frozen; templates.py is the one to make fast. In the manner of Liquid:

    Engine(partials).render(source, data) -> text

partials: {name: source}, for {% include 'name' %}. data: {name: value}; it is never changed. A template that is wrong
raises TemplateError. The language:

    {{ product.title | upcase | append: '!' }}          dotted lookup, filters with arguments; missing names are empty
    {% assign total = cart.total | plus: 5 %}           seen until the end of the template, in what it includes too
    {% if a.b == 3 and not_c %} {% elsif x contains 'y' %} {% else %} {% endif %}      and, or: from right to left
    {% unless sold_out %} {% endunless %}               may have else, too
    {% for item in items limit: 3 %} {{ forloop.index }} {% else %} none {% endfor %}  also: for n in (1..5)
    {% include 'card' product: item, wide: true %}      the partial sees everything the page sees, and these
    {% comment %} not shown {% endcomment %}
"""

import html
import operator
import re
from dataclasses import dataclass

TAG = re.compile(r"(\{\{.*?\}\}|\{%.*?%\})", re.DOTALL)
WORD = re.compile(r""""[^"]*"|'[^']*'|==|!=|<=|>=|[<>|:,]|[^\s|:,<>=!]+""")
DEEPEST = 20  # includes within includes: a partial that includes itself ends with an error, not with a full stack


class TemplateError(ValueError):
    """The template is wrong: a tag without its end, an unknown tag, filter or partial."""


# == VALUES ==


def to_text(value):
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "".join(to_text(item) for item in value)
    return str(value)


def to_number(value):
    """0 for what is no number, as Liquid has it."""
    if isinstance(value, bool) or value is None:
        return 0
    if isinstance(value, (int, float)):
        return value
    try:
        text = to_text(value)
        return float(text) if "." in text else int(text)
    except ValueError:
        return 0


def is_true(value):
    """Only nil and false are false; 0 and the empty string are true."""
    return value is not None and value is not False


class Scope:
    """The variables that a template sees: the innermost frame that has a name wins."""

    def __init__(self, data, partials):
        self.frames = [data, {}]
        self.partials = partials
        self.depth = 0

    def lookup(self, path):
        first, *rest = path.split(".")
        value = next((frame[first] for frame in reversed(self.frames) if first in frame), None)
        for key in rest:
            value = member(value, key)
        return value


def member(value, key):
    """value.key: of a dict its entry; of lists and texts size, first, last and the number of an item."""
    if isinstance(value, dict) and key in value:
        return value[key]
    if key == "size" and isinstance(value, (list, str, dict)):
        return len(value)
    if isinstance(value, list) and value:
        if key == "first":
            return value[0]
        if key == "last":
            return value[-1]
        if key.isdigit() and int(key) < len(value):
            return value[int(key)]
    return None


# == FILTERS ==


def truncate(value, length=50, end="..."):
    text = to_text(value)
    most = int(to_number(length))
    if len(text) <= most:
        return text
    return text[: max(0, most - len(to_text(end)))] + to_text(end)


def split(value, by=" "):
    text = to_text(value)
    return text.split(to_text(by)) if by else list(text)


def as_list(value):
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


FILTERS = {
    "upcase": lambda value: to_text(value).upper(),
    "downcase": lambda value: to_text(value).lower(),
    "capitalize": lambda value: to_text(value).capitalize(),
    "strip": lambda value: to_text(value).strip(),
    "escape": lambda value: html.escape(to_text(value)),
    "append": lambda value, other: to_text(value) + to_text(other),
    "prepend": lambda value, other: to_text(other) + to_text(value),
    "replace": lambda value, old, new="": to_text(value).replace(to_text(old), to_text(new)),
    "split": split,
    "truncate": truncate,
    "size": lambda value: len(value) if isinstance(value, (str, list, dict)) else 0,
    "first": lambda value: member(value, "first"),
    "last": lambda value: member(value, "last"),
    "join": lambda value, by=" ": to_text(by).join(to_text(item) for item in as_list(value)),
    "sort": lambda value, key=None: sorted(
        as_list(value), key=lambda item: to_text(member(item, key) if key else item)
    ),
    "reverse": lambda value: as_list(value)[::-1],
    "map": lambda value, key: [member(item, key) for item in as_list(value)],
    "default": lambda value, other: other if value in (None, False, "", []) else value,
    "plus": lambda value, other: to_number(value) + to_number(other),
    "minus": lambda value, other: to_number(value) - to_number(other),
    "times": lambda value, other: to_number(value) * to_number(other),
    "money": lambda value: f"{to_number(value) / 100:,.2f}",  # from cents
}


# == EXPRESSIONS ==


def evaluate_word(word, scope):
    """A literal or a dotted path."""
    if word[0] in "'\"":
        return word[1:-1]
    if re.fullmatch(r"-?\d+", word):
        return int(word)
    if re.fullmatch(r"-?\d+\.\d+", word):
        return float(word)
    if word in ("true", "false"):
        return word == "true"
    if word in ("nil", "null"):
        return None
    return scope.lookup(word)


def evaluate(markup, scope):
    """`value | filter: argument, argument | filter`"""
    words = WORD.findall(markup)
    if not words:
        raise TemplateError("an empty expression")
    value = evaluate_word(words[0], scope)
    position = 1
    while position < len(words):
        if words[position] != "|" or position + 1 == len(words):
            raise TemplateError(f"a filter is expected in {markup!r}")
        name = words[position + 1]
        position += 2
        arguments = []
        while position < len(words) and words[position] != "|":
            if words[position] not in (":", ","):
                arguments.append(evaluate_word(words[position], scope))
            position += 1
        value = apply_filter(name, value, arguments)
    return value


def apply_filter(name, value, arguments):
    if name not in FILTERS:
        raise TemplateError(f"unknown filter {name!r}")
    try:
        return FILTERS[name](value, *arguments)
    except TypeError as error:
        raise TemplateError(f"filter {name!r}: {error}") from error


def contains(left, right):
    if isinstance(left, str):
        return to_text(right) in left
    return isinstance(left, (list, dict)) and right in left


OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "contains": contains,
}


def holds(words, scope):
    """A condition; `and` and `or` bind from right to left, as in Liquid."""
    for position, word in enumerate(words):
        if word == "and":
            return compare(words[:position], scope) and holds(words[position + 1 :], scope)
        if word == "or":
            return compare(words[:position], scope) or holds(words[position + 1 :], scope)
    return compare(words, scope)


def compare(words, scope):
    """One value, or two with an operator between them."""
    if len(words) not in (1, 3):
        raise TemplateError(f"a condition is `value` or `value operator value`, not {' '.join(words)!r}")
    left = evaluate_word(words[0], scope)
    if len(words) == 1:
        return is_true(left)
    right = evaluate_word(words[2], scope)
    if words[1] not in OPERATORS:
        raise TemplateError(f"unknown operator {words[1]!r}")
    try:
        return OPERATORS[words[1]](left, right)
    except TypeError:
        return False  # of different kinds: neither is less


# == NODES: each renders itself ==


@dataclass
class Text:
    text: str

    def render(self, scope):
        return self.text


@dataclass
class Output:
    markup: str

    def render(self, scope):
        return to_text(evaluate(self.markup, scope))


class Assign:
    def __init__(self, markup):
        self.name, equals, self.markup = (part.strip() for part in markup.partition("="))
        if not equals or not self.name.isidentifier():
            raise TemplateError(f"assign needs `name = value`, not {markup!r}")

    def render(self, scope):
        scope.frames[1][self.name] = evaluate(self.markup, scope)
        return ""


@dataclass
class If:
    """branches: [(condition's markup, or None for else; nodes)]; the first that holds is shown."""

    branches: list
    negated: bool  # `unless`: the first condition the other way round

    def render(self, scope):
        for number, (markup, nodes) in enumerate(self.branches):
            if markup is None:
                return render_all(nodes, scope)
            negated = self.negated and number == 0
            if bool(holds(WORD.findall(markup), scope)) != negated:
                return render_all(nodes, scope)
        return ""


class For:
    def __init__(self, markup, nodes, otherwise):
        match = re.fullmatch(r"(\w+)\s+in\s+(\(.+\.\..+\)|\S+)(?:\s+limit:\s*(\S+))?", markup)
        if not match:
            raise TemplateError(f"for needs `name in list`, not {markup!r}")
        self.name, self.collection = match[1], match[2]
        self.limit = match[3]
        self.nodes = nodes
        self.otherwise = otherwise

    def items(self, scope):
        if self.collection.startswith("("):
            start, end = (int(to_number(evaluate_word(word, scope))) for word in self.collection[1:-1].split(".."))
            items = list(range(start, end + 1))
        else:
            items = as_list(evaluate_word(self.collection, scope))
        if self.limit:
            return items[: int(to_number(evaluate_word(self.limit, scope)))]
        return items

    def render(self, scope):
        items = self.items(scope)
        if not items:
            return render_all(self.otherwise, scope)
        result = ""
        for index, item in enumerate(items):
            forloop = {
                "index": index + 1,
                "index0": index,
                "rindex": len(items) - index,
                "first": index == 0,
                "last": index == len(items) - 1,
                "length": len(items),
            }
            scope.frames.append({self.name: item, "forloop": forloop})
            result += render_all(self.nodes, scope)
            scope.frames.pop()
        return result


class Include:
    def __init__(self, markup):
        name, _, rest = markup.partition(" ")
        self.name = name.strip("'\"")
        self.arguments = re.findall(r"""(\w+)\s*:\s*("[^"]*"|'[^']*'|[^\s,]+)""", rest)

    def render(self, scope):
        if self.name not in scope.partials:
            raise TemplateError(f"no partial {self.name!r}")
        if scope.depth == DEEPEST:
            raise TemplateError(f"{self.name!r} is included more than {DEEPEST} deep")
        scope.frames.append({name: evaluate_word(word, scope) for name, word in self.arguments})
        scope.depth += 1
        result = render_all(parse(scope.partials[self.name]), scope)
        scope.depth -= 1
        scope.frames.pop()
        return result


def render_all(nodes, scope):
    return "".join(node.render(scope) for node in nodes)


# == PARSER ==


def parse(source):
    """The nodes of a template."""
    nodes, end = parse_until(iter(TAG.split(source)), ())
    return nodes


def parse_until(tokens, ends):
    """Nodes up to the first tag whose word is in `ends`, and that tag as (word, markup); (None, "") at the end."""
    nodes = []
    for token in tokens:
        if token.startswith("{{"):
            nodes.append(Output(token[2:-2].strip()))
        elif token.startswith("{%"):
            word, _, markup = token[2:-2].strip().partition(" ")
            if word in ends:
                return nodes, (word, markup.strip())
            nodes.append(parse_tag(word, markup.strip(), tokens))
        elif token:
            nodes.append(Text(token))
    if ends:
        raise TemplateError(f"{ends[-1]} is missing")
    return nodes, (None, "")


def parse_tag(word, markup, tokens):
    if word == "assign":
        return Assign(markup)
    if word == "include":
        return Include(markup)
    if word == "comment":
        return parse_comment(tokens)
    if word == "for":
        return parse_for(markup, tokens)
    if word in ("if", "unless"):
        return parse_if(word, markup, tokens)
    raise TemplateError(f"unknown tag {word!r}")


def parse_comment(tokens):
    """What is in a comment need not be right."""
    for token in tokens:
        if re.fullmatch(r"\{%\s*endcomment\s*%\}", token):
            return Text("")
    raise TemplateError("endcomment is missing")


def parse_if(word, markup, tokens):
    ends = ("elsif", "else", "end" + word)
    branches = []
    end = "elsif"
    while end == "elsif":
        nodes, (end, next_markup) = parse_until(tokens, ends)
        branches.append((markup, nodes))
        markup = next_markup
    if end == "else":
        nodes, _ = parse_until(tokens, ends[2:])
        branches.append((None, nodes))
    return If(branches, negated=word == "unless")


def parse_for(markup, tokens):
    nodes, (end, _) = parse_until(tokens, ("else", "endfor"))
    otherwise = []
    if end == "else":
        otherwise, _ = parse_until(tokens, ("endfor",))
    return For(markup, nodes, otherwise)


class Engine:
    def __init__(self, partials=None):
        self.partials = partials or {}

    def render(self, source, data):
        return render_all(parse(source), Scope(data, self.partials))

"""Writes an article on a topic, from a template. This is the file that an experiment changes.

write(topic) -> Markdown. topic: name, title, term, action, also, things, doings and facts, as sources/<name>.md has.
The same topic gives the same text, and a text on one topic must not read like the text on another.
"""

OPENINGS = [
    "You hear {title} before you see it. Is there a better reason to stop?",
    "Few places reward a slow walk as {title} does. What will you look at first?",
    "{title} asks for an hour of your day. Will you give it that hour?",
    "Bring good shoes when you come to {title}. Who knows how long you will stay?",
]
THINGS = [
    "Start with {thing}. It looks plain from the path, and that is how it was meant. "
    "Take a minute and let your eyes find the detail.",
    "Then there is {thing}. Children find it first. You can {doing} close by, and nobody will hurry you along.",
    "Do not pass by {thing}. Somebody has cared for it through wind and frost, and you can tell. "
    "If you have time, {doing}.",
    "A few steps on you come to {thing}. Older people know stories about it. "
    "Ask for one, sit down, and let the talk take its time.",
]
FACTS = [
    "One thing is worth knowing: {fact}.",
    "People here will tell you that {fact}.",
    "For the record, {fact}.",
]
HEADINGS = [
    "A first look at the {term}",
    "What the {also0} can show you",
    "Around the {also1} and back",
    "Facts for a good visit",
]


def paragraph_on(thing, number, topic):
    doing = topic["doings"][number % len(topic["doings"])]
    return THINGS[number % len(THINGS)].format(thing=thing, doing=doing)


def paragraph_of(facts):
    return " ".join(FACTS[number % len(FACTS)].format(fact=fact) for number, fact in enumerate(facts))


def fill(text, topic):
    return text.format(title=topic["title"], term=topic["term"], also0=topic["also"][0], also1=topic["also"][1])


def write(topic):
    opening = OPENINGS[len(topic["name"]) % len(OPENINGS)]
    blocks = [f"# {topic['title']}: a visit to a {topic['term']}"]
    blocks.append(fill(opening, topic) + f" This {topic['term']} has more to tell than its size suggests.")
    third = len(topic["things"]) // 3 + 1
    for part in range(3):
        blocks.append("## " + fill(HEADINGS[part], topic))
        for number, thing in enumerate(topic["things"]):
            if number // third == part:
                blocks.append(paragraph_on(thing, number, topic))
    blocks.append("## " + fill(HEADINGS[3], topic))
    for start in range(0, len(topic["facts"]), 3):
        blocks.append(paragraph_of(topic["facts"][start : start + 3]))
    blocks.append(f"You have read enough. Check the {topic['action']} and come by.")
    return "\n\n".join(blocks) + "\n"

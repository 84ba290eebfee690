"""Writes an article on a topic, from a template. This is the file that an experiment changes.

write(topic) -> Markdown. topic: {field: text} of a file of sources/; also, things and doings are lists, facts {sentence:
words that belong together}. The same topic gives the same text; texts on two topics must not read alike.
"""

OPENINGS = [
    "You hear {title} before you see it. Is there a better reason to stop?",
    "Few places reward a slow walk as {title} does. What will you look at first?",
    "{title} asks for an hour of your day. Will you give it that hour?",
]
THINGS = [
    "Start with {thing}. It looks plain from the path, and that is how it was meant. "
    "Take a minute and let your eyes find the detail.",
    "Then there is {thing}. Children find it first. You can {doing} close by, and nobody will hurry you along.",
    "Do not pass by {thing}. Somebody has cared for it through wind and frost, and you can tell. "
    "If you have time, {doing}.",
]
FACTS = ["One thing is worth knowing: {fact}.", "People here will tell you that {fact}.", "For the record, {fact}."]
HEADINGS = ["A first look at the {term}", "Around the place and back", "Facts for a good visit"]


def turn(choices, number):
    return choices[number % len(choices)]


def write(topic):
    opening = turn(OPENINGS, len(topic["title"])).format(**topic)
    blocks = [
        f"# {topic['title']}: a visit to a {topic['term']}",
        f"{opening} It has more to tell than its size suggests.",
    ]
    for number, thing in enumerate(topic["things"]):
        if number % 4 == 0:
            blocks.append("## " + HEADINGS[number // 4].format(**topic))
        blocks.append(turn(THINGS, number).format(thing=thing, doing=turn(topic["doings"], number)))
    blocks.append("## " + HEADINGS[2])
    said = [turn(FACTS, number).format(fact=fact) for number, fact in enumerate(topic["facts"])]
    blocks += [" ".join(said[start : start + 3]) for start in range(0, len(said), 3)]
    blocks.append(f"You have read enough. Check the {topic['action']} and come by.")
    return "\n\n".join(blocks) + "\n"

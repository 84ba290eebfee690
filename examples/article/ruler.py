"""The ruler of examples/article: how good draft.md is, in points of 100. Frozen.

uv run ../../referee.py run     measures HEAD, in a few seconds; prose.py says how
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import prose  # noqa: E402  (found by the line above)

import referee  # noqa: E402


def quality():
    """(points, sub-scores); what is missing goes into the log."""
    draft, facts, guide = ((HERE / name).read_text(encoding="utf-8") for name in ("draft.md", "facts.md", "guide.md"))
    wanted = prose.read_facts(facts)
    for line in prose.notes(draft, wanted, guide):
        print(line)
    return prose.judge(draft, wanted, guide)


if __name__ == "__main__":
    referee.measure(
        quality,
        metric="points",
        lower_is_better=False,
        edits=["draft.md"],
        frozen=["prose.py", "facts.md", "guide.md"],
        budget=60,
    )

"""The ruler of examples/article: how good draft.md is, in points of 100. Frozen.

uv run ../../referee run     measures HEAD, in a second; topics/prose.py says how
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "topics"), str(HERE.parent.parent)]

import prose  # noqa: E402  (found by the line above)

import referee  # noqa: E402


def quality():
    """(points, sub-scores); what is missing goes into the log."""
    draft = (HERE / "draft.md").read_text(encoding="utf-8")
    facts = prose.read_facts((HERE / "facts.md").read_text(encoding="utf-8"))
    guide = (HERE / "topics/guide.md").read_text(encoding="utf-8")
    print(*prose.notes(draft, facts, guide), sep="\n")
    return prose.judge(draft, facts, guide)


if __name__ == "__main__":
    referee.measure(
        quality,
        metric="points",
        lower_is_better=False,
        edits=["draft.md"],
        frozen=["facts.md", "topics/prose.py", "topics/guide.md"],
        perfect=100,
        budget=60,
    )

"""The ruler of examples/topics: the points of the worst article that articles.py writes. Frozen.

uv run ../../referee.py run     measures HEAD, in a few seconds; grading.py says how
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import grading  # noqa: E402  (found by the line above)

import referee  # noqa: E402


def worst():
    """(points, figures) of the worst article."""
    import articles

    try:
        return grading.measure(articles.write)
    except grading.Unfit as error:
        raise referee.RefereeError(f"{error}; mend articles.py", "harness") from None


if __name__ == "__main__":
    referee.measure(
        worst,
        metric="points",
        lower_is_better=False,
        edits=["articles.py"],
        frozen=["grading.py", "prose.py", "guide.md", "sources"],
        budget=60,
    )

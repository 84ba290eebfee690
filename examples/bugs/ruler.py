"""The ruler of examples/bugs: how many tests and checks bookings.py fails. Frozen.

uv run ../../referee.py run     measures HEAD, in a second; counting.py says how
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import counting  # noqa: E402  (found by the line above)

import referee  # noqa: E402


def failing():
    """(number, figures); 0 when there is nothing left to mend."""
    try:
        return counting.count()
    except counting.NotCounted as error:
        raise referee.RefereeError(f"{error}; mend bookings.py", "harness") from None


if __name__ == "__main__":
    referee.measure(
        failing,
        metric="failing",
        lower_is_better=True,
        edits=["bookings.py"],
        frozen=["counting.py", "checks.py", "test_bookings.py", "report.md"],
        budget=30,
    )

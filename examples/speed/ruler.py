"""The ruler of examples/speed: how long templates.py takes to render the pages, in calibration loops. Frozen.

uv run ../../referee.py run     measures HEAD, in about 20 seconds; stopwatch.py says how
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import stopwatch  # noqa: E402

import referee  # noqa: E402  (found by the line above)


def rendering():
    """(ratio, figures); output that is not right has no speed."""
    try:
        return stopwatch.measure()
    except stopwatch.WrongOutput as error:
        raise referee.RefereeError(f"{error}; mend templates.py", "harness") from None


if __name__ == "__main__":
    referee.measure(
        rendering,
        metric="ratio",
        lower_is_better=True,
        edits=["templates.py"],
        frozen=["stopwatch.py", "reference.py", "cases.json", "pages", "golden", "test_templates.py"],
        budget=120,
    )

"""Plants the defects of tests/defects.py one by one in a copy of the project and shows that the suite catches each.

    uv run python tests/plant_defects.py               # all of them: an hour on two cores
    uv run python tests/plant_defects.py --sample 4    # four, the same until the table grows
    uv run python tests/plant_defects.py lock window   # those whose name holds one of the words

Not collected by pytest. Exit status 1 where a defect survives.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from defects import DEFECTS

ROOT = Path(__file__).resolve().parent.parent


def plant(folder, defect):
    """(whether the tests fail with the defect in place, the test that did)."""
    what, name, sound, broken, tests = defect
    path = folder / name
    text = path.read_text(encoding="utf-8")
    assert text.count(sound) == 1, f"{what}: {sound!r} stands {text.count(sound)} times in {name}"
    path.write_text(text.replace(sound, broken), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", f"tests/test_{tests}.py"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    finally:
        path.write_text(text, encoding="utf-8")
    caught = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1, caught[0][:110] if caught else done.stdout[-300:]


def chosen(arguments):
    """The defects to plant: those whose name holds a word, or a sample of as many, the same until the table grows."""
    words = arguments.words or [""]
    fitting = [defect for defect in DEFECTS if any(word in defect[0] for word in words)]
    if arguments.sample is None:
        return fitting
    return random.Random(len(DEFECTS)).sample(fitting, min(arguments.sample, len(fitting)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of the names of defects")
    parser.add_argument("--sample", type=int, metavar="N", help="as many, drawn")
    defects = chosen(parser.parse_args())
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    survived = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "project"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "*.log"))
        for defect in defects:
            began = time.monotonic()
            caught, by = plant(folder, defect)
            survived += not caught
            word = "caught  " if caught else "SURVIVED"
            print(f"{word} {defect[0]} ({time.monotonic() - began:.0f} s): {by}", flush=True)
    print(f"{survived} of {len(defects)} defects survived")
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()

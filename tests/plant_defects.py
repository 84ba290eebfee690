"""Plants the defects of tests/defects*.txt one by one in a copy of the project and shows that the suite catches each.

    uv run python tests/plant_defects.py               # all of them
    uv run python tests/plant_defects.py --sample 6    # six, the same until the list grows
    uv run python tests/plant_defects.py lock window   # those whose line holds one of the words

A line is `what | file | sound text | defective text | the tests that must see it`, with \\n for an end of line and \\| for a bar; tests: a part of a file's name, -k and a word of the tests in it.
Not collected by pytest. Exit status 1 where a defect survives.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def read_defects():
    """Every line as [what, file, sound text, defective text, tests]."""
    defects = []
    for path in sorted(ROOT.glob("tests/defects*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            parts = [part.replace("\\|", "|") for part in re.split(r"(?<!\\)\|", line)]
            what, name, sound, broken, tests = (part[1:-1] if part[:1] == part[-1:] == " " else part for part in parts)
            ends = [text.replace("\\\\", "\0").replace("\\n", "\n").replace("\0", "\\") for text in (sound, broken)]
            defects.append([what.strip(), name.strip(), *ends, tests.strip()])
    return defects


def plant(folder, defect):
    """(whether the tests fail with the defect in place, the test that did)."""
    what, name, sound, broken, tests = defect
    path = folder / name
    text = path.read_text(encoding="utf-8")
    assert text.count(sound) == 1, f"{what}: {sound!r} stands {text.count(sound)} times in {name}"
    path.write_text(text.replace(sound, broken), encoding="utf-8")
    file, *only = tests.split()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-xq",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        f"tests/test_{file}.py",
        *only,
    ]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    finally:
        path.write_text(text, encoding="utf-8")
    caught = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1, caught[0][:110] if caught else done.stdout[-300:]


def chosen(arguments):
    """The defects to plant: those whose line holds a word, or a sample of as many, the same until the list grows."""
    words = arguments.words or [""]
    defects = read_defects()
    fitting = [defect for defect in defects if any(word in " ".join(defect) for word in words)]
    if arguments.sample is None:
        return fitting
    return random.Random(len(defects)).sample(fitting, min(arguments.sample, len(fitting)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of the lines of defects")
    parser.add_argument("--sample", type=int, metavar="N", help="as many, drawn")
    defects = chosen(parser.parse_args())
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    survived = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "project"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.log", "*.json"))
        shutil.copytree(ROOT / ".claude", folder / ".claude", dirs_exist_ok=True)
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
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

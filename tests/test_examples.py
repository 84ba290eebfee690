"""Every example's program.md is executed, command by command, in a repository of its own, with scripted edits."""

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_examples_bugs
import test_examples_speed

ROOT = Path(__file__).resolve().parent.parent
GIT = {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@dataclass(frozen=True)
class Example:
    """What a scripted agent does in an example's folder. better, worse, wrong: (old text, new text)."""

    name: str
    edited: str
    metric: str
    frozen: str
    better: tuple
    worse: tuple = None
    wrong: tuple = None  # an edit whose run fails
    said: str = ""  # by that run


EXAMPLES = {
    "speed": Example(
        name="speed",
        edited="templates.py",
        metric="ratio",
        frozen="cases.json",
        better=("[WORD.findall(part) for part in PART.findall(markup)]", "parts(markup)"),  # see build()
        worse=('    result = ""\n    position = 0\n', '    result = ""\n    position = 0\n    sum(range(1000))\n'),
        wrong=("html.escape(to_text(value))", "to_text(value)"),
        said="FAIL: harness: wrong output: escape, once",
    ),
    "bugs": Example(
        name="bugs",
        edited="bookings.py",
        metric="failing",
        frozen="report.md",
        better=("one[0] <= other[1] and other[0] <= one[1]", "one[0] < other[1] and other[0] < one[1]"),
        wrong=("import calendar\n", "import calendar\nimport checks\n"),
        said="FAIL: harness: bookings.py line",
    ),
    "article": Example(
        name="article",
        edited="draft.md",
        metric="points",
        frozen="topics/prose.py",
        better=("Marta Vane is the skipper.", "For 22 years Marta Vane has been the skipper. Ask her about the river."),
        worse=("room for 46 passengers", "room for 90 passengers"),
    ),
    "article/topics": Example(
        name="article/topics",
        edited="articles.py",
        metric="points",
        frozen="sources/mill.md",
        better=(
            "and that is how it was meant. ",
            "as it was meant to. From here you can see how {thing} earns its keep. ",
        ),
        wrong=("def write(topic):\n", "def write(topic):\n    return None\n\n\ndef unused(topic):\n"),
        said="FAIL: harness: write() gives",
    ),
}
FOLDERS = {name: ROOT / "examples" / name for name in EXAMPLES}


def program(name):
    return (FOLDERS[name] / "program.md").read_text(encoding="utf-8")


def codes(name):
    """All code of a program.md, in order."""
    return re.findall(r"`([^`]+)`", program(name))


def code(name, start):
    return next(each for each in codes(name) if each.startswith(start))


class Night:
    """An agent in a copy of an example's folder, who knows the commands of its program.md."""

    def __init__(self, name, folder, environment):
        self.example = EXAMPLES[name]
        self.folder = folder
        self.environment = environment
        self.referee = code(name, "uv run").rpartition(" ")[0]

    def shell(self, line):
        """What a command line prints."""
        done = subprocess.run(
            line, shell=True, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True
        )
        return (done.stdout + done.stderr).decode().strip()

    def call(self, words):
        return self.shell(f"{self.referee} {words}")

    def run_and_follow(self):
        """Does what `next:` says, until it is no command; returns all that was printed."""
        said = self.call("run")
        for _ in range(9):
            command = said.splitlines()[-1].removeprefix("next: ").partition("#")[0].strip()
            if not command:
                return said
            said += "\n" + self.shell(command)
        raise AssertionError(said)

    def commit(self, change, idea):
        """Commits an edit; returns the commit."""
        replace(self.folder / self.example.edited, *change)
        self.shell(re.sub("'.*'", f"'{idea}'", code(self.example.name, "git commit -qam")))
        return self.head

    @property
    def head(self):
        return self.shell("git rev-parse HEAD")

    def status_of(self, idea):
        rows = [line.split("\t") for line in (self.folder / "results.tsv").read_text(encoding="utf-8").splitlines()]
        return {row[3] for row in rows if row[4].startswith(idea)}


def build(root, name):
    """A Night in a repository with the referee and the examples as they are, where `uv run` is this interpreter."""
    tools = root / "bin"
    tools.mkdir(parents=True)
    (tools / "uv").write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -B "$@"\n')
    (tools / "uv").chmod(0o755)
    made = shutil.ignore_patterns("__pycache__", "runs", "results*.tsv", "run.log", "ideas.md")
    for part in ("examples", "referee"):
        shutil.copytree(ROOT / part, root / part, ignore=made)
    (root / ".gitignore").write_text("bin/\nresults.tsv\nruns/\nrun.log\nideas.md\n")
    replace(root / "referee/verdict.py", "SLOWED = 0.2", "SLOWED = 99.0")  # the tests' machine may be busy
    replace(root / "examples/speed/ruler.py", "rounds=400", "rounds=5")
    engine = root / "examples/speed/templates.py"
    replace(engine, "class Engine:", f"{test_examples_speed.REMEMBERED}\n\nclass Engine:")  # what the gain calls
    night = Night(name, root / "examples" / name, {**os.environ, **GIT, "PATH": f"{tools}:{os.environ['PATH']}"})
    night.shell(f"cd {root} && git init -q && git add -A && git commit -qm start")
    return night


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text, old
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.fixture(scope="module", params=EXAMPLES)
def told(request, tmp_path_factory):
    """{what: what was seen} of a night with a gain, a loss, a mistake and an edit of the ruler."""
    night = build(tmp_path_factory.mktemp("night") / "project", request.param)
    example = night.example
    told = {"example": example}
    told["set-up"] = night.shell(code(example.name, "git checkout")) + night.shell(code(example.name, "printf"))
    told["branch"] = night.shell("git branch --show-current")
    told["baseline"] = night.run_and_follow()
    told["baseline rows"] = night.status_of("baseline")
    told["gain at"] = night.commit(example.better, "a gain")
    told["gain"] = night.run_and_follow()
    told["gain rows"] = night.status_of("a gain")
    if example.worse:
        told["loss at"] = night.commit(example.worse, "a loss")
        told["loss"] = night.run_and_follow()
        told["loss rows"] = night.status_of("a loss")
        told["dropped"] = night.shell("git for-each-ref --format='%(objectname)' refs/autoresearch")
    if example.wrong:
        night.commit(example.wrong, "a mistake")
        told["mistake"] = night.call("run")
        night.shell(code(example.name, f"{night.referee} log crash"))
        told["mistake rows"] = night.status_of("a mistake")
    told["head"] = night.head
    frozen = night.folder / example.frozen
    frozen.write_text(frozen.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    night.shell("git commit -qam 'another ruler'")
    told["another ruler"] = night.call("run")
    told["status"] = night.shell(code(example.name, f"{night.referee} status"))
    return told


def test_set_up_says_nothing(told):
    assert told["set-up"] == ""


def test_branch_is_named_after_the_example(told):
    assert told["branch"] == f"autoresearch/{told['example'].name.split('/')[-1]}-nov21"


def test_baseline_is_measured(told):
    assert re.search(rf"^{told['example'].metric}: ", told["baseline"], re.M), told["baseline"]


def test_baseline_is_kept(told):
    assert told["baseline rows"] == {"keep"}, told["baseline"]


def test_gain_is_kept(told):
    assert told["gain rows"] == {"keep"}, told["gain"]


def test_loss_is_discarded(told):
    assert told.get("loss rows", {"discard"}) == {"discard"}, told["loss"]


def test_loss_is_not_lost(told):
    assert told.get("loss at", "") in told.get("dropped", "")


def test_what_was_dropped_goes_back(told):
    assert told["head"] == told["gain at"]


def test_mistake_is_named(told):
    assert told["example"].said in told.get("mistake", "")


def test_mistake_is_a_crash(told):
    assert told.get("mistake rows", {"crash"}) == {"crash"}


def test_edit_of_a_frozen_file_is_named(told):
    assert told["example"].frozen in told["another ruler"]


def test_edit_of_a_frozen_file_is_not_measured(told):
    assert "verdict" not in told["another ruler"]


def test_status_says_what_is_next(told):
    assert told["status"].splitlines()[-1].startswith("next: ")


def test_night_ends_when_nothing_fails(tmp_path):
    night = build(tmp_path / "project", "bugs")
    night.run_and_follow()
    night.commit((test_examples_bugs.SHIPPED, test_examples_bugs.fixed(*test_examples_bugs.FIXES)), "all at once")
    assert "the night is over" in night.run_and_follow()


def test_a_patched_library_is_not_measured(tmp_path):
    """It would slow the loop that the pages are compared with."""
    night = build(tmp_path / "project", "speed")
    night.commit(("TAGS = {", "html.escape = sorted\nTAGS = {"), "a cheat")
    assert "not started" in night.call("run")


# == what stands in the folders


@pytest.mark.parametrize("name", EXAMPLES)
def test_program_fits_a_page(name):
    assert len(program(name).splitlines()) <= 40


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(
    "word", ["next:", "One run decides", "impler wins", "t most twice", "Stuck", "never stop", "git push"]
)
def test_program_says(name, word):
    assert word in program(name)


@pytest.mark.parametrize("name", EXAMPLES)
def test_program_names_what_is_edited_and_measured(name):
    assert {EXAMPLES[name].edited, EXAMPLES[name].metric} <= set(codes(name))


@pytest.mark.parametrize("name", EXAMPLES)
def test_program_calls_the_referee_where_it_lies(name):
    calls = {each.split()[2] for each in codes(name) if each.startswith("uv run")}
    assert {(FOLDERS[name] / call).resolve() for call in calls} == {ROOT / "referee"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_program_has_nothing_to_be_filled_in(name):
    """`<date>` in a command was typed as it stood."""
    assert not [each for each in codes(name) if "<" in each]


@pytest.mark.parametrize("name", EXAMPLES)
def test_ruler_is_free_to_import(name):
    line = "import sys; sys.dont_write_bytecode = True; import ruler"
    done = subprocess.run([sys.executable, "-c", line], cwd=FOLDERS[name], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_not_edited_is_frozen(name):
    folder = FOLDERS[name]
    call = ast.parse((folder / "ruler.py").read_text(encoding="utf-8")).body[-1].body[0].value
    facts = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    made = {"__pycache__", "runs", "results.tsv", "run.log", "ideas.md"}
    here = {path.name for path in folder.iterdir()} - made
    listed = {path.split("/")[0] for path in [*facts["edits"], *facts["frozen"], "ruler.py", "program.md"]}
    assert here == listed

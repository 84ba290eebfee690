"""Every example's program.md is executed, command by command, in a repository of its own, with scripted edits."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

EXAMPLES = ("speed", "bugs", "article", "topics")
EDITED = {"speed": "templates.py", "bugs": "bookings.py", "article": "draft.md", "topics": "articles.py"}
METRIC = {"speed": "ratio", "bugs": "failing", "article": "points", "topics": "points"}
FROZEN = {"speed": "golden/letter.txt", "bugs": "test_bookings.py", "article": "facts.md", "topics": "sources/mill.md"}
# (old, new): an edit that gains clearly, one that loses, one whose run fails
BETTER = {
    "speed": ("class Engine:\n", "from functools import cache\n\nparse = cache(parse)\n\n\nclass Engine:\n"),
    "bugs": ("one[0] <= other[1] and other[0] <= one[1]", "one[0] < other[1] and other[0] < one[1]"),
    "article": (
        "Marta Vane is the skipper.",
        "For 22 years Marta Vane has been the skipper. You may ask her about the river.",
    ),
    "topics": (
        "and that is how it was meant.",
        "as it was meant to. From here you can see how the {thing} earns its keep.",
    ),
}
WORSE = {
    "speed": ("def render_all(nodes, scope):\n", "def render_all(nodes, scope):\n    sum(range(500))\n"),
    "bugs": ('return f"{minutes // 60:02}:{minutes % 60:02}"', 'return f"{minutes // 60}:{minutes % 60}"'),
    "article": ("room for 46 passengers", "room for 90 passengers"),
    "topics": ("## ", "### Very "),
}
FAILING = {
    "speed": ("html.escape(to_text(value))", "to_text(value)"),
    "bugs": ("import datetime\n", "import datetime\nimport checks\n"),
    "article": None,  # no text makes this ruler fail
    "topics": ("def write(topic):\n", "def write(topic):\n    return None\n\n\ndef unused(topic):\n"),
}
FAIL = {
    "speed": "FAIL: harness: wrong output",
    "bugs": "FAIL: harness: bookings.py line",
    "topics": "FAIL: harness: write() gives",
}


def program(example):
    return (ROOT / "examples" / example / "program.md").read_text(encoding="utf-8")


def commands(example, title):
    """The code of a section, in order."""
    section = re.search(rf"^## {title}.*?\n(.*?)(?=^## |\Z)", program(example), re.M | re.S)[1]
    return re.findall(r"`([^`]+)`", section)


def command(example, title, start, number=0):
    return [code for code in commands(example, title) if code.startswith(start)][number]


class Night:
    """An agent that runs what program.md says."""

    def __init__(self, example, folder):
        self.example, self.folder = example, folder
        self.file = folder / EDITED[example]
        steps = "One experiment"
        self.run_command = command(example, steps, "uv run ../../referee.py run")
        self.wait_command = command(example, steps, "uv run ../../referee.py wait")
        self.log_command = command(example, steps, "uv run ../../referee.py log")
        self.discard_command = command(example, steps, "uv run ../../referee.py log discard")
        self.crash_command = command(example, steps, "uv run ../../referee.py log crash")
        self.commit_command = command(example, steps, "git commit -qam")
        self.mend_command = command(example, steps, "git commit -q --amend")
        self.last = ""

    def shell(self, line):
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        self.last = done.stdout + done.stderr
        assert len(self.last.splitlines()) <= 20, self.last
        return self.last

    def set_up(self):
        for line in commands(self.example, "Set-up"):
            if line.startswith(("git checkout", "printf")):
                self.shell(line.replace("<nov24>", "nov24"))
                assert self.last == "", self.last

    def until_an_idea_is_wanted(self):
        """Run and log, and whatever seed `next:` names."""
        self.shell(self.run_command)
        first = self.last
        self.shell(self.log_command)
        for _ in range(5):
            seed = re.search(r"^next: .*referee\.py run --seed (\d+)", self.last, re.M)
            if not seed:
                return first
            self.shell(f"{self.run_command} --seed {seed[1]}")
            self.shell(self.log_command)
        raise AssertionError(self.last)

    def edit(self, change):
        text = self.file.read_text(encoding="utf-8")
        assert change[0] in text, change
        self.file.write_text(text.replace(change[0], change[1]), encoding="utf-8")

    def commit(self, idea):
        self.shell(re.sub(r"<.*?>", idea, self.commit_command))

    def rows(self):
        lines = (self.folder / "results.tsv").read_text(encoding="utf-8").splitlines()
        return [line.split("\t") for line in lines]

    def words_on(self, idea):
        return [row[3] for row in self.rows() if row[4].partition(" (does not count: ")[0] == idea]


@pytest.fixture
def night(tmp_path, monkeypatch, request):
    """A repository with the referee and the examples as they are, and `uv` that runs this interpreter."""
    example = request.param
    root = tmp_path / "project"
    tools = tmp_path / "bin"
    tools.mkdir()
    shutil.copytree(
        ROOT / "examples", root / "examples", symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "runs")
    )
    shutil.copy(ROOT / "referee.py", root)
    (root / ".gitignore").write_text("results.tsv\nruns/\nrun.log\nrun.json\nideas.md\n__pycache__/\n")
    (tools / "uv").write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -B "$@"\n')
    (tools / "uv").chmod(0o755)
    (tools / "nltk.py").write_text("")  # textstat imports it, a second a run, for what no ruler calls
    monkeypatch.setenv("PYTHONPATH", str(tools))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    stopwatch = root / "examples/speed/stopwatch.py"
    text = stopwatch.read_text(encoding="utf-8")
    assert "rounds=40, templates=400" in text
    stopwatch.write_text(text.replace("rounds=40, templates=400", "rounds=3, templates=50"))
    subprocess.run("git init -q && git add -A && git commit -qm start", shell=True, cwd=root, check=True)
    return Night(example, root / "examples" / example)


def git(night, *words):
    done = subprocess.run(["git", *words], cwd=night.folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def check_baseline(night):
    night.set_up()
    assert git(night, "branch", "--show-current") == f"autoresearch/{night.example}-nov24"
    first = night.until_an_idea_is_wanted()
    assert re.search(rf"^{METRIC[night.example]}: ", first, re.M), first
    assert re.search(r"^verdict: +baseline ", first, re.M), first
    assert night.rows()[0] == ["commit", METRIC[night.example], "memory_gb", "status", "description"]
    assert {row[3] for row in night.rows()[1:]} == {"keep"}


def check_keep_and_discard(night):
    night.edit(BETTER[night.example])
    night.commit("a gain")
    night.until_an_idea_is_wanted()
    assert night.words_on("a gain")[-1] == "keep", night.last
    kept = git(night, "rev-parse", "HEAD")
    before = night.file.read_text(encoding="utf-8")
    night.edit(WORSE[night.example])
    night.commit("a loss")
    dropped = git(night, "rev-parse", "HEAD")
    night.until_an_idea_is_wanted()
    assert night.words_on("a loss")[-1] == "discard", night.last
    assert git(night, "rev-parse", "HEAD") == kept
    assert night.file.read_text(encoding="utf-8") == before
    assert dropped in git(night, "for-each-ref", "--format=%(objectname)", "refs/autoresearch")


def check_crash(night):
    kept = git(night, "rev-parse", "HEAD")
    night.edit(FAILING[night.example])
    night.commit("a mistake")
    assert FAIL[night.example] in night.shell(night.run_command)
    if night.example == "bugs":  # once is enough: a mend that is none
        night.file.write_text(night.file.read_text(encoding="utf-8") + "\nMENDED = True\n", encoding="utf-8")
        night.shell(night.mend_command)
        assert FAIL[night.example] in night.shell(night.run_command)
    night.shell(night.crash_command)
    assert night.words_on("a mistake") == ["crash"]
    assert [row[1] for row in night.rows() if row[3] == "crash"] == ["nan"]
    assert git(night, "rev-parse", "HEAD") == kept


def check_frozen(night):
    """A frozen file is edited in the commit of an idea: the run does not count, whatever it scores."""
    night.edit(BETTER[night.example][::-1])
    frozen = night.folder / FROZEN[night.example]
    frozen.write_text(frozen.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    night.commit("another ruler")
    out = night.shell(night.run_command)
    said = rf"FAIL: |^verdict: +none \(.*{re.escape(frozen.name)} was edited"
    assert re.search(said, out, re.M), out
    night.shell(night.discard_command if "verdict" in out else night.crash_command)
    assert night.words_on("another ruler")[-1] != "keep"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("night", EXAMPLES, indirect=True)
def test_a_night(night):
    check_baseline(night)
    check_keep_and_discard(night)
    if FAILING[night.example]:
        check_crash(night)
    check_frozen(night)
    status = re.search(r"`(uv run \.\./\.\./referee\.py status)`", program(night.example))[1]
    assert re.search(r"^next: ", night.shell(status), re.M)


@pytest.mark.parametrize("example", EXAMPLES)
def test_program_is_short_and_complete(example):
    text = program(example)
    assert len(text.splitlines()) <= 40
    assert f"`{EDITED[example]}`" in text
    assert METRIC[example] in text
    for word in ("never stop", "At most twice", "Stuck", "git push", "ideas.md", "referee.py status", "crash"):
        assert word in text, word


@pytest.mark.parametrize("example", EXAMPLES)
def test_ruler_is_short_and_free_to_import(example):
    path = ROOT / "examples" / example / "ruler.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 45
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__':\n    referee.measure(")
    code = "import sys; sys.dont_write_bytecode = True; import ruler"
    done = subprocess.run([sys.executable, "-c", code], cwd=path.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("example", EXAMPLES)
def test_all_files_but_one_are_frozen(example):
    """What lies in the folder is edited, frozen, the ruler or program.md."""
    folder = ROOT / "examples" / example
    call = ast.parse((folder / "ruler.py").read_text(encoding="utf-8")).body[-1].body[0].value
    facts = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert facts["edits"] == [EDITED[example]]
    assert facts["metric"] == METRIC[example]
    listed = subprocess.run(
        ["git", "ls-files", "."], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.split()
    tops = {name.split("/")[0] for name in listed}
    assert tops == {*facts["edits"], *facts["frozen"], "ruler.py", "program.md"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_functions_fit_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name

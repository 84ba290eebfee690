"""The permissions shipped for Claude Code and Codex: every command of program.md is allowed, what would break a night is not.

What was learnt in the agents themselves (Claude Code 2.1.197 with --permission-mode dontAsk, codex-cli 0.169.0, answering to
a scripted model) is checked here: a `*` matches nothing in an assignment before a command, and Codex takes a command with an
assignment as one string.
"""

import json
import re
import tomllib

import night
import pytest
from conftest import ROOT

CLAUDE = json.loads((ROOT / ".claude/settings.json").read_text())
ALLOW = CLAUDE["permissions"]["allow"]
DENY = CLAUDE["permissions"]["deny"]
CODEX = []


def prefix_rule(**rule):
    CODEX.append(rule)


exec((ROOT / ".codex/rules/autoresearch.rules").read_text(), {"prefix_rule": prefix_rule})  # Starlark, and Python

PROGRAM = (ROOT / "program.md").read_text(encoding="utf-8")
COMMANDS = night.Commands(PROGRAM)
LOOP = [
    re.sub("<[^>]*>", "nov21", COMMANDS.branch),
    COMMANDS.check,
    COMMANDS.notes,
    COMMANDS.search.replace("<a word of it>", "wider"),
    COMMANDS.commit.replace("<the idea in a few words>", "wider; deeper"),
    COMMANDS.mend,
    COMMANDS.run,
    COMMANDS.wait,
    COMMANDS.log,
    COMMANDS.status,
    f"{COMMANDS.run} --seed 43",
    f"{COMMANDS.log} discard",
    f"{COMMANDS.log} keep --note 'less code'",
    "git restore train.py",
    "git checkout -q --detach 3f2a1bc",
    "git checkout -q autoresearch/nov21",
    "git cherry-pick refs/autoresearch/3f2a1bc",
    "uv run prepare.py --dataset python",
    "tail -n 20 ideas.md",
    "git log --oneline -5",
]
FLEET = (ROOT / "fleet/program.md").read_text(encoding="utf-8")
LOOP += [
    re.sub("<[^>]*>", "3f2a1bc", code) for code in night.codes(FLEET) if code.startswith(("git c", "uv run referee"))
]
REPORT = [f"AUDIT=1 {COMMANDS.run} --seed {seed}" for seed in (101, 102)]
HARM = [
    "git push",
    "git push origin main",
    "git clean -fdx",
    "git stash",
    "git add -A",
    "git reset --hard HEAD~1",
    "rm -rf .git",
    "rm results.tsv",
    "sed -i s/a/b/ prepare.py",
    "curl http://example.org",
    "python3 -c 'x'",
    "uv pip install x",
    "uv run train.py",
    "TIME_BUDGET=900 uv run referee.py run",
    "AUDIT=1 uv run referee.py run",
]


def matches(rule, command):
    """A Bash rule of Claude Code: * is any text, a final ' *' may be missing."""
    pattern = re.fullmatch(r"Bash\((.*)\)", rule)
    if not pattern:
        return False
    text = re.escape(pattern[1]).replace(r"\*", ".*")
    return re.fullmatch(re.sub(r"\\ \.\*$", r"(\\ .*)?", text), command) is not None


@pytest.mark.parametrize("command", LOOP + REPORT)
def test_claude_allows_the_loop(command):
    assert any(matches(rule, command) for rule in ALLOW)
    assert not any(matches(rule, command) for rule in DENY)


@pytest.mark.parametrize("command", HARM)
def test_claude_allows_no_harm(command):
    denied = any(matches(rule, command) for rule in DENY)
    assert denied or not any(matches(rule, command) for rule in ALLOW)


def test_claude_protects_the_frozen_half_and_the_records():
    assert {"Edit(/prepare.py)", "Edit(/referee.py)", "Edit(/runs/**)", "Edit(/results.tsv)"} <= set(DENY)
    assert {"Edit(/train.py)", "Edit(/ideas.md)"} <= set(ALLOW)
    assert not any(re.match(r"Bash\(([A-Z_]+=\S*\s+)*[A-Z_]+=\S*\*", rule) for rule in ALLOW), "no * in an assignment"
    assert not {"Bash", "Bash(*)"} & set(ALLOW)


def test_claude_waits_as_long_as_a_run_takes():
    assert CLAUDE["env"]["BASH_DEFAULT_TIMEOUT_MS"] == "600000"
    assert "at most 540 s" not in PROGRAM  # the default of --wait, which ends before that


def fits(rule, words):
    """Whether the pattern of a Codex rule begins this command."""
    if len(words) < len(rule["pattern"]):
        return False
    pairs = zip(rule["pattern"], words)
    return all(word in (want if isinstance(want, list) else [want]) for want, word in pairs)


def decided(words):
    """Codex's decision on a command: the strictest of the rules that fit."""
    found = {rule["decision"] for rule in CODEX if fits(rule, words)}
    return next((decision for decision in ("forbidden", "prompt", "allow") if decision in found), None)


def plain_words(command):
    return [word.strip("'") for word in re.findall(r"'[^']*'|\S+", command)]


@pytest.mark.parametrize("command", LOOP)
def test_codex_runs_outside_its_sandbox_what_needs_it(command):
    assert decided(plain_words(command)) == "allow"


@pytest.mark.parametrize("command", REPORT)
def test_codex_takes_an_assignment_as_one_string(command):
    assert decided(["bash", "-lc", command]) == "allow"
    assert decided(["/bin/zsh", "-c", command]) == "allow"


@pytest.mark.parametrize("command", LOOP)
def test_codex_takes_the_loops_words_as_plain_ones(command):
    """An unquoted ~ or ^ would make Codex judge the whole line as one string, which no rule allows."""
    assert not re.search(r"[~^*$`{}()|&;]", re.sub(r"'[^']*'", "", command))


@pytest.mark.parametrize("command", HARM)
def test_codex_allows_no_harm(command):
    assert decided(plain_words(command)) != "allow"
    assert decided(["bash", "-lc", command]) != "allow"


def test_codex_fences_the_frozen_files():
    config = tomllib.loads((ROOT / ".codex/config.toml").read_text())
    profile = config["permissions"][config["default_permissions"]]
    roots = profile["filesystem"][":workspace_roots"]
    assert config["approval_policy"] == "never"
    assert profile["extends"] == ":workspace"
    assert "sandbox_mode" not in config
    assert {roots[name] for name in ("prepare.py", "referee.py", "runs", "tests", "uv.lock")} == {"read"}

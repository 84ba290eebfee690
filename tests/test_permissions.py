"""The permissions that are shipped let the loop run and refuse harm. Codex is asked itself where it is installed."""

import json
import re
import shutil
import subprocess
import tomllib

import pytest
from conftest import ROOT

CLAUDE = json.loads((ROOT / ".claude/settings.json").read_text())
RULES = ROOT / ".codex/rules/autoresearch.rules"
EXAMPLES = ("speed", "bugs", "article", "article/topics")
PROGRAMS = ["program.md", "fleet/program.md", *(f"examples/{name}/program.md" for name in EXAMPLES)]
REPORT = "AUDIT=1 uv run referee run --seed 101"
HARM = ["git push", "git clean -fd", "git stash", "git reset --hard HEAD~3", "git push origin main", "rm -rf runs"]
HARM += ["TIME_BUDGET=900 uv run referee run", "AUDIT=1 uv run referee run --seed 42"]


def commands():
    """Every command that a program.md tells the agent to run, placeholders filled in."""
    found = []
    for name in PROGRAMS:
        for code in re.findall(r"`([^`\n]+)`", (ROOT / name).read_text(encoding="utf-8")):
            for command in re.split(r" && | \| ", code):
                if re.match(r"(uv run|git|printf|grep|tail|AUDIT=1 uv) ", command) and not is_forbidden(command):
                    found.append(re.sub(r"<\w+>", "a1b2c3d", command))
    return sorted(set(found))


def is_forbidden(command):
    """Named in a rule that forbids it, or left to the user's own permissions, or the start of a line."""
    return re.match(
        r"git (clean|push|stash|reset|add|worktree)|uv run (python|pytest)|git cherry-pick -x \.\.\.", command
    )


def claude_allows(command):
    """Whether a prefix of the shipped list begins the command."""
    rules = [rule[5:-1] for rule in CLAUDE["permissions"]["allow"] if rule.startswith("Bash(")]
    return any(command == rule or (rule.endswith("*") and f"{command} ".startswith(rule[:-1])) for rule in rules)


@pytest.mark.parametrize("command", commands())
def test_claude_allows_the_loop(command):
    assert claude_allows(command)


@pytest.mark.parametrize("command", HARM)
def test_claude_allows_no_harm(command):
    denied = [rule for rule in CLAUDE["permissions"]["deny"] if command.startswith(rule[5:-1].rstrip("*").rstrip())]
    assert denied or not claude_allows(command)


def test_claude_protects_the_frozen_half_and_the_records():
    deny = set(CLAUDE["permissions"]["deny"])
    assert {"Edit(/prepare.py)", "Edit(/referee/**)", "Edit(/runs/**)", "Edit(/results.tsv)"} <= deny
    assert CLAUDE["env"]["BASH_DEFAULT_TIMEOUT_MS"] == "600000"


def test_codex_fences_the_frozen_files():
    config = tomllib.loads((ROOT / ".codex/config.toml").read_text())
    roots = config["permissions"][config["default_permissions"]]["filesystem"][":workspace_roots"]
    assert config["approval_policy"] == "never"
    assert {roots[name] for name in ("prepare.py", "referee", "runs", "tests", "uv.lock")} == {"read"}


def codex_decides(*words):
    """What the real Codex decides on a command."""
    command = ["codex", "execpolicy", "check", "--rules", str(RULES), "--", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout).get("decision")


needs_codex = pytest.mark.skipif(not shutil.which("codex"), reason="no codex here: npm install -g @openai/codex")


@needs_codex
def test_codex_allows_the_loop():
    plain = [command for command in commands() if not command.startswith("AUDIT")]
    refused = [command for command in plain if codex_decides(*re.findall(r"[^\s']+", command)) != "allow"]
    assert refused == []
    assert codex_decides("bash", "-lc", REPORT) == "allow"


@needs_codex
@pytest.mark.parametrize("command", HARM)
def test_codex_allows_no_harm(command):
    assert codex_decides(*command.split()) != "allow"
    assert codex_decides("bash", "-lc", command) != "allow"

"""The permissions shipped for Claude Code and Codex: every command of program.md is allowed, what would break a night is not.

Both were tried in the agents themselves (Claude Code 2.1.197 with --permission-mode dontAsk, codex-cli 0.169.0), which answered
to a scripted model; what was learnt there is checked here: a `&` is never allowed by a rule of Claude Code, a `*` matches
nothing in an assignment before a command, and Codex takes a command with a redirection as one string.
"""

import json
import re
import shlex
import tomllib

import night
import pytest
from conftest import ROOT

CLAUDE = json.loads((ROOT / ".claude/settings.json").read_text())["permissions"]
CODEX = []
exec(
    (ROOT / ".codex/rules/autoresearch.rules").read_text(), {"prefix_rule": lambda **rule: CODEX.append(rule)}
)  # Starlark, and Python

SEEDED = [f"SEED={seed} {night.START}" for seed in (42, 43, 44)] + [
    f"AUDIT=1 SEED={seed} {night.START}" for seed in (101, 102)
]
ROW = night.ROW.replace("<val_bpb>", "0.9979").replace("<memory_gb>", "44.0").replace("<status>", "keep")
LOOP = [
    night.BRANCH.replace("<nov21>", "nov21"),
    night.CHECK,
    night.NOTES,
    night.LOG,
    night.START,
    *SEEDED,
    night.POLL,
    night.READ,
    ROW,
    night.SEARCH.replace("<a word of it>", "wider"),
    night.COMMIT.replace("<the idea in a few words>", "wider; deeper"),
    night.BACK,
    night.MEND,
    night.TAIL,
    *night.AFTER[:3],
    "git restore --staged --worktree train.py",
    "cut -f 4 results.tsv | tail -n 5",
    "git checkout -q --detach 3f2a1bc",
    "git checkout -q autoresearch/nov21",
    "uv run prepare.py --dataset python",
]
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
    "TIME_BUDGET=900 uv run train.py",
]


def segments(command):
    """The simple commands of a line, as lists of words, without redirections."""
    lexer = shlex.shlex(command.replace("\n", " "), posix=False, punctuation_chars=True)
    lexer.whitespace_split = True
    found, words, skip = [], [], False
    for token in lexer:
        if skip:
            skip = False
        elif set(token) <= set("<>&") and set(token) & set("<>"):
            skip = True
            if words and words[-1].isdigit():
                words.pop()
        elif set(token) <= set(";|&"):
            found.append(words)
            words = []
        else:
            words.append(token)
    return [words for words in [*found, words] if words]


def test_segments():
    assert segments("nohup uv run t.py > run.log 2>&1 < /dev/null &") == [["nohup", "uv", "run", "t.py"]]
    assert segments("a 'x; y' | b && c; d >> e") == [["a", "'x; y'"], ["b"], ["c"], ["d"]]


def matches(rule, command):
    """A Bash rule of Claude Code: * is any text, a final ' *' may be missing."""
    pattern = re.fullmatch(r"Bash\((.*)\)", rule)
    if not pattern:
        return False
    text = re.escape(pattern[1]).replace(r"\*", ".*")
    return bool(re.fullmatch(re.sub(r"\\ \.\*$", r"(\\ .*)?", text), command))


@pytest.mark.parametrize("command", LOOP)
def test_claude_allows_the_loop(command):
    for words in segments(command.removesuffix(" &")):  # without the &: Claude Code keeps the command running itself
        text = " ".join(words)
        assert any(matches(rule, text) for rule in CLAUDE["allow"]), text
        assert not any(matches(rule, text) for rule in CLAUDE["deny"]), text


@pytest.mark.parametrize("command", HARM)
def test_claude_allows_no_harm(command):
    allowed = all(any(matches(rule, " ".join(words)) for rule in CLAUDE["allow"]) for words in segments(command))
    denied = any(matches(rule, " ".join(words)) for rule in CLAUDE["deny"] for words in segments(command))
    assert denied or not allowed


def test_claude_protects_the_frozen_half():
    assert {"Edit(/prepare.py)", "Edit(/runs.jsonl)", "Bash(git push *)"} <= set(CLAUDE["deny"])
    assert {"Edit(/train.py)", "Edit(/ideas.md)", "Edit(/results.tsv)", "Edit(/run.log)"} <= set(CLAUDE["allow"])
    assert not any(re.match(r"Bash\(([A-Z_]+=\S*\s+)*[A-Z_]+=\S*\*", rule) for rule in CLAUDE["allow"]), (
        "no * in an assignment"
    )
    assert "Bash" not in CLAUDE["allow"] and "Bash(*)" not in CLAUDE["allow"]


def decided(words):
    """Codex's decision on a command: the strictest of the rules whose pattern begins it."""
    fits = lambda rule: (
        len(words) >= len(rule["pattern"])
        and all(word in (want if isinstance(want, list) else [want]) for want, word in zip(rule["pattern"], words))
    )
    found = {rule["decision"] for rule in CODEX if fits(rule)}
    return next((d for d in ("forbidden", "prompt", "allow") if d in found), None)


def test_codex_runs_outside_its_sandbox_what_needs_it():
    for command in [night.START, *SEEDED]:  # they redirect
        for whole in (command, command.removesuffix(" &")):
            assert decided(["bash", "-lc", whole]) == decided(["/bin/zsh", "-c", whole]) == "allow", whole
    for command in LOOP:
        if not re.search(r"[<>]", re.sub(r"'[^']*'", "", command)):
            for words in segments(command):
                assert decided([word.strip("'") for word in words]) == "allow", words


def test_codex_takes_the_loops_words_as_plain_ones():
    """An unquoted ~ or ^ would make Codex judge the whole line as one string, which no rule allows."""
    for command in LOOP:
        if "git" in command:
            assert not re.search(r"[~^*$`{}()]", re.sub(r"'[^']*'", "", command)), command


def test_codex_forbids_harm():
    for command in HARM:
        assert all(decided(words) != "allow" for words in segments(command)), command
    assert decided(["git", "push", "origin"]) == decided(["git", "clean", "-fd"]) == "forbidden"
    config = tomllib.loads((ROOT / ".codex/config.toml").read_text())
    profile = config["permissions"][config["default_permissions"]]
    assert config["approval_policy"] == "never" and profile["extends"] == ":workspace"
    assert profile["filesystem"][":workspace_roots"]["prepare.py"] == "read" and "sandbox_mode" not in config

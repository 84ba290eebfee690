"""README and program.md are run: every command in them, and the summary block they show."""

import io
import os
import re
import shlex
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run_prepare, words
from zygote import run_script

README, PROGRAM = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "program.md"))


def commands(text):
    """Single commands that start with `uv run`, from fenced blocks and inline code, comments and redirections cut off."""
    code = re.findall(r"```\n(.*?)```", text, re.S) + re.findall(
        r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
    )
    found = []
    for line in "\n".join(code).splitlines():
        for part in re.sub(r"\s#.*|\s*>.*", "", line).split("&&"):
            if "uv run" in part and "..." not in part:
                found.append(part.strip())
    found += [f"uv run prepare.py {options}" for options in re.findall(r"^\| `(--[^`]*)`", text, re.M)]
    return list(dict.fromkeys(found))


def test_commands_are_found():
    assert commands("x `A=1 uv run train.py` y\n```\nuv run a && uv run b  # c\n```") == [
        "uv run a",
        "uv run b",
        "A=1 uv run train.py",
    ]
    assert len(commands(README)) >= 9 and "uv run prepare.py --dataset python" in commands(README)


@pytest.fixture
def hub(monkeypatch):
    """A hub with all shards that the default asks for, and datasets cut to a size that a test can prepare."""
    import test_download

    import prepare

    def shard(seed, count):
        out = io.BytesIO()
        pq.write_table(pa.table({"text": [words(1000 * seed + n, 60) for n in range(count)]}), out)
        return out.getvalue()

    names = [f"shard_{n:05d}.parquet" for n in (*range(10), 6541, 6542)]
    server = test_download.Hub(
        {**{name: shard(n, 90) for n, name in enumerate(names)}, "tinystories_gpt4_clean.parquet": shard(50, 900)}
    )
    monkeypatch.setattr(
        prepare, "PRESETS", {name: (repository, 400, 64, 2048) for name, (repository, *_) in prepare.PRESETS.items()}
    )
    monkeypatch.setattr(prepare, "TINYSTORIES_HELD_OUT", 90)
    monkeypatch.setattr(prepare, "PYTHON_CHARS", 2 * 10**6)
    yield server
    server.shutdown()


def test_every_command_of_the_readme_runs(hub, project, text_folder, tmp_path):
    home, locks, ran = tmp_path / "home", tmp_path / "locks", 0
    locks.mkdir()
    for command in commands(README):
        parts = shlex.split(command)
        env = dict(part.split("=") for part in parts[: parts.index("uv")])
        script, *options = parts[parts.index("uv") + 2 :]
        if script == "prepare.py":
            options = [str(text_folder) if option == "DIR" else option for option in options]
            if "--check" in options and not home.exists():
                assert run_prepare("--dataset", "python", env={"AUTORESEARCH_HOME": str(home)}).returncode == 0
            done = run_prepare(*options, env={"AUTORESEARCH_HOME": str(home), "HF_ENDPOINT": hub.url})
            assert done.returncode == 0, (command, done.stdout, done.stderr)
        elif script == "train.py":
            full = {
                **os.environ,
                "AUTORESEARCH_HOME": str(home),
                "TMPDIR": str(locks),
                "TORCH_COMPILE_DISABLE": "1",
                **env,
                "TIME_BUDGET": "1",
            }
            status = run_script("train.py", project, full, project / "run.log")
            assert status == 0, (command, (project / "run.log").read_text())
        elif (
            script == "tests/bench_gpu.py"
        ):  # half an hour of runs; test_bench.py runs it for a second each, marked slow
            done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0 and "ABBA" in done.stdout, done.stderr
        else:
            assert script == "pytest"
        ran += 1
    assert ran >= 9


def test_readmes_main_commands_are_what_ci_runs():
    ci = (ROOT / ".ci/run").read_text()
    first = re.search(r"```\n(.*?)```", README, re.S)[1]
    for line in first.splitlines():
        assert re.sub(r"\s+#.*", "", line) in ci, line


def test_the_block_shown_is_a_real_one():
    import test_guard

    shown = re.findall(r"^---\n((?:\w+: +\S+\n)+)", README, re.M)
    assert len(shown) == 1
    lines = shown[0].splitlines()
    assert [line.split(":")[0] for line in lines] == test_guard.NINE and all(
        line.index(line.split()[1]) == 18 for line in lines
    )


def test_documents_are_short():
    assert len(README.splitlines()) <= 95 and len(PROGRAM.splitlines()) <= 110
    assert all(len(line) <= 130 for line in (README + PROGRAM).splitlines())


def test_files_named_exist_or_are_made_in_use():
    made = {"results.tsv", "run.log", "progress.png", "runs.jsonl", "ideas.md"}
    for name in set(re.findall(r"`([\w.]+\.(?:py|md|ipynb|tsv|log|png|jsonl))`", README + PROGRAM)) - made:
        assert (ROOT / name).is_file(), name


def test_program_says_what_it_must():
    for word in (
        "SEED=43",
        "autoresearch/<nov21>",
        "results.tsv",
        "run.log",
        "ideas.md",
        "nan",
        "FAIL: oom",
        "FAIL: nan",
        "FAIL: timeout",
        "FAIL: busy",
        "FAIL: harness",
        "FAIL: error",
        "never stop",
        "never ask",
        "prepare.py --check",
        "Simpler",
        "AUDIT=1",
        "refs/autoresearch/",
        "rerun (next SEED=",
        "Memory is a cost",
    ):
        assert word in PROGRAM, word
    assert (
        "git reset --hard" not in PROGRAM and PROGRAM.count("nohup uv run train.py >") == 2
    )  # each fact once; the report's is the other

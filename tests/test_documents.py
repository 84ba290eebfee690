"""README and the program.md files are run: every command in them, and the summary block they show."""

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

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = (ROOT / "program.md").read_text(encoding="utf-8")
RECIPE = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
NINE = ["val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent"]
NINE += ["total_tokens_M", "num_steps", "num_params_M", "depth"]


def commands(text):
    """Single commands that start with `uv run`, from fenced blocks and inline code, comments and redirections cut off."""
    code = re.findall(r"```\n(.*?)```", text, re.S)
    code += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    found = []
    for line in "\n".join(code).splitlines():
        for part in re.sub(r"\s#.*|\s*>.*", "", line).split("&&"):
            if "uv run" in part and "..." not in part:
                found.append(part.strip())
    return list(dict.fromkeys(found))


def test_commands_are_found():
    text = "x `A=1 uv run train.py` y\n```\nuv run a && uv run b  # c\n```"
    assert commands(text) == ["uv run a", "uv run b", "A=1 uv run train.py"]
    assert "uv run prepare.py --dataset python" in commands(README)


def shard(seed, count):
    """Bytes of a parquet file of some text."""
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [words(1000 * seed + n, 60) for n in range(count)]}), out)
    return out.getvalue()


@pytest.fixture
def hub(monkeypatch):
    """A hub with all shards that the default asks for, and datasets cut to a size that a test can prepare."""
    import test_download

    import prepare

    names = [f"shard_{n:05d}.parquet" for n in (*range(10), 6541, 6542)]
    files = {name: shard(n, 90) for n, name in enumerate(names)}
    server = test_download.Hub({**files, "tinystories_gpt4_clean.parquet": shard(50, 900)})
    small = {name: prepare.Preset(preset.repository, 400, 64, 2048) for name, preset in prepare.PRESETS.items()}
    monkeypatch.setattr(prepare, "PRESETS", small)
    monkeypatch.setattr(prepare, "TINYSTORIES_HELD_OUT", 90)
    monkeypatch.setattr(prepare, "PYTHON_CHARS", 2 * 10**6)
    yield server
    server.shutdown()


@pytest.mark.timeout(300)
def test_every_command_of_the_readme_runs(hub, small_project, text_folder, tmp_path):
    home = tmp_path / "home"
    environment = {**os.environ, "AUTORESEARCH_HOME": str(home), "TMPDIR": str(tmp_path), "TORCH_COMPILE_DISABLE": "1"}
    for command in commands(README):
        parts = shlex.split(command)
        given = dict(part.split("=") for part in parts[: parts.index("uv")])
        script, *options = parts[parts.index("uv") + 2 :]
        options = [str(text_folder) if option == "DIR" else option for option in options]
        if script == "prepare.py":
            done = run_prepare(*options, env={"AUTORESEARCH_HOME": str(home), "HF_ENDPOINT": hub.url})
            assert done.returncode == 0, (command, done.stdout, done.stderr)
        elif script == "train.py":
            full = {**environment, **given, "TIME_BUDGET": "1"}
            status = run_script("train.py", small_project, full, small_project / "run.log")
            assert status == 0, (command, (small_project / "run.log").read_text())
        elif script == "referee" or script.startswith("bench/"):  # run in full by the tests of nights, by hand
            done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, (command, done.stderr)
            assert script != "referee" or options[0] in done.stdout
        else:
            assert script in ("pytest", "jupyter"), command


def test_readmes_main_commands_are_what_ci_runs():
    ci = (ROOT / ".ci/run").read_text()
    first = re.search(r"```\n(.*?)```", README, re.S)[1]
    for line in first.splitlines():
        assert re.sub(r"\s+#.*", "", line) in ci, line


def test_the_block_shown_is_a_real_one():
    (shown,) = re.findall(r"^---\n((?:\w+: +\S+\n)+)", README, re.M)
    lines = shown.splitlines()
    assert [line.split(":")[0] for line in lines] == NINE
    assert all(line.index(line.split()[1]) == 18 for line in lines)


@pytest.mark.parametrize(
    "name, most", [("README.md", 120), ("program.md", 85), ("fleet/program.md", 50), ("docs/recipe.md", 140)]
)
def test_documents_are_short(name, most):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= most
    assert all(len(line) <= 160 for line in lines if not line.startswith("|"))


def test_files_named_exist_or_are_made_in_use():
    made = {
        "results.tsv",
        "run.log",
        "progress.png",
        "ideas.md",
        "ruler.py",
        "engine.py",
        "analysis.html",
        "articles.py",
    }
    for name in set(re.findall(r"`([\w./]+\.(?:py|md|ipynb|tsv|log|png))`", README + PROGRAM + RECIPE)) - made:
        assert (ROOT / name).is_file(), name


FAILURES = ["`oom`", "`nan`", "`timeout`", "`busy`", "`lost`", "`preempted`", "`harness`", "`error`"]
MUST = [
    "never stop",
    "never ask",
    "prepare.py --check",
    "Simpler wins",
    "AUDIT=1",
    "refs/autoresearch/",
    "One run decides",
]


@pytest.mark.parametrize("word", FAILURES + MUST + ["Memory is a cost", "docs/recipe.md", "less than half an sd"])
def test_program_says_what_it_must(word):
    assert word in PROGRAM


@pytest.mark.parametrize("name", ["program.md", "fleet/program.md"])
def test_no_placeholder_reads_like_a_literal(name):
    assert not re.search(
        r"`[^`]*<(?!commit>|seed>)[^`]*`", (ROOT / name).read_text().replace("next: <command>  # <reason>", "")
    )


def test_program_takes_no_git_into_its_own_hands():
    for word in ("git reset --hard", "git add train.py", "update-ref", "nohup"):
        assert word not in PROGRAM

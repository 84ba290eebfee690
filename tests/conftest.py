"""Every test runs in a home, a cache and a temporary directory of its own; the user's are never touched."""

import atexit
import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = Path(tempfile.mkdtemp(prefix="autoresearch-tests-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)  # registered early, so it runs last
for name in list(os.environ):
    if name in ("SEED", "TIME_BUDGET", "AUDIT", "HF_ENDPOINT", "HF_TOKEN") or name.startswith("AUTORESEARCH_"):
        del os.environ[name]
for name, folder in {
    "HOME": "home",
    "TMPDIR": "tmp",
    "AUTORESEARCH_HOME": "cache",
    "XDG_CACHE_HOME": "xdg",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "IPYTHONDIR": "ipython",
    "MPLCONFIGDIR": "mpl",
}.items():
    (SCRATCH / folder).mkdir()
    os.environ[name] = str(SCRATCH / folder)
os.environ.update(
    NO_PROXY="127.0.0.1,localhost",
    OMP_NUM_THREADS="1",  # a worker a core: threads of two workers would wait for each other
    GIT_CONFIG_GLOBAL="/dev/null",
    GIT_AUTHOR_NAME="t",
    GIT_COMMITTER_NAME="t",
    GIT_AUTHOR_EMAIL="t@example.org",
    GIT_COMMITTER_EMAIL="t@example.org",
)
tempfile.tempdir = None
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job: children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402  (after the environment is set, as are the imports of prepare in the tests)


def pytest_collection_modifyitems(items):
    import torch

    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def words(seed, count):
    """Text with some structure to learn: words of a small vocabulary, each likely followed by one of a few."""
    rng = random.Random(0)
    stock = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9))) for _ in range(300)]
    follow = {word: rng.sample(stock, 4) for word in stock}
    rng = random.Random(seed)
    word = stock[0]
    out = []
    for _ in range(count):
        word = rng.choice(follow[word]) if rng.random() < 0.9 else rng.choice(stock)
        if rng.random() < 0.02:
            out.append(word + ".\n\n")
        else:
            out.append(word + (" é " if rng.random() < 0.01 else " "))
    return "".join(out)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for n in range(40):
        (folder / f"{n:02d}.txt").write_text(words(n, 1500), encoding="utf-8")
    return folder


def run_prepare(*args, env=None):
    """prepare.py within this process: argv, environment, output and exit status as a shell would have them."""
    import prepare

    argv = sys.argv
    before = dict(os.environ)
    out = io.StringIO()
    err = io.StringIO()
    status = 0
    sys.argv = ["prepare.py", *map(str, args)]
    os.environ.update(env or {})
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            prepare.main()
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, str):
            err.write(f"{status}\n")
            status = 1
    except BaseException:
        err.write(traceback.format_exc())
        status = 1
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(before)
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


SMALL = ["--vocab-size", 512, "--seq-len", 64, "--eval-tokens", 4096]


@pytest.fixture(scope="session")
def small_home(tmp_path_factory, text_folder):
    """An AUTORESEARCH_HOME with a small `local` dataset: vocabulary 512, T = 64, 64 evaluation rows."""
    home = tmp_path_factory.mktemp("small")
    done = run_prepare("--dataset", "local", "--path", text_folder, *SMALL, env={"AUTORESEARCH_HOME": str(home)})
    assert done.returncode == 0, done.stdout + done.stderr
    return home


@pytest.fixture
def small(small_home, monkeypatch):
    """The small dataset in use, with a clock and a run of this test's own; gives the prepare module."""
    import prepare

    monkeypatch.setenv("AUTORESEARCH_HOME", str(small_home))
    fresh_run(monkeypatch)
    return prepare


def fresh_run(monkeypatch):
    """A run and an opened dataset of this test's own; returns the Run."""
    import prepare
    from referee import audit, run

    monkeypatch.setattr(run, "this_run", run.Run())
    audit._watched.clear()  # files of another test, whose numbers may be given anew
    prepare.dataset_in_use.cache_clear()
    return run.this_run


def doubts():
    """What has been noted so far against the score of this test's run."""
    from referee import run

    return run.this_run.doubts


def tree(folder):
    """Hash of every file below a folder, by name, locks left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != "lock"
    }


SMALLER = "batch_tokens=2**10, micro_tokens=2**9, eval_tokens=2**11, muon"  # what a test can wait for


@pytest.fixture
def project(tmp_path):
    """A git repository with the files that a training needs, as a user has them."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("prepare.py", "train.py", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "referee", folder / "referee", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run("git init -q && git add -A && git commit -qm start", shell=True, cwd=folder, check=True)
    return folder


@pytest.fixture
def small_project(project):
    """The same with a CPU tier of small batches."""
    script = project / "train.py"
    text = script.read_text()
    script.write_text(re.sub(r"batch_tokens=2\*\*12,\s.*\s.*\s+muon", SMALLER, text))
    assert script.read_text() != text
    subprocess.run(["git", "commit", "-qam", "smaller"], cwd=project, check=True)
    return project


@pytest.fixture(scope="session")
def begun(tmp_path_factory):
    """{mode: a night whose baseline is kept}, to be copied."""
    from stage import MODES, Stage

    return {mode: Stage(tmp_path_factory.mktemp(mode), slots=mode == "slots").baseline() for mode in MODES}


@pytest.fixture(params=("alone", "slots"))
def night(request, begun, tmp_path):
    """A night whose baseline is kept, alone and in slots."""
    from stage import copied

    return copied(begun[request.param], tmp_path)


@pytest.fixture
def alone(begun, tmp_path):
    from stage import copied

    return copied(begun["alone"], tmp_path)


@pytest.fixture
def slots(begun, tmp_path):
    from stage import copied

    return copied(begun["slots"], tmp_path)

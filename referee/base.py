"""The error with a kind, files written whole, hashes, locks, git."""

import ast
import contextlib
import fcntl
import hashlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

HISTORY = 2000  # commits of a branch that are read


class RefereeError(Exception):
    """A mistake of the user or the machine, in a sentence that says what to run. kind: of its FAIL line."""

    def __init__(self, message, kind="harness"):
        super().__init__(message)
        self.kind = kind


def require(condition, message, kind="harness"):
    """Raises RefereeError unless the condition holds."""
    if not condition:
        raise RefereeError(message, kind)


def whole_number(name, default, least, most):
    """The value of an environment variable. Raises RefereeError where it is no number in that range."""
    text = os.environ.get(name, str(default))
    good = text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most
    require(good, f"{name} is {text[:40]!r}; give a whole number from {least} to {most}, or unset it")
    return int(text)


# -- files


def write_atomic(path, content):
    """Writes text or bytes under a temporary name, then renames: the file is whole or as it was."""
    part = path.with_name(f"{path.name}.part")  # one that a kill leaves is the next writer's
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def hash_text(text):
    """SHA-256 of a text, 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def hash_file(path):
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_hash(source):
    """SHA-256 of what Python source does: comments, spacing and docstrings are left out. Text that is no Python is hashed
    as it stands."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return hash_text(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            body[0] = ast.Pass()
    return hash_text(ast.unparse(tree))


def try_lock(path):
    """(open file, whether its flock is ours). The lock is held until the file is closed, at the latest by our end, and
    not by children that are forked from us."""
    file = open(path, "a+")
    os.register_at_fork(after_in_child=file.close)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return file, False
    return file, True


def tail(path, count):
    """The last lines of a log, without empty ones, each cut to 200 characters."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.split("\r")[-1].rstrip()[:200] for line in text.splitlines()]
    return [line for line in lines if line][-count:]


# -- the machine


def usable_cores():
    """Numbers of the cores that this process may use: a slot of a cluster has fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_key():
    """Names the processor for a lock: cpu, or the cores of a slot that has some of them only."""
    cores = usable_cores()
    if len(cores) == os.cpu_count():
        return "cpu"
    return "cpu-" + "-".join(map(str, cores))


def cpu_name():
    """Model and usable cores of this machine's processor."""
    found = None
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    model = found[1].strip() if found else platform.machine()
    return f"cpu ({model}, {len(usable_cores())} cores)"


def birth(pid):
    """What tells this process from a later one with its number; None where it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()
        return None if words[0] in "ZX" else words[19]  # start, in clock ticks since boot
    except OSError:
        if Path("/proc/self/stat").is_file():
            return None
    out = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True).stdout
    state, _, started = out.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()


# -- git, which answers the same whatever the user's configuration says

PLAIN = {
    "color.ui": "false",
    "commit.gpgSign": "false",
    "core.fsmonitor": "false",
    "core.hooksPath": "/dev/null",
    "core.quotePath": "off",
    "diff.noprefix": "false",
    "diff.relative": "false",
    "i18n.logOutputEncoding": "utf-8",
    "log.mailmap": "false",
    "log.showSignature": "false",
    "merge.verifySignatures": "false",
    "safe.directory": "*",
}


def ask_git(folder, *words, data=None):
    """(standard output, what git complains of or None) of a git command; data: bytes for its standard input."""
    options = [part for setting, value in PLAIN.items() for part in ("-c", f"{setting}={value}")]
    environment = {**os.environ, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    environment.pop("GIT_EXTERNAL_DIFF", None)
    try:
        done = subprocess.run(["git", *options, *words], cwd=folder, capture_output=True, env=environment, input=data)
    except OSError as error:
        return b"", f"git cannot be run: {error.strerror}"
    if done.returncode == 0:
        return done.stdout, None
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return b"", said[0] if said else f"git {words[0]} failed"


def git(folder, *words, data=None):
    """Output of a git command that has to succeed, as text. Raises RefereeError with git's words."""
    out, trouble = ask_git(folder, *words, data=data)
    require(trouble is None, f"git says: {trouble}; settle that, then run this again (it goes on where it stopped)")
    return out.decode("utf-8", "replace").rstrip("\n")


@dataclass(frozen=True)
class Commit:
    hash: str  # 40 hex digits
    short: str  # 7 or more, as many as tell it from other commits
    parent: str | None  # the first one
    subject: str


@dataclass(frozen=True)
class Repository:
    """What git says of a folder. trouble: its own words where it has no commit to show."""

    folder: Path
    top: Path | None = None  # of this working tree
    common: Path | None = None  # .git of the main working tree
    own: Path | None = None  # .git of this working tree
    branch: str = ""  # empty on a detached HEAD
    history: tuple = ()  # Commits along first parents, HEAD first
    trouble: str = ""

    @property
    def head(self):
        return self.history[0] if self.history else None

    @property
    def relative(self):
        """This folder from the top of the working tree, as git writes it, with a slash at its end; empty at the top."""
        inner = self.folder.relative_to(self.top).as_posix()
        return "" if inner == "." else f"{inner}/"


def read_repository(folder):
    """The Repository around a folder. One git process: where .git lies can be read."""
    top = next((above for above in (folder, *folder.parents) if (above / ".git").exists()), None)
    if top is None:
        return Repository(folder, trouble="there is no git repository")
    own = top / ".git"
    if own.is_file():  # a linked working tree
        own = (top / own.read_text().strip().removeprefix("gitdir: ")).resolve()
    shared = own / "commondir"
    common = (own / shared.read_text().strip()).resolve() if shared.is_file() else own
    named = re.fullmatch(r"ref: refs/heads/(.+)\n?", (own / "HEAD").read_text())
    branch = named[1] if named else ""
    form = ["--abbrev=7", "--format=%H%x09%h%x09%P%x09%s"]
    out, trouble = ask_git(folder, "rev-list", "--first-parent", f"--max-count={HISTORY}", *form, "HEAD")
    history = []
    for line in out.decode("utf-8", "replace").split("\n")[1::2]:  # each behind a line `commit ...`
        digits, short, parents, subject = line.split("\t", 3)
        history.append(Commit(digits, short, parents.split()[0] if parents else None, subject))
    if trouble and "HEAD" in trouble:
        trouble = "there is no commit yet"
    return Repository(folder, top, common, own, branch, tuple(history), trouble or "")


def read_blobs(repository, names):
    """{name: bytes, or None for what is not there} of objects such as `HEAD:train.py` or `HEAD`, in one git process."""
    asked = "".join(f"{name}\n" for name in names)
    out, trouble = ask_git(repository.folder, "cat-file", "--batch", data=asked.encode())
    blobs = dict.fromkeys(names)
    if trouble:
        return blobs
    at = 0
    for name in names:
        end = out.index(b"\n", at)
        words = out[at:end].split()
        at = end + 1
        if len(words) == 3 and words[2].isdigit():
            size = int(words[2])
            blobs[name] = out[at : at + size]
            at += size + 1
    return blobs

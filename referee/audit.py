"""Who opens watched files, and which functions of the frozen half were replaced, while a run goes on."""

import contextlib
import os
import sys
import threading
from pathlib import Path

_watched = {}  # (device, inode) of a file or folder: what is said of it
_free = set()  # threads that read and write for the harness
_seals = []  # (name, namespace, key, function, its code) as they were compiled
_doubt = None  # called with a sentence; the hook is in place once this is set


def watch(paths, said, doubt):
    """From now on doubt(sentence) is called when somebody opens one of these files, or writes into one of these folders,
    outside harness_only()."""
    global _doubt
    for path in paths:
        with contextlib.suppress(OSError):
            _watched[identity(path)] = f"{said}: {Path(path).name}"
    if _doubt is None:
        sys.addaudithook(_on_event)
    _doubt = doubt


def identity(path):
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino


def _on_event(event, arguments):
    """The audit hook (PEP 578). It stays for the life of the process, so it is cheap where nothing is opened."""
    if event not in ("open", "os.rename") or not _watched or threading.get_ident() in _free:
        return
    with contextlib.suppress(OSError, ValueError, TypeError):
        path = os.fspath(arguments[0 if event == "open" else 1])
        writes = event == "os.rename" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        said = _watched.get(identity(os.path.dirname(path) or ".")) if writes else None
        if said is None and event == "open":
            said = _watched.get(identity(path))
        if said is not None:
            _doubt(f"{said} was opened{_caller()}")


def _caller():
    """Where in the running script this thread is, as a phrase."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == script:
            return f" by {Path(script).name} in line {frame.f_lineno}"
        frame = frame.f_back
    return " by other code"


@contextlib.contextmanager
def harness_only():
    """While this lasts, this thread opens watched files for the harness."""
    thread = threading.get_ident()
    inner = thread in _free
    _free.add(thread)
    try:
        yield
    finally:
        if not inner:
            _free.discard(thread)


def seal(module):
    """Notes the functions and methods of a module of the frozen half, so that a replaced one is noticed."""
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if callable(value) and hasattr(value, "__code__"):
            _seals.append((f"{module.__name__}.{name}", vars(module), name, value, value.__code__))
        if isinstance(value, type):
            for key, method in vars(value).items():
                if hasattr(method, "__code__"):
                    _seals.append((f"{module.__name__}.{name}.{key}", value, key, method, method.__code__))


def broken_seals():
    """Names of sealed functions that are no longer what they were."""
    broken = []
    for name, owner, key, function, code in _seals:
        now = owner.get(key) if isinstance(owner, dict) else vars(owner).get(key)
        if now is not function or function.__code__ is not code:
            broken.append(name)
    return broken


def borrowed_modules(folder, known):
    """Names of imported files below a folder that are not among the known ones, nor of an environment in it."""
    found = set()
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "/")
        if not path.is_relative_to(folder) or "site-packages" in path.parts:
            continue
        name = path.relative_to(folder)
        if str(name) not in known and name.parts[0] not in known:
            found.add(str(name))
    return sorted(found)

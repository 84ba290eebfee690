"""What runs in a folder, which of its files may be edited, and what is measured."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from referee.base import RefereeError, code_hash, hash_file, hash_text, require

DECIDING = ("clock", "run", "verdict")  # modules of this folder that decide a score or a verdict


@dataclass(frozen=True)
class Experiment:
    folder: Path
    script: str = "train.py"
    edits: tuple = ("train.py",)
    frozen: tuple = ("prepare.py", "referee")
    metric: str = "val_bpb"
    lower_is_better: bool = True
    perfect: float | None = None  # a score that cannot be bettered
    budget: float | None = None  # seconds from the start to the limit; None for that of a training

    @property
    def edited(self):
        """The edited files as a phrase."""
        return " and ".join(self.edits)

    @property
    def results(self):
        return self.folder / "results.tsv"

    @property
    def log(self):
        return self.folder / "run.log"

    @property
    def sign(self):
        """What a score is multiplied by so that less is better."""
        return 1 if self.lower_is_better else -1


def find_experiment(folder):
    """The Experiment of a folder. Raises RefereeError where nothing there can be run."""
    folder = Path(folder).resolve()
    if (folder / "train.py").is_file():
        return Experiment(folder)
    ruler = folder / "ruler.py"
    require(ruler.is_file(), f"{folder} holds no train.py and no ruler.py; name the folder of an experiment")
    return ruled_experiment(folder, **ruler_facts(ruler))


def ruler_facts(path):
    """The literal arguments of the measure() call in a ruler, read without running it."""
    wanted = ("metric", "lower_is_better", "edits", "frozen", "perfect", "budget")
    try:
        tree = ast.parse(path.read_bytes())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        call = next(call for call in calls if ast.unparse(call.func).split(".")[-1] == "measure")
        facts = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg in wanted}
    except (SyntaxError, ValueError, StopIteration):
        raise RefereeError(f"{path} must end in referee.measure(...) with its arguments written out") from None
    require("metric" in facts and "edits" in facts, f"measure() in {path} needs metric=... and edits=[...]")
    return facts


def ruled_experiment(folder, metric, edits, frozen=(), lower_is_better=True, perfect=None, budget=300):
    """The Experiment of a ruler's arguments. Raises RefereeError where they cannot be meant."""
    named = isinstance(metric, str) and re.fullmatch(r"[A-Za-z]\w*", metric)
    require(named, f"the metric is called {metric!r}; give a name of letters, digits and _")
    require(lower_is_better in (True, False), "lower_is_better is True or False; correct the ruler")
    number = perfect is None or isinstance(perfect, (int, float))
    require(number, f"perfect is {perfect!r}; give the score that cannot be bettered, or leave it out")
    timed = isinstance(budget, (int, float)) and budget > 0
    require(timed, f"budget is {budget!r}; give seconds above 0")
    listed = isinstance(edits, (list, tuple)) and isinstance(frozen, (list, tuple)) and len(edits) > 0
    require(listed, "edits and frozen are lists of file names, edits with one at least; correct the ruler")
    for name in [*edits, *frozen]:
        inside = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
        require(inside, f"{name!r} is no path inside {folder}; correct the ruler")
        require((folder / name).exists(), f"there is no {name} in {folder}; correct the ruler or restore the file")
    fixed = ("ruler.py", *frozen)
    return Experiment(folder, "ruler.py", tuple(edits), fixed, metric, lower_is_better, perfect, budget)


def edits_on_disk(experiment):
    """{name: bytes, or None for a file that is not there} of the edited files."""
    paths = {name: experiment.folder / name for name in experiment.edits}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}


def hash_edits(blobs):
    """16 hex digits of what edited files do, given {name: bytes or None}; two commits with the same ones are one idea."""
    parts = []
    for name, data in blobs.items():
        text = (data or b"").decode("utf-8", "surrogateescape")
        parts.append(f"{name} {code_hash(text) if name.endswith('.py') else hash_text(text)}")
    return hash_text("\n".join(parts))[:16]


def deciding_code():
    """Hash of the modules of this folder that decide a score or a verdict."""
    here = Path(__file__).parent
    return hash_text("\n".join(code_hash((here / f"{name}.py").read_text("utf-8")) for name in DECIDING))


def fingerprint(experiment):
    """8 hex digits over all that defines a ruler's number: the frozen files, the budget, the referee's rules."""
    files = set()
    for name in experiment.frozen:
        path = experiment.folder / name
        inner = path.rglob("*") if path.is_dir() else [path]
        files |= {file for file in inner if file.is_file() and "__pycache__" not in file.parts}
    parts = [f"{deciding_code()} {experiment.budget} {experiment.metric}"]
    for file in sorted(files):
        digest = code_hash(file.read_text("utf-8")) if file.suffix == ".py" else hash_file(file)
        parts.append(f"{file.relative_to(experiment.folder)} {digest}")
    return hash_text("\n".join(parts))[:8]

"""The look at the edited file: what reaches into the harness is named with its line, and its honest twin passes."""

import subprocess
import sys

import pytest
import stage
from stage import ROOT, commit, records, seeds, version

from referee import look

DOORS = {"prepare": {"clock", "evaluate_bpb", "make_dataloader", "Tokenizer", "guard", "TIME_BUDGET", "SEED"}}
HEAD = """
import os
import sys
import time
import torch
import torch.nn.functional as F
import prepare
from prepare import Tokenizer, clock
"""

CHEATS = {
    "a patched loss": "F.cross_entropy = lambda *a, **k: 0",
    "a patched loss by its long name": "torch.nn.functional.cross_entropy = min",
    "a longer budget": "prepare.clock.budget = 600",
    "time taken back": "clock.started += 10",
    "a slower clock": "time.monotonic = lambda: 0",
    "a patched tokenizer": "Tokenizer.token_bytes = lambda self: 0",
    "setattr": "setattr(torch, 'logsumexp', min)",
    "through vars": "vars(F)['cross_entropy'] = min",
    "through __dict__": "F.__dict__.update(cross_entropy=min)",
    "under another name": "c = clock\nc.budget = 600",
    "in a tuple": "a, clock.budget = 1, 600",
    "in a loop": "for clock.budget in (600,):\n    pass",
    "in a with": "with open('x') as clock.budget:\n    pass",
    "deleted": "del clock.started",
    "replaced output": "sys.stdout = open('x', 'w')",
    "another home": "os.environ['AUTORESEARCH_HOME'] = '/tmp'",
    "another budget": "os.environ.update(TIME_BUDGET='900')",
    "an unknown variable": "os.environ[input()] = '1'",
    "the audit": "os.environ.setdefault('AUDIT', '1')",
    "outside the door": "prepare._dataset()",
    "outside the door by getattr": "getattr(prepare, '_dataset')()",
    "outside the door by a computed name": "getattr(prepare, '_' + 'dataset')()",
    "outside the door by vars": "vars(prepare)['_dataset']()",
    "imported from outside the door": "from prepare import _dataset",
    "the referee itself": "import referee",
    "the referee through the door": "prepare.referee.this_run",
    "a frame": "sys._getframe(1).f_locals",
    "a frame by inspect": "import inspect",
    "other people's objects": "import gc\ngc.get_objects()",
    "a thread": "import threading",
    "a pool": "from concurrent.futures import ThreadPoolExecutor",
    "a process": "import subprocess",
    "a fork": "os.fork()",
    "torch's processes": "import torch.multiprocessing as mp",
    "at exit": "import atexit",
    "code from text": "exec('clock.budget = 600')",
    "a module by name": "sys.modules['prepare']",
    "import by name": "import importlib",
    "the code of a function": "clock.tick.__code__ = 1",
    "the globals of a function": "clock.tick.__globals__['x'] = 1",
    "mocks": "from unittest import mock",
}
HONEST = {
    "settings of torch": "torch._dynamo.config.recompile_limit = 64\ntorch.backends.cuda.matmul.allow_tf32 = True",
    "settings under another name": "c = torch._dynamo.config\nc.cache_size_limit = 8",
    "allocator": "os.environ.setdefault('PYTORCH_ALLOC_CONF', 'expandable_segments:True')\nos.environ['OMP_NUM_THREADS'] = '2'",
    "its own objects": "class A:\n    pass\nA.x = 1\na = A()\na.y = {}\na.y['z'] = 2",
    "a model of torch": "m = torch.nn.Linear(2, 2)\nm.weight.data = m.weight * 2\nm.forward = min",
    "own name like a module's": "F = {}\nF['x'] = 1",
    "names rebound": "TIME_BUDGET = 30\nnorm = F.rms_norm",
    "collector": "import gc\ngc.collect()\ngc.freeze()",
    "eval of a model": "m = torch.nn.Linear(2, 2)\nm.eval()",
    "generators": "import random\nrandom.seed(1)\ntorch.manual_seed(1)",
    "default device": "torch.set_default_device('cpu')",
    "averages of weights": "for p in [torch.ones(2)]:\n    p.data.lerp_(p, 0.5)",
    "groups of an optimizer": "o = torch.optim.SGD([torch.ones(2)])\nfor g in o.param_groups:\n    g['lr'] = 0.1",
    "getattr of its own": "getattr(torch.nn, 'Linear')\ngetattr(prepare, 'TIME_BUDGET')\nvars(F)",
    "the door": "prepare.MAX_SEQ_LEN if False else prepare.TIME_BUDGET",
}


@pytest.mark.parametrize("name", CHEATS)
def test_what_reaches_into_the_harness_is_named_with_its_line(name):
    text = HEAD + "\n" + CHEATS[name] + "\n"
    found = look(text, DOORS)
    assert found, name
    first = text.splitlines().index(CHEATS[name].splitlines()[0]) + 1
    assert first <= found[0][0] < first + 3


@pytest.mark.parametrize("name", HONEST)
def test_its_honest_twin_passes(name):
    doors = {"prepare": DOORS["prepare"] | {"MAX_SEQ_LEN"}}
    assert look(HEAD + HONEST[name] + "\n", doors) == []


def test_the_shipped_train_passes():
    code = "import prepare, referee; print(referee.look(open('train.py').read(), {'prepare': set(prepare.__all__)}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_text_that_is_no_python_is_left_to_python():
    assert look("def (") == []


def test_the_verdict_names_the_line(tmp_path):
    folder = stage.make(tmp_path / "project")
    commit(folder, version(seeds(0.5)).replace("NOTE", "import time\ntime.perf_counter = min\nNOTE"), "sly")
    out = stage.train(folder)[1]
    assert "none (train.py line 4 changes time.perf_counter, which is not its own)" in out
    assert records(folder)[0]["why_not"] == ["train.py line 4 changes time.perf_counter, which is not its own"]
    assert "does not count" in stage.referee(folder, "status")[1]


def test_a_replaced_function_of_the_frozen_half_is_noticed_while_it_runs(tmp_path):
    """By a way that the look does not see: the module is reached through an object of its own."""
    folder = stage.make(tmp_path / "project")
    prepare = (folder / "prepare.py").read_text()
    (folder / "prepare.py").write_text(prepare + "\n\nreferee.seal(referee)\n")
    sly = "def reach(x):\n    return x\n\n\nreach(prepare).pretend.__init__\n"
    commit(folder, version(seeds(0.5)).replace("NOTE", sly + "NOTE"), "honest")
    assert "replaced" not in stage.train(folder)[1]
    sly = "def reach(x):\n    return x\n\n\nreach(prepare.pretend.__self__ if 0 else prepare).referee.mean = min\n"
    commit(folder, version(seeds(0.5)).replace("NOTE", sly + "NOTE"), "sly")
    assert "referee.mean was replaced while the run went on" in stage.train(folder)[1]

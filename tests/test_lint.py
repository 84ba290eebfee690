"""The look at the edited file: what reaches into the harness is named with its line, and its honest twin passes."""

import subprocess
import sys

import pytest
from conftest import ROOT

from referee.lint import lint

DOORS = {
    "prepare": {"clock", "evaluate_bpb", "make_dataloader", "Tokenizer", "guard", "TIME_BUDGET", "SEED", "MAX_SEQ_LEN"}
}
HEAD = """
import os
import sys
import time
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import prepare
from pathlib import Path
from prepare import Tokenizer, clock
"""

CHEATS = {
    "a patched loss": "F.cross_entropy = lambda *a, **k: 0",
    "a patched loss by its long name": "torch.nn.functional.cross_entropy = min",
    "a longer budget": "prepare.clock.budget = 600",
    "time taken back": "clock.started += 10",
    "a slower clock": "time.monotonic = lambda: 0",
    "a patched tokenizer": "Tokenizer.token_bytes = lambda self: 0",
    "a patched module class": "nn.Module.named_parameters = lambda self: ()",
    "setattr": "setattr(torch, 'logsumexp', min)",
    "through vars": "vars(F)['cross_entropy'] = min",
    "through __dict__": "F.__dict__.update(cross_entropy=min)",
    "under another name": "c = clock\nc.budget = 600",
    "in a tuple": "a, clock.budget = 1, 600",
    "in a loop": "for clock.budget in (600,):\n    pass",
    "in a with": "with open('x', 'w') as clock.budget:\n    pass",
    "deleted": "del clock.started",
    "replaced output": "sys.stdout = open('x', 'w')",
    "another home": "os.environ['AUTORESEARCH_HOME'] = '/tmp'",
    "another budget": "os.environ.update(TIME_BUDGET='900')",
    "a budget in a loop": "for name in ('TIME_BUDGET',):\n    os.environ[name] = '900'",
    "the audit": "os.environ.setdefault('AUDIT', '1')",
    "outside the door": "prepare.dataset_in_use()",
    "outside the door by getattr": "getattr(prepare, 'dataset_in_use')()",
    "outside the door by a computed name": "getattr(prepare, 'dataset' + '_in_use')()",
    "outside the door in a loop": "for name in dir(prepare):\n    getattr(prepare, name)",
    "outside the door by vars": "vars(prepare)['dataset_in_use']()",
    "the door handed on": "p = prepare",
    "imported from outside the door": "from prepare import dataset_in_use",
    "all of it": "from prepare import *",
    "the referee itself": "import referee",
    "a part of the referee": "from referee import run",
    "the referee through the door": "prepare.run.this_run",
    "a frame": "sys._getframe(1).f_locals",
    "a frame by inspect": "import inspect\ninspect.stack()",
    "other people's objects": "import gc\ngc.get_objects()",
    "a thread": "import threading",
    "a pool": "from concurrent.futures import ThreadPoolExecutor",
    "a process": "import subprocess",
    "a fork": "os.fork()",
    "torch's processes": "import torch.multiprocessing as mp",
    "torch's processes by the back door": "torch.multiprocessing.spawn(min)",
    "workers of a loader": "torch.utils.data.DataLoader([1], num_workers=2)",
    "a signal handler": "import signal",
    "at exit": "import atexit",
    "code from text": "exec('clock.budget = 600')",
    "a module by name": "sys.modules['prepare']",
    "import by name": "import importlib\nimportlib.import_module('referee')",
    "the code of a function": "clock.tick.__code__ = 1",
    "the globals of a function": "clock.tick.__globals__['x'] = 1",
    "mocks": "from unittest import mock",
    "every operation of torch": "from torch.overrides import TorchFunctionMode",
    "every operation by a class": "class A(torch.overrides.TorchFunctionMode):\n    pass",
    "every operation by a method": "class A:\n    def __torch_function__(self, *a):\n        pass",
    "a file": "open('x').read()",
    "a file to read and write": "open('x', 'r+b')",
    "a file by a path": "Path('x').read_text()",
    "a file opened by a path": "Path('x').open()",
    "a file by its descriptor": "os.open('x', os.O_RDONLY)",
    "a folder": "os.listdir('.')",
    "a file that is mapped": "np.memmap('x')",
    "a file mapped by torch": "torch.from_file('x')",
    "weights": "torch.load('w.pt')",
    "counts": "np.load('x.npy')",
    "a pickle": "import pickle",
    "source as text": "import inspect\ninspect.getsource(Path)",
    "the network": "import urllib.request",
}
HONEST = {
    "settings of torch": "torch._dynamo.config.recompile_limit = 64\ntorch.backends.cuda.matmul.allow_tf32 = True",
    "settings under another name": "c = torch._dynamo.config\nc.cache_size_limit = 8",
    "allocator": "os.environ.setdefault('PYTORCH_ALLOC_CONF', 'x')\nos.environ['OMP_NUM_THREADS'] = '2'",
    "variables in a loop": "for k, v in {'OMP_NUM_THREADS': '1', 'A': '2'}.items():\n    os.environ[k] = v",
    "its own objects": "class A:\n    pass\nA.x = 1\na = A()\na.y = {}\na.y['z'] = 2",
    "its own open": "class A:\n    def open(self):\n        pass\nA().open()",
    "a model of torch": "m = torch.nn.Linear(2, 2)\nm.weight.data = m.weight * 2\nm.forward = min",
    "a patched layer class": "nn.Linear.reset_parameters = lambda self: None\nnn.Embedding.extra = max",
    "own name like a module's": "F = {}\nF['x'] = 1",
    "names rebound": "TIME_BUDGET = 30\nnorm = F.rms_norm",
    "parameters like modules": "def f(signal, time, random, F):\n    F.x = 1\n    time.y = 2\n    signal['a'] = random",
    "loop variables like modules": "for time in range(3):\n    pass\nfor F in [torch.zeros(1)]:\n    F.grad = None",
    "an alias of another function": "def f():\n    g = torch.nn\n    return g\ndef h(g):\n    g.x = 1",
    "eval as a name": "eval = 3\nprint(eval)\neval_loss = eval",
    "collector": "import gc\ngc.collect()\ngc.freeze()",
    "eval of a model": "m = torch.nn.Linear(2, 2)\nm.eval()",
    "weights of its own": "m = torch.nn.Linear(1, 1)\nm.load_state_dict(m.state_dict())",
    "generators": "import random\nrandom.seed(1)\ntorch.manual_seed(1)",
    "default device": "torch.set_default_device('cpu')",
    "averages of weights": "for p in [torch.ones(2)]:\n    p.data.lerp_(p, 0.5)",
    "groups of an optimizer": "o = torch.optim.SGD([torch.ones(2)])\nfor g in o.param_groups:\n    g['lr'] = 0.1",
    "getattr of its own": "getattr(torch.nn, 'Linear')\ngetattr(prepare, 'TIME_BUDGET')\nvars(F)",
    "the door": "prepare.MAX_SEQ_LEN if False else prepare.TIME_BUDGET",
    "signatures": "import inspect\ninspect.signature(min)",
    "what is installed": "import importlib.util\nok = importlib.util.find_spec('triton')",
    "what a human wants to keep": "torch.save({}, 'w.pt')\nwith open('a.txt', mode='w') as f:\n    f.write('x')",
    "a terminal": "sys.stdout.isatty()",
}


@pytest.mark.parametrize("name", CHEATS)
def test_what_reaches_into_the_harness_is_named_with_its_line(name):
    text = HEAD + "\n" + CHEATS[name] + "\n"
    found = lint(text, DOORS)
    assert found
    first = text.splitlines().index(CHEATS[name].splitlines()[0]) + 1
    assert first <= found[0][0] < first + 3


@pytest.mark.parametrize("name", HONEST)
def test_its_honest_twin_passes(name):
    assert lint(HEAD + HONEST[name] + "\n", DOORS) == []


def test_the_shipped_train_passes():
    code = "import prepare; from referee.lint import lint; print(lint(open('train.py').read(), {'prepare': set(prepare.__all__)}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("text", ["def (", "\0", "(" * 10_000])
def test_text_that_is_no_python_is_left_to_python(text):
    assert lint(text) == []

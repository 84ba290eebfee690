"""Preparation: what it makes, what it refuses, and that no interruption changes a byte."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SMALL, run_prepare, spawn_prepare, tree, words

LOCAL = ["--dataset", "local", "--path"]


def write_parquet(path, texts, column="text", type=None, row_group=500):
    pq.write_table(pa.table({column: pa.array(texts, type=type)}), path, row_group_size=row_group)


def documents(seed, count):
    return [words(1000 * seed + n, random.Random(n).randint(5, 120)) for n in range(count)]


def local(home, folder, *args, **env):
    return run_prepare(*LOCAL, folder, *(args or SMALL), env={"AUTORESEARCH_HOME": str(home), **env})


def check(home, **env):
    return run_prepare("--check", env={"AUTORESEARCH_HOME": str(home), **env})


def meta_of(home):
    return json.loads((home / "local" / "meta.json").read_text())


def texts_of(home, split):
    import prepare

    folder = home / "local"
    tokenizer = prepare.Tokenizer.from_directory(folder)
    tokens = np.fromfile(folder / f"{split}.tokens", "<u2")
    lengths = np.fromfile(folder / f"{split}.docs", "<u4")
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, np.cumsum(lengths)[:-1])]


# -- splits


def test_parquet_splits_are_whole_files_in_order(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for n in range(4):
        write_parquet(folder / f"part_{n}.{'PARQUET' if n == 1 else 'parquet'}", documents(n, 700))
    (folder / "notes.txt").write_text("not used")
    done = local(tmp_path, folder)
    assert done.returncode == 0, done.stderr
    assert "1 .txt and .md files are left out" in done.stdout
    assert texts_of(tmp_path, "val") == documents(3, 700)
    assert texts_of(tmp_path, "audit") == documents(2, 700)
    assert texts_of(tmp_path, "train") == documents(0, 700) + documents(1, 700)
    batches = np.fromfile(tmp_path / "local" / "train.batches", "<u4").tolist()
    assert batches == [128, 128, 128, 116, 128, 72] * 2  # row groups of 500 and 200 are not crossed


def test_text_goes_to_splits_by_its_hash_and_none_is_lost(text_folder, small_home):
    splits = {split: texts_of(small_home, split) for split in ("train", "val", "audit")}
    everything = "".join(path.read_text() for path in sorted(text_folder.iterdir()))
    assert sum(map(len, map("".join, splits.values()))) == len(everything)
    for texts in splits.values():
        assert all(text in everything for text in texts[:50])
    assert not set(splits["train"]) & set(splits["val"])
    assert 0.01 < len(splits["val"]) / len(splits["train"]) < 0.12
    assert max(map(len, splits["train"])) <= 4 * 64


def test_hidden_files_are_left_out_and_capitals_are_not(text_folder, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(text_folder, folder)
    (folder / "00.txt").rename(folder / "00.TXT")
    for hidden in (".git/objects", ".venv/lib", "deep/.cache"):
        (folder / hidden).mkdir(parents=True)
        (folder / hidden / "x.txt").write_text("UNWANTED " * 999)
    done = local(tmp_path, folder)
    assert done.returncode == 0, done.stderr
    assert meta_of(tmp_path)["shards"] == ["00.TXT", *(f"{n:02d}.txt" for n in range(1, 40))]
    assert "UNWANTED" not in "".join(texts_of(tmp_path, "train"))


def test_names_and_paths_of_any_bytes(text_folder, tmp_path):
    folder = os.fsencode(tmp_path / "é漢") + b"\xff"
    shutil.copytree(os.fsencode(text_folder), folder)
    os.rename(folder + b"/00.txt", folder + b"/00\xff\xe9.txt")
    env = {"AUTORESEARCH_HOME": str(tmp_path / "é"), "PYTHONIOENCODING": "ascii"}
    done = spawn_prepare(*LOCAL, os.fsdecode(folder), *SMALL, env=env)
    assert done.returncode == 0, done.stderr
    assert "\\udcff" in done.stdout
    assert spawn_prepare("--check", env=env).returncode == 0


def test_python_corpus_is_the_libraries_without_their_tests():
    import prepare

    names = dict(prepare._python_files()).keys()
    assert any(name.startswith("stdlib/json/") for name in names)
    assert "torch/torch/nn/functional.py" in names
    unwanted = ("/tests/", "/test_", "site-packages", "..")
    assert not [name for name in names if any(part in name for part in unwanted)]
    assert not {name.split("/")[0] for name in names} & {"pytest", "pandas", "matplotlib"}


def test_cut_keeps_every_character_and_prefers_blank_lines():
    import prepare

    text = "".join(f"line {n} of a file\n" + ("\n" if n % 9 == 0 else "") for n in range(200))
    parts = list(prepare._cut(text, 64))
    assert "".join(parts) == text
    assert all(128 <= len(part) <= 256 for part in parts[:-1])
    assert sum(part.startswith("\n") for part in parts) >= len(parts) // 2
    assert list(prepare._cut("x" * 999, 64)) == ["x" * 256] * 3 + ["x" * 231]
    assert list(prepare._cut("", 64)) == []


# -- again, otherwise, interrupted


def test_second_run_changes_nothing_and_check_never_does(text_folder, small_home):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in small_home.rglob("*") if path.name != "lock"}

    before = stamps()
    again = local(small_home, text_folder)
    assert again.returncode == 0
    assert "already prepared" in again.stdout
    said = check(small_home)
    assert said.returncode == 0
    assert stamps() == before
    train = f"train {meta_of(small_home)['splits']['train']['tokens']:,}"
    for word in ("dataset:     local", "shards:", "vocab:       512", "T = 64", "4,096", "fingerprint:", train):
        assert word in said.stdout


def test_check_of_nothing_makes_nothing(tmp_path):
    done = spawn_prepare("--check", env={"AUTORESEARCH_HOME": str(tmp_path / "none")})
    assert done.returncode == 1
    assert "run: uv run prepare.py" in done.stderr
    assert not (tmp_path / "none").exists()


def test_preparing_otherwise_replaces_and_failing_keeps(text_folder, small_home, tmp_path):
    assert local(tmp_path, text_folder).returncode == 0
    assert tree(tmp_path) == tree(small_home)  # two preparations give the same bytes
    failed = local(tmp_path, text_folder, *SMALL[:4], "--eval-tokens", 10**7)
    assert failed.returncode == 1
    assert "too little text" in failed.stderr
    assert tree(tmp_path) == tree(small_home)
    assert local(tmp_path, text_folder, *SMALL[:2], "--seq-len", 32).returncode == 0
    meta = meta_of(tmp_path)
    assert meta["seq_len"] == 32
    assert 0 < meta["eval_tokens"] <= meta["splits"]["val"]["tokens"]


DIE = """
import os, signal, sys
left = int(os.environ["DIE_AT"])
def audit(event, args):
    global left
    mine = event in ("os.rename", "os.remove", "os.mkdir") or event == "open" and "w" in str(args[1])
    if mine and os.environ["AUTORESEARCH_HOME"] in str(args[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(audit)
"""


def test_killed_anywhere_and_started_again_ends_in_the_same_bytes(text_folder, small_home, tmp_path):
    """SIGKILL at several file operations of one preparation, the first and the renaming among them."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(DIE)
    home = tmp_path / "home"
    env = {"AUTORESEARCH_HOME": str(home), "PYTHONPATH": str(tmp_path / "hook")}
    deaths = 0
    for at in (2, 5, 10, 13, 16, 20, 24, 25):
        done = spawn_prepare(*LOCAL, text_folder, *SMALL, env={**env, "DIE_AT": str(at)})
        deaths += done.returncode == -signal.SIGKILL
        if done.returncode != 0:
            assert check(home).returncode == 1, "an interrupted preparation counts as done"
        else:
            (home / "local" / "meta.json").unlink()  # so that the next one has work to do
    assert deaths >= 5
    assert local(home, text_folder).returncode == 0
    assert tree(home) == tree(small_home)


def test_nothing_counts_as_prepared_while_files_are_replaced(text_folder, tmp_path, monkeypatch):
    import prepare

    local(tmp_path, text_folder)
    seen = []
    replace = os.replace

    def watching(source, target):
        if "building" in str(source):
            seen.append((tmp_path / "local" / "meta.json").exists())
        replace(source, target)

    monkeypatch.setattr(prepare.os, "replace", watching)
    assert local(tmp_path, text_folder, *SMALL[:2], "--seq-len", 32).returncode == 0
    assert seen == [False] * 11


def start(home, *args):
    env = {**os.environ, "AUTORESEARCH_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "prepare.py", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_interrupt_key_is_one_sentence(tmp_path):
    running = start(tmp_path, "--dataset", "python")
    assert "training the tokenizer" in running.stdout.readline()
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 1
    assert err == "interrupted; run this again to go on\n"
    assert check(tmp_path).returncode == 1


def test_two_at_once_are_one(text_folder, small_home, tmp_path):
    both = [start(tmp_path, *LOCAL, text_folder, *SMALL) for _ in range(2)]
    said = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert tree(tmp_path) == tree(small_home)
    assert sum("already prepared" in text for text in said) == 1


# -- bad input


def assert_one_sentence(done, *said):
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 400
    for words_ in said:
        assert words_ in lines[0]


def bad_strings():
    offsets = pa.py_buffer(np.array([0, 4], np.int32))
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"ab\xff\xfe")])


def corrupt_page(path):
    write_parquet(path, documents(0, 300))
    data = bytearray(path.read_bytes())
    data[200:600] = bytes(400)
    path.write_bytes(data)


def twice_text(path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, path)


BAD_FILES = {  # what: (name, how to write it, words of the sentence)
    "empty folder": ("x.csv", lambda p: p.write_text("a,b"), ["holds no .parquet"]),
    "only hidden": (".hidden.txt", lambda p: p.write_text("x" * 999), ["holds no .parquet"]),
    "no text column": ("a.parquet", lambda p: write_parquet(p, ["x"], "body"), ["a.parquet has no column text"]),
    "numbers": ("a.parquet", lambda p: write_parquet(p, [1, 2]), ["a.parquet holds no strings, but int64"]),
    "lists": ("a.parquet", lambda p: write_parquet(p, [["x"], ["y"]]), ["a.parquet holds no strings, but list"]),
    "structs": ("a.parquet", lambda p: write_parquet(p, [{"s": "x"}]), ["a.parquet holds no strings, but struct"]),
    "two text columns": ("a.parquet", twice_text, ["a.parquet has several columns called text"]),
    "not parquet": ("a.parquet", lambda p: p.write_text("hello"), ["a.parquet is no whole parquet file"]),
    "corrupt page": ("a.parquet", corrupt_page, ["a.parquet is damaged", "replace or delete it"]),
    "not utf-8": ("a.txt", lambda p: p.write_bytes(b"caf\xe9 " * 999), ["a.txt is not UTF-8"]),
    "not utf-8 in parquet": ("a.parquet", lambda p: write_parquet(p, bad_strings()), ["a.parquet holds text", "UTF-8"]),
    "no text": ("a.txt", lambda p: p.write_text(""), ["too little text"]),
    "little text": ("a.txt", lambda p: p.write_text(words(0, 300)), ["too little text"]),
    "val too small": ("a.txt", lambda p: p.write_text(words(0, 6000)), ["too little text", "--eval-tokens"]),
}


@pytest.mark.parametrize("name, write, said", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_one_sentence(name, write, said, tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / name)
    few = "--eval-tokens" in said
    done = local(tmp_path / "home", tmp_path / "in", *(SMALL[:4] if few else SMALL[:2]), "--eval-tokens", 10**6)
    assert_one_sentence(done, *said)
    assert not list((tmp_path / "home").rglob("meta.json"))


BAD_ARGUMENTS = {
    "no such folder": (["--dataset", "local", "--path", "/nowhere"], "there is no folder /nowhere"),
    "no path": (["--dataset", "local"], "--path is missing"),
    "vocabulary of 100": ([*LOCAL, ROOT, "--vocab-size", 100], "--vocab-size is 100; give 261"),
    "vocabulary of 0": ([*LOCAL, ROOT, "--vocab-size", 0], "--vocab-size is 0"),
    "vocabulary too large": ([*LOCAL, ROOT, "--vocab-size", 70000], "--vocab-size is 70000"),
    "rows of 2": ([*LOCAL, ROOT, "--seq-len", 2], "--seq-len is 2; give 16"),
    "rows of 0": ([*LOCAL, ROOT, "--seq-len", 0], "--seq-len is 0"),
    "no whole row": ([*LOCAL, ROOT, "--eval-tokens", 5], "--eval-tokens is 5; give 2048"),
    "nothing scored": ([*LOCAL, ROOT, "--eval-tokens", 0], "--eval-tokens is 0"),
    "not a number": ([*LOCAL, ROOT, "--seq-len", "many"], "--seq-len"),
    "unknown dataset": (["--dataset", "wikipedia"], "climbmix"),
    "shards of local": ([*LOCAL, ROOT, "--num-shards", -5], "--num-shards is for climbmix"),
    "path of python": (["--dataset", "python", "--path", ROOT], "--path is for local"),
    "no shards": (["--num-shards", 0], "--num-shards is 0; give 1 to 6541"),
    "negative shards": (["--num-shards", -2], "--num-shards is -2"),
    "too many shards": (["--num-shards", 6542], "--num-shards is 6542"),
}


@pytest.mark.parametrize("args, said", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_one_sentence(args, said, tmp_path):
    assert_one_sentence(run_prepare(*args, env={"AUTORESEARCH_HOME": str(tmp_path / "home")}), said)
    assert not list((tmp_path / "home").rglob("meta.json"))


def test_homes_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    done = run_prepare("--dataset", "python", env={"AUTORESEARCH_HOME": str(tmp_path / "file" / "home")})
    assert_one_sentence(done, "AUTORESEARCH_HOME")
    assert "free some room" not in done.stderr
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("AUTORESEARCH_HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as for a container's user without an entry
    assert_one_sentence(run_prepare("--check"), "no home folder; set AUTORESEARCH_HOME")


# -- damage


def edit(**changes):
    def change(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **changes}))

    return change


def without(key):
    def change(folder):
        meta = json.loads((folder / "meta.json").read_text())
        del meta[key]
        (folder / "meta.json").write_text(json.dumps(meta))

    return change


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def flip(name):
    def change(folder):
        data = bytearray((folder / name).read_bytes())
        data[0] ^= 1
        (folder / name).write_bytes(data)

    return change


def zeros(name):
    return lambda folder: (folder / name).write_bytes(bytes((folder / name).stat().st_size))


def cut_short(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-2])


META_DAMAGE = {
    "another version": edit(format=0),
    "not JSON": write("meta.json", b"{"),
    "a list": write("meta.json", b"[]"),
    "deep": write("meta.json", b"[" * 100_000),
    "not UTF-8": write("meta.json", b'{"format": "\xff\xfe"}'),
    "files a list": edit(files=[]),
    "no splits": edit(splits={}),
    "splits of nothing": edit(splits={"train": 1, "val": None, "audit": []}),
    "no shards": edit(shards=[]),
    "shards of numbers": edit(shards=[1]),
    "eval_tokens null": edit(eval_tokens=None),
    "eval_tokens another": edit(eval_tokens=2048),
    "T a text": edit(seq_len="64"),
    "T of 0": edit(seq_len=0),
    "another dataset": edit(dataset="python"),
    "no vocabulary": without("vocab_size"),
    "no source": without("source"),
}
FILE_DAMAGE = {
    "train.tokens short": cut_short("train.tokens"),
    "val.docs missing": lambda folder: (folder / "val.docs").unlink(),
    "val.tokens another": flip("val.tokens"),
    "val.docs another": flip("val.docs"),
    "val.batches another": flip("val.batches"),
    "train.docs zeros": zeros("train.docs"),
    "train.batches zeros": zeros("train.batches"),
    "tokenizer another": flip("tokenizer.json"),
}


@pytest.fixture
def damaged(small_home, tmp_path, monkeypatch):
    """A function that damages a copy of the small dataset, which is then in use."""
    import prepare

    shutil.copytree(small_home, tmp_path / "home")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    prepare._dataset.cache_clear()

    def damage(how):
        how(tmp_path / "home" / "local")
        return tmp_path / "home"

    yield damage
    prepare._dataset.cache_clear()


@pytest.mark.parametrize("how", [*META_DAMAGE.values(), *FILE_DAMAGE.values()], ids=[*META_DAMAGE, *FILE_DAMAGE])
def test_damage_is_named_by_check_and_run_and_mended(how, damaged, text_folder, small_home):
    import prepare

    home = damaged(how)
    assert_one_sentence(check(home), "run: uv run prepare.py --dataset local")
    with pytest.raises(prepare.PrepareError, match="run: uv run prepare.py --dataset local"):
        prepare.Tokenizer.from_directory()
    done = local(home, text_folder)
    assert done.returncode == 0, done.stderr
    assert tree(home) == tree(small_home)


def test_train_ids_are_hashed_by_check_only(damaged):
    import prepare

    home = damaged(flip("train.tokens"))
    assert_one_sentence(check(home), "train.tokens has changed")
    assert prepare.MAX_SEQ_LEN == 64


def test_lengths_that_do_not_add_up_are_refused(small, monkeypatch):
    monkeypatch.setattr(small.np, "memmap", lambda file, dtype, mode: np.zeros(9, dtype))
    with pytest.raises(small.PrepareError, match="train.docs in .* is damaged; run: uv run prepare.py"):
        next(small.make_dataloader(small.Tokenizer.from_directory(), 2, 64, "train", device="cpu"))


@pytest.mark.parametrize("current", [b"\xff\xfe", b"", b"../x", b"nonsense\n"])
def test_damaged_current_is_one_sentence(damaged, current, text_folder, small_home):
    home = damaged(lambda folder: (folder.parent / "current").write_bytes(current))
    assert_one_sentence(check(home), "uv run prepare.py")
    assert local(home, text_folder).returncode == 0
    assert tree(home) == tree(small_home)


def test_tokenizer_is_read_without_executing_it(small, tmp_path):
    for data in (b"cos\nsystem\n(S'touch pwned'\ntR.", b"{}", b'{"pattern": "x", "special_tokens": [], "tokens": [1]}'):
        (tmp_path / "tokenizer.json").write_bytes(data)
        with pytest.raises(small.PrepareError, match="damaged"):
            small.Tokenizer.from_directory(tmp_path)
    with pytest.raises(small.PrepareError, match="cannot be read"):
        small.Tokenizer.from_directory(tmp_path / "nowhere")


# -- the dataset in use


def test_fingerprint_follows_everything_that_defines_the_number(small, monkeypatch):
    import referee

    meta = small._dataset().meta
    code = small._dataset().code
    base = small.fingerprint(meta, code)
    assert len(base) == 8
    assert int(base, 16) >= 0
    others = [small.fingerprint({**meta, "seq_len": 65}, code), small.fingerprint({**meta, "eval_tokens": 1}, code)]
    for name, facts in meta["files"].items():
        files = {**meta["files"], name: {**facts, "sha256": "0"}}
        others.append(small.fingerprint({**meta, "files": files}, code))
    for owner, name in ((small, "TIME_BUDGET"), (referee, "RULES")):
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, 10)
            others.append(small.fingerprint(meta, code))
    assert len({base, *others}) == 15
    assert small.fingerprint(meta, code) == base


def test_fingerprint_follows_the_code_and_not_its_comments(small):
    meta = small._dataset().meta
    code = (ROOT / "prepare.py").read_text()
    assert small._dataset().code == code
    base = small.fingerprint(meta, code)
    assert small.fingerprint(meta, code.replace("# == 9. METRIC", "# another comment\n# == 9. METRIC")) == base
    assert small.fingerprint(meta, code.replace("LEAK = 1e-3", "LEAK = 1e-2")) != base


@pytest.mark.parametrize(
    "name, said", [("python", "python is not prepared"), ("nonsense", "no dataset is called 'nonsense'")]
)
def test_last_prepared_is_used_unless_named(small, monkeypatch, name, said):
    assert small.EVAL_TOKENS == 4096
    small._dataset.cache_clear()
    monkeypatch.setenv("AUTORESEARCH_DATASET", name)
    with pytest.raises(small.PrepareError, match=said):
        small.EVAL_TOKENS


def test_tokenizer_round_trips_and_batches(small):
    tokenizer = small.Tokenizer.from_directory()
    text = "Hello é 漢字 🙂 12345 <|reserved_0|>\n\n\tx"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < 508  # text never becomes a special token
    bos = tokenizer.get_bos_token_id()
    assert tokenizer.encode([text, ""], prepend=bos) == [[bos, *ids], [bos]]
    assert tokenizer.encode(text, prepend="<|reserved_0|>") == [bos, *ids]
    assert tokenizer.get_vocab_size() == tokenizer.enc.n_vocab == 512


def test_numbers_split_in_pairs_of_digits(small):
    import regex

    parts = regex.findall(small.SPLIT_PATTERN, "it's 12345 ok!!\n\n")
    assert parts == ["it", "'s", " ", "12", "34", "5", " ok", "!!\n\n"]


# -- the device


class FakeCuda:
    """What torch.cuda says of a machine."""

    def __init__(self, error):
        self.error = error

    def is_available(self):
        return self.error is None

    def init(self):
        raise self.error

    def get_device_properties(self, device):
        return type("Facts", (), {"uuid": "GPU-1234"})


OLD = RuntimeError("The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver")
NONE = RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU")
DEVICES = {  # what: (torch's complaint, CUDA_VISIBLE_DEVICES, the key or what the refusal says)
    "old driver": (OLD, None, "too old.*R580.*CUDA 13"),
    "old driver, a slot": (OLD, "0", "too old.*R580"),
    "old driver, hidden": (OLD, "", "cpu"),
    "no driver": (NONE, None, "cpu"),
    "a GPU": (None, None, "GPU-1234"),
    "a slice": (None, "MIG-77,MIG-78", "MIG-77"),
}


@pytest.mark.parametrize("error, visible, wanted", DEVICES.values(), ids=DEVICES)
def test_a_gpu_that_torch_cannot_use_is_no_silent_night(small, monkeypatch, error, visible, wanted):
    import referee

    monkeypatch.setattr(small.torch, "cuda", FakeCuda(error))
    monkeypatch.setattr(small.torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    keys = []
    monkeypatch.setattr(referee.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(referee.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(referee, "guard", lambda body, lock_key, limit: keys.append(lock_key()))
    if "R580" in wanted:
        with pytest.raises(small.PrepareError, match=wanted):
            small.guard(print)
    else:
        small.guard(print)
        assert keys == [wanted]


def test_slots_of_one_processor_lock_their_own_cores(monkeypatch):
    import referee

    monkeypatch.setattr(referee.os, "sched_getaffinity", lambda pid: {3, 1}, raising=False)
    monkeypatch.setattr(referee.os, "cpu_count", lambda: 8)
    assert referee.cpu_key() == "cpu-1-3"
    monkeypatch.setattr(referee.os, "cpu_count", lambda: 2)
    assert referee.cpu_key() == "cpu"


def test_summary_has_its_keys_in_order(small, monkeypatch):
    import torch

    import referee

    seen = []
    monkeypatch.setattr(referee, "finish", lambda lines, facts: seen.append((lines, facts)))
    with pytest.raises(small.PrepareError, match="no score yet; call evaluate_bpb"):
        small.print_summary(7, 12_345_678, 50_332_176, 8)
    tokenizer = small.Tokenizer.from_directory()
    next(small.make_dataloader(tokenizer, 8, 64, "train", device="cpu"))
    value = small.evaluate_bpb(lambda ids: torch.zeros(*ids.shape, 512), tokenizer, 8)
    small.print_summary(num_steps=7, total_tokens=12_345_678, num_params=50_332_176, depth=8, mfu=0.398, tier="cpu")
    lines, facts = seen[0]
    nine = [
        "val_bpb",
        "training_seconds",
        "total_seconds",
        "peak_vram_mb",
        "mfu_percent",
        "total_tokens_M",
        "num_steps",
    ]
    nine += ["num_params_M", "depth"]
    assert list(lines) == nine + ["epochs", "attention", "tier", "seed", "dataset", "device", "harness"]
    assert [lines[key] for key in nine[3:]] == ["n/a", "39.80", "12.3", "7", "50.3", "8"]
    assert lines["val_bpb"] == f"{value:.6f}"
    epochs = 8 * 65 / small._dataset().meta["splits"]["train"]["tokens"]
    assert lines["epochs"] == f"{epochs:.2f}"
    assert lines["harness"] == facts["harness"] == small.fingerprint(small._dataset().meta, small._dataset().code)
    assert lines["device"].startswith("cpu (")
    assert facts["memory_mb"] is None
    assert facts["steps"] == 7


def test_the_number_of_threads_changes_no_byte(tmp_path, text_folder):
    """BENCH_TEXT names a folder of parquet or text files; without it a small text is taken."""
    source = os.environ.get("BENCH_TEXT", text_folder)
    hashes = []
    for threads in ("1", "7"):
        home = tmp_path / threads
        env = {"AUTORESEARCH_HOME": str(home), "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        done = spawn_prepare("--dataset", "local", "--path", source, *SMALL, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        files = sorted(path for path in home.rglob("*") if path.is_file() and path.name != "meta.json")
        hashes.append([(str(path.relative_to(home)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
        hashes[-1].append(done.stdout.split("fingerprint:")[1].split()[0])
    assert len(hashes[0]) >= 5
    assert hashes[0] == hashes[1]

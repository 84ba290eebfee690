"""Preparation: what it makes, what it refuses, and that no interruption changes a byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SMALL, run_prepare, spawn_prepare, tree, words


def write_parquet(path, texts, column="text", row_group=500, type=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: pa.array(texts, type=type)}), path, row_group_size=row_group)


def documents(seed, count):
    return [words(1000 * seed + n, random.Random(n).randint(5, 120)) for n in range(count)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for n in range(4):
        write_parquet(folder / f"part_{n}.parquet", documents(n, 700))
    return folder


def prepared(home, name="local"):
    folder = home / name
    meta = json.loads((folder / "meta.json").read_text())
    return folder, meta


def texts_of(home, split, name="local"):
    import prepare
    folder, _ = prepared(home, name)
    tokenizer = prepare.Tokenizer.from_directory(folder)
    tokens, lengths = np.fromfile(folder / f"{split}.tokens", "<u2"), np.fromfile(folder / f"{split}.docs", "<u4")
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def test_parquet_splits_are_whole_files_in_order(shards, tmp_path):
    done = run_prepare("--dataset", "local", "--path", shards, *SMALL, env={"AUTORESEARCH_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert texts_of(tmp_path, "val") == documents(3, 700) and texts_of(tmp_path, "audit") == documents(2, 700)
    assert texts_of(tmp_path, "train") == documents(0, 700) + documents(1, 700)
    folder, _ = prepared(tmp_path)
    batches = np.fromfile(folder / "train.batches", "<u4").tolist()
    assert batches == [128, 128, 128, 116, 128, 72] * 2  # row groups of 500 and 200 are not crossed


def test_text_goes_to_splits_by_its_hash_and_none_is_lost(text_folder, small_home):
    splits = {split: texts_of(small_home, split) for split in ("train", "val", "audit")}
    everything = "".join(path.read_text() for path in sorted(text_folder.iterdir()))
    assert sum(map(len, map("".join, splits.values()))) == len(everything)
    assert all(text in everything for split in splits.values() for text in split[:50])
    assert not set(splits["train"]) & set(splits["val"]) and 0.01 < len(splits["val"]) / len(splits["train"]) < 0.12
    assert max(len(t) for t in splits["train"]) <= 4 * 64


def test_second_run_changes_nothing_and_check_never_does(text_folder, small_home):
    env = {"AUTORESEARCH_HOME": str(small_home)}
    stamp = lambda: {p: p.stat().st_mtime_ns for p in small_home.rglob("*") if p.name != "lock"}
    before = stamp()
    again = run_prepare("--dataset", "local", "--path", text_folder, *SMALL, env=env)
    assert again.returncode == 0 and "already prepared" in again.stdout and stamp() == before
    check = run_prepare("--check", env=env)
    assert check.returncode == 0 and stamp() == before
    meta = prepared(small_home)[1]
    for word in ("dataset:     local", "shards:", "vocab:       512", "T = 64", "4,096", "fingerprint:",
                 f"train {meta['splits']['train']['tokens']:,}"):
        assert word in check.stdout, word


def test_check_of_nothing_makes_nothing(tmp_path):
    done = spawn_prepare("--check", env={"AUTORESEARCH_HOME": str(tmp_path / "none")})
    assert done.returncode == 1 and "run: uv run prepare.py" in done.stderr and not (tmp_path / "none").exists()


def test_two_preparations_give_the_same_bytes(text_folder, small_home, tmp_path):
    run_prepare("--dataset", "local", "--path", text_folder, *SMALL, env={"AUTORESEARCH_HOME": str(tmp_path)})
    assert tree(tmp_path) == tree(small_home)


def test_preparing_otherwise_replaces_and_failing_keeps(text_folder, tmp_path):
    env = {"AUTORESEARCH_HOME": str(tmp_path)}
    assert run_prepare("--dataset", "local", "--path", text_folder, *SMALL, env=env).returncode == 0
    before = tree(tmp_path)
    failed = run_prepare("--dataset", "local", "--path", text_folder, *SMALL[:2], "--seq-len", 64, "--eval-tokens", 10**7, env=env)
    assert failed.returncode == 1 and "too little text" in failed.stderr and tree(tmp_path) == before
    assert run_prepare("--dataset", "local", "--path", text_folder, *SMALL[:2], "--seq-len", 32, env=env).returncode == 0
    meta = prepared(tmp_path)[1]
    assert meta["seq_len"] == 32 and 0 < meta["eval_tokens"] <= meta["splits"]["val"]["tokens"]


def test_killed_anywhere_and_started_again_ends_in_the_same_bytes(text_folder, small_home, tmp_path):
    """SIGKILL at several moments of one preparation, the start of training and the renaming among them."""
    env = {**os.environ, "AUTORESEARCH_HOME": str(tmp_path)}
    command = [sys.executable, "prepare.py", "--dataset", "local", "--path", str(text_folder), *map(str, SMALL)]
    # a hook in sitecustomize kills the process at the n-th file operation of the preparation
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, signal, sys\nleft = int(os.environ['DIE_AT'])\n"
        "def audit(event, args):\n"
        "    global left\n"
        "    mine = event in ('os.rename', 'os.remove', 'os.mkdir') or event == 'open' and 'w' in str(args[1])\n"
        "    if mine and os.environ['AUTORESEARCH_HOME'] in str(args[0]):\n"
        "        left -= 1\n"
        "        if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(audit)\n")
    deaths = 0
    for at in (2, 5, 10, 13, 16, 20, 24, 26):
        done = subprocess.run(command, cwd=ROOT, env={**env, "PYTHONPATH": str(hook), "DIE_AT": str(at)}, capture_output=True)
        deaths += done.returncode == -signal.SIGKILL
        if done.returncode != 0:
            check = run_prepare("--check", env={"AUTORESEARCH_HOME": str(tmp_path)})
            assert check.returncode == 1, "an interrupted preparation counts as done"
        else:
            (tmp_path / "local" / "meta.json").unlink()  # so that the next one has work to do
    assert deaths >= 5
    assert subprocess.run(command, cwd=ROOT, env=env, capture_output=True).returncode == 0
    wanted, got = tree(small_home), tree(tmp_path)
    assert {k: v for k, v in got.items() if not k.startswith("hook")} == wanted


def test_nothing_counts_as_prepared_while_files_are_replaced(text_folder, tmp_path, monkeypatch):
    import prepare
    env, seen, replace = {"AUTORESEARCH_HOME": str(tmp_path)}, [], os.replace
    run_prepare("--dataset", "local", "--path", text_folder, *SMALL, env=env)

    def watching(source, target):
        if "building" in str(source) and "building" not in str(target):
            seen.append((tmp_path / "local" / "meta.json").exists())
        replace(source, target)

    monkeypatch.setattr(prepare.os, "replace", watching)
    done = run_prepare("--dataset", "local", "--path", text_folder, *SMALL[:2], "--seq-len", 32, env=env)
    assert done.returncode == 0 and seen == [False] * 10


def test_interrupt_key_is_one_sentence(text_folder, tmp_path):
    env = {**os.environ, "AUTORESEARCH_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen([sys.executable, "prepare.py", "--dataset", "python"], cwd=ROOT, env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "training the tokenizer" in running.stdout.readline()
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode != 0 and "Traceback" not in err and "run this again" in err
    assert run_prepare("--check", env={"AUTORESEARCH_HOME": str(tmp_path)}).returncode == 1


def test_two_at_once_are_one(text_folder, small_home, tmp_path):
    env = {**os.environ, "AUTORESEARCH_HOME": str(tmp_path)}
    command = [sys.executable, "prepare.py", "--dataset", "local", "--path", str(text_folder), *map(str, SMALL)]
    both = [subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=100)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0] and tree(tmp_path) == tree(small_home)
    assert sum("already prepared" in text for text in said) == 1


REFUSED = {
    "no such folder": (lambda d: ["--path", d / "nowhere"], "there is no folder"),
    "no path": (lambda d: [], "--path"),
    "empty folder": (lambda d: ["--path", d], "holds no"),
    "no text column": (lambda d: [write_parquet(d / "a.parquet", ["x"], column="body"), "--path", d][1:], "no column text"),
    "text of numbers": (lambda d: [write_parquet(d / "a.parquet", [1, 2]), "--path", d][1:], "strings"),
    "not parquet": (lambda d: [(d / "a.parquet").write_text("hello"), "--path", d][1:], "parquet"),
    "not utf-8": (lambda d: [(d / "a.txt").write_bytes(b"caf\xe9 " * 999), "--path", d][1:], "UTF-8"),
    "not utf-8 in parquet": (lambda d: [write_parquet(d / "a.parquet", bad_strings()), "--path", d][1:], "UTF-8"),
    "empty text": (lambda d: [(d / "a.txt").write_text(""), "--path", d][1:], "too little text"),
    "little text": (lambda d: [(d / "a.txt").write_text(words(0, 300)), "--path", d][1:], "too little text"),
    "val too small": (lambda d: [(d / "a.txt").write_text(words(0, 6000)), "--path", d, *SMALL, "--eval-tokens", 10**6][1:],
                      "too little text"),
    "vocabulary too small": (lambda d: ["--path", ROOT, "--vocab-size", 100], "--vocab-size"),
    "vocabulary too large": (lambda d: ["--path", ROOT, "--vocab-size", 70000], "--vocab-size"),
    "rows too short": (lambda d: ["--path", ROOT, "--seq-len", 2], "--seq-len"),
    "no whole row": (lambda d: ["--path", ROOT, "--eval-tokens", 5], "--eval-tokens"),
    "not a number": (lambda d: ["--path", ROOT, "--seq-len", "many"], "seq-len"),
}


def bad_strings():
    return pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 4], np.int32)), pa.py_buffer(b"ab\xff\xfe")])


def assert_one_sentence(done):
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 400, done.stderr


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(case, tmp_path):
    make, expected = REFUSED[case]
    (tmp_path / "in").mkdir()
    done = run_prepare("--dataset", "local", *make(tmp_path / "in"), env={"AUTORESEARCH_HOME": str(tmp_path / "home")})
    assert_one_sentence(done)
    assert expected in done.stderr and not list((tmp_path / "home").rglob("meta.json"))


def test_unknown_dataset_and_home_that_cannot_be_written(tmp_path):
    done = run_prepare("--dataset", "wikipedia", env={"AUTORESEARCH_HOME": str(tmp_path)})
    assert_one_sentence(done)
    assert "wikipedia" in done.stderr and "climbmix" in done.stderr
    (tmp_path / "file").write_text("")
    assert_one_sentence(run_prepare("--dataset", "python", env={"AUTORESEARCH_HOME": str(tmp_path / "file" / "home")}))


def test_shards_out_of_range_are_refused(tmp_path):
    for count in (0, -2, 6542):
        done = run_prepare("--num-shards", count, env={"AUTORESEARCH_HOME": str(tmp_path)})
        assert_one_sentence(done)
        assert "--num-shards" in done.stderr


def damage(folder, how):
    meta = json.loads((folder / "meta.json").read_text())
    if how == "another version":
        (folder / "meta.json").write_text(json.dumps({**meta, "format": 0}))
    elif how == "not JSON":
        (folder / "meta.json").write_text("{")
    elif how == "a list":
        (folder / "meta.json").write_text("[]")
    elif how == "cut short":
        (folder / "train.tokens").write_bytes((folder / "train.tokens").read_bytes()[:-2])
    elif how == "missing":
        (folder / "val.docs").unlink()
    elif how == "other bytes":
        data = bytearray((folder / "val.tokens").read_bytes())
        data[0] ^= 1
        (folder / "val.tokens").write_bytes(data)


@pytest.mark.parametrize("how", ["another version", "not JSON", "a list", "cut short", "missing", "other bytes"])
def test_damaged_cache_is_named_and_mended(how, text_folder, small_home, tmp_path):
    import shutil
    shutil.copytree(small_home, tmp_path / "home")
    damage(tmp_path / "home" / "local", how)
    env = {"AUTORESEARCH_HOME": str(tmp_path / "home")}
    check = run_prepare("--check", env=env)
    assert_one_sentence(check)
    assert "run: uv run prepare.py --dataset local" in check.stderr
    assert run_prepare("--dataset", "local", "--path", text_folder, *SMALL, env=env).returncode == 0
    assert tree(tmp_path / "home") == tree(small_home)


def test_damaged_tokenizer_is_refused_without_executing_it(small, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(small.PrepareError, match="damaged"):
        small.Tokenizer.from_directory(tmp_path)


def test_fingerprint_follows_everything_that_defines_the_number(small, monkeypatch):
    meta = small._prepared()[1]
    base = small.fingerprint(meta)
    assert len(base) == 8 and int(base, 16) >= 0 and small.fingerprint(json.loads(json.dumps(meta))) == base
    other = {base}
    for name in meta["files"]:
        other.add(small.fingerprint({**meta, "files": {**meta["files"], name: {"bytes": 1, "sha256": "0"}}}))
    other |= {small.fingerprint({**meta, "seq_len": 65}), small.fingerprint({**meta, "eval_tokens": 1})}
    monkeypatch.setattr(small, "TIME_BUDGET", 10)
    other.add(small.fingerprint(meta))
    assert len(other) == 4 + len(meta["files"]) and len(meta["files"]) == 10


def test_last_prepared_is_used_unless_named(small, monkeypatch, tmp_path):
    assert small._prepared()[1]["dataset"] == "local"
    monkeypatch.setenv("AUTORESEARCH_DATASET", "python")
    with pytest.raises(small.PrepareError, match="python is not prepared"):
        small.MAX_SEQ_LEN
    monkeypatch.setenv("AUTORESEARCH_DATASET", "nonsense")
    with pytest.raises(small.PrepareError, match="nonsense"):
        small.EVAL_TOKENS


def test_tokenizer_round_trips_and_batches(small):
    tokenizer = small.Tokenizer.from_directory()
    text = "Hello é 漢字 🙂 12345 <|reserved_0|>\n\n\tx"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and max(ids) < 508  # text never becomes a special token
    bos = tokenizer.get_bos_token_id()
    assert tokenizer.encode([text, ""], prepend=bos) == [[bos, *ids], [bos]]
    assert tokenizer.encode(text, prepend="<|reserved_0|>") == [bos, *ids]
    assert tokenizer.get_vocab_size() == tokenizer.enc.n_vocab == 512


def test_numbers_split_in_pairs_of_digits(small):
    import regex

    assert regex.findall(small.SPLIT_PATTERN, "it's 12345 ok!!\n\n") == ["it", "'s", " ", "12", "34", "5", " ok", "!!\n\n"]


def test_python_corpus_is_the_libraries_without_their_tests():
    import prepare
    files = dict(prepare._python_files())
    assert any(name.startswith("stdlib/json/") for name in files) and "torch/torch/nn/functional.py" in files
    assert not [name for name in files if "/tests/" in name or "/test_" in name or "site-packages" in name or ".." in name]
    assert not [name for name in files if name.split("/")[0] in ("pytest", "pandas", "matplotlib")]


def test_cut_keeps_every_character_and_prefers_blank_lines():
    import prepare
    text = "".join(f"line {n} of a file\n" + "\n" * (n % 9 == 0) for n in range(200))
    parts = list(prepare._cut(text, 64))
    assert "".join(parts) == text and all(128 <= len(p) <= 256 for p in parts[:-1])
    assert sum(p.startswith("\n") for p in parts) >= len(parts) // 2
    assert list(prepare._cut("x" * 999, 64)) == ["x" * 256] * 3 + ["x" * 231] and list(prepare._cut("", 64)) == []

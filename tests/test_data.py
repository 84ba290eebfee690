"""Preparation: what it makes, what it refuses, and that no interruption changes a byte."""

import io
import json
import os
import shutil
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, fresh_run, run_prepare, tree, words
from zygote import child, forkserver

import prepare

LOCAL = ["--dataset", "local", "--path"]
TINY = ["--vocab-size", 270, "--seq-len", 16, "--eval-tokens", 64]
OTHER = ["--vocab-size", 270, "--seq-len", 32, "--eval-tokens", 64]
SCRIPT = """
import os, signal, sys
sys.argv = ["prepare.py", *{arguments!r}]
sys.stdout.reconfigure(encoding="ascii")
import prepare
{first}
prepare.main()
"""


def spawn(script, home, *arguments, first="", **env):
    """prepare.py in a process of its own, forked from one that has torch. script: where it is written; its output goes
    into a .log beside it. first: statements before main()."""
    script.write_text(SCRIPT.format(arguments=list(map(str, arguments)), first=first))
    env = {**os.environ, "AUTORESEARCH_HOME": str(home), **env}
    process = forkserver.Process(target=child, args=(str(script), str(ROOT), env, str(script.with_suffix(".log"))))
    process.start()
    return process


def local(home, folder, *arguments):
    return run_prepare(*LOCAL, folder, *(arguments or TINY), env={"AUTORESEARCH_HOME": str(home)})


def check(home):
    return run_prepare("--check", env={"AUTORESEARCH_HOME": str(home)})


def prepared(home, dataset="local"):
    return home / dataset / "prepared"


def meta_of(home):
    return json.loads((prepared(home) / "meta.json").read_text())


def texts_of(home, split, dataset="local"):
    folder = prepared(home, dataset)
    decode = prepare.Tokenizer.from_directory(folder).decode
    tokens = np.fromfile(folder / f"{split}.tokens", "<u2")
    lengths = np.fromfile(folder / f"{split}.docs", "<u4")
    return [decode(part[1:].tolist()) for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def documents(seed, count, size=8):
    """Texts of `size` words each."""
    parts = words(seed, count * size).split(" ")
    return [" ".join(parts[n * size : (n + 1) * size]) for n in range(count)]


def parquet(texts, column="text", row_group=500):
    """The bytes of a shard."""
    out = io.BytesIO()
    pq.write_table(pa.table({column: pa.array(texts)}), out, row_group_size=row_group)
    return out.getvalue()


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-text")
    for n in range(4):
        (folder / f"{n}.txt").write_text(words(n, 1200), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory, tiny_text):
    home = tmp_path_factory.mktemp("tiny")
    assert local(home, tiny_text).returncode == 0
    return home


# -- splits


def test_parquet_splits_are_whole_files_in_order(tmp_path):
    texts = [documents(n, 700) for n in range(4)]
    for n in range(4):
        (tmp_path / f"part_{n}.{'PARQUET' if n == 1 else 'parquet'}").write_bytes(parquet(texts[n]))
    (tmp_path / "notes.txt").write_text("not used")
    done = local(tmp_path / "home", tmp_path)
    assert "1 .txt and .md files are left out" in done.stdout, done.stderr
    assert texts_of(tmp_path / "home", "val") == texts[3]
    assert texts_of(tmp_path / "home", "audit") == texts[2]
    assert texts_of(tmp_path / "home", "train") == texts[0] + texts[1]
    batches = np.fromfile(prepared(tmp_path / "home") / "train.batches", "<u4").tolist()
    assert batches == [128, 128, 128, 116, 128, 72] * 2  # row groups of 500 and 200 are not crossed


def test_text_goes_to_splits_by_its_hash_and_none_is_lost(tiny_text, tiny_home):
    everything = "".join(path.read_text() for path in sorted(tiny_text.iterdir()))
    pieces = {split: texts_of(tiny_home, split) for split in prepare.SPLITS}
    assert sum(len(text) for texts in pieces.values() for text in texts) == len(everything)
    assert all(text in everything for texts in pieces.values() for text in texts)
    assert not set(pieces["train"]) & set(pieces["val"])
    for split in ("val", "audit"):
        assert 0.02 < len(pieces[split]) / len(pieces["train"]) < 0.1


def test_hidden_files_are_left_out_and_capitals_are_not(tiny_text, tmp_path):
    shutil.copytree(tiny_text, tmp_path / "text")
    (tmp_path / "text" / "0.txt").rename(tmp_path / "text" / "0.TXT")
    for hidden in (".git/objects", "deep/.cache"):
        shutil.copytree(tiny_text, tmp_path / "text" / hidden)
    local(tmp_path, tmp_path / "text")
    assert meta_of(tmp_path)["shards"] == ["0.TXT", "1.txt", "2.txt", "3.txt"]


def test_python_corpus_is_the_libraries_without_their_tests():
    names = dict(prepare.python_files()).keys()
    assert any(name.startswith("stdlib/json/") for name in names)
    assert "torch/torch/nn/functional.py" in names
    unwanted = ("/tests/", "/test_", "site-packages", "..")
    assert not [name for name in names if any(part in name for part in unwanted)]
    assert not {name.split("/")[0] for name in names} & {"pytest", "pandas", "matplotlib"}


def test_python_files_go_whole_to_one_split_and_copies_are_left_out(tmp_path, monkeypatch):
    texts = ["".join(f"value_{n}_{line} = {line}\n" for line in range(30)) for n in range(80)]
    for n, text in enumerate([*texts, texts[0], "\n"]):
        (tmp_path / f"{n}.py").write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    monkeypatch.setattr(prepare, "python_files", lambda: [(f"x/{path.name}", path) for path in tmp_path.iterdir()])
    done = run_prepare("--dataset", "python", *TINY, env={"AUTORESEARCH_HOME": str(tmp_path / "home")})
    assert "shards:      80 files" in done.stdout, done.stderr
    held = [set(texts_of(tmp_path / "home", split, "python")) for split in prepare.SPLITS]
    for text in texts:
        pieces = set(prepare.cut(text, 16))
        assert sum(pieces <= parts for parts in held) == 1
    assert held[0].isdisjoint(held[1])


def test_cut_keeps_every_character_and_prefers_blank_lines():
    text = "".join(f"line {n} of a file\n" + ("\n" if n % 9 == 0 else "") for n in range(200))
    parts = list(prepare.cut(text, 64))
    assert "".join(parts) == text
    assert all(128 <= len(part) <= 256 for part in parts[:-1])
    assert sum(part.startswith("\n") for part in parts) >= len(parts) // 2
    assert list(prepare.cut("x" * 999, 64)) == ["x" * 256] * 3 + ["x" * 231]
    assert list(prepare.cut("", 64)) == []


def test_the_tokenizer_learns_from_so_much_text_and_no_more(monkeypatch):
    monkeypatch.setattr(prepare, "TOKENIZER_CHARS", 9000)
    monkeypatch.setattr(prepare, "TOKENIZER_DOC_CHARS", 1000)
    texts = documents(0, 20, size=300)
    short = [text[:1000] for text in texts[:9]]
    assert prepare.train_vocabulary([texts[:7], texts[7:]], 300) == prepare.train_vocabulary([short], 300)


def test_scored_tokens_leave_room_for_what_packing_crops(tiny_text, tmp_path):
    local(tmp_path, tiny_text, *TINY[:4])
    meta = meta_of(tmp_path)
    assert meta["eval_tokens"] == meta["splits"]["val"]["tokens"] // 17 * 3 // 4 * 16


# -- again, otherwise


def test_second_run_changes_nothing_and_check_never_does(tiny_text, tiny_home):
    before = {path: path.stat().st_mtime_ns for path in (tiny_home / "local").rglob("*")}
    assert "already prepared" in local(tiny_home, tiny_text).stdout
    said = check(tiny_home).stdout
    for text in (
        "dataset:     local",
        "shards:",
        "vocab:       270",
        "T = 16",
        "64 of val",
        "fingerprint:",
        "train 26,",
    ):
        assert text in said
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_preparing_otherwise_replaces_and_failing_keeps(tiny_text, tiny_home, tmp_path):
    shutil.copytree(tiny_text, tmp_path / "text")
    (tmp_path / "text" / "0.txt").write_text(words(99, 1200))
    home = tmp_path / "home"
    local(home, tmp_path / "text")
    assert meta_of(home)["source"] != meta_of(tiny_home)["source"]
    local(home, tmp_path / "text", *OTHER)
    assert meta_of(home)["seq_len"] == 32
    local(home, tiny_text)
    assert tree(home) == tree(tiny_home)
    assert_one_sentence(local(home, tiny_text, *TINY[:4], "--eval-tokens", 10**7), "too little text")
    assert tree(home) == tree(tiny_home)


# -- bad input


def assert_one_sentence(done, *said):
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr) < 500
    for text in said:
        assert text in done.stderr


def bad_strings():
    offsets = pa.py_buffer(np.array([0, 4], np.int32))
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"ab\xff\xfe")])


def corrupt_page():
    data = bytearray(parquet(documents(0, 300)))
    data[200:600] = bytes(400)
    return bytes(data)


BAD_FILES = {  # what: (name, content, words of the sentence)
    "empty folder": ("x.csv", b"a,b", "holds no .parquet"),
    "no text column": ("a.parquet", parquet(["x"], "body"), "a.parquet has no column text"),
    "numbers": ("a.parquet", parquet([1, 2]), "a.parquet holds no strings, but int64"),
    "not parquet": ("a.parquet", b"hello", "a.parquet is no whole parquet file"),
    "corrupt page": ("a.parquet", corrupt_page(), "a.parquet is damaged"),
    "not utf-8": ("a.txt", b"caf\xe9 " * 999, "a.txt is not UTF-8"),
    "not utf-8 in parquet": ("a.parquet", parquet(bad_strings()), "a.parquet holds text that is not UTF-8"),
    "little text": ("a.txt", b"a b\n" * 999, "too little text for a vocabulary"),
    "val too small": ("a.txt", words(0, 900).encode(), "lower --eval-tokens"),
}


@pytest.mark.parametrize("name, content, said", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_one_sentence(name, content, said, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    assert_one_sentence(local(tmp_path / "home", tmp_path / "in", *TINY[:4], "--eval-tokens", 10**5), said)
    assert [path.name for path in (tmp_path / "home").rglob("*") if path.is_file()] == ["lock"]


BAD_ARGUMENTS = {  # words of the sentence: arguments
    "there is no folder /nowhere": [*LOCAL, "/nowhere"],
    "--path is missing": ["--dataset", "local"],
    "--vocab-size is 100; give 261": [*LOCAL, ROOT, "--vocab-size", 100],
    "--vocab-size is 70000": [*LOCAL, ROOT, "--vocab-size", 70000],
    "--seq-len is 0; give 16": [*LOCAL, ROOT, "--seq-len", 0],
    "--eval-tokens is 5; give 2048": [*LOCAL, ROOT, "--eval-tokens", 5],
    "invalid int value": [*LOCAL, ROOT, "--seq-len", "many"],
    "--num-shards is for climbmix": [*LOCAL, ROOT, "--num-shards", -5],
    "--path is for local": ["--dataset", "python", "--path", ROOT],
    "--num-shards is 0; give 1 to 6541": ["--num-shards", 0],
    "--num-shards is 6542": ["--num-shards", 6542],
}


@pytest.mark.parametrize("said", BAD_ARGUMENTS)
def test_bad_arguments_are_one_sentence(said, tmp_path):
    done = run_prepare(*BAD_ARGUMENTS[said], env={"AUTORESEARCH_HOME": str(tmp_path)})
    assert_one_sentence(done, said)


def test_homes_that_cannot_be_used(tmp_path, monkeypatch):
    assert_one_sentence(check(tmp_path / "none"), "nothing is prepared", "run: uv run prepare.py")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    assert_one_sentence(local(tmp_path / "file" / "home", tmp_path), "settle that or set AUTORESEARCH_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("AUTORESEARCH_HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as for a container's user without an entry
    assert_one_sentence(run_prepare("--check"), "no home folder; set AUTORESEARCH_HOME")


# -- damage


def edit(**changes):
    def change(folder):
        meta = json.loads((folder / "meta.json").read_text()) | changes
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


def as_before(folder):
    """The layout of the first format: files in the place of the folder prepared."""
    shutil.copy(folder / "meta.json", folder.parent / "meta.json")
    shutil.rmtree(folder)


DAMAGE = {  # what: (how, words of the sentence)
    "another format": (edit(format=99), "by another version"),
    "the first format": (as_before, "by an earlier version"),
    "no dataset": (shutil.rmtree, "is not prepared"),
    "meta is not JSON": (write("meta.json", b"{"), "meta.json is damaged"),
    "meta is a list": (write("meta.json", b"[]"), "meta.json is damaged"),
    "meta is deep": (write("meta.json", b"[" * 100_000), "meta.json is damaged"),
    "meta says T of 8": (edit(seq_len=8), "meta.json is damaged"),
    "meta without a hash": (edit(hash=None), "meta.json is damaged"),
    "train.tokens short": (lambda folder: os.truncate(folder / "train.tokens", 100), "train.tokens has changed"),
    "val.docs missing": (lambda folder: (folder / "val.docs").unlink(), "val.docs cannot be read"),
    "val.tokens another": (flip("val.tokens"), "val.tokens has changed"),
    "val.batches another": (flip("val.batches"), "val.batches has changed"),
    "train.docs another": (flip("train.docs"), "train.docs has changed"),
    "tokenizer another": (flip("tokenizer.json"), "tokenizer.json has changed"),
}


@pytest.fixture
def copy(tiny_home, tmp_path, monkeypatch):
    """A copy of the tiny home, in use."""
    shutil.copytree(tiny_home, tmp_path / "home")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    fresh_run(monkeypatch)
    return tmp_path / "home"


@pytest.mark.parametrize("how, said", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_by_check_and_run_and_mended(how, said, copy, tiny_text, tiny_home):
    how(prepared(copy))
    assert_one_sentence(check(copy), said, "run: uv run prepare.py --dataset local")
    with pytest.raises(prepare.PrepareError, match=said):
        prepare.Tokenizer.from_directory()
    (copy / "local" / "meta.json").unlink(missing_ok=True)
    local(copy, tiny_text)
    assert tree(copy) == tree(tiny_home)


def test_train_ids_are_hashed_by_check_only(copy):
    flip("train.tokens")(prepared(copy))
    assert_one_sentence(check(copy), "train.tokens has changed")
    assert prepare.MAX_SEQ_LEN == 16


@pytest.mark.parametrize("current", [b"\xff\xfe", b"", b"../x"])
def test_damaged_current_is_one_sentence(copy, current, tiny_text, tiny_home):
    (copy / "current").write_bytes(current)
    assert_one_sentence(check(copy), "uv run prepare.py")
    local(copy, tiny_text)
    assert tree(copy) == tree(tiny_home)


BAD_TOKENIZERS = {
    "a pickle": b"cos\nsystem\n(S'touch pwned'\ntR.",
    "numbers": b'{"pattern": "x", "special_tokens": [], "tokens": [1]}',
    "a token twice": b'{"pattern": "x", "special_tokens": ["<|reserved_0|>"], "tokens": ["a", "b", "a"]}',
    "no BOS": b'{"pattern": "x", "special_tokens": [], "tokens": ["a", "b"]}',
    "a broken pattern": b'{"pattern": "(", "special_tokens": ["<|reserved_0|>"], "tokens": ["a", "b"]}',
}


@pytest.mark.parametrize("data", BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS)
def test_tokenizer_is_read_without_executing_it(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(prepare.PrepareError, match="damaged"):
        prepare.Tokenizer.from_directory(tmp_path)


# -- the dataset in use


def test_fingerprint_follows_everything_that_defines_the_number(small, monkeypatch):
    meta = small.dataset_in_use().meta
    code = "LEAK = 1e-3"
    base = small.fingerprint(meta, code)
    others = [small.fingerprint({**meta, key: 7}, code) for key in ("seq_len", "eval_tokens")]
    for name, facts in meta["files"].items():
        files = {**meta["files"], name: {**facts, "sha256": "0"}}
        others.append(small.fingerprint({**meta, "files": files}, code))
    for name, value in (("TIME_BUDGET", 10), ("deciding_code", lambda: "other rules")):
        with monkeypatch.context() as changed:
            changed.setattr(small, name, value)
            others.append(small.fingerprint(meta, code))
    others.append(small.fingerprint(meta, "LEAK = 1e-2"))
    assert len({base, *others}) == 1 + len(others) == 16
    assert small.fingerprint(meta, f"{code}  # another comment") == base
    assert small.dataset_in_use().code == (ROOT / "prepare.py").read_text()


@pytest.mark.parametrize("name, said", [("python", "python is not prepared"), ("x", "no dataset is called 'x'")])
def test_last_prepared_is_used_unless_named(small, monkeypatch, name, said):
    assert small.EVAL_TOKENS == 4096
    fresh_run(monkeypatch)
    monkeypatch.setenv("AUTORESEARCH_DATASET", name)
    with pytest.raises(small.PrepareError, match=said):
        small.EVAL_TOKENS


def test_tokenizer_round_trips_and_batches(small):
    tokenizer = small.Tokenizer.from_directory()
    text = "Hello é 漢字 🙂 12345 <|reserved_0|>\n\n\tx"
    ids = tokenizer.encode(text)
    bos = tokenizer.get_bos_token_id()
    assert tokenizer.decode(ids) == text
    assert max(ids) < bos == 508  # text never becomes a special token
    assert tokenizer.encode([text, ""], prepend=bos) == [[bos, *ids], [bos]]
    assert tokenizer.encode(text, prepend="<|reserved_0|>") == [bos, *ids]
    assert tokenizer.get_vocab_size() == tokenizer.enc.n_vocab == 512


# -- interrupted, and several at once

STOP = """
left = {at}
def stop(event, arguments):
    global left
    changes = event in ("os.mkdir", "os.rename", "shutil.rmtree") or event == "open" and arguments[1] in ("w", "wb")
    if changes and os.environ["AUTORESEARCH_HOME"] in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), {signal})
sys.addaudithook(stop)
"""


@pytest.fixture
def stopped(tiny_text, tmp_path, monkeypatch):
    """A function that replaces a dataset of T = 32 by the tiny one in a process that a signal ends before its n-th
    change of a file; returns the home and the exit status."""
    monkeypatch.setattr(prepare, "fingerprint", lambda meta, code: "which takes a third of the time")
    assert local(tmp_path / "before", tiny_text, *OTHER).returncode == 0

    def run(at, number):
        home = tmp_path / f"home-{at}"
        shutil.copytree(tmp_path / "before", home)
        first = STOP.format(at=at, signal=int(number))
        process = spawn(tmp_path / "stopped.py", home, *LOCAL, tiny_text, *TINY, first=first)
        process.join(60)
        return home, process.exitcode

    return run


def assert_usable(home, tiny_text, tiny_home):
    """Nothing half made counts as a dataset, and preparing again ends in the same bytes as ever."""
    said = check(home)
    assert "T = " in said.stdout or "run: uv run prepare.py" in said.stderr
    assert local(home, tiny_text).returncode == 0
    assert tree(home) == tree(tiny_home)


def test_killed_anywhere_and_started_again_ends_in_the_same_bytes(stopped, tiny_text, tiny_home):
    """SIGKILL before every change of a file that one preparation makes."""
    for at in range(1, 99):
        home, status = stopped(at, signal.SIGKILL)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert_usable(home, tiny_text, tiny_home)
    assert 15 < at < 99


@pytest.mark.parametrize("at", [1, 8, 16])
def test_interrupt_key_is_one_sentence(stopped, tiny_text, tiny_home, tmp_path, at):
    home, status = stopped(at, signal.SIGINT)
    assert status == 1
    assert (tmp_path / "stopped.log").read_text().splitlines()[-1] == "interrupted; run this again to go on"
    assert not (home / "local" / "building").exists()
    assert_usable(home, tiny_text, tiny_home)


def test_two_at_once_are_one(tiny_text, tiny_home, tmp_path):
    both = [spawn(tmp_path / f"{n}.py", tmp_path / "home", *LOCAL, tiny_text, *TINY) for n in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert tree(tmp_path / "home") == tree(tiny_home)
    said = [(tmp_path / f"{n}.log").read_text() for n in range(2)]
    assert sum("already prepared" in text for text in said) == 1


def test_names_of_any_bytes_and_any_number_of_threads(tiny_text, tiny_home, tmp_path):
    folder = tmp_path / "é漢\udcff"
    home = tmp_path / "é"
    shutil.copytree(tiny_text, folder)
    (folder / "0.txt").rename(folder / "0\udcff.txt")
    process = spawn(tmp_path / "x.py", home, *LOCAL, folder, *TINY, RAYON_NUM_THREADS="7")
    process.join(60)
    assert process.exitcode == 0
    assert "\\udcff" in (tmp_path / "x.log").read_text()
    wanted = {name: hash for name, hash in tree(tiny_home).items() if not name.endswith("meta.json")}
    assert wanted.items() <= tree(home).items()

"""The downloader against a local server that behaves like the hub: redirects, hash headers, and every way to fail."""

import errno
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run_prepare, tree, words


def shard(seed, count=300):
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [words(1000 * seed + n, 60) for n in range(count)]}), out, row_group_size=120)
    return out.getvalue()


class Hub(http.server.ThreadingHTTPServer):
    """`plan[path]` lists what the next answers to a file shall be: whole, short, corrupt, reset, slow, or a status."""
    daemon_threads = True

    def __init__(self, files, hashes=True, sizes=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.hashes, self.sizes, self.plan, self.served, self.auth = files, hashes, sizes, {}, [], []
        self.linked_sizes = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        hub, name = self.server, self.path.rsplit("/", 1)[1]
        if "/resolve/main/" in self.path:
            hub.auth.append(self.headers.get("Authorization"))
            status = (hub.plan.get(name) or [None])[0]
            if isinstance(status, int):
                hub.plan[name].pop(0)
                return self.send_error(status)
            if name not in hub.files:
                return self.send_error(404)
            self.send_response(302)
            self.send_header("Location", f"/cdn/{name}")
            if name in hub.linked_sizes:
                self.send_header("X-Linked-Size", str(hub.linked_sizes[name]))
            if hub.hashes:
                self.send_header("X-Linked-Size", str(len(hub.files[name])))
                self.send_header("X-Linked-Etag", '"' + hashlib.sha256(hub.files[name]).hexdigest() + '"')
            return self.end_headers()
        data, how = hub.files[name], hub.plan[name].pop(0) if hub.plan.get(name) else "whole"
        hub.served.append((name, how))
        self.send_response(200)
        if hub.sizes:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if how == "corrupt":
            data = data[:50] + bytes([data[50] ^ 1]) + data[51:]
        half = len(data) // 2
        self.wfile.write(data[:half])
        if how == "slow":
            self.wfile.flush()
            time.sleep(60)
        if how != "short":
            self.wfile.write(data[half:])


NAMES = ["shard_00000.parquet", "shard_00001.parquet", "shard_06541.parquet", "shard_06542.parquet"]
ARGS = ["--num-shards", 2, "--vocab-size", 400, "--seq-len", 64, "--eval-tokens", 4096]


@pytest.fixture(scope="module")
def files():
    return {name: shard(n) for n, name in enumerate(NAMES)}


@pytest.fixture
def hub(files, monkeypatch):
    import prepare
    monkeypatch.setattr(prepare, "BACKOFF", (0.01, 0.01, 0.01))
    server = Hub(dict(files))
    yield server
    server.shutdown()


def prepare_from(hub, home, *args, **env):
    return run_prepare(*(args or ARGS), env={"AUTORESEARCH_HOME": str(home), "HF_ENDPOINT": hub.url + "/", **env})


def assert_whole(home, files):
    got = {p.name: p.read_bytes() for p in (home / "climbmix" / "shards").iterdir()}
    assert got == {name: files[name] for name in NAMES}


def test_climbmix_end_to_end(hub, files, tmp_path):
    done = prepare_from(hub, tmp_path, HF_TOKEN="secret")
    assert done.returncode == 0, done.stderr
    assert_whole(tmp_path, files)
    assert set(hub.auth) == {"Bearer secret"} and "without a SHA-256" not in done.stdout
    total = f"{sum(map(len, files.values())) / 1e6:,.1f}"
    assert f"downloaded: {total} of {total} MB in 4 files" in done.stdout
    served = len(hub.served)
    again = prepare_from(hub, tmp_path)
    assert "already prepared" in again.stdout and len(hub.served) == served == 4
    more = prepare_from(hub, tmp_path, "--num-shards", 1, *ARGS[2:])  # another request, the same shards
    assert more.returncode == 0 and len(hub.served) == served


def test_paths_are_those_of_the_hub(hub, tmp_path, monkeypatch):
    asked = []
    get = Handler.do_GET
    monkeypatch.setattr(Handler, "do_GET", lambda self: (asked.append(self.path), get(self)))
    prepare_from(hub, tmp_path)
    assert "/datasets/karpathy/climbmix-400b-shuffle/resolve/main/shard_06542.parquet" in asked


@pytest.mark.parametrize("trouble", [["short"], ["corrupt"], [503], [503, 429, "short"], ["corrupt", "short", "corrupt"]])
def test_trouble_that_passes(hub, files, tmp_path, trouble):
    hub.plan = {name: list(trouble) for name in NAMES[:3]}
    done = prepare_from(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_whole(tmp_path, files)


@pytest.mark.parametrize("trouble, said", [("short", "bytes"), ("corrupt", "not the right ones"), (503, "503")])
def test_trouble_that_stays(hub, files, tmp_path, trouble, said):
    hub.plan = {NAMES[1]: [trouble] * 99}
    done = prepare_from(hub, tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr and said in done.stderr and "run this again" in done.stderr
    there = {p.name for p in (tmp_path / "climbmix" / "shards").iterdir()}
    assert NAMES[1] not in there and not [n for n in there if n.endswith(".part")]
    assert not (tmp_path / "climbmix" / "meta.json").exists()
    hub.plan = {}
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "climbmix" / "shards").iterdir()}
    assert prepare_from(hub, tmp_path).returncode == 0
    assert_whole(tmp_path, files)
    assert all((tmp_path / "climbmix" / "shards" / n).stat().st_mtime_ns == t for n, t in kept.items())  # not fetched again


@pytest.mark.parametrize("status", [404, 401, 403])
def test_refusal_is_final_and_not_retried(hub, tmp_path, status):
    hub.plan = {NAMES[0]: [status, "whole"]}
    done = prepare_from(hub, tmp_path)
    assert done.returncode == 1 and str(status) in done.stderr and "HF_" in done.stderr
    assert hub.plan[NAMES[0]] == ["whole"]


def test_no_server_is_one_sentence(tmp_path, monkeypatch):
    import prepare
    monkeypatch.setattr(prepare, "BACKOFF", (0.01,))
    done = run_prepare(*ARGS, env={"AUTORESEARCH_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "could not be downloaded" in done.stderr


@pytest.mark.parametrize("sizes", [True, False])
def test_mirror_without_hashes_is_checked_and_said(files, tmp_path, sizes, monkeypatch):
    import prepare
    monkeypatch.setattr(prepare, "BACKOFF", (0.01, 0.01, 0.01))
    mirror = Hub(dict(files), hashes=False, sizes=sizes)
    mirror.plan = {NAMES[0]: ["short"]} if sizes else {}
    done = prepare_from(mirror, tmp_path)
    assert done.returncode == 0 and "4 files came without a SHA-256 header" in done.stdout, done.stderr
    assert_whole(tmp_path, files)
    mirror.shutdown()


def test_mirror_without_any_header_is_opened(files, tmp_path, monkeypatch):
    import prepare
    monkeypatch.setattr(prepare, "BACKOFF", (0.01,))
    mirror = Hub({**files, NAMES[0]: b"<html>sign in</html>"}, hashes=False, sizes=False)
    done = prepare_from(mirror, tmp_path)
    assert done.returncode == 1 and "parquet" in done.stderr and not (tmp_path / "climbmix/shards" / NAMES[0]).exists()
    mirror.shutdown()


def test_mirror_that_serves_another_file_is_refused(files, tmp_path, monkeypatch):
    import prepare
    monkeypatch.setattr(prepare, "BACKOFF", (0.01,))
    mirror = Hub({**files, NAMES[0]: shard(9, 50)}, hashes=False)  # whole and readable, but not what the header says
    mirror.linked_sizes = {NAMES[0]: len(files[NAMES[0]])}
    done = prepare_from(mirror, tmp_path)
    assert done.returncode == 1 and "not the right ones" in done.stderr
    assert not (tmp_path / "climbmix/shards" / NAMES[0]).exists()
    mirror.shutdown()


def test_killed_in_the_middle_and_started_again(hub, files, tmp_path):
    hub.plan = {NAMES[2]: ["slow"]}
    env = {**os.environ, "AUTORESEARCH_HOME": str(tmp_path), "HF_ENDPOINT": hub.url}
    running = subprocess.Popen([sys.executable, "prepare.py", *map(str, ARGS)], cwd=ROOT, env=env)
    shards = tmp_path / "climbmix" / "shards"
    while len(list(shards.glob("*.parquet")) if shards.exists() else []) < 3:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (shards / NAMES[2]).exists()
    served = len(hub.served)
    assert prepare_from(hub, tmp_path).returncode == 0
    assert_whole(tmp_path, files)
    assert hub.served[served:] == [(NAMES[2], "whole")]  # finished shards are kept, the other starts again


def test_interrupt_during_a_download_ends_soon(hub, tmp_path):
    hub.plan = {NAMES[2]: ["slow"]}
    env = {**os.environ, "AUTORESEARCH_HOME": str(tmp_path), "HF_ENDPOINT": hub.url}
    running = subprocess.Popen([sys.executable, "prepare.py", *map(str, ARGS)], cwd=ROOT, env=env, stderr=subprocess.PIPE)
    shards = tmp_path / "climbmix" / "shards"
    while len(list(shards.glob("*.parquet")) if shards.exists() else []) < 3:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert running.returncode == 1 and err == b"interrupted; run this again to go on\n"


def test_two_preparations_at_once(hub, files, tmp_path):
    env = {**os.environ, "AUTORESEARCH_HOME": str(tmp_path), "HF_ENDPOINT": hub.url}
    both = [subprocess.Popen([sys.executable, "prepare.py", *map(str, ARGS)], cwd=ROOT, env=env) for _ in range(2)]
    assert [p.wait(timeout=100) for p in both] == [0, 0]
    assert_whole(tmp_path, files)
    assert len(hub.served) == 4
    single = tmp_path / "single"
    assert prepare_from(hub, single).returncode == 0
    assert tree(single / "climbmix") == tree(tmp_path / "climbmix")


class FullDisk:
    """A file that takes some bytes and then has no room."""

    def __init__(self, file):
        self.file, self.room = file, 30_000

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("kind", [".part", ".tokens"])
def test_full_disk_is_one_sentence_and_leaves_no_half_file(hub, tmp_path, monkeypatch, kind):
    import prepare
    plain = open
    monkeypatch.setattr(prepare, "open", lambda path, mode="r", **kw: FullDisk(plain(path, mode, **kw)) if str(path).endswith(
        kind) and "w" in mode else plain(path, mode, **kw), raising=False)
    done = prepare_from(hub, tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "disk is full" in done.stderr
    assert "AUTORESEARCH_HOME" in done.stderr
    names = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert not [n for n in names if n.endswith((".part", ".tokens"))] and "meta.json" not in names
    monkeypatch.undo()
    assert prepare_from(hub, tmp_path).returncode == 0


def test_tinystories_rows_go_to_their_splits(hub, tmp_path, monkeypatch):
    import prepare
    monkeypatch.setattr(prepare, "TINYSTORIES_HELD_OUT", 100)
    hub.files = {"tinystories_gpt4_clean.parquet": shard(7, 1000)}
    done = prepare_from(hub, tmp_path, "--dataset", "tinystories", *ARGS[2:])
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "tinystories/meta.json").read_text())
    assert {s: f["documents"] for s, f in meta["splits"].items()} == {"audit": 100, "val": 100, "train": 800}
    tokenizer = prepare.Tokenizer.from_directory(tmp_path / "tinystories")
    first = np.fromfile(tmp_path / "tinystories/val.tokens", "<u2")[1:40].tolist()
    assert words(7100, 60).startswith(tokenizer.decode(first)[:30])
    assert prepare.PRESETS["tinystories"][0] == "karpathy/tinystories-gpt4-clean"

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
        self.files = files
        self.hashes = hashes
        self.sizes = sizes
        self.plan = {}
        self.served = []
        self.asked = []
        self.auth = []
        self.linked_sizes = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        hub, name = self.server, self.path.rsplit("/", 1)[1]
        if "/resolve/main/" in self.path:
            hub.asked.append(self.path)
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
        data = hub.files[name]
        how = hub.plan[name].pop(0) if hub.plan.get(name) else "whole"
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
SIZES = ["--vocab-size", 400, "--seq-len", 64, "--eval-tokens", 4096]
ARGS = ["--num-shards", 2, *SIZES]


@pytest.fixture(scope="module")
def files():
    return {name: shard(n) for n, name in enumerate(NAMES)}


@pytest.fixture
def serve(files, monkeypatch):
    """A function that starts a hub with the four shards, some of them replaced."""
    import prepare

    monkeypatch.setattr(prepare, "BACKOFF", (0.01, 0.01, 0.01))
    running = []

    def start(replaced=None, **how):
        running.append(Hub({**files, **(replaced or {})}, **how))
        return running[-1]

    yield start
    for server in running:
        server.shutdown()


@pytest.fixture
def hub(serve):
    return serve()


def prepare_from(hub, home, *args, **env):
    return run_prepare(*(args or ARGS), env={"AUTORESEARCH_HOME": str(home), "HF_ENDPOINT": hub.url + "/", **env})


def shards_of(home):
    return home / "climbmix" / "shards"


def assert_whole(home, files):
    assert {path.name: path.read_bytes() for path in shards_of(home).iterdir()} == files


def assert_one_sentence(done, *said):
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    for words_ in said:
        assert words_ in done.stderr


def test_climbmix_end_to_end(hub, files, tmp_path):
    done = prepare_from(hub, tmp_path, HF_TOKEN="secret")
    assert done.returncode == 0, done.stderr
    assert_whole(tmp_path, files)
    assert set(hub.auth) == {"Bearer secret"}
    assert "/datasets/karpathy/climbmix-400b-shuffle/resolve/main/shard_06542.parquet" in hub.asked
    assert "without a SHA-256" not in done.stdout
    total = f"{sum(map(len, files.values())) / 1e6:,.1f}"
    assert f"downloaded: {total} of {total} MB in 4 files" in done.stdout
    assert len(hub.served) == 4
    assert "already prepared" in prepare_from(hub, tmp_path).stdout
    other = prepare_from(hub, tmp_path, "--num-shards", 1, *SIZES)  # another request, the same shards
    assert other.returncode == 0
    assert len(hub.served) == 4


@pytest.mark.parametrize(
    "trouble", [["short"], ["corrupt"], [503], [503, 429, "short"], ["corrupt", "short", "corrupt"]]
)
def test_trouble_that_passes(hub, files, tmp_path, trouble):
    hub.plan = {name: list(trouble) for name in NAMES[:3]}
    done = prepare_from(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_whole(tmp_path, files)
    total = f"{sum(map(len, files.values())) / 1e6:,.1f}"
    assert f"downloaded: {total} of {total} MB" in done.stdout  # what came in vain is not counted


@pytest.mark.parametrize("trouble, said", [("short", "bytes"), ("corrupt", "not the right ones"), (503, "503")])
def test_trouble_that_stays(hub, files, tmp_path, trouble, said):
    hub.plan = {NAMES[1]: [trouble] * 99}
    assert_one_sentence(prepare_from(hub, tmp_path), said, "run this again")
    kept = {path: path.stat().st_mtime_ns for path in shards_of(tmp_path).iterdir()}
    names = {path.name for path in kept}
    assert names <= set(NAMES) - {NAMES[1]}  # and no .part
    assert not (tmp_path / "climbmix" / "meta.json").exists()
    hub.plan = {}
    assert prepare_from(hub, tmp_path).returncode == 0
    assert_whole(tmp_path, files)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not fetched again


@pytest.mark.parametrize("status", [404, 401, 403])
def test_refusal_is_final_and_not_retried(hub, tmp_path, status):
    hub.plan = {NAMES[0]: [status, "whole"]}
    assert_one_sentence(prepare_from(hub, tmp_path), str(status), "HF_TOKEN")
    assert hub.plan[NAMES[0]] == ["whole"]


def test_no_server_is_one_sentence(serve, tmp_path):
    done = run_prepare(*ARGS, env={"AUTORESEARCH_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert_one_sentence(done, "could not be downloaded")


@pytest.mark.parametrize("sizes", [True, False])
def test_mirror_without_hashes_is_checked_and_said(serve, files, tmp_path, sizes):
    mirror = serve(hashes=False, sizes=sizes)
    mirror.plan = {NAMES[0]: ["short"]} if sizes else {}
    done = prepare_from(mirror, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 files came without a SHA-256 header" in done.stdout
    assert_whole(tmp_path, files)


def test_mirror_without_any_header_is_opened(serve, tmp_path):
    mirror = serve({NAMES[0]: b"<html>sign in</html>"}, hashes=False, sizes=False)
    assert_one_sentence(prepare_from(mirror, tmp_path), "parquet")
    assert not (shards_of(tmp_path) / NAMES[0]).exists()


def test_mirror_that_serves_another_file_is_refused(serve, files, tmp_path):
    mirror = serve({NAMES[0]: shard(9, 50)}, hashes=False)  # whole and readable, but not what the header says
    mirror.linked_sizes = {NAMES[0]: len(files[NAMES[0]])}
    assert_one_sentence(prepare_from(mirror, tmp_path), "not the right ones")
    assert not (shards_of(tmp_path) / NAMES[0]).exists()


def start(hub, home):
    """A preparation in a process of its own."""
    env = {**os.environ, "AUTORESEARCH_HOME": str(home), "HF_ENDPOINT": hub.url}
    return subprocess.Popen([sys.executable, "prepare.py", *map(str, ARGS)], cwd=ROOT, env=env, stderr=subprocess.PIPE)


def start_and_stall(hub, home):
    """The same, when all but the third shard are there."""
    hub.plan = {NAMES[2]: ["slow"]}
    running = start(hub, home)
    while len(list(shards_of(home).glob("*.parquet"))) < 3:
        time.sleep(0.05)
    return running


def test_killed_in_the_middle_and_started_again(hub, files, tmp_path):
    running = start_and_stall(hub, tmp_path)
    running.kill()
    running.communicate()
    assert not (shards_of(tmp_path) / NAMES[2]).exists()
    served = len(hub.served)
    assert prepare_from(hub, tmp_path).returncode == 0
    assert_whole(tmp_path, files)
    assert hub.served[served:] == [(NAMES[2], "whole")]  # finished shards are kept, the other starts again


def test_interrupt_during_a_download_ends_soon(hub, tmp_path):
    running = start_and_stall(hub, tmp_path)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert running.returncode == 1
    assert err == b"interrupted; run this again to go on\n"


def test_two_preparations_at_once(hub, files, tmp_path):
    both = [start(hub, tmp_path) for _ in range(2)]
    for process in both:
        process.communicate(timeout=100)
    assert [process.returncode for process in both] == [0, 0]
    assert_whole(tmp_path, files)
    assert len(hub.served) == 4
    assert prepare_from(hub, tmp_path / "single").returncode == 0
    assert tree(tmp_path / "single" / "climbmix") == tree(tmp_path / "climbmix")


class FullDisk:
    """A file that takes some bytes and then has no room."""

    def __init__(self, file):
        self.file = file
        self.room = 30_000

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

    def opened(path, mode="r"):
        file = open(path, mode)
        return FullDisk(file) if str(path).endswith(kind) and "w" in mode else file

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "open", opened, raising=False)
        assert_one_sentence(prepare_from(hub, tmp_path), "disk is full", "free some room", "AUTORESEARCH_HOME")
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith((".part", ".tokens"))]
    assert "meta.json" not in names
    assert prepare_from(hub, tmp_path).returncode == 0


def test_tinystories_rows_go_to_their_splits(hub, tmp_path, monkeypatch):
    import prepare

    monkeypatch.setattr(prepare, "TINYSTORIES_HELD_OUT", 100)
    hub.files = {"tinystories_gpt4_clean.parquet": shard(7, 1000)}
    done = prepare_from(hub, tmp_path, "--dataset", "tinystories", *SIZES)
    assert done.returncode == 0, done.stderr
    assert "/datasets/karpathy/tinystories-gpt4-clean/resolve/main/tinystories_gpt4_clean.parquet" in hub.asked
    folder = tmp_path / "tinystories"
    splits = json.loads((folder / "meta.json").read_text())["splits"]
    assert {name: facts["documents"] for name, facts in splits.items()} == {"audit": 100, "val": 100, "train": 800}
    first = np.fromfile(folder / "val.tokens", "<u2")[1:40].tolist()
    assert words(7100, 60).startswith(prepare.Tokenizer.from_directory(folder).decode(first)[:30])

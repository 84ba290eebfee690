"""The downloader against a local server that behaves like the hub: redirects, hash headers, and every way to fail."""

import errno
import hashlib
import http.server
import io
import json
import os
import signal
import threading
import time
from unittest import mock

import pytest
from conftest import run_prepare, tree
from test_data import assert_one_sentence, documents, parquet, spawn, texts_of

import prepare

NAMES = ["shard_00000.parquet", "shard_00001.parquet", "shard_06541.parquet", "shard_06542.parquet"]
SIZES = ["--vocab-size", 300, "--seq-len", 16, "--eval-tokens", 256]
FILES = {name: parquet(documents(n, 300, size=30), row_group=120) for n, name in enumerate(NAMES)}
TOTAL = f"{sum(map(len, FILES.values())) / 1e6:,.1f}"


def etag(data):
    return f'"{hashlib.sha256(data).hexdigest()}"'


class Hub(http.server.ThreadingHTTPServer):
    """plan[name] lists what the next answers to a file shall be: short, corrupt, slow, or a status; then whole ones."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = files
        self.headers = {"X-Linked-Size": len, "X-Linked-Etag": etag}  # of a file's bytes, in the first answer
        self.lengths = True  # whether it is said how much will be sent
        self.plan = {}
        self.asked = set()  # (path, authorization)
        self.served = []  # names
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def next_of(self, name, kind):
        plan = self.plan.get(name, [])
        return plan.pop(0) if plan and isinstance(plan[0], kind) else None


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path.rsplit("/", 1)[1]
        if self.path.startswith("/cdn/"):
            self.send_file(self.server, name)
            return
        self.server.asked.add((self.path, self.headers.get("Authorization")))
        status = self.server.next_of(name, int)
        if status:
            self.send_error(status)
            return
        self.send_response(302)
        self.send_header("Location", f"/cdn/{name}")
        for key, function in self.server.headers.items():
            self.send_header(key, str(function(self.server.files[name])))
        self.end_headers()

    def send_file(self, hub, name):
        how = hub.next_of(name, str)
        hub.served.append(name)
        data = bytearray(hub.files[name])
        if how == "corrupt":
            data[50] ^= 1
        self.send_response(200)
        if hub.lengths:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:100])
        if how == "slow":
            self.wfile.flush()
            time.sleep(60)
        if how != "short":
            self.wfile.write(data[100:])


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(prepare, "BACKOFF", (0.01, 0.01, 0.01))
    server = Hub(FILES)
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    yield server
    server.shutdown()


def prepare_in(home, *arguments):
    arguments = arguments or ["--num-shards", 2]
    return run_prepare(*arguments, *SIZES, env={"AUTORESEARCH_HOME": str(home)})


def shards_of(home):
    return {path.name: path.read_bytes() for path in (home / "climbmix" / "shards").iterdir()}


def counts_of(home, dataset):
    """Documents of each split."""
    splits = json.loads((home / dataset / "prepared" / "meta.json").read_text())["splits"]
    return [splits[split]["documents"] for split in ("train", "val", "audit")]


def test_climbmix_end_to_end(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    done = prepare_in(tmp_path)
    assert done.returncode == 0, done.stderr
    assert shards_of(tmp_path) == FILES
    repository = "/datasets/karpathy/climbmix-400b-shuffle/resolve/main"
    assert hub.asked == {(f"{repository}/{name}", "Bearer secret") for name in NAMES}
    assert "without a SHA-256" not in done.stdout
    assert f"downloaded: {TOTAL} of {TOTAL} MB in 4 files" in done.stdout
    assert counts_of(tmp_path, "climbmix") == [600, 300, 300]
    assert "already prepared" in prepare_in(tmp_path).stdout
    assert "shard_06542.parquet, 3 in all" in prepare_in(tmp_path, "--num-shards", 1).stdout
    assert len(hub.served) == 4  # another request, the same shards


@pytest.mark.parametrize("trouble", [["short"], [503, 429, "short"], ["corrupt", "short", "corrupt"]], ids=str)
def test_trouble_that_passes(hub, tmp_path, trouble):
    hub.plan = {name: list(trouble) for name in NAMES[:3]}
    done = prepare_in(tmp_path)
    assert shards_of(tmp_path) == FILES, done.stderr
    assert f"downloaded: {TOTAL} of {TOTAL} MB" in done.stdout  # what came in vain is not counted


@pytest.mark.parametrize(
    "trouble, said", [("short", "bytes"), ("corrupt", "not the right ones"), (503, "answered 503")]
)
def test_trouble_that_stays(hub, tmp_path, trouble, said):
    hub.plan = {NAMES[1]: [trouble] * 99}
    assert_one_sentence(prepare_in(tmp_path), said, "run this again")
    kept = shards_of(tmp_path).keys()
    assert kept <= FILES.keys() - {NAMES[1]}  # and no .part
    assert not (tmp_path / "climbmix" / "prepared").exists()
    hub.plan = {}
    hub.served = []
    assert prepare_in(tmp_path).returncode == 0
    assert shards_of(tmp_path) == FILES
    assert set(hub.served) == FILES.keys() - kept


@pytest.mark.parametrize("status", [404, 403])
def test_refusal_is_final_and_not_retried(hub, tmp_path, status):
    hub.plan = {NAMES[0]: [status, 503]}
    assert_one_sentence(prepare_in(tmp_path), f"answered {status}", "HF_TOKEN")
    assert hub.plan[NAMES[0]] == [503]


def test_mirror_without_hashes_is_checked_by_size_and_said(hub, tmp_path):
    hub.headers = {}
    hub.plan = {NAMES[0]: ["short"]}
    done = prepare_in(tmp_path)
    assert shards_of(tmp_path) == FILES, done.stderr
    assert "4 files came without a SHA-256 header" in done.stdout


def test_mirror_without_any_header_is_checked_by_opening(hub, tmp_path):
    hub.headers = {}
    hub.lengths = False
    hub.plan = {NAMES[0]: ["short"]}
    assert_one_sentence(prepare_in(tmp_path), "no whole parquet file")
    assert NAMES[0] not in shards_of(tmp_path)


def test_mirror_that_sends_another_size_than_it_says_is_refused(hub, tmp_path):
    hub.headers = {"X-Linked-Size": lambda data: len(data) - 1}
    assert_one_sentence(prepare_in(tmp_path), "not the right ones")


@pytest.fixture
def stalled(hub, tmp_path):
    """A preparation in a process of its own, when all but the third shard are there."""
    hub.plan = {NAMES[2]: ["slow"]}
    process = spawn(tmp_path / "x.py", tmp_path / "home", "--num-shards", 2, *SIZES)
    while len(hub.served) < 4 or len(list(tmp_path.glob("home/climbmix/shards/*.parquet"))) < 3:
        time.sleep(0.05)
    return process


def test_killed_in_the_middle_and_started_again(hub, stalled, tmp_path):
    stalled.kill()
    stalled.join()
    assert NAMES[2] not in shards_of(tmp_path / "home")
    hub.served = []
    assert prepare_in(tmp_path / "home").returncode == 0
    assert shards_of(tmp_path / "home") == FILES
    assert hub.served == [NAMES[2]]  # finished shards are kept, the other starts again
    assert prepare_in(tmp_path / "single").returncode == 0
    assert tree(tmp_path / "single") == tree(tmp_path / "home")


def test_interrupt_during_a_download_ends_soon(stalled, tmp_path):
    os.kill(stalled.pid, signal.SIGINT)
    stalled.join(20)
    assert stalled.exitcode == 1
    assert (tmp_path / "x.log").read_text().splitlines()[-1] == "interrupted; run this again to go on"


class FullDisk(io.FileIO):
    """A file that takes some bytes and then has no room."""

    def write(self, data):
        if self.tell() + len(data) > 3000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("kind", [".part", ".tokens"])
def test_full_disk_is_one_sentence_and_leaves_no_half_file(hub, tmp_path, monkeypatch, kind):
    def opened(path, mode="r"):
        return FullDisk(path, "w") if str(path).endswith(kind) and "w" in mode else open(path, mode)

    monkeypatch.setattr(prepare, "open", opened, raising=False)
    assert_one_sentence(prepare_in(tmp_path), "disk is full", "free some room", "AUTORESEARCH_HOME")
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {"", ".parquet"}
    assert len(hub.served) <= 4  # a full disk is no trouble that passes


def test_tinystories_rows_go_to_their_splits(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "TINYSTORIES_HELD_OUT", 100)
    texts = documents(7, 1000, size=30)
    hub.files = {"tinystories_gpt4_clean.parquet": parquet(texts, row_group=120)}
    done = prepare_in(tmp_path, "--dataset", "tinystories")
    assert done.returncode == 0, done.stderr
    assert "/datasets/karpathy/tinystories-gpt4-clean/resolve/main/" in str(hub.asked)
    assert counts_of(tmp_path, "tinystories") == [800, 100, 100]
    assert texts_of(tmp_path, "val", "tinystories") == texts[100:200]


# -- FlashAttention-3, which kernels brings from the hub

COMMIT = "0123456789" * 4


@pytest.fixture
def get_kernel(monkeypatch, tmp_path):
    """What kernels is asked for, with its real signature; it answers with a module out of the hub's cache."""
    import kernels

    found = mock.Mock(__file__=f"/cache/snapshots/{COMMIT}/build/__init__.py")
    monkeypatch.setattr(kernels, "get_kernel", mock.create_autospec(kernels.get_kernel, return_value=found))
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return kernels.get_kernel


def test_a_run_asks_no_network_for_flash_attention(get_kernel):
    with pytest.raises(prepare.PrepareError, match="not fetched; run: uv run prepare.py"):
        prepare.load_flash_attention()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not get_kernel.called


def test_flash_attention_is_fetched_once_and_stays_the_same_commit(get_kernel):
    prepare.load_flash_attention(offline=False)
    get_kernel.assert_called_once_with(prepare.FLASH, version=1)
    assert prepare.load_flash_attention() is get_kernel.return_value.flash_attn_func
    prepare.load_flash_attention(offline=False)
    assert get_kernel.call_args_list[1:] == [mock.call(prepare.FLASH, revision=COMMIT)] * 2

"""The ruler of language models: data, tokenizer, dataloader, metric. Frozen: no experiment edits this file.

    uv run prepare.py [--dataset climbmix|tinystories|python|local [--path DIR]] [--check]

train.py imports the names in __all__ and nothing else. Clock, record and verdict are those of referee/. Rooms, each
using only those above it:

    1. CONSTANTS    datasets, limits
    2. DATASET      a prepared dataset, opened once a run
    3. TOKENIZER    text to ids and back
    4. DOWNLOAD     shards from the hub, FlashAttention-3
    5. CORPORA      documents of each dataset and their splits
    6. PREPARATION  from documents to token files
    7. PACKING      from token files to batches
    8. METRIC       bits per byte, and the probes of the model that claims them
    9. RUN          the doors to the referee
    10. COMMANDS    uv run prepare.py
"""

import argparse
import bisect
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from referee import audit, run
from referee.base import RefereeError as PrepareError
from referee.base import code_hash, cpu_key, cpu_name, hash_file, hash_text, require, try_lock, usable_cores
from referee.experiment import deciding_code
from referee.run import SEED, TIME_BUDGET, TrainingClock, doubt

__all__ = [
    "TIME_BUDGET",
    "MAX_SEQ_LEN",
    "EVAL_TOKENS",
    "SEED",
    "Tokenizer",
    "make_dataloader",
    "evaluate_bpb",
    "get_token_bytes",
    "load_flash_attention",
    "clock",
    "print_summary",
    "guard",
    "PrepareError",
]

# == 1. CONSTANTS ======================================================================================================

AUDIT = os.environ.get("AUDIT") == "1"  # read here, so that a train.py cannot ask for the audit by itself
clock = TrainingClock()
MAX_SEQ_LEN: int  # T of the dataset in use, resolved on first access
EVAL_TOKENS: int  # of its val split, likewise

FORMAT = 2  # of the prepared files: to be raised with any change in what they hold


@dataclass(frozen=True)
class Preset:
    """Defaults of a dataset. eval_tokens None: what fits the data."""

    repository: str | None  # on the hub
    vocab_size: int
    seq_len: int
    eval_tokens: int | None


PRESETS = {
    "climbmix": Preset("karpathy/climbmix-400b-shuffle", 8192, 2048, 40 * 524288),
    "tinystories": Preset("karpathy/tinystories-gpt4-clean", 4096, 512, 3 * 524288),  # val holds about 1.9M tokens
    "python": Preset(None, 2048, 256, 524288),
    "local": Preset(None, 8192, 2048, None),
}
CLIMBMIX_SHARDS = 6543  # the last is val, the one before it audit
CLIMBMIX_TRAIN_SHARDS = 10  # unless --num-shards says otherwise
TINYSTORIES_HELD_OUT = 10_000  # rows 0-9,999 are that dataset's suggested test rows (audit here), the next 10,000 val
LOCAL_EVAL_TOKENS = 2**20  # at most, unless --eval-tokens says otherwise: more costs a CPU over 10 % of the budget
PYTHON_CHARS = 64 * 10**6  # cap of the built-in corpus
RUNTIME = ("kernels", "numpy", "pyarrow", "requests", "rustbpe", "tiktoken", "torch")  # the project's dependencies
HELD_OUT = {0: "val", 1: "audit"}  # where a hash decides, by its remainder: one document in 20 to each
GROUP = 1024  # documents in a row group of a text corpus
BATCH = 128  # documents in a refill of the packing buffer, at most
SPLITS = ("train", "val", "audit")
SPLIT_FILES = {"tokens": "<u2", "docs": "<u4", "batches": "<u4"}  # ids; tokens a document; documents a refill
SPLIT_PATTERN = (  # GPT-4's, with numbers in groups of at most two digits
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]  # the last four ids; the first of them is BOS
TOKENIZER_CHARS = 10**9
TOKENIZER_DOC_CHARS = 10_000
BACKOFF = (1, 2, 4, 8, 16)  # seconds before each new try of a download
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
FLASH = "kernels-community/flash-attn3"

# == 2. DATASET ========================================================================================================
# AUTORESEARCH_HOME/<name>/prepared holds a dataset, shards/ beside it what was downloaded; `current` names the one in use.


def home():
    chosen = os.environ.get("AUTORESEARCH_HOME") or "~/.cache/autoresearch"
    try:
        return Path(chosen).expanduser()
    except RuntimeError:  # a container's user without an entry in the password file
        raise PrepareError("this user has no home folder; set AUTORESEARCH_HOME to a folder for the data") from None


def advice(name):
    """What to run where the files of a dataset cannot be used."""
    return f"run: uv run prepare.py --dataset {name}{' --path DIR' if name == 'local' else ''}"


def meta_hash(meta):
    """SHA-256 of what meta.json says, but for the hash itself."""
    return hash_text(json.dumps({key: meta[key] for key in meta if key != "hash"}, sort_keys=True))


def find_dataset(name=None):
    """(folder, meta) of a prepared dataset, by default the one in use: what AUTORESEARCH_DATASET names, else the last one
    prepared. Raises PrepareError where there is none or its meta.json is not what preparation wrote."""
    current = home() / "current"
    named = name or os.environ.get("AUTORESEARCH_DATASET")
    if not named and current.is_file():
        named = current.read_bytes().decode("utf-8", "replace").strip()
    require(named, f"nothing is prepared in {home()}; run: uv run prepare.py (or --dataset python without a network)")
    known = f"choose one of {', '.join(PRESETS)} by running uv run prepare.py --dataset NAME"
    require(named in PRESETS, f"no dataset is called {named!r}; {known}")
    path = home() / named / "prepared" / "meta.json"
    older = (home() / named / "meta.json").is_file()
    said = "was prepared by an earlier version" if older else f"is not prepared in {home()}"
    require(path.is_file(), f"dataset {named} {said}; {advice(named)}")
    try:
        meta = json.loads(path.read_bytes())
        same = meta["format"] != FORMAT or meta["hash"] == meta_hash(meta)
        written_here = meta["format"] == FORMAT
    except (KeyError, OSError, RecursionError, TypeError, ValueError):
        same = False
    require(same, f"{path} is damaged; {advice(named)}")
    require(written_here, f"dataset {named} was prepared by another version of prepare.py; {advice(named)}")
    return path.parent, meta


def open_checked(path, facts, name, hashed=True):
    """The open file, if it has the size and, where asked, the SHA-256 that meta.json says. Raises PrepareError."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise PrepareError(f"{path} cannot be read ({error.strerror}); {advice(name)}") from None
    same = os.fstat(file.fileno()).st_size == facts["bytes"]
    if same and hashed:
        same = hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"]
    require(same, f"{path} has changed since it was prepared; {advice(name)}")
    return file


def check_files(folder, meta):
    """Reads every file of a dataset and compares its hash. Raises PrepareError."""
    for name, facts in meta["files"].items():
        open_checked(folder / name, facts, meta["dataset"]).close()


@dataclass(frozen=True)
class Vocabulary:
    """What tokenizer.json holds. tokens: in order of their ids, each as the Latin-1 reading of its bytes."""

    pattern: str
    special_tokens: list
    tokens: list

    @classmethod
    def parse(cls, data, path):
        """From the bytes of tokenizer.json, of which nothing is executed. Raises PrepareError where it is damaged."""
        try:
            facts = json.loads(data)
            found = cls(facts["pattern"], facts["special_tokens"], facts["tokens"])
            distinct = {token.encode("latin-1") for token in found.tokens}
            sound = len(distinct) == len(found.tokens) and all(found.tokens) and isinstance(found.pattern, str)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            sound = False
        require(sound, f"{path} is damaged; run uv run prepare.py for this dataset again")
        return found

    def sizes(self):  # -> (vocab,) int64
        """Bytes that each id stands for: the raw bytes of the token, 0 for a special one."""
        return np.array([len(token) for token in self.tokens] + [0] * len(self.special_tokens), dtype=np.int64)


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset, its files open: another preparation in the same home changes nothing for who holds this."""

    folder: Path
    meta: dict
    vocabulary: Vocabulary
    code: str  # of this file when the dataset was opened
    files: dict  # name: open file; those of audit only where the audit was asked for

    def read(self, split):
        """Arrays (ids of all documents, tokens of each document, documents of each refill) of a split. Held-out rows
        that are read before the clock has stopped make the run's score one that does not compare."""
        if split != "train" and run.this_run.clock.stopped is None:
            doubt("validation rows were drawn before the score")
        return [
            np.asarray(np.memmap(self.files[f"{split}.{kind}"], dtype=dtype, mode="r"))
            for kind, dtype in SPLIT_FILES.items()
        ]


def own_code():
    return Path(__file__).read_text(encoding="utf-8")


def fingerprint(meta, code):
    """8 hex digits over all that defines the number: the code of this file without comments, the tokenizer, every token
    file, T, the scored tokens, the budget, the referee's rules."""
    files = [f"{name} {facts['sha256']}" for name, facts in sorted(meta["files"].items())]
    sizes = f"{TIME_BUDGET} {meta['seq_len']} {meta['eval_tokens']}"
    return hash_text(f"{code_hash(code)} {deciding_code()} {sizes} {files}")[:8]


@functools.cache
def dataset_in_use():
    """The Dataset of this run: looked up and opened once. All that decides a score is hashed (30 ms for a val file of 40
    MB); the ids of train and audit, gigabytes, only by --check. From then on it is noted who else opens its text."""
    with audit.harness_only():
        folder, meta = find_dataset()
        files = {}
        for file, facts in meta["files"].items():
            if AUDIT or not file.startswith("audit."):
                hashed = file not in ("train.tokens", "audit.tokens")
                files[file] = open_checked(folder / file, facts, meta["dataset"], hashed)
        path = folder / "tokenizer.json"
        dataset = Dataset(folder, meta, Vocabulary.parse(path.read_bytes(), path), own_code(), files)
    text = [folder / f"{split}.tokens" for split in SPLITS]
    text += sorted((folder.parent / "shards").glob("*"))
    audit.watch(text, "the data was read past the dataloader", doubt)
    return dataset


def __getattr__(name):  # resolved on first use, so that importing this file touches no other
    if name == "MAX_SEQ_LEN":
        return dataset_in_use().meta["seq_len"]
    if name == "EVAL_TOKENS":
        return dataset_in_use().meta["eval_tokens"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_token_bytes(device="cpu"):  # -> (vocab,) int64
    """Bytes that each id of the prepared tokenizer stands for, 0 for a special one."""
    return torch.from_numpy(dataset_in_use().vocabulary.sizes()).to(device)


# == 3. TOKENIZER ======================================================================================================


class Tokenizer:
    """Text to ids and back. `enc` is the tiktoken Encoding behind it."""

    def __init__(self, enc):
        self.enc = enc
        self.bos_token_id = enc.encode_single_token(SPECIAL_TOKENS[0])

    @classmethod
    def from_directory(cls, directory=None):
        """The tokenizer of a folder, by default that of the dataset in use. Raises PrepareError where it is missing or
        damaged."""
        if directory is None:
            return cls.from_vocabulary(dataset_in_use().vocabulary)
        path = Path(directory) / "tokenizer.json"
        require(path.is_file(), f"{path} cannot be read; run uv run prepare.py for this dataset again")
        return cls.from_vocabulary(Vocabulary.parse(path.read_bytes(), path))

    @classmethod
    def from_vocabulary(cls, vocabulary):
        import tiktoken  # here: 20 ms that a second dataloader need not pay

        ranks = {token.encode("latin-1"): rank for rank, token in enumerate(vocabulary.tokens)}
        special = {name: len(ranks) + n for n, name in enumerate(vocabulary.special_tokens)}
        try:
            enc = tiktoken.Encoding(
                "autoresearch", pat_str=vocabulary.pattern, mergeable_ranks=ranks, special_tokens=special
            )
            return cls(enc)
        except (KeyError, TypeError, ValueError) as error:
            raise PrepareError(f"tokenizer.json is damaged ({error}); run uv run prepare.py for it again") from None

    def get_vocab_size(self):
        return self.enc.n_vocab

    def get_bos_token_id(self):
        return self.bos_token_id

    def encode(self, text, prepend=None, num_threads=8):
        """Ids of a string, or a list of ids a string of a list; prepend: an id or the name of a special token."""
        if isinstance(prepend, str):
            prepend = self.enc.encode_single_token(prepend)
        first = [] if prepend is None else [prepend]
        if isinstance(text, str):
            return first + self.enc.encode_ordinary(text)
        return [first + ids for ids in self.enc.encode_ordinary_batch(text, num_threads=num_threads)]

    def decode(self, ids):
        return self.enc.decode(ids)


def train_vocabulary(groups, vocab_size):
    """The Vocabulary of a BPE trained on row groups. Raises PrepareError where there is too little text for it."""
    import rustbpe  # here: research runs train no tokenizer

    def documents():
        left = TOKENIZER_CHARS
        for text in itertools.chain.from_iterable(groups):
            text = text[: min(TOKENIZER_DOC_CHARS, left)]
            left -= len(text)
            yield text
            if not left:
                return

    bpe = rustbpe.Tokenizer()
    wanted = vocab_size - len(SPECIAL_TOKENS)
    bpe.train_from_iterator(documents(), wanted, pattern=SPLIT_PATTERN)
    ranked = sorted(bpe.get_mergeable_ranks(), key=lambda item: item[1])
    tokens = [bytes(token).decode("latin-1") for token, _ in ranked]
    short = f"it gives {len(tokens) + len(SPECIAL_TOKENS)}; add text or lower --vocab-size"
    require(len(tokens) == wanted, f"too little text for a vocabulary of {vocab_size}: {short}")
    return Vocabulary(SPLIT_PATTERN, SPECIAL_TOKENS, tokens)


# == 4. DOWNLOAD =======================================================================================================


class Meter:
    """Bytes done, of the sizes of files begun, as a live line or, in a file, a line every 10 seconds. Thread-safe."""

    def __init__(self, label):
        self.label = label
        self.done = 0
        self.sizes = {}
        self.shown = time.monotonic()
        self.live = sys.stdout.isatty()
        self.lock = threading.Lock()

    def add(self, amount):
        with self.lock:
            self.done += amount
            if time.monotonic() - self.shown >= (0.2 if self.live else 10):
                self.show("\r" if self.live else "\n")

    def expect(self, name, size):
        with self.lock:
            self.sizes[name] = size

    def show(self, end="\n"):
        self.shown = time.monotonic()
        total = sum(self.sizes.values())
        share = f" of {total / 1e6:,.1f} MB in {len(self.sizes)} files" if total else " MB"
        print(f"{self.label}: {self.done / 1e6:,.1f}{share}", end=end, flush=True)


def open_parquet(path):
    """The pyarrow file of a shard that has one column text, of strings. Raises PrepareError."""
    import pyarrow as pa  # here: research runs read no parquet and start faster without
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
        raise PrepareError(f"{path} is no whole parquet file; replace it and run this again") from None
    columns = [f"{field.name} ({field.type})" for field in schema]
    require("text" in schema.names, f"{path} has no column text, but {', '.join(columns)[:200]}; rename one")
    require(schema.names.count("text") == 1, f"{path} has several columns called text; rename all but one")
    kind = schema.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    require(strings, f"the column text of {path} holds no strings, but {str(kind)[:100]}; convert it")
    return file


def fetch(url, path, meter, stop):
    """Downloads url with back-off; path appears only when whole and verified. Returns whether there was a SHA-256 to
    check it by. Raises PrepareError, or OSError where this machine has no room."""
    for wait in (*BACKOFF, None):
        try:
            return fetch_once(url, path, meter, stop)
        except OSError as error:  # requests' exceptions are OSErrors too
            if error.errno in (*NO_ROOM, errno.EACCES):
                raise
            reason = error
        if wait is None or stop.wait(wait):
            raise PrepareError(f"{url} could not be downloaded ({reason}); run this again to go on where it stopped")


def fetch_once(url, path, meter, stop):
    """One try: into a .part file, renamed when its size and hash are those that the hub's headers promise."""
    import requests

    headers = {"Accept-Encoding": "identity", "User-Agent": "autoresearch"}
    token = os.environ.get("HF_TOKEN")
    if token:
        headers["Authorization"] = f"Bearer {token}"  # requests drops it on the way to another host
    part = path.with_name(path.name + ".part")
    try:
        with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as reply, open(part, "wb") as file:
            if reply.status_code in (408, 425, 429, 500, 502, 503, 504):
                raise OSError(f"the server answered {reply.status_code}")
            require(reply.ok, f"{url} answered {reply.status_code}; check HF_ENDPOINT and HF_TOKEN")
            hops = {key: value for hop in (reply, *reply.history) for key, value in hop.headers.lower_items()}
            size = int(hops.get("x-linked-size") or reply.headers.get("content-length") or 0)
            sha = re.fullmatch(r'"?([0-9a-f]{64})"?', hops.get("x-linked-etag", ""))
            meter.expect(path.name, size)
            receive(reply, file, meter, stop, (size, sha[1] if sha else None))
        if not sha:
            open_parquet(part)
        os.replace(part, path)
        return bool(sha)
    finally:
        part.unlink(missing_ok=True)


def receive(reply, file, meter, stop, promised):
    """Writes the body of a reply into file. promised: (size or 0, SHA-256 or None); OSError where it is another."""
    size, sha = promised
    digest = hashlib.sha256()
    got = 0
    try:
        for chunk in reply.iter_content(1 << 20):
            require(not stop.is_set(), "the download was stopped; run this again to go on")
            file.write(chunk)
            digest.update(chunk)
            got += len(chunk)
            meter.add(len(chunk))
        wrong_size = size and got != size
        wrong_bytes = sha and digest.hexdigest() != sha
        if wrong_size or wrong_bytes:
            raise OSError(f"{got:,} of {size:,} bytes came, or not the right ones")
    except BaseException:
        meter.add(-got)
        raise


def download(repository, names, folder, workers):
    """Brings the named files of a hub dataset into folder, in parallel; raises while any is missing."""
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{hub}/datasets/{repository}/resolve/main"
    print(f"downloading {len(missing)} files from {url}", flush=True)
    meter = Meter("downloaded")
    stop = threading.Event()
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        jobs = [pool.submit(fetch, f"{url}/{name}", folder / name, meter, stop) for name in missing]
        unverified = sum(not job.result() for job in as_completed(jobs))
    finally:
        stop.set()
        pool.shutdown(wait=not isinstance(sys.exc_info()[1], KeyboardInterrupt), cancel_futures=True)
    meter.show()
    if unverified:
        print(f"{unverified} files came without a SHA-256 header: checked by size and by opening them")


def flash_pin():
    """The file that names the commit of FlashAttention-3 that this machine uses."""
    return home() / "flash-attn3"


def load_flash_attention(offline=True):
    """flash_attn_func of FlashAttention-3, from the local cache of the hub; a run never asks the network. Raises
    PrepareError where prepare.py has not fetched it, and what kernels raises where it does not load."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
    from kernels import get_kernel

    pinned = flash_pin().read_text().strip() if flash_pin().is_file() else None
    require(pinned or not offline, "FlashAttention-3 is not fetched; run: uv run prepare.py")
    module = get_kernel(FLASH, revision=pinned) if pinned else get_kernel(FLASH, version=1)
    found = re.search(r"/snapshots/([0-9a-f]{40})/", module.__file__ or "")
    if found and not pinned:
        flash_pin().write_text(found[1])
    return module.flash_attn_func


def fetch_flash_attention():
    """On a Hopper GPU: fetches FlashAttention-3 once, from then on the same commit; completes what is there in part."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return
    try:
        load_flash_attention(offline=False)
        print("FlashAttention-3 is in the local cache")
    except Exception as error:  # no network, no build for this torch: each raises its own
        print(f"FlashAttention-3 could not be fetched ({str(error).splitlines()[0][:200]}); attention will be slower")


# == 5. CORPORA ========================================================================================================


@dataclass(frozen=True)
class Corpus:
    """Documents and how they are split. groups(split) yields row groups, lists of documents (str)."""

    source: str  # a hash that changes with the content
    shards: list  # names of its files
    groups: Callable


def split_by_hash(documents):
    """groups(split) for documents() -> (key, text) pairs, of which the hash of the key says the split."""

    def groups(split):
        texts = (text for key, text in documents() if HELD_OUT.get(int(hash_text(key)[:8], 16) % 20, "train") == split)
        while group := list(itertools.islice(texts, GROUP)):
            yield group

    return groups


def row_groups(segments):
    """Row groups of parquet segments (path, first row, end row); nulls are left out. Raises PrepareError."""
    import pyarrow as pa

    for path, first, end in segments:
        file = open_parquet(path)
        row = 0
        for index in range(file.num_row_groups):
            count = file.metadata.row_group(index).num_rows
            low = max(first - row, 0)
            high = min(end - row, count)
            row += count
            if low >= high:
                continue
            try:
                column = file.read_row_group(index, columns=["text"]).column("text")
                texts = [text for text in column[low:high].to_pylist() if text is not None]
            except UnicodeDecodeError:
                raise PrepareError(f"{path} holds text that is not UTF-8; convert it and run this again") from None
            except (pa.ArrowException, OSError) as error:
                said = " ".join(str(error).split())[:120]
                raise PrepareError(f"{path} is damaged ({said}); replace or delete it and run this again") from None
            yield texts


def cut(text, seq_len):
    """Cuts a text into documents of 2 to 4 characters a position, at blank lines or line ends where there are some:
    packing crops what exceeds a row, so a document a file would lose most of a long file."""
    part = ""
    for line in re.findall(rf".{{0,{4 * seq_len - 1}}}\n|.{{1,{4 * seq_len}}}", text):
        full = len(part) + len(line) > 4 * seq_len
        pause = len(part) >= 2 * seq_len and not line.strip()
        if part and (full or pause):
            yield part
            part = ""
        part += line
    if part:
        yield part


def python_files():
    """(identity, path) of the standard library's and the installed runtime packages' .py files, without test suites."""
    left_out = re.compile(
        r"(^|/)(tests?|testing|idle_test|site-packages|dist-packages|\.\.)/|(^|/)test_[^/]*$"
        r"|_test\.py$|(^|/)_sysconfigdata_[^/]*$"  # the last is this machine's build configuration
    )
    library = Path(sysconfig.get_path("stdlib"))
    found = [(f"stdlib/{path.relative_to(library).as_posix()}", path) for path in library.rglob("*.py")]
    todo = list(RUNTIME)
    seen = set()
    while todo:
        name = re.match(r"[\w.-]+", todo.pop())[0].lower().replace("_", "-")
        package = None if name in seen else next(iter(metadata.distributions(name=name)), None)
        seen.add(name)
        if package:  # else known, or needed on another platform only
            todo += [need for need in package.requires or () if "extra ==" not in need]
            found += [(f"{name}/{file}", file.locate()) for file in package.files or () if file.suffix == ".py"]
    return [(identity, path) for identity, path in found if not left_out.search(identity)]


def python_corpus(seq_len):
    """The built-in corpus: files in the order of their identity's hash, up to PYTHON_CHARS, exact copies left out; their
    pieces are intermixed, and a file goes to one split as a whole."""
    total = 0
    seen = {}
    parts = []  # (hash, identity of the file, text)
    for identity, path in sorted(python_files(), key=lambda item: hash_text(item[0])):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hash_text(text)
        if not text.strip() or digest in seen:
            continue
        total += len(text)
        if total > PYTHON_CHARS:
            break
        seen[digest] = identity
        parts += [(hash_text(f"{identity}#{n}"), identity, part) for n, part in enumerate(cut(text, seq_len))]
    parts.sort()
    groups = split_by_hash(lambda: ((identity, part) for _, identity, part in parts))
    return Corpus(hash_text(json.dumps(seen)), [f"{len(seen)} files"], groups)


def local_corpus(folder, seq_len):
    """The parquet files of a folder if there are any, else its text files; hidden ones never. Of three or more parquet
    files the last is val, the one before it audit; else the hash of a text says its split. Raises PrepareError."""
    require(folder, "--path is missing; run: uv run prepare.py --dataset local --path DIR")
    root = Path(folder).expanduser()
    require(root.is_dir(), f"there is no folder {root}; run: uv run prepare.py --dataset local --path DIR")
    seen = [path for path in sorted(root.rglob("*")) if path.is_file()]
    shown = [path for path in seen if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    parquet = [path for path in shown if path.suffix.lower() == ".parquet"]
    text = [path for path in shown if path.suffix.lower() in (".txt", ".md")]
    files = parquet or text
    require(files, f"{root} holds no .parquet, .txt or .md file; name another folder with --path")
    if parquet and text:
        print(f"{len(text)} .txt and .md files are left out: {root} holds .parquet files, which are used alone")
    names = [path.relative_to(root).as_posix() for path in files]
    source = hash_text("\n".join(f"{name} {hash_file(path)}" for name, path in zip(names, files)))
    segments = [(path, 0, math.inf) for path in files]
    if len(parquet) >= 3:
        parts = {"train": segments[:-2], "audit": segments[-2:-1], "val": segments[-1:]}
        return Corpus(source, names, lambda split: row_groups(parts[split]))

    def documents():
        if parquet:
            for text in itertools.chain.from_iterable(row_groups(segments)):
                yield text, text
            return
        for path in files:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise PrepareError(f"{path} is not UTF-8 text; convert or remove it and run this again") from None
            for part in cut(text, seq_len):
                yield part, part

    return Corpus(source, names, split_by_hash(documents))


def hub_corpus(args):
    """The shards of a dataset on the hub; those that are missing are downloaded. Raises PrepareError."""
    folder = home() / args.dataset / "shards"
    if args.dataset == "tinystories":
        names = ["tinystories_gpt4_clean.parquet"]
        held = TINYSTORIES_HELD_OUT
        rows = {"audit": (0, held), "val": (held, 2 * held), "train": (2 * held, math.inf)}
        parts = {split: [(folder / names[0], first, end)] for split, (first, end) in rows.items()}
    else:
        most = CLIMBMIX_SHARDS - 2
        count = CLIMBMIX_TRAIN_SHARDS if args.num_shards is None else args.num_shards
        count = most if count == -1 else count
        require(1 <= count <= most, f"--num-shards is {count}; give 1 to {most}, or -1 for all")
        names = [f"shard_{index:05d}.parquet" for index in (*range(count), most, most + 1)]
        segments = [(folder / name, 0, math.inf) for name in names]
        parts = {"train": segments[:-2], "audit": segments[-2:-1], "val": segments[-1:]}
    download(PRESETS[args.dataset].repository, names, folder, args.download_workers)
    return Corpus(hash_text("\n".join(names)), names, lambda split: row_groups(parts[split]))


# == 6. PREPARATION ====================================================================================================


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for, by which a dataset that is there is told from another."""

    source: str
    vocab_size: int
    seq_len: int
    eval_tokens_asked: int | None


def wanted_sizes(args):
    """(vocabulary, T, evaluation tokens or None) asked for, else those of the preset. Raises PrepareError."""
    preset = PRESETS[args.dataset]
    vocab_size = preset.vocab_size if args.vocab_size is None else args.vocab_size
    seq_len = preset.seq_len if args.seq_len is None else args.seq_len
    eval_tokens = preset.eval_tokens if args.eval_tokens is None else args.eval_tokens
    least = 257 + len(SPECIAL_TOKENS)
    require(least <= vocab_size <= 2**16, f"--vocab-size is {vocab_size}; give {least} to 65536, for ids of 16 bits")
    require(16 <= seq_len <= 2**16, f"--seq-len is {seq_len}; give 16 to 65536")
    enough = eval_tokens is None or eval_tokens >= seq_len
    require(enough, f"--eval-tokens is {eval_tokens}; give {seq_len} or more")
    shards = args.num_shards is None or args.dataset == "climbmix"
    require(shards, f"--num-shards is for climbmix; leave it out for {args.dataset}")
    require(not args.path or args.dataset == "local", f"--path is for local; leave it out for {args.dataset}")
    return vocab_size, seq_len, eval_tokens


def prepare(args):
    """Downloads, trains the tokenizer, encodes every split once. A dataset is made beside its place and takes it when it is
    whole: a run killed anywhere and started again ends in the same bytes. Raises PrepareError."""
    sizes = wanted_sizes(args)
    place = home() / args.dataset / "prepared"
    place.parent.mkdir(parents=True, exist_ok=True)
    lock, ours = try_lock(home() / "lock")
    with lock:  # a second preparation waits, then finds the work done
        if not ours:
            print(f"another preparation is running in {home()}; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in ("building", "old"):  # by a run that was killed
            shutil.rmtree(place.with_name(left), ignore_errors=True)
        corpora = {"python": lambda: python_corpus(sizes[1]), "local": lambda: local_corpus(args.path, sizes[1])}
        corpus = corpora.get(args.dataset, lambda: hub_corpus(args))()
        wanted = Wanted(corpus.source, *sizes)
        try:
            folder, meta = find_dataset(args.dataset)
            check_files(folder, meta)
            done = all(meta[key] == value for key, value in asdict(wanted).items())
        except PrepareError:
            done = False
        if not done:
            meta = build(place, corpus, wanted)
        part = place.parent / "current"  # what a kill leaves there, the next run takes over
        part.write_text(args.dataset)
        os.replace(part, home() / "current")
        fetch_flash_attention()
    print("already prepared; nothing to do" if done else "prepared")
    describe(place, meta)


def build(place, corpus, wanted):
    """Makes a dataset beside its place and moves it there; returns its meta. Raises PrepareError."""
    building = place.with_name("building")
    old = place.with_name("old")
    building.mkdir()
    try:
        print("training the tokenizer", flush=True)
        vocabulary = train_vocabulary(corpus.groups("train"), wanted.vocab_size)
        (building / "tokenizer.json").write_text(json.dumps(asdict(vocabulary), indent=0))
        tokenizer = Tokenizer.from_vocabulary(vocabulary)
        meter = Meter("encoded")
        splits = {split: encode_split(tokenizer, corpus.groups(split), building, split, meter) for split in SPLITS}
        meter.show()
        meta = {"format": FORMAT, "dataset": place.parent.name, **asdict(wanted), "shards": corpus.shards}
        meta["eval_tokens"] = scored_tokens(splits, wanted)
        meta["splits"] = splits
        files = sorted(building.iterdir())
        meta["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in files}
        meta["hash"] = meta_hash(meta)
        (building / "meta.json").write_text(json.dumps(meta, indent=1))
        if place.exists():
            os.rename(place, old)
        os.rename(building, place)
        return meta
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def encode_split(tokenizer, groups, folder, split, meter):
    """Writes <split>.tokens (uint16, each document BOS + its tokens), <split>.docs (uint32, tokens of each document)
    and <split>.batches (uint32, documents of each refill, which do not cross row groups); returns what it holds."""
    lengths = array("I")
    batches = array("I")
    size = 0
    bos = tokenizer.get_bos_token_id()
    with open(folder / f"{split}.tokens", "wb") as file:
        for batch in (group[start : start + BATCH] for group in groups for start in range(0, len(group), BATCH)):
            encoded = tokenizer.encode(batch, prepend=bos, num_threads=len(usable_cores()))
            lengths.extend(map(len, encoded))
            batches.append(len(batch))
            file.write(np.fromiter(itertools.chain.from_iterable(encoded), dtype="<u2").tobytes())
            amount = sum(len(text.encode()) for text in batch)
            size += amount
            meter.add(amount)
    for kind, values in (("docs", lengths), ("batches", batches)):
        (folder / f"{split}.{kind}").write_bytes(np.asarray(values, dtype="<u4").tobytes())
    return {"documents": len(lengths), "tokens": sum(lengths), "bytes": size}


def scored_tokens(splits, wanted):
    """Tokens of val to be scored: those asked for, else what fits. Raises PrepareError where there are too few rows."""
    T = wanted.seq_len
    rows = {split: splits[split]["tokens"] // (T + 1) for split in SPLITS}
    fits = min(rows["val"] * 3 // 4, LOCAL_EVAL_TOKENS // T) * T  # a quarter is left for what packing crops
    scored = wanted.eval_tokens_asked or max(fits, T)
    few = f"it fills {rows} rows of T = {T}, and val needs {scored // T}"
    enough = rows["train"] > 0 and scored // T <= rows["val"]
    require(enough, f"too little text: {few}; add text, or lower --eval-tokens or --seq-len")
    return scored


def describe(folder, meta):
    shards = meta["shards"]
    tokens = ", ".join(f"{split} {meta['splits'][split]['tokens']:,}" for split in SPLITS)
    several = f" ... {shards[-1]}, {len(shards)} in all" if len(shards) > 1 else ""
    print(f"dataset:     {meta['dataset']} in {folder}")
    print(f"shards:      {shards[0]}{several}")
    print(f"tokens:      {tokens}; {meta['eval_tokens']:,} of val scored")
    print(f"fingerprint: {fingerprint(meta, own_code())}")
    print(f"vocab:       {meta['vocab_size']}, rows of T = {meta['seq_len']}", flush=True)


# == 7. PACKING ========================================================================================================

ARRIVAL = (1 << 40) - 1  # low bits of a key in plan_rows


def plan_rows(lengths, batches, capacity, buffer_size=1000):
    """Best-fit packing without padding, for ever: yields (documents, tokens taken of each, epoch) for rows of exactly
    `capacity` tokens. lengths: tokens of each document; batches: documents of each refill; both lists, cycled.
    A document is one integer in a sorted list, high bits its length, low bits its arrival counted down, so that one
    bisection finds the longest that fits (the earliest of equals); removal moves at most 9 KB, 0.2 us."""
    keys = []
    arrived = 0
    epoch = 0
    refills = iter(())
    while True:
        documents = []
        takes = []
        room = capacity
        while room:
            while len(keys) < buffer_size:
                count = next(refills, None)
                if count is None:
                    refills = iter(batches)
                    epoch += 1
                    continue
                keys += [(lengths[n % len(lengths)] << 40) + ARRIVAL - n for n in range(arrived, arrived + count)]
                keys.sort()
                arrived += count
            at = bisect.bisect_right(keys, room << 40 | ARRIVAL) - 1
            if at < 0:  # none fits whole: the shortest is cropped
                at = bisect.bisect_right(keys, keys[0] | ARRIVAL) - 1
            key = keys.pop(at)
            take = min(key >> 40, room)
            documents.append((ARRIVAL - (key & ARRIVAL)) % len(lengths))
            takes.append(take)
            room -= take
        yield documents, takes, epoch


class Rows:
    """The packed rows of a split, one after the other, for ever."""

    def __init__(self, dataset, split, T, buffer_size=1000):
        self.dataset = dataset
        self.split = split
        self.T = T
        self.buffer_size = buffer_size
        self.plan = None  # made at the first row: who never draws from val has not read it

    def fill(self, block):  # (n, T + 1) uint16
        """Writes the next n rows into block; returns the epoch of the last. Raises PrepareError for what is no id."""
        if self.plan is None:
            self.tokens, lengths, batches = self.dataset.read(self.split)
            self.starts = (np.cumsum(lengths, dtype=np.int64) - lengths).tolist()
            self.plan = plan_rows(lengths.tolist(), batches.tolist(), self.T + 1, self.buffer_size)
        tokens = self.tokens
        starts = self.starts
        for row in block:
            documents, takes, epoch = next(self.plan)
            at = 0
            for document, take in zip(documents, takes):
                start = starts[document]
                row[at : at + take] = tokens[start : start + take]
                at += take
        meta = self.dataset.meta
        known = block.max() < meta["vocab_size"]  # train.tokens are not hashed at the start of a run
        require(known, f"{self.split}.tokens holds ids beyond the vocabulary; {advice(meta['dataset'])}")
        return epoch


def default_device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def say_ignored(function, forks):
    """Keywords of the public project's forks: an error after 300 seconds would lose the run."""
    if forks:
        names = ", ".join(f"{name}={value!r}"[:60] for name, value in forks.items())
        print(f"{function} ignores {names}: rows, lengths and device are the harness's", flush=True)


def make_dataloader(tokenizer, B, T, split, buffer_size=1000, device=None, **forks):
    """Yields (inputs, targets, epoch) for ever: int64 (B, T) on the device (CUDA, else MPS, else CPU), targets one
    token ahead. The first draw of the train split starts the clock. forks: keywords that are accepted and ignored.
    Raises PrepareError for any other split than train and val, or a tokenizer that is not the prepared one."""
    require(split in ("train", "val"), f"a dataloader serves train or val, not {split!r}; correct train.py")
    whole = all(isinstance(size, int) and size > 0 for size in (B, T, buffer_size))
    sizes = f"{B!r}, {T!r}, {buffer_size!r}"
    require(whole, f"B, T and buffer_size are whole numbers above 0, not {sizes}; correct train.py")
    dataset = dataset_in_use()
    same = tokenizer.get_vocab_size() == dataset.meta["vocab_size"]
    require(same, "the tokenizer is not that of the prepared data; use Tokenizer.from_directory()")
    say_ignored("make_dataloader", forks)
    device = torch.device(device) if device else default_device()
    serve = serve_staged if device.type == "cuda" else serve_plain
    return serve(Rows(dataset, split, T, buffer_size), B, device)


def note_draw(rows, B, device):
    """What the referee learns of every draw. The clock starts once the first batch of the train split is in memory."""
    state = run.this_run
    if rows.split != "train":
        return
    if state.clock.stopped is not None:
        if state.score is None:
            doubt("training batches were drawn while the model was judged")
        return
    state.rows += B
    if state.clock.started is None:
        if torch.initial_seed() != SEED:
            doubt(f"the seed was not the harness's: call torch.manual_seed(SEED), here {SEED}")
        synchronize(device)
        state.clock.start()


def serve_plain(rows, B, device):
    """Batches by way of numpy: a torch operation would wait for its thread pool, 60 times longer where another process
    holds a core."""
    block = np.empty((B, rows.T + 1), dtype=np.uint16)
    while True:
        epoch = rows.fill(block)
        note_draw(rows, B, device)
        ids = block.astype(np.int64)
        inputs = torch.from_numpy(np.ascontiguousarray(ids[:, :-1]))
        targets = torch.from_numpy(np.ascontiguousarray(ids[:, 1:]))
        yield inputs.to(device), targets.to(device), epoch


def serve_staged(rows, B, device):
    """Batches by way of two staging buffers in page-locked memory, used in turn: the host fills one while the other's
    copy is in flight. Before it refills a buffer it waits for the event recorded behind that buffer's last copy, and
    what is handed out is made anew on the device from the copy: no later batch can overwrite one that is in use."""
    slots = [torch.empty(B, rows.T + 1, dtype=torch.int16, device="cpu", pin_memory=True) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in slots]
    turn = 0
    while True:
        copied[turn].synchronize()  # returns at once for an event never recorded
        epoch = rows.fill(slots[turn].numpy().view(np.uint16))
        note_draw(rows, B, device)
        ids = slots[turn].to(device, non_blocking=True).to(torch.int64) & 0xFFFF  # int16 holds the bits of a uint16
        copied[turn].record()
        turn = 1 - turn
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), epoch


# == 8. METRIC =========================================================================================================
# bits per byte = the cross-entropy of the next tokens in nats / (ln 2 x the bytes of those tokens). The model is given
# ids and returns logits; everything else happens here. Between the scored calls it gets others, probes, that differ in
# what must not matter. Which batches, rows and positions, and in what order, is drawn anew in every run from the
# operating system's randomness. A probe compares scores (nats of the true targets): what moves none gains nothing.

JITTER = 0.01  # nats: what repeating a call may move
LEAK = 1e-3  # nats: what a token that must not matter may move, unless the device's own jitter is larger
ROUNDING = 0.2  # nats: more is no rounding
SLICE = 1 << 26  # logits scored at a time: 256 MB in fp32
NOT_FINITE = "the model's logits hold NaN or infinity, or are too large for fp32; lower a learning rate and run again"
CAT = torch.cat
BASE = torch._C.TensorBase  # its methods cannot be replaced, unlike those of torch.Tensor and torch.nn.functional


@dataclass
class Judge:
    """One scoring: the model, what its tokens weigh, what it may move."""

    model: Callable  # ids (B, T) -> logits (B, T, vocab)
    sizes: torch.Tensor  # (vocab,) bytes of each id, on the device
    random: np.random.Generator
    jitter: float = 0.0  # nats by which the device itself moves a score

    def nats(self, ids, targets):  # (B, T), (B, T) -> (B, T) fp32
        """Cross-entropy of the targets after ids; 0 for targets of no bytes. The model gets a copy of ids, always in one
        layout, or a compiled model compiles again. PrepareError: no plain tensor of the right shape, or not finite."""
        logits = self.model(ids.clone(memory_format=torch.contiguous_format))
        shape = (*ids.shape, len(self.sizes))
        got = tuple(getattr(logits, "shape", [type(logits).__name__]))
        require(got == shape, f"model(ids) must return logits (B, T, vocab) = {shape}, not {got}; correct train.py")
        plain = type(logits) is torch.Tensor
        require(plain, f"model(ids) must return a plain torch.Tensor, not a {type(logits).__name__}; correct train.py")
        step = max(1, SLICE // logits[0].numel())
        parts = []
        with torch._C.DisableTorchFunction():  # nor can a mode of torch replace what follows
            for i in range(0, len(ids), step):
                part = BASE.float(logits[i : i + step])
                goal = targets[i : i + step]
                if not math.isfinite(BASE.sum(part).item()):
                    self.refuse_infinity(part)
                log_p = BASE.gather(BASE.log_softmax(part, -1), 2, goal.unsqueeze(2)).squeeze(2)
                parts.append(BASE.masked_fill(BASE.neg(log_p), self.sizes[goal] == 0, 0))
            nats = CAT(parts)
            require(math.isfinite(BASE.sum(nats).item()), NOT_FINITE, "nan")
        return nats

    def refuse_infinity(self, logits):  # (n, T, vocab)
        """Raises PrepareError in the words that fit; not where the sum of finite logits has overflowed."""
        at = logits.isfinite().logical_not_().flatten(0, 1).any(dim=0)  # (vocab,)
        require(not (at & (self.sizes > 0)).any(), NOT_FINITE, "nan")
        names = at.nonzero().flatten().tolist()
        said = f"the model's logits are infinite at ids that are never scored (special tokens: {names})"
        require(not names, f"{said}; give them a finite value such as -1e4 in train.py")

    def require_repeatable(self, ids, targets):
        """The same ids score the same, but for the device's own jitter, which widens what a probe may move."""
        self.jitter = (self.nats(ids, targets) - self.nats(ids, targets)).abs().max().item()
        said = f"the same ids scored {self.jitter:.2g} nats apart: the model is random (dropout?) or learns while it is"
        require(self.jitter <= JITTER, f"{said} judged; correct train.py")

    def probe(self, ids, cuts):  # cuts: (B,) -> (B, T), (B, T) bool
        """(ids in which every token behind a row's cut is replaced by one drawn at random, the positions that are kept). A
        cut of -1 keeps nothing of a row: one that is kept whole beside such rows must not know its neighbours."""
        steps = self.random.integers(1, len(self.sizes), size=tuple(ids.shape))
        other = (ids + torch.from_numpy(steps).to(ids.device)) % len(self.sizes)
        last = torch.from_numpy(cuts).to(ids.device).unsqueeze(1)
        kept = torch.arange(ids.shape[1], device=ids.device) <= last
        return torch.where(kept, ids, other), kept

    def require_kept(self, ids, targets, moved):  # moved: (B, T) nats, of the positions that were kept
        """Nothing has moved. A leak is named by the narrowest cause: chance, other rows, the future."""
        worst = moved.max().item()
        if worst <= max(LEAK, 4 * self.jitter):
            return
        row = int(moved.amax(dim=1).argmax())
        self.require_repeatable(ids, targets)
        beside, kept = self.probe(ids, np.where(np.arange(len(ids)) == row, ids.shape[1] - 1, -1))
        by_rows = (self.nats(ids, targets) - self.nats(beside, targets)).abs().masked_fill(~kept, 0).max().item()
        said = "sees the future: later tokens moved a position's score by {:.2g} nats; attention, convolutions and pooling "
        said += "must look back only"
        if by_rows > max(LEAK, 4 * self.jitter):
            worst = by_rows
            said = "mixes rows of the batch: other rows moved a row's score by {:.2g} nats; every row must be computed alone"
        hint = "; if that is rounding (an FFT in bf16 can do it), the same model passes once that part computes in fp32"
        raise PrepareError(f"the model {said.format(worst)}{hint if worst < ROUNDING else ''}")

    def score_batch(self, ids, targets, probes=()):  # probes: cuts (B,) each -> (B,) float64
        """Nats of each row. The scored call and its probes come in an order that the model cannot foresee."""
        made = [self.probe(ids, cuts) for cuts in probes]
        calls = [ids, *(other for other, _ in made)]
        got = {n: self.nats(calls[n], targets) for n in self.random.permutation(len(calls)).tolist()}
        for n, (_, kept) in enumerate(made, 1):
            self.require_kept(ids, targets, (got[0] - got[n]).abs().masked_fill(~kept, 0))
        with torch._C.DisableTorchFunction():
            return BASE.double(BASE.cpu(BASE.sum(got[0], 1)))


def draw_probes(random, batches, B, T):
    """{batch: cuts (B,) of its probes}. Every position is the last one kept in some row, as long as that takes no more
    than a quarter of the scored calls; the first and the last always. Eight calls at least. Three keep one row whole."""
    calls = max(8, min(math.ceil((T - 1) / B), batches // 4))
    edges = [0, T - 2]
    cuts = np.concatenate([edges, random.permutation(np.arange(1, T - 2))])
    cuts = random.permutation(np.resize(cuts, calls * B)).reshape(calls, B)
    probes = {number: [] for number in range(batches)}
    for number, row_cuts in zip(np.resize(random.permutation(batches), calls).tolist(), cuts):
        probes[number].append(row_cuts)
    for number in random.integers(batches, size=3 if B > 1 else 0).tolist():
        probes[number].append(np.where(np.arange(B) == random.integers(B), T - 1, -1))
    return probes


@torch.no_grad()
def bits_per_byte(model, dataset, batch_size, split, device):
    """Scores the fixed rows of a split in calls of batch_size rows, in random order; None where it holds less than one. A
    batch is scored again at the end: a model that has learned meanwhile is refused."""
    T = dataset.meta["seq_len"]
    count = min(dataset.meta["eval_tokens"] // T, dataset.meta["splits"][split]["tokens"] // (T + 1))
    if count == 0:
        return None
    batches = math.ceil(count / batch_size)
    rows = np.zeros((batches * batch_size, T + 1), dtype=np.uint16)  # the last batch is padded
    Rows(dataset, split, T).fill(rows[:count])
    sizes = dataset.vocabulary.sizes()
    random = np.random.default_rng(int.from_bytes(os.urandom(16), "little"))
    judge = Judge(model, torch.from_numpy(sizes).to(device), random)
    ids = torch.from_numpy(rows.astype(np.int64))

    def batch(number):
        part = ids[number * batch_size : (number + 1) * batch_size].to(device)
        return part[:, :-1], part[:, 1:]

    order = random.permutation(batches).tolist()
    judge.require_repeatable(*batch(order[0]))
    probes = draw_probes(random, batches, batch_size, T)
    nats = {number: judge.score_batch(*batch(number), probes[number]) for number in order}
    number = order[int(random.integers((batches + 1) // 2))]  # of the first half: time enough to have learned
    change = (nats[number] - judge.score_batch(*batch(number))).abs().max().item() / T
    said = f"a batch, scored again, differed by {change:.2g} nats a token: the model learns while it is judged"
    require(change <= max(1e-4, judge.jitter), f"{said}; correct train.py")
    with torch._C.DisableTorchFunction():
        total = BASE.item(BASE.sum(CAT([nats[number] for number in range(batches)])[:count]))
    return total / (math.log(2) * int(sizes[rows[:count, 1:]].sum()))


def checksum(model):
    """{(name, shape): sum of the raw bits} of every parameter and buffer. A buffer that grows while it is judged (a
    table of positions after a curriculum of T) has another key then, and is none that changed."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {}
    for kind in ("named_parameters", "named_buffers"):
        for name, tensor in getattr(model, kind, tuple)():
            tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            if tensor.layout == torch.strided and tensor.device.type != "meta":
                bits = tensor.detach().view(words[tensor.element_size()])
                sums[name, tensor.shape] = BASE.sum(bits, dtype=torch.int64)
    return {key: total.item() for key, total in sums.items()}


def foreign_threads():
    """Threads that run code from outside the interpreter and its packages, whose own are free to start."""
    known = (sysconfig.get_path("stdlib"), str(Path(torch.__file__).parent.parent), "<frozen")
    found = set()
    for thread, frame in sys._current_frames().items():
        while frame is not None:
            if not frame.f_code.co_filename.startswith(known):
                found.add(thread)
            frame = frame.f_back
    return found


def evaluate_bpb(model, tokenizer, batch_size, **forks):
    """Validation bits per byte of model(ids) -> logits (B, T, vocab), where ids are always (batch_size, T). The first
    call stops the clock and fixes the score; later ones return a number and change nothing. tokenizer: not used, the
    prepared one's bytes count; forks: keywords that are accepted and ignored. Raises PrepareError for a model that sees
    the future or its neighbours, learns while it is judged, or returns NaN or another shape."""
    say_ignored("evaluate_bpb", forks)
    whole = isinstance(batch_size, int) and batch_size > 0
    require(whole, f"batch_size is a whole number above 0, not {batch_size!r}; correct train.py")
    dataset = dataset_in_use()
    first = run.this_run.clock.stopped is None
    parameters = getattr(model, "parameters", lambda: ())()
    device = next((parameter.device for parameter in parameters), default_device())
    training = getattr(model, "training", False)
    if training:
        model.eval()  # before the clock stops: what a model's own eval() does is training time
    synchronize(device)
    if first:
        run.this_run.clock.stop()
    try:
        score = fix_score if first else bits_per_byte
        return score(model, dataset, batch_size, "val", device)
    finally:
        if training:
            model.train()


def fix_score(model, dataset, batch_size, split, device):
    """The score of this run, and what was unchanged while it was taken."""
    state = run.this_run
    began = time.monotonic()
    weights = checksum(model)
    threads = foreign_threads()
    score = bits_per_byte(model, dataset, batch_size, split, device)
    state.evaluation = round(time.monotonic() - began, 1)
    if AUDIT:
        state.audit = bits_per_byte(model, dataset, batch_size, "audit", device)
    now = checksum(model)
    if any(now.get(key, total) != total for key, total in weights.items()):
        doubt("parameters or buffers of the model changed while it was judged")
    if foreign_threads() - threads:
        doubt("a thread was started while the model was judged")
    state.score = score
    state.device = device
    return score


# == 9. RUN ============================================================================================================


def require_usable_gpu():
    """Raises PrepareError for an NVIDIA GPU that is there and that this torch cannot use: a night on the CPU would go
    unnoticed, and a GPU without kernels crashes outside Python."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or torch.version.cuda is None:
        return
    hide = "or set CUDA_VISIBLE_DEVICES= for the CPU"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        built = [int(arch[3:].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
        name = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
        have = f"torch {torch.__version__} has no kernels for {name}, only for sm_{min(built, default=0)} and newer"
        cure = "install a build for an older CUDA (https://pytorch.org/get-started/previous-versions)"
        require(10 * major + minor >= min(built, default=0), f"{have}; {cure}, {hide}")
        return
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        said = str(error).strip().split(". ")[0].splitlines()[0]
        there = any(Path("/dev").glob("nvidia[0-9]*")) or "too old" in said
        cure = f"install the NVIDIA driver R580 or newer (torch is built for CUDA {torch.version.cuda})"
        require(not there, f"torch cannot use the GPU ({said}); {cure}, {hide}")


def lock_key():
    """Names the device of this run: the UUID of the first visible GPU or MIG slice, else cpu, with its
    cores in a slot that has a part of them."""
    require_usable_gpu()
    if not torch.cuda.is_available():
        return cpu_key()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    return first if first.startswith("MIG-") else str(torch.cuda.get_device_properties(0).uuid)


def guard(train):
    """Runs train() as the one run on its device, under a supervisor that ends it 300 seconds past the budget. Exits with 0
    after a score, else with 1 and the line
    FAIL: <oom|nan|timeout|busy|harness|error>: what happened, what to do."""

    def body():
        dataset_in_use()  # opened here, so that who opens its files in train() is noticed
        train()

    run.guard(body, lock_key)


def print_summary(num_steps, total_tokens, num_params, depth, mfu=None, attention="n/a", tier="n/a"):
    """Prints the stamped block and writes the run's record. num_steps: optimizer steps; total_tokens: trained on;
    mfu: a fraction, None where the device's peak is unknown. Score and seconds are the harness's own.
    Raises PrepareError before the first evaluate_bpb."""
    state = run.this_run
    require(state.score is not None, "there is no score yet; call evaluate_bpb before print_summary")
    dataset = dataset_in_use()
    meta = dataset.meta
    cuda = state.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(state.device) / 2**20 if cuda else None
    name = torch.cuda.get_device_name(state.device) if cuda else cpu_name().replace("cpu", state.device.type, 1)
    lines = {
        "val_bpb": f"{state.score:.6f}",
        "training_seconds": f"{state.clock.elapsed():.1f}",
        "total_seconds": f"{time.monotonic() - run.STARTED:.1f}",
        "peak_vram_mb": "n/a" if memory is None else f"{memory:.1f}",
        "mfu_percent": "n/a" if mfu is None else f"{100 * float(mfu):.2f}",
        "total_tokens_M": f"{float(total_tokens) / 1e6:.1f}",
        "num_steps": f"{int(num_steps)}",
        "num_params_M": f"{float(num_params) / 1e6:.1f}",
        "depth": f"{depth}",
        "epochs": f"{state.rows * (meta['seq_len'] + 1) / meta['splits']['train']['tokens']:.2f}",
        "attention": attention,
        "tier": tier,
        "seed": f"{SEED}",
        "dataset": meta["dataset"],
        "device": name,
        "harness": fingerprint(meta, dataset.code),
    }
    if state.audit is not None:
        lines["audit_bpb"] = f"{state.audit:.6f}"
    facts = {"harness": lines["harness"], "device": name, "audit": state.audit}
    figures = {key: lines[key] for key in ("dataset", "attention", "tier")}
    figures |= {"steps": num_steps, "tokens": total_tokens, "params": num_params, "depth": depth, "mfu": mfu}
    figures |= {"evaluation": state.evaluation, "memory_mb": None if memory is None else round(memory, 1)}
    run.finish(lines, facts, figures)


# == 10. COMMANDS ======================================================================================================


def parse(words=None):
    parser = argparse.ArgumentParser(description="Prepares data for train.py: download, tokenizer, token files.")
    parser.error = lambda message: sys.exit(f"error: {message}; run: uv run prepare.py --help")
    parser.add_argument("--dataset", choices=list(PRESETS), help="climbmix unless given; python needs no network")
    parser.add_argument("--path", metavar="DIR", help="folder of .parquet (text column) or .txt/.md files, for local")
    parser.add_argument("--num-shards", type=int, metavar="N", help="training shards of climbmix (10; -1 for all)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="vocabulary")
    parser.add_argument("--seq-len", type=int, metavar="N", help="length T of a row")
    parser.add_argument("--eval-tokens", type=int, metavar="N", help="tokens of val to score")
    parser.add_argument("--download-workers", type=int, metavar="N", default=8, help="downloads at a time (8)")
    parser.add_argument("--check", action="store_true", help="say what is prepared and change nothing")
    return parser.parse_args(words)


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files in whatever encoding
    try:
        args = parse()
        if args.check:
            folder, meta = find_dataset(args.dataset)
            check_files(folder, meta)
            describe(folder, meta)
        else:
            args.dataset = args.dataset or "climbmix"
            prepare(args)
    except PrepareError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        full = error.errno in NO_ROOM
        cure = "free some room or set AUTORESEARCH_HOME" if full else "settle that or set AUTORESEARCH_HOME"
        sys.exit(f"error: {'the disk is full: ' if full else ''}{error}; {cure}, then run this again")
    except KeyboardInterrupt:
        print("interrupted; run this again to go on", file=sys.stderr, flush=True)
        os._exit(1)  # without waiting for downloads that hang


audit.seal(sys.modules[__name__])  # from here on a replaced function of this file is noticed

if __name__ == "__main__":
    main()

"""The frozen half of autoresearch: data, tokenizer, dataloader, clock, metric, summary. No experiment edits this file.

    uv run prepare.py [--dataset climbmix|tinystories|python|local [--path DIR]] [--check]

train.py imports the names in __all__ and nothing else. Rooms, each using only those above it: 1 CONSTANTS, 2 PLACES,
3 DOWNLOAD, 4 CORPORA, 5 TOKENIZER, 6 PREPARATION, 7 CLOCK, 8 PACKING, 9 METRIC, 10 VERDICT, 11 SUMMARY, 12 GUARD,
13 COMMANDS.
"""

import argparse, bisect, ctypes, errno, fcntl, hashlib, inspect, itertools, json, math, os, platform, re, shutil, signal
import statistics, subprocess, sys, sysconfig, tempfile, threading, time, traceback
from array import array
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["TIME_BUDGET", "MAX_SEQ_LEN", "EVAL_TOKENS", "SEED", "Tokenizer", "make_dataloader", "evaluate_bpb",
           "clock", "print_summary", "guard", "PrepareError"]

# == 1. CONSTANTS ======================================================================================================
STARTED = time.monotonic()  # total_seconds and the hard limit count from here
_whole = lambda name, default: int(text) if (text := os.environ.get(name, "")).isdecimal() else default
TIME_BUDGET = _whole("TIME_BUDGET", 300)  # seconds of training; guard() refuses a malformed variable
SEED = _whole("SEED", 42)
GRACE = 300  # seconds for start, compilation and evaluation; this far beyond the budget the watchdog ends the run
FORMAT = 1  # of the prepared cache: to be raised with any change in what it holds
PRESETS = {  # dataset: hub repository, vocabulary, T, evaluation tokens (None: what fits the data)
    "climbmix": ("karpathy/climbmix-400b-shuffle", 8192, 2048, 40 * 524288),
    "tinystories": ("karpathy/tinystories-gpt4-clean", 4096, 512, 3 * 524288),  # its val rows hold about 1.9M tokens
    "python": (None, 2048, 256, 524288),
    "local": (None, 8192, 2048, None),
}
CLIMBMIX_SHARDS = 6543  # the last is val, the one before it audit
TINYSTORIES_HELD_OUT = 10_000  # rows 0-9,999 are that dataset's suggested test rows (audit here), the next 10,000 val
LOCAL_EVAL_TOKENS = 2**20  # at most, unless --eval-tokens says otherwise: more costs a CPU over 10 % of the budget
PYTHON_CHARS = 64 * 10**6  # cap of the built-in corpus
RUNTIME = ("kernels", "numpy", "pyarrow", "requests", "rustbpe", "tiktoken", "torch")  # the project's dependencies
HELD_OUT = 20  # where a hash decides, one document in 20 goes to val and one to audit
GROUP, BATCH = 1024, 128  # documents in a row group of a text corpus; in a refill of the packing buffer, at most
SPLITS = ("train", "val", "audit")
SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")  # GPT-4's, with numbers in groups of at most two digits
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]  # the last four ids; the first of them is BOS
TOKENIZER_CHARS, TOKENIZER_DOC_CHARS = 10**9, 10_000
BACKOFF = (1, 2, 4, 8, 16)  # seconds before each new try of a download

class PrepareError(Exception):
    """A mistake of the user or the machine, in a sentence that says what to run."""
    def __init__(self, message, kind="harness"):  # kind: of its FAIL line
        super().__init__(message)
        self.kind = kind

def _require(condition, message, kind="harness"):
    if not condition: raise PrepareError(message, kind)

# == 2. PLACES =========================================================================================================
def _home(): return Path(os.environ.get("AUTORESEARCH_HOME") or "~/.cache/autoresearch").expanduser()
def _write_atomic(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)

def _hash(text): return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
def _sha256(path):
    with open(path, "rb") as file: return hashlib.file_digest(file, "sha256").hexdigest()

def _lock(path):
    """(open file, whether its flock is ours); the lock is held until the file is closed, at the latest by our end."""
    file = open(path, "a+")
    try: return file, fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None
    except BlockingIOError: return file, False

def _prepared(name=None, deep=False):
    """(folder, meta) of a prepared dataset; name: AUTORESEARCH_DATASET, else the last one prepared; deep: hash it."""
    current = _home() / "current"
    name = name or os.environ.get("AUTORESEARCH_DATASET") or (current.read_text().strip() if current.is_file() else "")
    _require(name, f"nothing is prepared in {_home()}; run: uv run prepare.py (or --dataset python without a network)")
    _require(name in PRESETS, f"no dataset is called {name!r}; choose one of {', '.join(PRESETS)}")
    folder, redo = _home() / name, f"run: uv run prepare.py --dataset {name}" + " --path DIR" * (name == "local")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        _require(meta["format"] == FORMAT, f"{folder} was written by another version of prepare.py; {redo}")
        for path, facts in ((folder / file, facts) for file, facts in meta["files"].items()):
            same = path.stat().st_size == facts["bytes"] and (not deep or _sha256(path) == facts["sha256"])
            _require(same, f"{path} has changed since it was prepared; {redo}")
        return folder, meta
    except OSError: raise PrepareError(f"dataset {name} is not prepared in {_home()}; {redo}") from None
    except (ValueError, KeyError, TypeError): raise PrepareError(f"{folder / 'meta.json'} is damaged; {redo}") from None

def __getattr__(name):  # resolved on first use, so that importing this file touches no other
    if name in ("MAX_SEQ_LEN", "EVAL_TOKENS"):
        return _prepared()[1]["seq_len" if name == "MAX_SEQ_LEN" else "eval_tokens"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

def _meter(label):
    """A thread-safe function of bytes done, or sizes of files begun: a live line, or in a file one every 10 seconds."""
    done, shown, sizes, lock, live = 0, time.monotonic(), {}, threading.Lock(), sys.stdout.isatty()
    def add(amount, last=False, **begun):
        nonlocal done, shown
        with lock:
            done, total = done + amount, sum((sizes.update(begun) or sizes).values())
            if last or time.monotonic() - shown >= (0.2 if live else 10):
                shown, share = time.monotonic(), f" of {total / 1e6:,.1f} MB in {len(sizes)} files" if total else " MB"
                print(f"{label}: {done / 1e6:,.1f}{share}", end="\r" if live and not last else "\n", flush=True)
    return add

# == 3. DOWNLOAD =======================================================================================================
def _open_parquet(path):
    """The pyarrow file of a shard that has a text column."""
    import pyarrow as pa, pyarrow.parquet as pq  # here: research runs read no parquet and start faster without
    try: file = pq.ParquetFile(path)
    except pa.ArrowInvalid:
        raise PrepareError(f"{path} is no whole parquet file; replace it and run this again") from None
    columns = dict(zip(file.schema_arrow.names, map(str, file.schema_arrow.types)))
    _require("string" in columns.get("text", ""), f"{path} has no column text of strings, but {columns}; rename one")
    return file

def _fetch(url, path, meter, stop):
    """Downloads url; path appears only when whole and verified. Returns True if there was a SHA-256 to check."""
    import requests
    headers, token = {"Accept-Encoding": "identity", "User-Agent": "autoresearch"}, os.environ.get("HF_TOKEN")
    headers |= {"Authorization": f"Bearer {token}"} if token else {}  # requests drops it on the way to another host
    part = path.with_name(path.name + ".part")
    for wait in (*BACKOFF, None):
        digest, got = hashlib.sha256(), 0
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as reply, open(part, "wb") as file:
                if reply.status_code in (408, 425, 429, 500, 502, 503, 504):
                    raise OSError(f"the server answered {reply.status_code}")
                _require(reply.ok, f"{url} answered {reply.status_code}; check HF_ENDPOINT and HF_TOKEN")
                hops = {key: value for hop in (reply, *reply.history) for key, value in hop.headers.lower_items()}
                size = int(hops.get("x-linked-size") or reply.headers.get("content-length") or 0)
                sha = re.fullmatch(r'"?([0-9a-f]{64})"?', hops.get("x-linked-etag", ""))
                meter(0, **{path.name: size})
                for chunk in reply.iter_content(1 << 20):
                    _require(not stop.is_set(), "the download was stopped; run this again to go on")
                    file.write(chunk)
                    digest.update(chunk)
                    got += len(chunk)
                    meter(len(chunk))
            if size and got != size or sha and digest.hexdigest() != sha[1]:
                raise OSError(f"{got:,} of {size:,} bytes came, or not the right ones")
            sha or _open_parquet(part)
            os.replace(part, path)
            return bool(sha)
        except OSError as error:  # requests' exceptions are OSErrors too
            meter(-got)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES): raise  # for main() to say
            reason = error
        finally: part.unlink(missing_ok=True)
        if wait is None or stop.wait(wait):
            raise PrepareError(f"{url} could not be downloaded ({reason}); run this again to go on where it stopped")

def _download(repository, names, folder, workers):
    """Brings the named files of a hub dataset into folder, in parallel; raises while any is missing."""
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing: return
    folder.mkdir(parents=True, exist_ok=True)
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{hub}/datasets/{repository}/resolve/main"
    print(f"downloading {len(missing)} files from {url}", flush=True)
    meter, stop, pool = _meter("downloaded"), threading.Event(), ThreadPoolExecutor(max(1, workers))
    try:
        jobs = [pool.submit(_fetch, f"{url}/{name}", folder / name, meter, stop) for name in missing]
        unverified = sum(not job.result() for job in as_completed(jobs))
    finally:
        stop.set()
        pool.shutdown(wait=not isinstance(sys.exc_info()[1], KeyboardInterrupt), cancel_futures=True)
    meter(0, last=True)
    if unverified: print(f"{unverified} files came without a SHA-256 header: checked by size and by opening them")

# == 4. CORPORA ========================================================================================================
# A corpus is (source, shards, groups): a hash that changes with its content, names of its files, and groups(split),
# which yields row groups: lists of documents (str).
def _by_hash(documents):
    """groups(split) for documents() -> (key, text) pairs, of which the hash of the key says the split."""
    split_of = lambda key: {0: "val", 1: "audit"}.get(int(_hash(key)[:8], 16) % HELD_OUT, "train")
    def groups(split):
        texts = (text for key, text in documents() if split_of(key) == split)
        return iter(lambda: list(itertools.islice(texts, GROUP)), [])
    return groups

def _row_groups(segments):
    """Row groups of parquet segments (path, first row, end row); nulls are left out."""
    for path, first, end in segments:
        file, row = _open_parquet(path), 0
        for index in range(file.num_row_groups):
            count = file.metadata.row_group(index).num_rows
            lo, hi, row = max(first - row, 0), min(end - row, count), row + count
            if lo < hi:
                texts = file.read_row_group(index, columns=["text"]).column("text").slice(lo, hi - lo)
                try: yield [text for text in texts.to_pylist() if text is not None]
                except UnicodeDecodeError:
                    raise PrepareError(f"{path} holds text that is not UTF-8; convert it and run this again") from None

def _cut(text, seq_len):
    """Cuts a text into documents of 2 to 4 characters a position, at blank lines or line ends where there are some:
    packing crops what exceeds a row, so a document a file would lose most of a long file."""
    part = ""
    for line in re.findall(rf".{{0,{4 * seq_len - 1}}}\n|.{{1,{4 * seq_len}}}", text):
        if part and (len(part) + len(line) > 4 * seq_len or len(part) >= 2 * seq_len and not line.strip()):
            yield part
            part = ""
        part += line
    if part: yield part

def _python_files():
    """(identity, path) of the standard library's and the installed runtime packages' .py files, without test suites."""
    left_out = re.compile(r"(^|/)(tests?|testing|idle_test|site-packages|dist-packages|\.\.)/|(^|/)test_[^/]*$"
                          r"|_test\.py$|(^|/)_sysconfigdata_[^/]*$")  # the last is this machine's build configuration
    library, todo, seen = Path(sysconfig.get_path("stdlib")), list(RUNTIME), set()
    found = [(f"stdlib/{path.relative_to(library).as_posix()}", path) for path in library.rglob("*.py")]
    while todo:
        name = re.match(r"[\w.-]+", todo.pop())[0].lower().replace("_", "-")
        package = None if name in seen else next(iter(metadata.distributions(name=name)), None)
        seen.add(name)
        if package:  # else known, or needed on another platform only
            todo += [need for need in package.requires or () if "extra ==" not in need]
            found += [(f"{name}/{file}", file.locate()) for file in package.files or () if file.suffix == ".py"]
    return [(identity, path) for identity, path in found if not left_out.search(identity)]

def _python_corpus(seq_len):
    total, seen, parts = 0, {}, []  # parts: (hash, (identity of the file, text))
    for identity, path in sorted(_python_files(), key=lambda item: _hash(item[0])):
        try: text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError): continue
        if text.strip() and (digest := _hash(text)) not in seen:
            total += len(text)
            if total > PYTHON_CHARS: break
            seen[digest] = identity
            parts += [(_hash(f"{identity}#{n}"), (identity, part)) for n, part in enumerate(_cut(text, seq_len))]
    parts.sort()  # the pieces of all files are intermixed
    return _hash(json.dumps(seen)), [f"{len(seen)} files"], _by_hash(lambda: (part for _, part in parts))

def _local_corpus(folder, seq_len):
    root = Path(folder or "").expanduser()
    _require(folder and root.is_dir(), f"{f'there is no folder {root}' if folder else '--path is missing'}; "
             "run: uv run prepare.py --dataset local --path DIR")
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    parquet = [path for path in files if path.suffix == ".parquet"]
    used = parquet or [path for path in files if path.suffix in (".txt", ".md")]
    _require(used, f"{root} holds no .parquet, .txt or .md file; name another folder with --path")
    shards = [path.relative_to(root).as_posix() for path in used]
    source = _hash("\n".join(f"{name} {_sha256(path)}" for name, path in zip(shards, used)))
    segments = [(path, 0, math.inf) for path in parquet]
    if len(parquet) >= 3:
        parts = {"train": segments[:-2], "audit": segments[-2:-1], "val": segments[-1:]}
        return source, shards, lambda split: _row_groups(parts[split])
    def documents():
        for text in itertools.chain.from_iterable(_row_groups(segments)): yield text, text
        for path in () if parquet else used:
            try: yield from ((text, text) for text in _cut(path.read_text(encoding="utf-8"), seq_len))
            except UnicodeDecodeError:
                raise PrepareError(f"{path} is not UTF-8 text; convert or remove it and run this again") from None
    return source, shards, _by_hash(documents)

def _corpus(args, seq_len):
    repository, folder, count = PRESETS[args.dataset][0], _home() / args.dataset / "shards", args.num_shards
    if not repository:
        return _python_corpus(seq_len) if args.dataset == "python" else _local_corpus(args.path, seq_len)
    if args.dataset == "tinystories":
        names, held = ["tinystories_gpt4_clean.parquet"], TINYSTORIES_HELD_OUT
        parts = {"audit": (0, held), "val": (held, 2 * held), "train": (2 * held, math.inf)}
        parts = {split: [(folder / names[0], *rows)] for split, rows in parts.items()}
    else:
        most = CLIMBMIX_SHARDS - 2
        count = most if count == -1 else count
        _require(1 <= count <= most, f"--num-shards is {count}; give 1 to {most}, or -1 for all")
        names = [f"shard_{index:05d}.parquet" for index in (*range(count), most, most + 1)]
        paths = [(folder / name, 0, math.inf) for name in names]
        parts = {"train": paths[:-2], "audit": paths[-2:-1], "val": paths[-1:]}
    _download(repository, names, folder, args.download_workers)
    return _hash("\n".join(names)), names, lambda split: _row_groups(parts[split])

# == 5. TOKENIZER ======================================================================================================
def _train_tokenizer(groups, vocab_size):
    """Token bytes, in order of rank, of a BPE vocabulary trained on row groups; special tokens are not among them."""
    import rustbpe
    def texts():
        left = TOKENIZER_CHARS
        for text in itertools.chain.from_iterable(groups):
            text = text[:min(TOKENIZER_DOC_CHARS, left)]
            left -= len(text)
            yield text
            if not left: return
    bpe, wanted = rustbpe.Tokenizer(), vocab_size - len(SPECIAL_TOKENS)
    bpe.train_from_iterator(texts(), wanted, pattern=SPLIT_PATTERN)
    tokens = [bytes(token) for token, _ in sorted(bpe.get_mergeable_ranks(), key=lambda item: item[1])]
    _require(len(tokens) == wanted, f"too little text for a vocabulary of {vocab_size}: it gives "
             f"{len(tokens) + len(SPECIAL_TOKENS)}; add text or lower --vocab-size")
    return tokens

class Tokenizer:
    """Text to ids and back. `enc` is the tiktoken Encoding behind it."""
    def __init__(self, enc):
        self.enc, self.bos_token_id = enc, enc.encode_single_token(SPECIAL_TOKENS[0])

    @classmethod
    def from_directory(cls, directory=None):
        """Loads tokenizer.json of a prepared dataset (default: the one in use). A token stands there as the Latin-1
        reading of its bytes; nothing in the file is executed. Raises PrepareError where it is missing or damaged."""
        import tiktoken
        path = Path(directory or _prepared()[0]) / "tokenizer.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            ranks = {token.encode("latin-1"): rank for rank, token in enumerate(data["tokens"])}
            special = {name: len(ranks) + n for n, name in enumerate(data["special_tokens"])}
            return cls(tiktoken.Encoding("autoresearch", pat_str=data["pattern"], mergeable_ranks=ranks,
                                         special_tokens=special))
        except (OSError, ValueError, KeyError, TypeError):
            raise PrepareError(f"{path} is missing or damaged; run uv run prepare.py for this dataset again") from None

    def get_vocab_size(self): return self.enc.n_vocab
    def get_bos_token_id(self): return self.bos_token_id
    def encode(self, text, prepend=None, num_threads=8):
        """Ids of a string, or a list of ids a string of a list; prepend: an id or the name of a special token."""
        prepend = self.enc.encode_single_token(prepend) if isinstance(prepend, str) else prepend
        first = [] if prepend is None else [prepend]
        if isinstance(text, str): return first + self.enc.encode_ordinary(text)
        return [first + ids for ids in self.enc.encode_ordinary_batch(text, num_threads=num_threads)]
    def decode(self, ids): return self.enc.decode(ids)
    def token_bytes(self):  # -> (vocab,) int64
        """Bytes each id stands for: the raw bytes of the token, 0 for a special one."""
        special = {self.enc.encode_single_token(name) for name in self.enc.special_tokens_set}
        size = lambda i: 0 if i in special else len(self.enc.decode_single_token_bytes(i))
        return torch.tensor([size(i) for i in range(self.enc.n_vocab)])

# == 6. PREPARATION ====================================================================================================
def prepare(args):
    """Downloads, trains the tokenizer, encodes every split once. Files take their names only when all are whole, and
    meta.json, without which nothing counts as prepared, comes last: a run killed anywhere and started again ends in
    the same bytes. Raises PrepareError."""
    args.dataset = args.dataset or "climbmix"
    _, vocab_size, seq_len, eval_tokens = PRESETS[args.dataset]
    vocab_size, seq_len = args.vocab_size or vocab_size, args.seq_len or seq_len
    eval_tokens, least = args.eval_tokens or eval_tokens, 257 + len(SPECIAL_TOKENS)
    _require(least <= vocab_size <= 2**16, f"--vocab-size is {vocab_size}; give {least} to 65536, for ids of 16 bits")
    _require(16 <= seq_len <= 2**16, f"--seq-len is {seq_len}; give 16 to 65536")
    _require(eval_tokens is None or eval_tokens >= seq_len, f"--eval-tokens is {eval_tokens}; give {seq_len} or more")
    folder, current = _home() / args.dataset, _home() / "current"
    folder.mkdir(parents=True, exist_ok=True)
    lock, ours = _lock(_home() / "lock")
    with lock:  # a second preparation waits, then finds the work done
        if not ours:
            print(f"another preparation is running in {_home()}; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        source, shards, groups = _corpus(args, seq_len)
        wanted = {"source": source, "vocab_size": vocab_size, "seq_len": seq_len, "eval_tokens_asked": eval_tokens}
        try:
            meta = _prepared(args.dataset, deep=True)[1]
            done = all(meta[key] == value for key, value in wanted.items())
        except PrepareError: done = False
        if not done:
            meta = _build(folder, groups, {"format": FORMAT, "dataset": args.dataset, **wanted, "shards": shards})
        if not current.is_file() or current.read_text() != args.dataset: _write_atomic(current, args.dataset)
    print("already prepared; nothing to do" if done else "prepared")
    _describe(folder, meta)

def _build(folder, groups, meta):
    building = folder / "building"
    shutil.rmtree(building, ignore_errors=True)  # left by a run that was killed
    building.mkdir()
    try:
        print("training the tokenizer", flush=True)
        tokens = [token.decode("latin-1") for token in _train_tokenizer(groups("train"), meta["vocab_size"])]
        text = json.dumps({"pattern": SPLIT_PATTERN, "special_tokens": SPECIAL_TOKENS, "tokens": tokens}, indent=0)
        _write_atomic(building / "tokenizer.json", text)
        tokenizer, meter = Tokenizer.from_directory(building), _meter("encoded")
        splits = {split: _encode_split(tokenizer, groups(split), building, split, meter) for split in SPLITS}
        meter(0, last=True)
        T, facts = meta["seq_len"], lambda path: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        files = {path.name: facts(path) for path in sorted(building.iterdir())}
        rows = {split: splits[split]["tokens"] // (T + 1) for split in SPLITS}
        fits = min(rows["val"] * 3 // 4, LOCAL_EVAL_TOKENS // T) * T  # a quarter is left for what packing crops
        wanted = meta["eval_tokens_asked"] or max(fits, T)
        _require(rows["train"] and wanted // T <= rows["val"], f"too little text: it fills {rows} rows of T = {T}, and "
                 f"val needs {wanted // T}; add text, or lower --eval-tokens or --seq-len")
        meta = {**meta, "eval_tokens": wanted, "splits": splits, "files": files}
        (folder / "meta.json").unlink(missing_ok=True)
        for name in files: os.replace(building / name, folder / name)
        _write_atomic(folder / "meta.json", json.dumps(meta, indent=1))
        return meta
    finally: shutil.rmtree(building, ignore_errors=True)

def _encode_split(tokenizer, groups, folder, split, meter):
    """Writes <split>.tokens (uint16, each document BOS + its tokens), <split>.docs (uint32, tokens of each document)
    and <split>.batches (uint32, documents of each refill); returns what the split holds."""
    lengths, batches, size = array("I"), array("I"), 0
    with open(folder / f"{split}.tokens", "wb") as file:
        for batch in (group[start:start + BATCH] for group in groups for start in range(0, len(group), BATCH)):
            encoded = tokenizer.encode(batch, prepend=tokenizer.get_bos_token_id(), num_threads=os.cpu_count() or 1)
            lengths.extend(map(len, encoded))
            batches.append(len(batch))
            file.write(np.fromiter(itertools.chain.from_iterable(encoded), dtype="<u2").tobytes())
            size += (amount := sum(len(text.encode()) for text in batch))
            meter(amount)
    for name, values in (("docs", lengths), ("batches", batches)):
        (folder / f"{split}.{name}").write_bytes(np.asarray(values, dtype="<u4").tobytes())
    return {"documents": len(lengths), "tokens": sum(lengths), "bytes": size}

def fingerprint(meta):
    """8 hex digits over all that defines the number: this file, the tokenizer, every token file, sizes, the budget."""
    files = [f"{name} {facts['sha256']}" for name, facts in sorted(meta["files"].items())]
    return _hash(f"{_sha256(__file__)} {TIME_BUDGET} {meta['seq_len']} {meta['eval_tokens']} {files}")[:8]

def _describe(folder, meta):
    shards, tokens = meta["shards"], ", ".join(f"{split} {meta['splits'][split]['tokens']:,}" for split in SPLITS)
    several = f" ... {shards[-1]}, {len(shards)} in all" * (len(shards) > 1)
    print(f"dataset:     {meta['dataset']} in {folder}\nshards:      {shards[0]}{several}\n"
          f"tokens:      {tokens}; {meta['eval_tokens']:,} of val scored\nfingerprint: {fingerprint(meta)}\n"
          f"vocab:       {meta['vocab_size']}, rows of T = {meta['seq_len']}", flush=True)

# == 7. CLOCK ==========================================================================================================
class Clock:
    """The training budget in seconds: starts with the first training batch, stops with the first evaluation, never
    pauses. `now` is an argument so that tests can feed it ticks."""
    def __init__(self, budget):
        self.budget, self.started, self.stopped, self.last, self.longest = budget, None, None, 0.0, 0.0
    def start(self, now=None): self.started = time.monotonic() if now is None else now
    def stop(self, now=None): self.stopped = time.monotonic() if now is None else now
    def elapsed(self, now=None):
        """Seconds of training so far; 0 before the first batch."""
        now = self.stopped if self.stopped is not None else time.monotonic() if now is None else now
        return 0.0 if self.started is None else now - self.started
    def tick(self, now=None):
        """To be called at the end of every step; returns elapsed(). A step that ends late does not excuse itself."""
        elapsed = self.elapsed(now)
        if elapsed <= self.budget: self.longest = max(self.longest, elapsed - self.last)
        self.last = elapsed
        return elapsed
    def overrun(self):
        """Seconds beyond the budget where they exceed the longest step and 2 % of the budget, else 0."""
        over = self.elapsed() - self.budget
        return over if over > max(self.longest, 0.02 * self.budget) else 0.0

clock = Clock(TIME_BUDGET)

class _Run:
    """What the harness itself saw of this run; train.py is never asked for it."""
    score = audit = device = commit = train_sha256 = None
    seed_ok, val_drawn, dirty, guarded, rows = True, False, False, False, 0

# == 8. PACKING ========================================================================================================
ARRIVAL = (1 << 40) - 1  # low bits of a key in plan_rows

def plan_rows(lengths, batches, capacity, buffer_size=1000):
    """Best-fit packing without padding, for ever: yields (documents, tokens taken of each, epoch) for rows of exactly
    `capacity` tokens. lengths: tokens of each document; batches: documents of each refill; both lists, cycled.
    A document is one integer in a sorted list, high bits its length, low bits its arrival counted down, so that one
    bisection finds the longest that fits (the earliest of equals); removal moves at most 9 KB, 0.2 us."""
    keys, arrived, epoch, refills = [], 0, 0, iter(())
    while True:
        documents, takes, room = [], [], capacity
        while room:
            while len(keys) < buffer_size:
                count = next(refills, None)
                if count is None:
                    refills, epoch = iter(batches), epoch + 1
                    continue
                keys += [(lengths[n % len(lengths)] << 40) + ARRIVAL - n for n in range(arrived, arrived + count)]
                keys.sort()
                arrived += count
            at = bisect.bisect_right(keys, room << 40 | ARRIVAL) - 1
            if at < 0: at = bisect.bisect_right(keys, keys[0] | ARRIVAL) - 1  # none fits whole: the shortest is cropped
            key = keys.pop(at)
            documents.append((ARRIVAL - (key & ARRIVAL)) % len(lengths))
            takes.append(min(key >> 40, room))
            room -= takes[-1]
        yield documents, takes, epoch

def _filler(split, T, buffer_size=1000):
    """A function that fills an (n, T + 1) uint16 array with the next rows of a split and returns their epoch."""
    folder, meta = _prepared()
    read = lambda kind, dtype: np.asarray(np.memmap(folder / f"{split}.{kind}", dtype=dtype, mode="r"))
    tokens, lengths = read("tokens", "<u2"), read("docs", "<u4")
    starts, lengths = (np.cumsum(lengths, dtype=np.int64) - lengths).tolist(), lengths.tolist()
    plan = plan_rows(lengths, read("batches", "<u4").tolist(), T + 1, buffer_size)
    def fill(block):
        for row in block:
            documents, takes, epoch = next(plan)
            at = 0
            for document, take in zip(documents, takes):
                row[at:at + take] = tokens[starts[document]:starts[document] + take]
                at += take
        return epoch
    return fill

def _default_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
def _synchronize(device):
    device.type == "cpu" or getattr(torch, device.type).synchronize()

def make_dataloader(tokenizer, B, T, split, buffer_size=1000, device=None):
    """Yields (inputs, targets, epoch) for ever: int64 (B, T) on the device (CUDA, else MPS, else CPU), targets one
    token ahead. The first draw of the train split starts the clock. Raises PrepareError for any other split than
    train and val, or a tokenizer that is not the prepared one."""
    _require(split in ("train", "val"), f"a dataloader serves train or val, not {split!r}; correct train.py")
    same = tokenizer.get_vocab_size() == _prepared()[1]["vocab_size"]
    _require(same, "the tokenizer is not that of the prepared data; use Tokenizer.from_directory()")
    device, turn = torch.device(device or _default_device()), 0
    fill, cuda = _filler(split, T, buffer_size), device.type == "cuda"
    # Two staging buffers in page-locked memory, used in turn: the host fills one while the other's copy is in flight.
    # Before it refills a buffer it waits for the event recorded behind that buffer's last copy, and what is handed out
    # is made anew on the device from the copy: no later batch can overwrite one that is being copied or used.
    slots = [torch.empty(B, T + 1, dtype=torch.int16, pin_memory=cuda) for _ in range(2)]
    copied = [torch.cuda.Event() if cuda else None for _ in slots]
    while True:
        cuda and copied[turn].synchronize()  # returns at once for an event never recorded
        epoch = fill(slots[turn].numpy().view(np.uint16))
        if split == "val":
            _Run.val_drawn |= clock.stopped is None
        elif clock.stopped is None:
            _Run.rows += B
            if clock.started is None:
                _Run.seed_ok = torch.initial_seed() == SEED
                _synchronize(device), clock.start()
        ids = slots[turn].to(device, non_blocking=True).to(torch.int64) & 0xFFFF  # int16 holds the bits of a uint16
        cuda and copied[turn].record()
        turn = 1 - turn
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), epoch

# == 9. METRIC =========================================================================================================
JITTER, LEAK = 0.01, 1e-3  # logits: what a repetition may move, and what a token that must not matter may move
SLICE = 1 << 26  # logits scored at a time: 256 MB in fp32
NOT_FINITE = "the model's logits hold NaN or infinity; lower a learning rate and run again"

def _logits(model, ids, vocab_size):
    logits, shape = model(ids.contiguous()), (*ids.shape, vocab_size)  # one layout, or a compiled model compiles again
    got = tuple(getattr(logits, "shape", [type(logits).__name__]))
    _require(got == shape, f"model(ids) must return logits (B, T, vocab) = {shape}, not {got}; correct train.py")
    return logits

def _probe(model, ids, vocab_size):  # ids: (B, T)
    """Refuses a model whose logits up to a position depend on later tokens or on other rows; returns its jitter."""
    (B, T), device = ids.shape, ids.device
    at = torch.tensor(sorted({0, 1, T - 2} | {n * (T - 2) // 31 for n in range(32)}), device=device)  # (P,) positions
    look = lambda x: _logits(model, x, vocab_size)[:, at].float()  # (B, P, vocab): the rest need not be kept
    moved = lambda a, b: torch.nan_to_num((a - b).abs(), nan=math.inf).amax(dim=2)  # (B, P)
    base = look(ids)
    _require(base.isfinite().all(), NOT_FINITE, "nan")
    jitter = moved(base, look(ids)).max().item()
    _require(jitter <= JITTER, f"the same ids gave logits {jitter:.2g} apart: the model is random (dropout?) or learns "
             "while it is judged; correct train.py")
    bound, columns = max(LEAK, 4 * jitter), torch.arange(T, device=device)
    other = (ids + 1 + torch.arange(B * T, device=device).view(B, T) * 7919 % (vocab_size - 1)) % vocab_size
    for row in sorted({0, B // 2, B - 1}) if B > 1 else ():
        leak = moved(base, look(torch.cat([other[:row], ids[row:row + 1], other[row + 1:]])))[row].max().item()
        _require(leak <= bound, f"the model mixes rows of the batch: other rows moved a row's logits by {leak:.2g}; "
                 "every row must be computed alone")
    for call in range(max(2, min(8, -(-len(at) // B)))):  # each row has its own last true position t
        t = at[(torch.arange(B, device=device) + call * B) * 13 % len(at)][:, None]  # (B, 1), spread out by the 13
        leak = moved(base, look(torch.where(columns > t, other, ids))).masked_fill(at > t, 0).max().item()
        _require(leak <= bound, f"the model sees the future: later tokens moved a position's logits by {leak:.2g}; "
                 "attention, convolutions and pooling must look back only")
    return jitter

def _nats(model, rows, sizes):  # rows: (B, T + 1) ids; sizes: (vocab,) bytes -> (B,) float64
    """Next-token cross-entropy in nats, summed over each row's ordinary targets; NaN where a logit is not finite."""
    logits, targets, sums = _logits(model, rows[:, :-1], len(sizes)), rows[:, 1:], []
    step = max(1, SLICE // logits[0].numel())
    for i in range(0, len(rows), step):
        part, goal = logits[i:i + step].float(), targets[i:i + step]
        nats = F.cross_entropy(part.flatten(0, 1), goal.flatten(), reduction="none").view(goal.shape)
        sums.append(torch.where(part.isfinite().all(), nats.masked_fill(sizes[goal] == 0, 0).sum(dim=1), torch.nan))
    return torch.cat(sums).cpu().double()

@torch.no_grad()
def _bits_per_byte(model, tokenizer, batch_size, split, device):
    """Scores the fixed rows of a split; None where it holds less than one."""
    meta, token_bytes = _prepared()[1], tokenizer.token_bytes()
    T, sizes = meta["seq_len"], token_bytes.to(device)
    count = min(meta["eval_tokens"] // T, meta["splits"][split]["tokens"] // (T + 1))
    if count == 0: return None
    rows = np.zeros((-(-count // batch_size) * batch_size, T + 1), dtype=np.uint16)  # the last batch is padded
    _filler(split, T)(rows[:count])
    rows = torch.from_numpy(rows.astype(np.int64))
    jitter = _probe(model, rows[:batch_size, :-1].to(device), len(sizes))
    nats = [_nats(model, batch.to(device), sizes) for batch in rows.split(batch_size)]
    again = _nats(model, rows[:batch_size].to(device), sizes)
    total = torch.cat(nats)[:count].sum().item()
    _require(math.isfinite(total), NOT_FINITE, "nan")
    change = (nats[0] - again).abs().max().item() / T
    _require(change <= max(1e-4, jitter), f"the first batch, scored again, differed by {change:.2g} nats a token: the "
             "model learns while it is judged; correct train.py")
    return total / (math.log(2) * token_bytes[rows[:count, 1:]].sum().item())

def evaluate_bpb(model, tokenizer, batch_size):
    """Validation bits per byte of model(ids) -> logits (B, T, vocab), where ids are always (batch_size, T). The first
    call stops the clock and fixes the score; later ones return a number and change nothing. Raises PrepareError for a
    model that sees the future or its neighbours, learns while it is judged, or returns NaN or another shape."""
    parameters = getattr(model, "parameters", lambda: ())()
    device, first = next((p.device for p in parameters), torch.device(_default_device())), clock.stopped is None
    if first: _synchronize(device), clock.stop()
    training = getattr(model, "training", False)
    training and model.eval()
    try:
        score = _bits_per_byte(model, tokenizer, batch_size, "val", device)
        if first:
            audit = os.environ.get("AUDIT") == "1" and _bits_per_byte(model, tokenizer, batch_size, "audit", device)
            _Run.score, _Run.audit, _Run.device = score, audit or None, device
        return score
    finally:
        training and model.train()

# == 10. VERDICT =======================================================================================================
HERE = Path(__file__).resolve().parent
STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02)  # t, one-sided 95 %, for 1 to 5 degrees of freedom; 2.0 for more
ENOUGH = 3  # seeds of one file after which it is kept or not
ROW = r"(?i)([0-9a-f]{7})[0-9a-f]*\t(nan|[\d.]+)\t[\d.]+\t(keep|discard|crash)\t"  # of results.tsv, up to its text

def judge(runs, statuses):
    """(verdict, the numbers behind it) on the last of runs: comparable records of runs.jsonl, oldest first. statuses:
    the last word of results.tsv on each commit. Student's t-test on means over seeds, with one deviation for all."""
    run, files, seeds = runs[-1], {}, {}  # files, by commit: the score of each seed; commits of one file share it
    for each in runs:
        files[each["commit"]] = seeds.setdefault(each["train_sha256"], {})
        files[each["commit"]].setdefault(each["seed"], each["val_bpb"])  # a repeated seed counts once
    mean, mine = lambda commit: statistics.fmean(files[commit].values()), files[run["commit"]]
    pools = [list(scores.values()) for scores in seeds.values() if len(scores) > 1]
    df = sum(len(pool) - 1 for pool in pools)
    sd = math.sqrt(sum(statistics.variance(pool) * (len(pool) - 1) for pool in pools) / max(df, 1))
    same = [each for each in runs[:-1] if each["train_sha256"] == run["train_sha256"]
            and (each["commit"] != run["commit"] or each["seed"] == run["seed"])]
    noise = "; ".join([f"noise sd {sd:.6f}, df {df}" if df else "noise unknown",
                       *(f"same file as {each['commit']}: {each['val_bpb']:.6f}" for each in same[:1])])
    after = f"next SEED={next(seed for seed in itertools.count(42) if seed not in mine)}; " * (len(mine) < ENOUGH)
    kept = [commit for commit in files if statuses.get(commit) == "keep" and commit != run["commit"]]
    if not kept:
        return "baseline", f"{after}mean {mean(run['commit']):.6f} of {len(mine)} seeds; {noise}"
    best = min(kept, key=mean)
    gain, t = mean(best) - mean(run["commit"]), STUDENT[df - 1] if 0 < df <= len(STUDENT) else 2.0
    need = t * sd * math.sqrt(1 / len(mine) + 1 / len(files[best]))
    word = "none" if not df else "keep" if gain > need else "rerun" if gain > 0 and after else "discard"
    todo = {"rerun": after, "none": f"run {best} with another SEED first; "}.get(word, "")
    return word, (f"{todo}gain {gain:+.6f} on {best}, {mean(best):.6f}; clear above {need:.6f} with {len(mine)} and "
                  f"{len(files[best])} seeds; {noise}")

def _verdict(record):
    """The verdict on record, just written to runs.jsonl, as one line. Names the rows of results.tsv it cannot read."""
    runs, statuses, lines = [], {}, lambda name: (HERE / name).read_text("utf-8", "replace").split("\n")
    for line in lines("runs.jsonl"):
        try:
            run = json.loads(line)
            same = all(run[key] == record[key] for key in ("harness", "device", "why_not")) and run["val_bpb"] > 0
            runs += [run] if same else []
        except (ValueError, KeyError, TypeError): pass  # a line torn by a kill
    for number, line in enumerate(lines("results.tsv") if (HERE / "results.tsv").is_file() else (), 1):
        if row := re.match(ROW, line): statuses[row[1].lower()] = row[3].lower()
        elif line.strip() and not line.startswith("commit\t"):
            print(f"results.tsv: line {number} is skipped: not commit, val_bpb, memory_gb, status, text between tabs")
    return "{} ({})".format(*judge(runs, statuses))

# == 11. SUMMARY =======================================================================================================
def _git(*words):
    try: return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError): return None

def _device_name(device):
    if device.type == "cuda": return torch.cuda.get_device_name(device)
    model = re.search(r"model name\s*:\s*(.+)", info.read_text() if (info := Path("/proc/cpuinfo")).is_file() else "")
    return f"{device.type} ({model[1].strip() if model else platform.machine()}, {os.cpu_count()} cores)"

def _why_not():
    """Why this run's score may not be compared with others; empty where it may."""
    reasons = {"train.py is in no commit; commit it first": not _Run.commit or _Run.dirty,
               f"the budget was overrun by {clock.overrun():.1f} s": clock.overrun() > 0,
               "no training batch was drawn": clock.started is None,
               f"the seed was not the harness's: call torch.manual_seed(SEED), here {SEED}": not _Run.seed_ok,
               "validation rows were drawn before the score": _Run.val_drawn,
               "guard() was not around main()": not _Run.guarded}
    return "; ".join(reason for reason, holds in reasons.items() if holds)

def print_summary(num_steps, total_tokens, num_params, depth, mfu=None, attention="n/a", tier="n/a"):
    """Prints the stamped block and appends the run to runs.jsonl. num_steps: optimizer steps; total_tokens: trained on;
    mfu: a fraction, None where the device's peak is unknown. Score and seconds are the harness's own.
    Raises PrepareError before the first evaluate_bpb."""
    _require(_Run.score is not None, "there is no score yet; call evaluate_bpb before print_summary")
    meta, device, run, audit = _prepared()[1], _Run.device, _Run, os.environ.get("AUDIT") == "1"
    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": run.commit, "dirty": run.dirty,
              "train_sha256": run.train_sha256, "seed": SEED, "val_bpb": round(run.score, 6), "audit_bpb": run.audit,
              "startup": clock.started and round(clock.started - STARTED, 1), "seconds": round(clock.elapsed(), 1),
              "tokens": total_tokens, "harness": fingerprint(meta), "device": _device_name(device),
              "why_not": _why_not()}
    lines = {
        "val_bpb": f"{run.score:.6f}", "training_seconds": f"{clock.elapsed():.1f}",
        "total_seconds": f"{time.monotonic() - STARTED:.1f}",
        "peak_vram_mb": f"{torch.cuda.max_memory_allocated() / 2**20:.1f}" if device.type == "cuda" else "n/a",
        "mfu_percent": "n/a" if mfu is None else f"{100 * mfu:.2f}", "total_tokens_M": f"{total_tokens / 1e6:.1f}",
        "num_steps": num_steps, "num_params_M": f"{num_params / 1e6:.1f}", "depth": depth,
        "epochs": f"{run.rows * (meta['seq_len'] + 1) / meta['splits']['train']['tokens']:.2f}", "attention": attention,
        "tier": tier, "seed": SEED, "dataset": meta["dataset"], **{key: record[key] for key in ("device", "harness")},
        **({"audit_bpb": f"{run.audit:.6f}" if run.audit else "n/a"} if audit else {})}
    with open(HERE / "runs.jsonl", "ab+") as file:  # one write; a line that a kill left unfinished is closed first
        torn = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps(record).encode() + b"\n")
    lines["verdict"] = f"none ({record['why_not']})" if record["why_not"] else _verdict(record)
    print("---\n" + "\n".join(f"{key + ':':<17} {value}" for key, value in lines.items()), flush=True)

# == 12. GUARD =========================================================================================================
def _watch(pid, seconds, line):
    """Runs in a process of its own, from its source text: ends process `pid` and all its descendants after `seconds`
    and says so. It signals single processes, never a group, which the caller's shell may share."""
    import contextlib, os, re, signal, subprocess, time
    def kill(target, number):
        with contextlib.suppress(OSError): os.kill(int(target), number)
    def parents():  # pid: parent's pid, of every process: "7 (name) S 1 ..." from Linux, "7 1" from ps elsewhere
        command = "cat /proc/[0-9]*/stat 2> /dev/null || ps -Ao pid=,ppid="  # Latin-1 below decodes any name
        table = subprocess.run(command, shell=True, stdout=subprocess.PIPE, encoding="latin-1").stdout
        return dict(re.findall(r"(?m)^ *(\d+)(?: \(.*\) \w)? +(\d+)", table))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.2)
        if os.getppid() != pid:  # it died in a way that guard() could not see
            os.write(1, b"\nFAIL: error: train.py was killed or crashed outside Python; run it again\n")
            return
    kill(pid, signal.SIGSTOP)  # it starts nothing more
    for _ in range(10):  # again, for what was being started meanwhile
        table, tree, me = parents(), {str(pid)}, str(os.getpid())
        while grown := {p for p, of in table.items() if of in tree and me not in (p, of)} - tree: tree |= grown
        for target in tree - {str(pid)}: kill(target, signal.SIGKILL)
        time.sleep(0.05)
    os.write(1, f"\n{line}\n".encode())
    kill(pid, signal.SIGKILL)

def _begin():
    """Notes what is about to run and locks the device for this user; returns the open lock file."""
    for name, text in (("SEED", os.environ.get("SEED", "0")), ("TIME_BUDGET", os.environ.get("TIME_BUDGET", "300"))):
        _require(text.isdecimal() and TIME_BUDGET, f"{name} is {text!r}; give a whole number or unset it")
    script, key = Path(sys.modules["__main__"].__file__).resolve(), "cpu"
    _Run.guarded, _Run.train_sha256 = True, hashlib.sha256(script.read_bytes()).hexdigest()[:16]
    commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", str(script))
    _Run.commit, _Run.dirty = commit and commit[:7], bool(changed)
    if TIME_BUDGET != 300:
        print(f"budget: {TIME_BUDGET} s instead of 300; the score compares only with runs of this budget", flush=True)
    if torch.cuda.is_available():
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
        key = first if first.startswith("MIG-") else str(torch.cuda.get_device_properties(0).uuid)
    lock, ours = _lock(Path(tempfile.gettempdir()) / f"autoresearch-{os.getuid()}-{key}.lock")
    lock.seek(0)
    _require(ours, f"process {lock.read()} is using {key}; wait for it or end it, then run again", "busy")
    lock.truncate(0)
    print(os.getpid(), end="", file=lock, flush=True)
    return lock

def guard(train, grace=GRACE):
    """Runs train() as the one run on its device, under a watchdog that ends it and its descendants `grace` seconds past
    the budget. Exits with 0 after a score, else with 1 and the line FAIL: <oom|nan|timeout|busy|harness|error>: ..."""
    limit, kind, said = TIME_BUDGET + grace, "error", ""
    line = f"FAIL: timeout: not done {limit} s after the start; look for a hang or slow work outside the budget"
    if sys.platform == "linux":  # PR_SET_CHILD_SUBREAPER: orphaned descendants become ours, so that the tree is whole
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    code = f"{inspect.getsource(_watch)}\n_watch({os.getpid()}, {limit - (time.monotonic() - STARTED)}, {line!r})"
    watchdog = subprocess.Popen([sys.executable, "-ISc", code], stdin=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM"))
    try:
        lock = _begin()  # held while this frame lives
        train()
        _require(_Run.score is not None, "train.py ended without a score; call evaluate_bpb and print_summary", "error")
    except PrepareError as error: kind, said = error.kind, str(error)
    except FloatingPointError as error: kind, said = "nan", f"{error}; lower a learning rate and run again"
    except (torch.OutOfMemoryError, MemoryError) as error:
        kind, said = "oom", f"{str(error).split('. ')[0]}; lower the micro-batch or the model and run again"
    except (KeyboardInterrupt, SystemExit) as end: said = f"ended early ({type(end).__name__} {end}); run it again"
    except BaseException as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}; the traceback above says where"
    watchdog.kill(), watchdog.wait()
    if said:
        sys.stderr.flush()
        print(f"\nFAIL: {kind}: {' '.join(said.split())}", flush=True)
    sys.exit(1 if said else 0)

# == 13. COMMANDS ======================================================================================================
def main():
    parser = argparse.ArgumentParser(description="Prepares data for train.py: download, tokenizer, token files.")
    parser.error = lambda message: sys.exit(f"error: {message}; run: uv run prepare.py --help")
    parser.add_argument("--dataset", choices=list(PRESETS), help="climbmix unless given; python needs no network")
    parser.add_argument("--path", metavar="DIR", help="folder of .parquet (text column) or .txt/.md files, for local")
    for name, default, text in (
            ("num-shards", 10, "training shards of climbmix (10; -1 for all)"), ("vocab-size", None, "vocabulary"),
            ("download-workers", 8, "at a time (8)"), ("seq-len", None, "length T"), ("eval-tokens", None, "to score")):
        parser.add_argument(f"--{name}", type=int, metavar="N", default=default, help=text)
    parser.add_argument("--check", action="store_true", help="say what is prepared and change nothing")
    try:
        args = parser.parse_args()
        _describe(*_prepared(args.dataset, deep=True)) if args.check else prepare(args)
    except PrepareError as error: sys.exit(f"error: {error}")
    except OSError as error:
        full = "the disk is full: " * (error.errno in (errno.ENOSPC, errno.EDQUOT))
        sys.exit(f"error: {full}{error}; free some room or set AUTORESEARCH_HOME, then run this again")
    except KeyboardInterrupt:
        print("interrupted; run this again to go on", file=sys.stderr, flush=True)
        os._exit(1)  # without waiting for downloads that hang

if __name__ == "__main__":
    main()

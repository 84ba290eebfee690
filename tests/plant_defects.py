"""Plants defects one by one in a copy of the project and shows that the suite catches each: python tests/plant_defects.py

Not collected by pytest: it takes several minutes. Exit status 1 where a defect survives."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFECTS = [  # what, file, sound text, defective text, the tests that must see it
    (
        "momentum inverted",
        "train.py",
        "momentum.copy_(mu * momentum + (1 - mu) * g)",
        "momentum.copy_((1 - mu) * momentum + mu * g)",
        "optimizer",
    ),
    (
        "no Nesterov look-ahead",
        "train.py",
        "orthogonalize(mu * momentum + (1 - mu) * g, dtype)",
        "orthogonalize(momentum, dtype)",
        "optimizer",
    ),
    ("Muon climbs", "train.py", "p = p - lr * (u +", "p = p + lr * (u +", "optimizer"),
    ("decay against the update", "train.py", "(u * p >= 0)", "(u * p <= 0)", "optimizer"),
    ("decay not cautious", "train.py", "decay * p * (u * p >= 0)", "decay * p", "optimizer"),
    (
        "variance reduction loses the norm",
        "train.py",
        "return even * (length(u) / length(even).clamp_min(1e-10))",
        "return even",
        "optimizer",
    ),
    (
        "variance over the wrong axis",
        "train.py",
        "axis = -1 if u.size(-2) >= u.size(-1) else -2\n    second.copy_",
        "axis = -2 if u.size(-2) >= u.size(-1) else -1\n    second.copy_",
        "optimizer",
    ),
    (
        "four Polar Express steps",
        "train.py",
        "for a, b, c in POLAR_EXPRESS:",
        "for a, b, c in POLAR_EXPRESS[:2]:",
        "optimizer",
    ),
    ("no bias correction in AdamW", "train.py", "(v / (1 - beta2**step)).sqrt()", "v.sqrt()", "optimizer"),
    (
        "epsilon inside the root",
        "train.py",
        "(v / (1 - beta2**step)).sqrt() + eps",
        "(v / (1 - beta2**step) + eps).sqrt()",
        "optimizer",
    ),
    (
        "a parameter owned twice",
        "train.py",
        "adamw(k.x0_lr, [model.x0_scale], betas=k.x0_betas),",
        "adamw(k.x0_lr, [model.x0_scale, model.residual_scale], k.x0_betas),",
        "optimizer",
    ),
    ("rates not scaled by width", "train.py", "scale = (k.width / 768) ** -0.5", "scale = 1.0", "optimizer"),
    ("window off by one", "train.py", "(behind <= window)", "(behind < window)", "model"),
    ("flex window off by one", "train.py", "(i - j <= window)", "(i - j < window)", "model"),
    ("attention sees one ahead", "train.py", "return (behind >= 0)", "return (behind >= -1)", "model"),
    ("last block short", "train.py", '[: L - 1] + "L"', "[:L]", "model"),
    ("values on the other blocks", "train.py", "i % 2 == (L - 1) % 2", "i % 2 == L % 2", "model"),
    (
        "no soft cap",
        "train.py",
        "logits = self.knobs.softcap * torch.tanh(logits / self.knobs.softcap)",
        "logits = logits.float()",
        "model",
    ),
    ("q and k not scaled", "train.py", "self.sharpness * norm(", "norm(", "model"),
    ("pairs of one token", "train.py", "F.pad(ids[:, :-1], (1, 0)) * vocab_size + ids", "ids", "model"),
    ("pairs look ahead", "train.py", "F.pad(ids[:, :-1], (1, 0))", "F.pad(ids[:, 1:], (0, 1))", "model"),
    ("pair table drawn", "train.py", "self.bigram.weight.zero_()", "self.bigram.weight.normal_()", "model"),
    (
        "a second moment a channel's worth too large",
        "train.py",
        "g.square().mean(dim=-1, keepdim=True))\n    table",
        "g.square().sum(dim=-1, keepdim=True))\n    table",
        "optimizer",
    ),
    ("no bias correction of the rows", "train.py", "(square / (1 - beta2**step)).sqrt()", "square.sqrt()", "optimizer"),
    (
        "tables never decay",
        "train.py",
        "eps=k.adam_eps, weight_decay=decay)",
        "eps=k.adam_eps, weight_decay=0.0)",
        "optimizer",
    ),
    ("the last loss unread", "train.py", "    last()\n", "    pass\n", "run"),
    ("a card of 24 GB taken for 12", "train.py", "gigabytes > 0.9 * size", "gigabytes > size", "run"),
    ("warm-up trained", "train.py", "tensor.copy_(old)", "pass", "run"),
    (
        "warm-up keeps optimizer state",
        "train.py",
        "tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]",
        "",
        "run",
    ),
    ("warm-up counts its steps", "train.py", "group.update(old)", "pass", "run"),
    ("warm-up moves the generators", "train.py", "torch.set_rng_state(cpu)", "pass", "run"),
    (
        "warm-down starts late",
        "train.py",
        "if progress <= 1 - k.warmdown else",
        "if progress <= 1 - k.warmdown / 2 else",
        "run",
    ),
    ("weight decay never falls", "train.py", "k.weight_decay * max(0.0, 1 - progress)", "k.weight_decay", "run"),
    (
        "accumulated gradients not averaged",
        "train.py",
        "part = forward(ids, targets) / accumulation",
        "part = forward(ids, targets)",
        "run",
    ),
    ("NaN goes on", "train.py", "if not (value := copy.item()) <= 100:", "if (value := copy.item()) > 100:", "run"),
    (
        "targets unshifted",
        "prepare.py",
        "yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), epoch",
        "yield ids[:, :-1].contiguous(), ids[:, :-1].contiguous(), epoch",
        "packing",
    ),
    (
        "latest of equals",
        "prepare.py",
        "(lengths[n % len(lengths)] << 40) + ARRIVAL - n",
        "(lengths[n % len(lengths)] << 40) + n",
        "packing",
    ),
    (
        "longest cropped",
        "prepare.py",
        "at = bisect.bisect_right(keys, keys[0] | ARRIVAL) - 1",
        "at = len(keys) - 1",
        "packing",
    ),
    ("buffer refilled too late", "prepare.py", "while len(keys) < buffer_size:", "while not keys:", "packing"),
    (
        "batches across row groups",
        "prepare.py",
        "(group[start:start + BATCH] for group in groups for start in range(0, len(group), BATCH))",
        "iter(lambda it=itertools.chain.from_iterable(groups): list(itertools.islice(it, BATCH)), [])",
        "data",
    ),
    ("no BOS", "prepare.py", "prepend=tokenizer.get_bos_token_id(), num_threads", "num_threads", "packing"),
    ("BOS counted", "prepare.py", "0 if i in special else len", "len", "metric"),
    ("specials in the loss", "prepare.py", "nats.masked_fill(sizes[goal] == 0, 0)", "nats", "metric"),
    ("bits taken for nats", "prepare.py", "total / (math.log(2) * token_bytes", "total / (token_bytes", "metric"),
    (
        "padding scored",
        "prepare.py",
        "total = torch.cat(nats)[:count].sum().item()",
        "total = torch.cat(nats).sum().item()",
        "metric",
    ),
    (
        "bytes of decoded text",
        "prepare.py",
        "len(self.enc.decode_single_token_bytes(i))",
        "len(self.enc.decode([i]).encode())",
        "metric",
    ),
    (
        "future unseen by the probe",
        "prepare.py",
        "torch.where(columns > t, other, ids)",
        "torch.where(columns > t + 1, other, ids)",
        "metric",
    ),
    (
        "probe blind late in the row",
        "prepare.py",
        "{0, 1, T - 2} | {n * (T - 2) // 31",
        "{0, 1, T // 2} | {n * (T // 2) // 31",
        "metric",
    ),
    (
        "rows not probed",
        "prepare.py",
        "for row in sorted({0, B // 2, B - 1}) if B > 1 else ():",
        "for row in ():",
        "metric",
    ),
    ("learning unnoticed", "prepare.py", "_require(change <= max(1e-4, jitter)", "_require(True", "metric"),
    (
        "infinity accepted",
        "prepare.py",
        "torch.where(part.isfinite().all(), ",
        "torch.where(part.isnan().logical_not().all(), ",
        "metric",
    ),
    ("score not fixed", "prepare.py", "if first:\n            audit", "if True:\n            audit", "metric"),
    (
        "clock starts when the loader is made",
        "prepare.py",
        "    device, turn = torch.device(device or _default_device()), 0\n",
        "    device, turn = torch.device(device or _default_device()), 0\n    clock.start()\n",
        "packing",
    ),
    ("overrun excused by its own step", "prepare.py", "if elapsed <= self.budget: ", "if True: ", "guard"),
    ("seed not compared", "prepare.py", "_Run.seed_ok = torch.initial_seed() == SEED", "_Run.seed_ok = True", "guard"),
    (
        "crash scored zero",
        "prepare.py",
        '_require(_Run.score is not None, "there is no score yet',
        '_Run.score = _Run.score or 0.0; _Run.device = torch.device("cpu"); _require(True, "there is no score yet',
        "guard",
    ),
    ("watchdog kills the run only", "prepare.py", "for target in tree - {str(pid)}:", "for target in ():", "guard"),
    ("lock not held", "prepare.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "guard"),
    ("torn runs.jsonl", "prepare.py", 'b"\\n" * bool(torn) + ', "", "guard"),
    ("hash not checked", "prepare.py", "or sha and digest.hexdigest() != sha[1]", "", "download"),
    ("size not checked", "prepare.py", "if size and got != size or sha", "if sha", "download"),
    (
        "half file under its name",
        "prepare.py",
        'part = path.with_name(path.name + ".part")\n    for wait',
        "part = path\n    for wait",
        "download",
    ),
    (
        "refusals retried",
        "prepare.py",
        "_require(reply.ok, f",
        "reply.raise_for_status(); _require(True, f",
        "download",
    ),
    ("meta written first", "prepare.py", '        (folder / "meta.json").unlink(missing_ok=True)\n', "", "data"),
    ("damage unnoticed", "prepare.py", '_sha256(path) == facts["sha256"])', "True)", "data"),
    ("train text in val", "prepare.py", '"val": segments[-1:]', '"val": segments[:1]', "data"),
    (
        "fingerprint without the tokenizer",
        "prepare.py",
        'for name, facts in sorted(meta["files"].items())]\n    return _hash',
        'for name, facts in sorted(meta["files"].items()) if name != "tokenizer.json"]\n    return _hash',
        "data",
    ),
    ("best is the worst", "prepare.py", "best = min(kept, key=mean)", "best = max(kept, key=mean)", "verdict"),
    (
        "a repeated seed counts again",
        "prepare.py",
        'files[each["commit"]].setdefault(each["seed"], each["val_bpb"])',
        'files[each["commit"]][each["seed"]] = each["val_bpb"]',
        "verdict",
    ),
    (
        "runs of another device count",
        "prepare.py",
        '("harness", "device", "why_not")',
        '("harness", "why_not")',
        "verdict",
    ),
    (
        "runs that may not be compared count",
        "prepare.py",
        '("harness", "device", "why_not")',
        '("harness", "device")',
        "verdict",
    ),
    (
        "the first row is the status",
        "prepare.py",
        "statuses[row[1].lower()] = row[3].lower()",
        "statuses.setdefault(row[1], row[3].lower())",
        "verdict",
    ),
    (
        "the best is known exactly",
        "prepare.py",
        "math.sqrt(1 / len(mine) + 1 / len(files[best]))",
        "math.sqrt(1 / len(mine))",
        "verdict",
    ),
    ("noise divided by runs", "prepare.py", "/ max(df, 1))", "/ max(df + len(pools), 1))", "verdict"),
    (
        "t of many degrees of freedom",
        "prepare.py",
        "STUDENT[df - 1] if 0 < df <= len(STUDENT) else 2.0",
        "2.0",
        "verdict",
    ),
    ("reruns never end", "prepare.py", "if gain > 0 and after else", "if gain > 0 else", "verdict"),
    ("a kept commit against itself", "prepare.py", 'and commit != run["commit"]]', "]", "verdict"),
    (
        "a stray row is fatal",
        "prepare.py",
        "if row := re.match(ROW, line): ",
        "if (row := re.match(ROW, line))[0]: ",
        "verdict",
    ),
    ("a file not in a commit is judged", "prepare.py", "not _Run.commit or _Run.dirty", "not _Run.commit", "guard"),
    (
        "a kill goes unsaid",
        "prepare.py",
        'os.write(1, b"\\nFAIL: error: train.py was killed',
        'os.write(1, b"" and b"',
        "guard",
    ),
    ("going back whatever the log says", "program.md", "| grep -qE 'discard|crash' &&", "| grep -c '' &&", "night"),
    ("a dropped commit is lost", "program.md", "| git update-ref --stdin &&", "| tail -n 0 &&", "night"),
    (
        "a hard reset",
        "program.md",
        "git restore '--source=HEAD~1' --staged --worktree train.py && git reset -q --soft 'HEAD~1'",
        "git reset -q --hard HEAD~1",
        "permissions",
    ),
    (
        "a run that is not detached",
        "program.md",
        "< /dev/null &` , here".replace(" ,", ","),
        "< /dev/null`, here",
        "night",
    ),
    (
        "luck drawn as progress",
        "analysis.ipynb",
        'kept[\\"gain\\"] > kept[\\"needed\\"]',
        'kept[\\"gain\\"] > 0',
        "notebook",
    ),
    (
        "reruns taken for experiments",
        "analysis.ipynb",
        "for key, group in log.groupby(keys, sort=False):",
        "for key, group in log.groupby(log.index, sort=False):",
        "notebook",
    ),
    (
        "print at import",
        "prepare.py",
        "clock = Clock(TIME_BUDGET)\n",
        "clock = Clock(TIME_BUDGET)\nprint(end='')\n",
        "static",
    ),
]


def plant(folder, defect):
    """True if the tests fail with the defect in place."""
    what, name, sound, broken, tests = defect
    path = folder / name
    text = path.read_text(encoding="utf-8")
    assert text.count(sound) == 1, f"{what}: {sound!r} stands {text.count(sound)} times in {name}"
    path.write_text(text.replace(sound, broken), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", f"tests/test_{tests}.py"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        caught = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return done.returncode == 1, caught[0][:110] if caught else done.stdout[-300:]
    finally:
        path.write_text(text, encoding="utf-8")


def main():
    only, survived = sys.argv[1:], 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "project"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.jsonl", "*.log")
        shutil.copytree(ROOT, folder, ignore=ignored)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        for defect in DEFECTS:
            if not only or any(word in defect[0] for word in only):
                began = time.monotonic()
                caught, by = plant(folder, defect)
                survived += not caught
                print(
                    f"{'caught  ' if caught else 'SURVIVED'} {defect[0]} ({time.monotonic() - began:.0f} s): {by}",
                    flush=True,
                )
    print(f"{survived} of {len(DEFECTS)} defects survived")
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()

"""results.tsv: one row an experiment."""

import re
from dataclasses import dataclass

from referee.base import require, write_atomic

STATUSES = ("keep", "discard", "crash")
LINE_ENDS = re.compile(r"\r\n|\n|\r")
NUMBER = r"-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"


@dataclass(frozen=True)
class Row:
    """commit: 7 or more hex digits; score and memory: as they stand there."""

    commit: str
    score: str
    memory: str
    status: str
    description: str = ""

    def is_of(self, commit):
        return commit is not None and commit.startswith(self.commit)


@dataclass(frozen=True)
class Book:
    """What results.tsv says. wrong: numbers of the lines that cannot be read; maybe_keep: one of them may name a keep."""

    rows: tuple = ()
    wrong: tuple = ()
    maybe_keep: bool = False

    def rows_of(self, commit):
        return [row for row in self.rows if row.is_of(commit)]

    def status(self, commit):
        """The last word on a commit, None where it has no row."""
        rows = self.rows_of(commit)
        return rows[-1].status if rows else None

    def names_a_keep(self):
        return self.maybe_keep or any(row.status == "keep" for row in self.rows)

    def logged(self, record, records):
        """Whether a record has its row. records: all runs of its commit; of two with one score each needs a row."""
        if record.fail:
            return any(row.status == "crash" for row in self.rows_of(record.commit))
        twins = [each for each in records if each.score_text == record.score_text and each.time <= record.time]
        rows = [row for row in self.rows_of(record.commit) if row.score == record.score_text]
        return len(rows) >= len(twins)

    def trouble(self):
        """The lines that cannot be read, as a sentence; empty where there are none."""
        if not self.wrong:
            return ""
        numbers = ", ".join(str(number) for number in self.wrong[:5])
        more = f" and {len(self.wrong) - 5} more" if len(self.wrong) > 5 else ""
        form = "commit, score, memory_gb, keep|discard|crash, text between tabs"
        return f"results.tsv: line {numbers}{more} cannot be read ({form})"


def read_row(line):
    """The Row of a line, None where it is none."""
    parts = line.split("\t")
    if len(parts) < 4:
        return None
    commit, score, memory, status = (part.strip().lower() for part in parts[:4])
    good = [
        re.fullmatch("[0-9a-f]{7,64}", commit),
        re.fullmatch(f"nan|{NUMBER}", score),
        re.fullmatch(f"{NUMBER}|n/a|", memory),
        status in STATUSES,
    ]
    return Row(commit, score, memory, status, "\t".join(parts[4:])) if all(good) else None


def read_book(path):
    """The Book of a file; one that is missing has no rows. Raises RefereeError where it is there and cannot be read."""
    if not path.exists():
        return Book()
    require(path.is_file(), f"{path} is no file; move it away, then run this again")
    try:
        data = path.read_bytes()
    except OSError as error:
        require(False, f"{path} cannot be read ({error.strerror}); make it readable, then run this again")
    rows = []
    wrong = []
    maybe_keep = False
    for number, line in enumerate(LINE_ENDS.split(data.decode("utf-8-sig", "replace")), 1):
        row = read_row(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and not (number == 1 and line.startswith("commit\t")):
            wrong.append(number)
            maybe_keep = maybe_keep or re.search("kee?p", line.replace("\0", ""), re.I) is not None
    return Book(tuple(rows), tuple(wrong), maybe_keep)


def append_rows(path, rows, metric):
    """Adds rows as one atomic write of the whole file; what else stands there stays, byte for byte."""
    before = path.read_bytes() if path.exists() else b""
    if not before.strip():
        before = f"commit\t{metric}\tmemory_gb\tstatus\tdescription\n".encode()
    if not before.endswith((b"\n", b"\r")):
        before += b"\n"
    for row in rows:
        text = "\t".join([row.commit, row.score, row.memory, row.status, " ".join(row.description.split())])
        before += text.encode("utf-8", "replace") + b"\n"
    write_atomic(path, before)

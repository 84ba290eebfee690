"""The referee of autoresearch: what a night of experiments needs, whatever is measured. No experiment edits it.

    uv run referee run [--seed N] [--wait S]                    runs HEAD's train.py and says what came of it
    uv run referee wait [--wait S]                              waits for a run that has been started
    uv run referee log [keep|discard|crash] [--note TEXT]       writes runs into results.tsv, goes back from what is dropped
    uv run referee status [--json]                              branch, best, noise, last rows, and the next step
    uv run referee submit [COMMIT] [--seed N] [--gpus KIND]     sends a commit to a slot (fleet/program.md)
    uv run referee until [--hours H] [--runs N] [--target X]    says when the night ends

Each command takes the folder of the experiment as a last argument; without one it is the folder it is called in. There
train.py is run or, where there is none, ruler.py, which ends in a call of measure() and makes any metric an experiment.

Modules, each using only those before it: base, experiment, clock, records, book, verdict, lint, audit, run; what a
training never loads: supervisor, engines, night, table, common, log, status, commands.
"""

from referee.base import RefereeError
from referee.run import measure

__all__ = ["RefereeError", "measure"]

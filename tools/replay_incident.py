"""Executes event logs of a live run again and says whether every core still answers the same.

lumen-serve --record_dir=/var/log/lumen --record_answers ...      # records
python tools/replay_incident.py /var/log/lumen/*.lumenlog         # executes again
python tools/replay_incident.py --show worker-0-replica-0-*.lumenlog

A log has one core's settings and every event with its time, so the core of the code at hand can be
made anew and told the same. Exit status: 0 if all answers are the same, 1 if one differs (the first
is shown), 2 if a file is no log of this version. A log that stops short is executed up to there.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lumen.errors import LumenError
from serving.incident.log_file import Entry
from serving.incident.replay import Replay, replay
from serving.incident.timeline import apart, brief, line

_SHOW = flags.DEFINE_bool("show", False, "Print every event and what it was answered.")


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        raise app.UsageError("Name at least one event log; see --help.")
    status = 0
    for name in arguments[1:]:
        try:
            status = max(status, _one(Path(name)))
        except LumenError as error:
            print(f"replay_incident: {error}", file=sys.stderr)
            status = 2
    return status


def _one(path: Path) -> int:
    first: list[float] = []

    def show(entry: Entry, answer: Sequence[object] | Exception) -> None:
        if not first:
            first.append(entry.now)
        print(line(entry.number, entry.now - first[0], entry.event, answer))

    outcome = replay(path, seen=show if _SHOW.value else None)
    print("\n".join(report(path, outcome)))
    return 0 if outcome.difference is None else 1


def report(path: Path, outcome: Replay) -> list[str]:
    """What came of one log, in sentences."""
    lines = []
    if outcome.notice:
        lines.append(outcome.notice)
    difference = outcome.difference
    if difference is None:
        lines.append(f"{outcome.header.name}: {outcome.events} events, every answer the same.")
        return lines
    entry = difference.entry
    lines += [
        f"{outcome.header.name}: event {entry.number} (byte {entry.offset} of {path}) is answered "
        "differently.",
        f"  event:    {brief(entry.event)} at {entry.now!r}",
    ]
    if entry.answer is None:
        lines.append(f"  recorded: digest {entry.digest.hex()} (record with --record_answers)")
        lines.append(f"  replayed: {difference.replayed}")
    else:
        recorded, replayed = apart(entry.answer, difference.replayed)
        lines += [f"  recorded: {recorded}", f"  replayed: {replayed}"]
    if outcome.other_code:
        lines.append("  The log was recorded by other code, so the difference may be meant.")
    return lines


if __name__ == "__main__":
    app.run(main)

"""Executes event logs of a live run again and says whether every core still answers the same.

lumen-serve --record_dir=/var/log/lumen --record_answers ...      # records
python tools/replay_incident.py /var/log/lumen/*.lumenlog         # executes again
python tools/replay_incident.py --show worker-0-replica-0-*.lumenlog

python tools/replay_incident.py --what_if max_step_tokens=1024 --what_if spread_steps=8 \
    worker-0-replica-0-*.lumenlog                                 # the same arrivals, otherwise

A log has one core's settings and every event with its time, so the core of the code at hand can be
made anew and told the same. Exit status: 0 if all answers are the same, 1 if one differs (the first
is shown), 2 if a file is no log of this version. A log that stops short is executed up to there.

--what_if lets a replica's requests arrive once more under other engine settings, in virtual time:
latencies as recorded, as modelled under the recorded settings (how far to trust the model, which is
fitted to the log's own steps) and as modelled under the others.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lumen.errors import LumenError
from serving.incident.log_file import Entry
from serving.incident.replay import Replay, replay
from serving.incident.timeline import apart, brief, line
from serving.sim.what_if import Timings, changed, read_run, run_again

_SHOW = flags.DEFINE_bool("show", False, "Print every event and what it was answered.")

_WHAT_IF = flags.DEFINE_multi_string(
    "what_if", [], "name=value of an engine setting (EngineConfig) to try the arrivals with."
)


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        raise app.UsageError("Name at least one event log; see --help.")
    status = 0
    for name in arguments[1:]:
        try:
            status = max(status, _what_if(Path(name)) if _WHAT_IF.value else _one(Path(name)))
        except LumenError as error:
            print(f"replay_incident: {error}", file=sys.stderr)
            status = 2
        except OSError as error:  # a full disk, or nobody reads on
            sys.exit(_not_printed(error))
        except KeyboardInterrupt:
            print(f"replay_incident: Stopped before the end of {name}.", file=sys.stderr)
            return 130
    return status


def _not_printed(error: OSError) -> int:
    print(f"replay_incident: What was found cannot be printed: {error.strerror}.", file=sys.stderr)
    # What is still to be printed would be tried again at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2


def _one(path: Path) -> int:
    first: list[float] = []

    def show(entry: Entry, answer: Sequence[object] | Exception) -> None:
        if not first:
            first.append(entry.now)
        print(line(entry.number, entry.now - first[0], entry.event, answer))

    outcome = replay(path, seen=show if _SHOW.value else None)
    print("\n".join(report(path, outcome)), flush=True)
    return 0 if outcome.difference is None else 1


def _what_if(path: Path) -> int:
    run = read_run(path)
    config = run.parts.config
    columns = {
        "recorded": run.timings,
        "modelled": run_again(run, config),
        ", ".join(_WHAT_IF.value): run_again(run, changed(config, _WHAT_IF.value)),
    }
    if run.notice:
        print(run.notice)
    print("\n".join(table(columns)), flush=True)
    return 0


def table(columns: dict[str, Timings]) -> list[str]:
    """Latencies side by side, in milliseconds."""
    rows: dict[str, list[str]] = {"": list(columns)}
    for what in ("ttft", "itl"):
        for percent in (50, 95, 99):
            samples = [t.ttft_s if what == "ttft" else t.itl_s for t in columns.values()]
            rows[f"{what} p{percent} ms"] = [
                f"{1e3 * np.percentile(one, percent):.2f}" if one else "-" for one in samples
            ]
    # Once for each request that came to run, and once more for each preemption.
    rows["placed"] = [str(t.placed) for t in columns.values()]
    rows["last output s"] = [f"{t.last_s:.3f}" for t in columns.values()]
    for word in sorted({word for t in columns.values() for word in t.ended}):
        rows[f"ended {word}"] = [str(t.ended.get(word, 0)) for t in columns.values()]
    widths = [max(12, len(name)) for name in columns]
    return [
        f"{name:<16}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        for name, cells in rows.items()
    ]


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

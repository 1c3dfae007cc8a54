"""Checks and times every operation of `lumen_kernels` on the device at hand.

python tools/bench_kernels.py --json=docs/results/kernels.json --markdown=kernels.md
python tools/bench_kernels.py --only=decode,matmul --pages=16 --arena_gib=8
python tools/bench_kernels.py --only=decode --match='any batch|128 x 1024, page'
JAX_PLATFORMS=cpu python tools/bench_kernels.py --smoke

Each operation is first compared with float64 NumPy (copies: bit by bit), and the arena with what it
was before; one that is wrong is not timed and makes the status non-zero. Then: medians over batches
of calls chained in one program, over more memory than the L2 holds, with donated arenas, beside a
device copy and a square matmul of the same run. On a GPU JAX takes 75 % of the memory by default;
XLA_PYTHON_CLIENT_MEM_FRACTION=0.93 gives an arena as large as a server's.
"""

import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.bench import results
from tools.bench.kernels.report import markdown
from tools.bench.kernels.runner import OPERATIONS, NoSuchRowError, Options, Outcome, run

_ONLY = flags.DEFINE_list("only", list(OPERATIONS), "Operations to measure.")
_MATCH = flags.DEFINE_string("match", "", "Of those, rows with this regular expression in them.")
_PAGES = flags.DEFINE_list("pages", ["16", "64"], "Block sizes: all shapes with the first.")
_ARENA = flags.DEFINE_float("arena_gib", None, "Size of the arena. Default: most of what is free.")
_REPS = flags.DEFINE_integer("reps", 5, "Batches timed per row: one sample each.")
_BATCH = flags.DEFINE_float("batch_ms", 20.0, "Shortest time of a batch.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny shapes, to see that everything works.")
_JSON = flags.DEFINE_string("json", "", "Results file to write, raw samples in it.")
_MARKDOWN = flags.DEFINE_string("markdown", "", "File for the table. Default: printed.")

_BARS = "Floors, aims and FlashAttention-3's figures are those of one H200."


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected argument {arguments[1]!r}; see --help.")
    try:
        results.check_writable(_JSON.value, _MARKDOWN.value)
        options = Options(
            only=tuple(_ONLY.value),
            match=_MATCH.value,
            pages=_pages(),
            arena_gib=_ARENA.value,
            reps=_REPS.value,
            batch_ms=0.0 if _SMOKE.value else _BATCH.value,
            smoke=_SMOKE.value,
        )
    except ValueError as error:
        sys.exit(f"bench_kernels: {error}")
    try:
        outcome = run(options)
    except NoSuchRowError as error:
        sys.exit(f"bench_kernels: {error}")
    _write(options, outcome)
    if outcome.failures:
        sys.exit("bench_kernels: " + "; ".join(outcome.failures))


def _pages() -> tuple[int, ...]:
    if not all(page.strip().isdecimal() for page in _PAGES.value):
        raise ValueError(f"--pages={','.join(_PAGES.value)} must be whole numbers.")
    return tuple(int(page) for page in _PAGES.value)


def _write(options: Options, outcome: Outcome) -> None:
    settings = {
        **{
            name: getattr(options, name)
            for name in ("only", "match", "pages", "reps", "batch_ms", "smoke")
        },
        **outcome.facts,
    }
    content = results.results(outcome.rows, settings, {})
    device = outcome.facts["device"]
    to = (_JSON.value, _MARKDOWN.value)
    results.publish(content, device, markdown(outcome.rows), _BARS, to)


if __name__ == "__main__":
    app.run(main)

"""Tells whether a deployment fits a TPU slice, on a machine without one, by compiling it.

    python tools/aot_check.py --model=random:llama-3.1-8b --topology=v5e --tensor_parallel=4
    python tools/aot_check.py --model=random:llama-3.1-70b --topology=all --tensor_parallel=8

Every program that serving would compile at start is compiled ahead of time for the slice, with
the KV arena that serving would allocate there; nothing is allocated and nothing runs. Prints what
each device holds (weights, KV arena, programs, the largest temporaries) and how many tokens of KV
a replica has. Exits with 0 if the deployment fits (with --topology=all: if it fits anywhere), with
1 if it does not, with 2 if something is wrong with the arguments. Needs libtpu (the dev extra).
"""

import importlib.metadata
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lumen.checkpoint.native import is_native
from lumen.errors import LumenError
from lumen.hf_config import read_model_config
from lumen.model_spec import ResolvedModel, resolve_model
from lumen.random_weights import RandomWeights
from serving import results_file
from serving.engine.device.config import DeviceExecutorConfig
from serving.errors import ConfigurationError
from serving.launch.config import DEFAULT_MAX_MODEL_LEN, ServeConfig, SettingValue, settings
from serving.launch.flags import EXIT_CONFIGURATION, build, read_preset
from serving.launch.model import ServedModel, check_arena_holds_a_request
from serving.launch.progress import progress_display
from serving.launch.replicas import executor_config
from tools.aot.compiling import (
    CompiledProgram,
    DoesNotCompileError,
    ProgramKey,
    check_total,
    compile_programs,
)
from tools.aot.deployment import Deployment, DoesNotFitError, Plan, plan
from tools.aot.report import Report, merged, program_table, rows_of, slice_table
from tools.aot.topologies import SLICES, slices_named
from tools.bench import results

_EXIT_NO = 1
_PIPE_COLUMNS = 140
_SECTIONS = ("model", "devices", "batching")
_SHARED = (
    "model", "max_model_len", "tensor_parallel", "dtype", "num_rows", "token_budget",
    "block_size", "num_blocks", "memory_fraction",
)  # fmt: skip

_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "TPU slice to compile for; a generation, for its smallest slice that has enough devices; or "
    "all, for a line per generation. "
    + "; ".join(
        f"{generation}: {', '.join(one.name for one in slices)}"
        for generation, slices in SLICES.items()
    )
    + ".",
    required=True,
)
_PRESET = flags.DEFINE_string(
    "config", None, "TOML preset of lumen-serve to take settings from; flags beside it win."
)
_QUICK = flags.DEFINE_boolean(
    "quick", False, "Compile only the largest bucket of every kind of program, not all of them."
)
_THREADS = flags.DEFINE_integer(
    "compile_threads",
    len(os.sched_getaffinity(0)),
    "Programs compiled at a time.",
    lower_bound=1,
)
_JSON = flags.DEFINE_string(
    "json",
    None,
    "File to write the figures to, in the form of docs/results; figures of other deployments that "
    "it has stay.",
)


def _define_shared_flags() -> None:
    """The settings of lumen-serve that decide what is compiled, under the same names."""
    define: dict[type, Any] = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    for _, name, info in settings(_SECTIONS):
        if name in _SHARED:
            define[info.kind](name, None, info.help)
    flags.mark_flag_as_required("model")  # type: ignore[no-untyped-call]  # absl leaves it untyped


_define_shared_flags()


def main(arguments: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")  # leaves accelerators to those who serve
    try:
        if len(arguments) > 1:
            raise ConfigurationError(f"{arguments[1]!r} is not a flag; see --help.")
        reports = check(_serve_config())
    except LumenError as error:
        print(f"aot_check: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIGURATION)
    _show(reports)
    if _JSON.value:
        _write(Path(_JSON.value), reports)
    if all(report.trouble for report in reports):
        sys.exit(_EXIT_NO)


def check(config: ServeConfig) -> list[Report]:
    """Compile for every slice that --topology names.

    Raises LumenError for arguments that make no sense; what does not fit is in the reports.
    """
    width = config.devices.tensor_parallel
    slices = slices_named(_TOPOLOGY.value, width)
    model = _served_model(config)
    executor = executor_config(config, model, "tpu")
    return [
        _checked(
            Deployment(
                name=model.model_id,
                model=model.resolved.source.config,
                settings=executor,
                tensor_parallel=width,
                slice=slice_,
            )
        )
        for slice_ in slices
    ]


def _checked(deployment: Deployment) -> Report:
    start = time.perf_counter()
    planned: Plan | None = None
    programs: tuple[CompiledProgram, ...] = ()
    trouble = ""
    with progress_display() as progress:
        bar = progress.add_task(f"compiling for {deployment.slice.name}", total=None)
        try:
            planned = plan(deployment)
            programs = compile_programs(
                planned,
                _largest(deployment.settings) if _QUICK.value else lambda key: True,
                _THREADS.value,
                lambda done, total, name: progress.update(bar, completed=done, total=total),
            )
            check_total(planned, programs)
        except (DoesNotFitError, DoesNotCompileError) as error:
            trouble = str(error)
    elapsed = time.perf_counter() - start
    return Report(deployment, planned, programs, elapsed, not _QUICK.value, trouble)


def _largest(executor: DeviceExecutorConfig) -> Callable[[ProgramKey], bool]:
    def wanted(key: ProgramKey) -> bool:
        if key[0].startswith("mixed"):
            return key[1:] == executor.mixed_sizes[-1]
        of = executor.chunk_buckets if key[0].startswith("prefill") else executor.decode_buckets
        return len(key) == 1 or key[1] == max(of)

    return wanted


def _show(reports: list[Report]) -> None:
    # Into a file or pipe, wide enough for every column.
    console = Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
    for report in reports if len(reports) == 1 else ():
        if report.programs:
            console.print(program_table(report))
    console.print(slice_table(reports))
    for report in reports:
        console.print(report.verdict, highlight=False, soft_wrap=True)
        for problem in report.problems:
            console.print(f"  Copied needlessly by {problem}", highlight=False, soft_wrap=True)


def _write(path: Path, reports: list[Report]) -> None:
    versions = {"libtpu": importlib.metadata.version("libtpu")}
    rows = [row for report in reports for row in rows_of(report)]
    how = {"ran on a TPU": "no: compiled ahead of time on this machine"}
    results_file.write(path, merged(path, results.results(rows, how, versions)))


def _serve_config() -> ServeConfig:
    given: dict[str, SettingValue] = {}
    if _PRESET.value:
        given.update(read_preset(Path(_PRESET.value).expanduser(), _SECTIONS))
    for name in _SHARED:
        if flags.FLAGS[name].present:
            given[name] = flags.FLAGS[name].value
    return build(given)


def _served_model(config: ServeConfig) -> ServedModel:
    """The model; of a Hugging Face folder config.json is enough, weights need not be there."""
    spec = config.model.model
    folder = Path(spec).expanduser()
    if (folder / "config.json").is_file() and not is_native(folder):
        name = folder.resolve().name
        source = RandomWeights(read_model_config(folder), name)  # of its shapes
        resolved = ResolvedModel(name, source, None, str(folder))
    else:
        resolved = resolve_model(spec)
    limit = resolved.source.config.max_position
    length = config.model.max_model_len or min(limit, DEFAULT_MAX_MODEL_LEN)
    if length > limit:
        raise ConfigurationError(
            f"--max_model_len is {length}, but the model goes up to {limit} tokens; lower it."
        )
    model = ServedModel(resolved.model_id, length, resolved)
    check_arena_holds_a_request(config.batching, model)
    return model


def _parse(arguments: list[str]) -> list[str]:
    """absl's own parser, with the exit status of every other wrong argument."""
    try:
        return list(flags.FLAGS(arguments))
    except flags.Error as error:
        print(f"aot_check: {error}; see --help.", file=sys.stderr)
        sys.exit(EXIT_CONFIGURATION)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)

"""What compiling told, for people and for results files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from serving.results_file import Row, row
from tools.aot.compiling import CompiledProgram, needed_bytes
from tools.aot.deployment import Deployment, Plan, gib
from tools.aot.topologies import HBM_BYTES, device_count

_MIB = float(1 << 20)
_GIB = float(1 << 30)


@dataclass(frozen=True, slots=True)
class Report:
    """One deployment on one slice. trouble: why it does not fit; empty if it does.

    plan: None if not even weights and one request fit. elapsed_s: of compiling, several at a time.
    complete: whether all programs were compiled, not only the largest of each kind.
    """

    deployment: Deployment
    plan: Plan | None
    programs: tuple[CompiledProgram, ...]
    elapsed_s: float
    complete: bool = True
    trouble: str = ""

    @property
    def title(self) -> str:
        """Model, width and slice."""
        deployment = self.deployment
        return (
            f"{deployment.name} ({deployment.settings.dtype}), tensor parallel "
            f"{deployment.tensor_parallel}, on {deployment.slice.name}"
        )

    @property
    def temp_bytes(self) -> int:
        """Most temporaries of one program."""
        return max((program.temp_bytes for program in self.programs), default=0)

    @property
    def vmem_bytes(self) -> int:
        """Most VMEM of one operation."""
        return max((program.vmem_bytes for program in self.programs), default=0)

    @property
    def code_bytes(self) -> int:
        """All programs: they stay on the device."""
        return sum(program.code_bytes for program in self.programs)

    @property
    def problems(self) -> tuple[str, ...]:
        """Arrays that programs copy and should not."""
        return tuple(
            f"{program.name}: {problem}"
            for program in self.programs
            for problem in program.problems
        )

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.trouble or self.plan is None:
            return f"Does not fit: {self.title}. {self.trouble}"
        plan, longest = self.plan, self.deployment.settings.max_model_len
        replicas = "1 replica" if plan.replicas == 1 else f"{plan.replicas} replicas"
        free = plan.hbm_bytes - needed_bytes(plan, self.programs)
        return (
            f"Fits: {self.title}: {replicas} of {plan.capacity_tokens:,} KV tokens each, "
            f"{plan.capacity_tokens // longest} requests of {longest:,} tokens; "
            f"{gib(free)} of each device stay free.{self._reservations(plan)}"
        )

    def _reservations(self, plan: Plan) -> str:
        text = ""
        if not self.complete:
            text += " The code of smaller programs, not compiled, is extra."
        if plan.replica_hosts > 1:
            text += (
                f" But a replica's devices belong to {plan.replica_hosts} hosts, and a worker "
                "serves with those of one."
            )
        return text


def slice_table(reports: Sequence[Report]) -> Table:
    """A line per slice: what a device holds and what a replica can do with it."""
    table = Table(title="Bytes are those of one device", title_justify="left")
    table.add_column("slice", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for name in ("devices", "hosts", "repli-\ncas", "HBM\nGiB", "weights\nGiB", "arena\nGiB",
                 "KV tokens\nper replica", "tempo-\nraries\nMiB", "VMEM\nMiB", "programs\nMiB",
                 "free\nGiB", "compile\ns"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for one in reports:
        table.add_row(*_cells(one))
    return table


def _cells(report: Report) -> list[str]:
    slice_, plan = report.deployment.slice, report.plan
    cells = [
        slice_.name,
        "no" if report.trouble else "yes",
        str(device_count(slice_)),
    ]
    if plan is None:
        return [*cells, "", "", _gib(HBM_BYTES[slice_.generation])]
    cells += [
        str(plan.hosts), str(plan.replicas), _gib(plan.hbm_bytes), _gib(plan.weights.whole),
        _gib(plan.arena_bytes), f"{plan.capacity_tokens:,}",
    ]  # fmt: skip
    if not report.programs:
        return cells
    return [
        *cells, _mib(report.temp_bytes), _mib(report.vmem_bytes), _mib(report.code_bytes),
        _gib(plan.hbm_bytes - needed_bytes(plan, report.programs)), f"{report.elapsed_s:.0f}",
    ]  # fmt: skip


def program_table(report: Report) -> Table:
    """A line per program: what it needs while it runs and how long it compiles."""
    table = Table(title=f"Programs of {report.title}", title_justify="left")
    table.add_column("program")
    for name in ("temporaries\nMiB", "VMEM\nMiB", "code\nMiB", "in place\nGiB", "compile\ns"):
        table.add_column(name, justify="right")
    for one in report.programs:
        table.add_row(
            one.name, _mib(one.temp_bytes), _mib(one.vmem_bytes), _mib(one.code_bytes),
            _gib(one.alias_bytes), f"{one.compile_s:.1f}",
        )  # fmt: skip
    return table


def rows_of(report: Report) -> list[Row]:
    """Rows of a results file. Bytes are those of one device."""
    name = report.title
    fits = row(f"{name}: fits", "bool", [0.0 if report.trouble else 1.0], trouble=report.trouble)
    plan = report.plan
    if plan is None:
        return [fits]
    figures = {
        "HBM of a device": (plan.hbm_bytes / _GIB, "GiB"),
        "weights": (plan.weights.whole / _GIB, "GiB"),
        "KV arena": (plan.arena_bytes / _GIB, "GiB"),
        "KV capacity of a replica": (plan.capacity_tokens, "tokens"),
    }
    if report.programs:
        free = plan.hbm_bytes - needed_bytes(plan, report.programs)
        figures |= {
            "temporaries, most of one program": (report.temp_bytes / _MIB, "MiB"),
            "VMEM, most of one operation": (report.vmem_bytes / _MIB, "MiB"),
            "code of all programs": (report.code_bytes / _MIB, "MiB"),
            "free": (free / _GIB, "GiB"),
            "compile, all programs": (report.elapsed_s, "s"),
        }
    rows = [fits]
    rows += [row(f"{name}: {what}", unit, [value]) for what, (value, unit) in figures.items()]
    for one in report.programs:
        rows.append(
            row(
                f"{name}: {one.name}, compile", "s", [one.compile_s],
                temporaries_mib=round(one.temp_bytes / _MIB, 2),
                vmem_mib=round(one.vmem_bytes / _MIB, 2),
                code_mib=round(one.code_bytes / _MIB, 2),
                in_place_bytes=one.alias_bytes,
                kernel_calls=one.kernels,
                problems=list(one.problems),
            )
        )  # fmt: skip
    return rows


def merged(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """A results file's content with the rows of other deployments that `path` already has."""
    if not path.exists():
        return content
    before = json.loads(path.read_text(encoding="utf-8"))
    mine = {_deployment(one) for one in content["rows"]}
    kept = [one for one in before["rows"] if _deployment(one) not in mine]
    commands = dict.fromkeys([*before["command"].split("\n"), content["command"]])
    return {**content, "command": "\n".join(commands), "rows": kept + content["rows"]}


def _deployment(one: Row) -> str:
    return str(one["name"]).split(": ")[0]


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}"


def _mib(size: int) -> str:
    return f"{size / _MIB:.1f}"

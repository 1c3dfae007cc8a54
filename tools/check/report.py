"""Rows and the table of a check."""

import dataclasses
from collections.abc import Mapping, Sequence

from serving.results_file import Row, row
from tools.check.comparison import Errors, Tolerance
from tools.check.hole import HoleCheck
from tools.check.token_by_token import TokenCheck

OK = "ok"
NOT_JUDGED = "not judged"
FINE = (OK, NOT_JUDGED)
"""Verdicts that break nothing."""

_ERRORS = (
    "positions", "mean", "p99", "most", "chosen_mean", "chosen_most", "agreement", "gap", "listed",
)  # fmt: skip
_HEADS = (
    "best 20 of", "positions", "mean", "p99", "most", "random token: mean", "most",
    "same best token", "else apart by at most", "listed by both", "verdict",
)  # fmt: skip


def error_row(name: str, found: Errors, tolerance: Tolerance | None) -> Row:
    """Errors of one kind of step: the sample is their mean. tolerance: None: any error is fine."""
    broken = NOT_JUDGED if tolerance is None else "; ".join(found.broken(tolerance))
    verdict = broken or OK
    return row(name, "nats", [found.mean], **dataclasses.asdict(found), verdict=verdict)


def token_row(name: str, found: TokenCheck, kernels: Mapping[str, Mapping[str, int]]) -> Row:
    """Tokens of a model: the sample is how many were other than they should be."""
    verdict = OK
    if found.first_wrong is not None:
        request, token = found.first_wrong
        verdict = f"{found.wrong} tokens differ, first token {token} of request {request}"
    facts = {**dataclasses.asdict(found), "kernels": {k: dict(v) for k, v in kernels.items()}}
    return row(name, "tokens", [found.wrong], **facts, verdict=verdict)


def hole_row(model: str, found: HoleCheck) -> Row:
    """Cycles of dropping weights: the samples are their times."""
    name = f"{found.units} units of {model} dropped, one array in their place"
    return row(name, "ms", list(found.segment_ms), **dataclasses.asdict(found), verdict=OK)


def markdown(rows: Sequence[Row]) -> str:
    """A table of errors, a line for each model whose tokens were compared, one for the hole."""
    text = ""
    if errors := [one for one in rows if one["unit"] == "nats"]:
        lines = [_HEADS, ["---"] * len(_HEADS)]
        lines += [
            [one["name"], *(f"{one[k]:.4g}" for k in _ERRORS), one["verdict"]] for one in errors
        ]
        text += "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    for one in rows:
        if one["unit"] == "tokens":
            calls = "; ".join(
                f"{unit}: {', '.join(named) or 'none, XLA alone'}"
                for unit, named in one["kernels"].items()
            )
            text += (
                f"\n{one['name']}: {one['tokens'] - one['wrong']} of {one['tokens']} tokens of "
                f"{one['requests']} requests equal, the closest call by {one['closest']:.2g} in "
                f"logits; {one['verdict']}. Kernels in a unit: {calls}.\n"
            )
        if one["unit"] == "ms":
            text += (
                f"\n{one['name']}: {one['weight_bytes'] / 1e9:.3f} GB of weights leave a piece of "
                f"{one['hole_bytes'] / 1e9:.3f} GB, and nothing else free was larger than "
                f"{one['free_bytes'] / 1e9:.3f} GB; deleted and taken again in "
                f"{', '.join(f'{ms:.1f}' for ms in one['segment_ms'])} ms.\n"
            )
    return text

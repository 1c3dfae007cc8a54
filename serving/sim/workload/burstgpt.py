"""Traces of BurstGPT (CC-BY-4.0): months of requests to ChatGPT and GPT-4."""

from pathlib import Path

from serving.errors import WorkloadFileError
from serving.sim.workload.requests import Workload
from serving.sim.workload.source_file import CsvSource, span
from serving.sim.workload.table import RequestTable

_TIME, _MODEL, _LOG = "Timestamp", "Model", "Log Type"
_PROMPT, _OUTPUT = "Request tokens", "Response tokens"


def read_burstgpt(path: Path, model: str | None = None, log_type: str | None = None) -> Workload:
    """A CSV file with columns Timestamp (s), Model, Request tokens, Response tokens, Log Type.

    Others, as Total tokens, Session ID and Elapsed time of later releases, are not looked at.
    model, log_type: only requests with just this, as "GPT-4" and "Conversation log". Those with no
    token in response failed; they are left out and counted. Times count from the first row, left
    out or not. Raises WorkloadFileError.
    """
    source = CsvSource(path, (_TIME, _MODEL, _PROMPT, _OUTPUT, _LOG))
    at_s: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    failed = 0
    first: float | None = None
    at = 0.0
    for line, (time, its_model, prompt, output, its_log) in source.rows():
        seconds = source.seconds(line, _TIME, time)
        first = seconds if first is None else first
        if seconds - first < at:
            raise source.wrong(line, _TIME, time, "a time not before that of the row above")
        at = seconds - first
        output_tokens = source.tokens(line, _OUTPUT, output, least=0)
        prompt_tokens = source.tokens(line, _PROMPT, prompt, least=1 if output_tokens else 0)
        if (model is None or its_model == model) and (log_type is None or its_log == log_type):
            if not output_tokens:
                failed += 1
                continue
            at_s.append(at)
            prompts.append(prompt_tokens)
            outputs.append(output_tokens)
    if not at_s:
        wanted = " and ".join(repr(one) for one in (model, log_type) if one is not None)
        raise WorkloadFileError(
            path,
            f"no request{f' of {wanted}' if wanted else ''} that succeeded, {failed} that failed",
            "at least one",
        )
    table = RequestTable.plain(at_s, prompts, outputs)
    return Workload(path.name, span(at_s), table, left_out=failed)

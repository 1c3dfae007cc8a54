"""From settings to the recorder of a core's event log."""

from pathlib import Path

from serving.incident.cores import Parts
from serving.incident.recorder import Recorder, open_recorder
from serving.launch.config import RecordSettings


def recorder_of(settings: RecordSettings, name: str, parts: Parts) -> Recorder | None:
    """A recorder for a core made from these parts, or None if --record_dir is empty.

    Raises ConfigurationError if the log cannot be made.
    """
    if not settings.record_dir:
        return None
    return open_recorder(
        Path(settings.record_dir).expanduser(),
        name,
        parts,
        keep_answers=settings.record_answers,
        limit_bytes=settings.record_limit_mib << 20,
    )

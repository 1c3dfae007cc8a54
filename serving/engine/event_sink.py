"""Where a shell may tell what its core heard and answered: the seam that recording hangs on."""

from collections.abc import Callable, Sequence

type EventSink = Callable[[float, object, Sequence[object] | Exception], None]
"""sink(now, event, answer): called once per event, in order, right after the core answered and
before anything of the answer is carried out; an exception if the core raised one. On the shell's
thread: it must not block, and it may keep event and answer, which nobody changes."""


def handle_recorded[Event, Effects: Sequence[object]](
    handle: Callable[[Event, float], Effects], event: Event, now: float, sink: EventSink | None
) -> Effects:
    """handle(event, now), with the sink told of it, if there is one. Raises what the core does."""
    if sink is None:
        return handle(event, now)
    try:
        effects = handle(event, now)
    except Exception as error:
        sink(now, event, error)
        raise
    sink(now, event, effects)
    return effects

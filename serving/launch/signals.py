"""Waiting for the signal to stop, or for something that ends the process sooner."""

import asyncio
import signal


async def until_stopped(*fatal: asyncio.Event) -> bool:
    """Wait for SIGTERM or SIGINT (then True) or for one of the fatal events (then False).

    Handlers stay in place, so that a signal during the stop changes nothing.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    waits = [asyncio.ensure_future(event.wait()) for event in (stop, *fatal)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return stop.is_set()

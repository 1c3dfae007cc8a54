"""Who holds the interpreter lock of another process, and for how long: looked at from outside.

Nothing runs in the process looked at, so nothing there slows down: its memory is read, some ten
thousand times a second, where CPython says whether the lock is taken and by which thread. That
place is found in this process, which runs the same CPython, by looking for what it must hold.
Linux only, and the processes of a user who may trace them: `LockWatchError` says what is missing.
"""

import ctypes
import os
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_RUNTIME = "_PyRuntime"  # holds the main interpreter, which holds the lock
_SEARCHED_BYTES = 4 << 20
_THREAD_STATE_BYTES = 1024
_EVERY_S = 5e-5
_WORD = struct.Struct("=Q")
_LOCK = struct.Struct("=QQi")
"""CPython's `_gil_runtime_state`: switch interval in microseconds, last holder, whether it is
taken."""


class LockWatchError(Exception):
    """The lock cannot be watched here; the text says why."""


@dataclass(frozen=True, slots=True)
class LockShares:
    """What was seen so far. looks: at the lock. held: of them, those that found it taken, by the
    kernel's number of the thread that had it."""

    looks: int
    held: Mapping[int, int]

    def since(self, before: "LockShares") -> "LockShares":
        """What was seen after `before`."""
        held = {thread: count - before.held.get(thread, 0) for thread, count in self.held.items()}
        return LockShares(self.looks - before.looks, held)

    def share(self, threads: Iterable[int]) -> float:
        """Part of the time in which one of these threads had the lock, 0 to 1."""
        return sum(self.held.get(thread, 0) for thread in threads) / max(self.looks, 1)


class LockWatch:
    """Watches the lock of a process from a thread of its own. Use as a context manager.

    Raises LockWatchError if it cannot.
    """

    def __init__(self, pid: int) -> None:
        place = _place_in_runtime()
        self._thread_number_at = _thread_number_at()
        try:
            self._lock_at = _runtime_of(pid) + place
            self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        except OSError as error:
            raise LockWatchError(f"process {pid} cannot be looked into: {error}") from error
        self._looks = 0
        self._holders: Counter[int] = Counter()  # by address of the thread's state
        self._numbers: dict[int, int] = {}
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="lock-watch", daemon=True)

    def shares(self) -> LockShares:
        """What was seen since the start."""
        held: Counter[int] = Counter()
        for state, count in list(self._holders.items()):
            held[self._number(state)] += count
        return LockShares(self._looks, held)

    def __enter__(self) -> Self:
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._watcher.join()
        os.close(self._memory)

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                _, holder, taken = _LOCK.unpack(os.pread(self._memory, _LOCK.size, self._lock_at))
            except (OSError, struct.error):  # the process is gone
                return
            self._looks += 1
            if taken:
                self._holders[holder] += 1
                if holder not in self._numbers:
                    self._number(holder)  # while the thread is there
            time.sleep(_EVERY_S)

    def _number(self, state: int) -> int:
        """The kernel's number of the thread with this state; 0 if that cannot be read."""
        if state not in self._numbers:
            try:
                word = os.pread(self._memory, _WORD.size, state + self._thread_number_at)
                self._numbers[state] = _WORD.unpack(word)[0]
            except (OSError, struct.error):
                return 0
        return self._numbers[state]


def _place_in_runtime() -> int:
    """Bytes from the start of CPython's runtime to its lock."""
    if not sys.platform.startswith("linux"):
        raise LockWatchError("only Linux shows a process's memory to others")
    found = _lock_address()
    if found is None:
        raise LockWatchError(f"this Python ({sys.version}) keeps its lock in another way")
    return found - _runtime_here()


def _runtime_here() -> int:
    try:
        return ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, _RUNTIME))
    except ValueError as error:
        raise LockWatchError(f"this Python does not show where its {_RUNTIME} is") from error


def _lock_address() -> int | None:
    """Where the lock of this process is: there the switch interval stands, which is set to two odd
    values in turn, then the state of the thread that had the lock last, which is this one."""
    state = _own_state()
    before = sys.getswitchinterval()
    try:
        places = set(_interval_places(4_931, state))
        places &= set(_interval_places(4_987, state))
    finally:
        sys.setswitchinterval(before)
    return places.pop() if len(places) == 1 else None


def _interval_places(interval_us: int, state: int) -> Iterable[int]:
    sys.setswitchinterval((interval_us + 0.5) / 1e6)
    first = _runtime_here()
    memory = _own_memory(first, _SEARCHED_BYTES)
    wanted = _LOCK.pack(interval_us, state, 0)[: 2 * _WORD.size]
    place = memory.find(wanted)
    while place >= 0:
        yield first + place
        place = memory.find(wanted, place + 1)


def _thread_number_at() -> int:
    """Bytes from the start of a thread's state to the kernel's number of it."""
    memory = _own_memory(_own_state(), _THREAD_STATE_BYTES)
    wanted = _WORD.pack(threading.get_native_id())
    place = memory.find(wanted)
    if place < 0 or place % _WORD.size:
        raise LockWatchError("this Python does not keep the numbers of its threads")
    return place


def _own_state() -> int:
    current = ctypes.pythonapi.PyThreadState_Get
    current.restype = ctypes.c_void_p
    state: int = current()
    return state


def _own_memory(first: int, most: int) -> bytes:
    """As much of it as there is: what follows may belong to nobody."""
    with Path("/proc/self/mem").open("rb", buffering=0) as memory:
        while most:
            try:
                memory.seek(first)
                return memory.read(most)
            except OSError:
                most //= 2
    return b""


def _runtime_of(pid: int) -> int:
    """Where the runtime of another process is: as far behind the start of its file as here."""
    here, path = _runtime_here(), ""
    base = 0
    for first, name in _files(os.getpid()):
        if name and first <= here and name != path:
            base, path = first, name
    for first, name in _files(pid):
        if name == path:
            return here - base + first
    raise LockWatchError(f"process {pid} does not run {path}")


def _files(pid: int) -> list[tuple[int, str]]:
    """(first address, file) of what a process has mapped, in order; "" where it is no file."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        name = fields[5] if len(fields) > 5 and fields[5].startswith("/") else ""
        found.append((int(fields[0].partition("-")[0], 16), name))
    return found

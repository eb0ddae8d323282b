"""The lease on an output directory: one run at a time exports into it, and `.owner.json` names that run.

The record is replaced under the registry's lock. Its writer touches it every few seconds, which other
hosts can see; on its own host the process shows whether it lives. A lock held for the whole run would fail:
processes that the owner forked (data loaders) keep it after its death, and some shared file systems lock on one
host only. A run that was taken for dead and wakes up finds another's token in the record, and publishes no more.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from verl_autoexport.errors import RegistryError
from verl_autoexport.system.durable_files import write_json_atomic
from verl_autoexport.system.untrusted import read_json

NAME = ".owner.json"
BEAT_S = 5.0
STALE_S = 60.0
"""An owner on another host is dead if it has not touched its record for so long."""
WAIT_S = 20.0
"""The longest wait of a start for an owner that is ending: the processes of a killed run need a moment."""
_POLL_S = 0.2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """A run's process. Its number is valid within `place`; `born` tells it from a later process of that number."""

    token: str
    host: str
    place: str | None
    pid: int
    born: str | None
    run: str
    since: str

    def __str__(self) -> str:
        return f"{self.run or 'a run'} (process {self.pid} on {self.host}, since {self.since})"

    def alive(self) -> bool | None:
        """Whether the process lives; None if this host cannot know."""
        if self.place is None or self.place != _place():
            return None
        return _born(self.pid) == self.born


class Lease:
    """This process's claim; `release` it when the run has nothing more to export.

    `before`: the owner that ended without a release, most likely killed.
    """

    def __init__(self, root: Path, owner: Owner, before: Owner | None = None) -> None:
        self.root, self.owner, self.before = root, owner, before
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="autoexport-lease", daemon=True).start()

    @property
    def token(self) -> str:
        return self.owner.token

    def release(self) -> None:
        """Gives the lease up; has no effect if another run has taken it since, or the directory is gone."""
        self._ended.set()
        with suppress(OSError):
            if (found := read(self.root)) and found.token == self.token:
                os.unlink(self.root / NAME)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(OSError):  # the directory itself may be broken; only silence counts
                found = read(self.root)
                if found is not None and found.token != self.token:
                    return
                os.utime(self.root / NAME)


def read(root: Path) -> Owner | None:
    """The recorded owner; None if there is no record, or a damaged one."""
    try:
        data = read_json(root / NAME)
        found: dict[str, Any] = {key: data.get(key) for key in Owner.__dataclass_fields__}  # any type, until checked
        owner = Owner(**found)
        texts = (owner.token, owner.host, owner.run, owner.since, owner.place or "", owner.born or "")
        sound = all(isinstance(text, str) for text in texts)
        return owner if sound and isinstance(owner.pid, int) and not isinstance(owner.pid, bool) else None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def check(root: Path, token: str) -> None:
    """Raises RegistryError if another run owns `root` by now; the caller holds the registry's lock."""
    if (owner := read(root)) is not None and owner.token != token:
        raise RegistryError(
            f"{root}: taken over by {owner}, which found this run's process dead or silent; this run exports nothing "
            "more here. End one of the two, or give it an autoexport.output_dir of its own."
        )


def living(root: Path, wait_s: float = WAIT_S, stale_s: float = STALE_S) -> Owner | None:
    """The living owner of `root`, after a wait for it to end; None: no owner, or a dead one."""
    began = time.monotonic()
    first = _last_beat(root)
    while (owner := read(root)) is not None:
        alive = False if owner.pid == os.getpid() and owner.place == _place() else owner.alive()
        if alive is None and _last_beat(root) != first:
            alive = True
        waited = time.monotonic() - began
        if alive is False or (alive is None and waited >= stale_s):
            return None
        if alive and waited >= wait_s:
            return owner
        if waited < _POLL_S:
            limit = wait_s if alive else stale_s
            log.warning("verl_autoexport: %s is owned by %s; waiting up to %g s for it to end", root, owner, limit)
        time.sleep(_POLL_S)
    return None


def may_live(root: Path) -> Owner | None:
    """The owner of `root`, unless it is known to be dead, was silent for long, or is this process."""
    owner = read(root)
    if owner is None or (owner.pid == os.getpid() and owner.place == _place()):
        return None
    alive, beat = owner.alive(), _last_beat(root)
    if alive is None:
        alive = beat is not None and time.time() - beat / 1e9 < STALE_S
    return owner if alive else None


def refuse(root: Path, owner: Owner) -> RegistryError:
    """The error that a second run gets."""
    return RegistryError(
        f"{root}: {owner} exports here, and two runs would mix their versions: give this run an autoexport.output_dir "
        f"of its own, or end that process (`kill -9 {owner.pid}` on {owner.host} if it hangs)."
    )


def take(root: Path, run: str, locked: Callable[[], Any], wait_s: float = WAIT_S, stale_s: float = STALE_S) -> Lease:
    """Makes `run` the owner of `root`; `locked` is the registry's lock. RegistryError names a living owner."""
    if owner := living(root, wait_s, stale_s):
        raise refuse(root, owner)
    before = read(root)
    mine = Owner(
        token=uuid.uuid4().hex, host=socket.gethostname(), place=_place(), pid=os.getpid(), born=_born(os.getpid()),
        run=run, since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip
    with locked():
        now = read(root)
        if now is not None and now != before:  # another start was faster
            raise refuse(root, now)
        write_json_atomic(root / NAME, asdict(mine))
    if before is not None and before.pid != os.getpid():
        log.info("verl_autoexport: %s taken over from %s, which is gone", root, before)
    return Lease(root, mine, before)


def _last_beat(root: Path) -> int | None:
    try:
        return os.stat(root / NAME).st_mtime_ns
    except OSError:
        return None


def _place() -> str | None:
    """The boot and process namespace, within which a process number identifies one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux, so only the record's age decides
        return None


def _born(pid: int) -> str | None:
    """The start of a process in ticks since boot, which no clock changes; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]

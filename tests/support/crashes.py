"""An action that a process dies in, at each change to the disk in turn."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from verl_autoexport.registry.store import Registry

CHANGES = ("write", "fsync", "replace", "rename", "symlink", "unlink", "mkdir", "rmdir")


def dies_at(nth: int, action) -> bool:
    """Runs `action` in a child that exits at its `nth` change to the disk; False if it ended before that."""
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9)
        return code == 9
    left = nth

    def mortal(name: str, call):
        def wrapper(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                if name == "write":  # a torn line: half of it reaches the disk
                    call(args[0], args[1][: len(args[1]) // 2])
                os._exit(9)
            return call(*args, **kwargs)

        return wrapper

    try:
        for name in CHANGES:
            setattr(os, name, mortal(name, getattr(os, name)))
        action()
        os._exit(0)
    finally:
        os._exit(1)


def every_crash(tmp_path: Path, root: Path, action):
    """Yields the registry's copy after a crash at the first, second, … change that `action` makes."""
    for nth in range(1, 200):
        copy = tmp_path / f"crash{nth}"
        shutil.copytree(root, copy, symlinks=True)
        died = dies_at(nth, lambda copy=copy: action(Registry(copy)))
        yield copy
        shutil.rmtree(copy)
        if not died:
            assert nth > 5, "the crashes were never reached"
            return
    raise AssertionError("the child never got through")

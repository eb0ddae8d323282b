"""`python -m verl_autoexport` is `verl-autoexport`."""

import os
import sys

from verl_autoexport.cli import signals


def main() -> int:
    """The entry point of `verl-autoexport`: it handles signals before any other import, and until the very end."""
    signals.install(raises=False)
    if sys.getfilesystemencoding() != "utf-8":  # otherwise libraries fail on names and files that are not ASCII
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    from verl_autoexport.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m verl_autoexport` is `verl-autoexport`."""

import os
import sys

from verl_autoexport.cli import signals


def main() -> int:
    """What `verl-autoexport` runs: signals are handled before anything else is imported, and until the very end."""
    signals.install(raises=False)
    if sys.getfilesystemencoding() != "utf-8":  # libraries fail at names and files that are not ASCII then
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    from verl_autoexport.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(main())

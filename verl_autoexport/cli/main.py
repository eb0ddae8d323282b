"""`verl-autoexport` exports by hand and shows a run's exports. It needs neither verl nor a Ray cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from verl_autoexport import __version__
from verl_autoexport.cli import arguments, exporting, signals, versions
from verl_autoexport.cli.terminal import collected, complain, open_streams, write_out
from verl_autoexport.errors import AutoExportError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; exit code: 0 done, 1 failed (one line on stderr), 2 wrong usage."""
    code = 1
    with signals.Handled(raises=False), collected() as said:
        open_streams()
        try:
            args = _parser().parse_args(argv)
            code = _run(args)
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except KeyboardInterrupt:
            complain(signals.INTERRUPTED)
        except (AutoExportError, OSError) as e:
            complain(signals.INTERRUPTED if signals.came() else _told(e))
    return code if write_out(said()) else 1


def _run(args: argparse.Namespace) -> int:
    if args.run is exporting.export:  # imports for seconds before there is anything to clean up
        return exporting.export(args)
    with signals.Handled(raises=True):
        return args.run(args)


def _told(error: Exception) -> str:
    if isinstance(error, OSError):
        return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(prog="verl-autoexport", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    exporting.add_commands(commands)
    versions.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())

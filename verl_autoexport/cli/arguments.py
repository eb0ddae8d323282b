"""The valid arguments of the command line; anything else is wrong usage, reported in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from verl_autoexport.cli.terminal import complain
from verl_autoexport.config.schema import ExportOptions, parse_size
from verl_autoexport.errors import ConfigError

_LARGEST = 1 << 60  # bytes; more is a slip, since no file system has so many


class Parser(argparse.ArgumentParser):
    """argparse's parser with errors in one line."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message} ({self.prog} --help)")
        raise SystemExit(2)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def export_options() -> dict[str, Field[Any]]:
    """The fields of `ExportOptions` that are options of the command line, by name."""
    return {f.name: f for f in fields(ExportOptions) if f.metadata.get("help")}


def add_export_options(parser: argparse.ArgumentParser) -> None:
    for option in export_options().values():
        add_option(parser, option)


def add_option(parser: argparse.ArgumentParser, option: Field[Any]) -> None:
    """Adds `--like-this`, with the default and the rule of the schema."""
    flag, help_ = f"--{option.name.replace('_', '-')}", option.metadata["help"]
    if option.default is False:
        parser.add_argument(flag, action="store_true", help=help_)
    elif choices := option.metadata.get("one_of"):
        parser.add_argument(flag, default=option.default, choices=choices, help=help_)
    else:
        kind = {"S": size, "B": size, "FILE": path}.get(option.metadata["metavar"], text)
        parser.add_argument(flag, default=option.default, type=kind, metavar=option.metadata["metavar"], help=help_)


def count(value: str) -> int:
    """A whole number from 1 on."""
    number = int(value) if value.isascii() and value.isdigit() and len(value) < 19 else 0
    if number < 1:
        raise _expected("a whole number from 1 on", value)
    return number


def size(value: str) -> int:
    """Bytes, from `5GB`, `512MiB` or a plain number."""
    try:
        number = parse_size(value, "size")
    except (ConfigError, ArithmeticError):  # Decimal has its own overflow error
        number = 0
    if not 0 < number < _LARGEST:
        raise _expected("a size such as 5GB or 512MiB", value)
    return number


def text(value: str) -> str:
    """A non-empty text in one line."""
    if not value.strip() or "\0" in value:
        raise _expected("a text that is not empty", value)
    return value


def path(value: str) -> Path:
    """A local path; whether it exists is checked later."""
    if not value.strip() or "\0" in value:
        raise _expected("a path", value)
    if "://" in value:
        raise _expected("a local path (no URL)", value)
    return Path(value)


def ray_address(value: str) -> str:
    """A Ray address: `auto`, or a host and a port."""
    try:
        url = urlsplit(value if "://" in value else f"//{value}")
        named = bool(url.hostname) and (url.port is not None or url.scheme not in ("", "ray"))
    except ValueError:
        named = False
    if (value not in ("auto", "local") and not named) or "\0" in value:
        raise _expected("HOST:PORT, ray://HOST:PORT or auto", value)
    return value


def _expected(what: str, found: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {what}, found {found!r:.200}")

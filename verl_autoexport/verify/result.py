"""One check of a directory: what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class CheckResult:
    """`status` is `passed`, `failed` or `skipped`; `detail` says what was found, or why it was skipped."""

    status: str
    detail: str

    def to_json(self) -> dict[str, str]:
        """As `export.json` has it under `verification`."""
        return asdict(self)


def passed(detail: str) -> CheckResult:
    return CheckResult("passed", detail)


def failed(error: object) -> CheckResult:
    """`error` is a text, or an exception, which is shown with its type."""
    detail = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    return CheckResult("failed", detail)


def skipped(reason: str) -> CheckResult:
    return CheckResult("skipped", reason)

"""The result of one check of a directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class CheckResult:
    """The result of one check: `status` is `passed`, `failed` or `skipped`; `detail` is the finding or reason."""

    status: str
    detail: str

    def to_json(self) -> dict[str, str]:
        """The result as it is in `export.json` under `verification`."""
        return asdict(self)


def passed(detail: str) -> CheckResult:
    return CheckResult("passed", detail)


def failed(error: object) -> CheckResult:
    """A failed check; `error` is a text, or an exception, which is shown with its type."""
    detail = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    return CheckResult("failed", detail)


def skipped(reason: str) -> CheckResult:
    return CheckResult("skipped", reason)

"""The commands for the versions in an output directory: list, show, request, pin and prune."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from verl_autoexport.cli import arguments
from verl_autoexport.cli.terminal import complain, print_table
from verl_autoexport.errors import RegistryError, shown
from verl_autoexport.milestones.events import is_measured

if TYPE_CHECKING:
    from pathlib import Path

    from verl_autoexport.registry.retention import Keep, RetentionPlan
    from verl_autoexport.registry.store import Registry, Version

_KEEP = ("last", "best", "every_n_steps", "max_bytes")


def _ls(args: argparse.Namespace) -> int:
    registry = _existing(args.root)
    pointers: dict[str, list[str]] = {}
    for pointer, name in registry.pointers().items():
        pointers.setdefault(name, []).append(pointer)
    pending = [m.step for m in registry.milestones() if m.status == "pending"]
    if args.json:
        versions = [_summary(v, pointers) for v in registry.versions()]
        print(json.dumps({"versions": versions, "pending": pending, "not_exported": registry.outcomes()}, indent=2))
        return 0
    rows = [_row(v, pointers) for v in registry.versions()]
    print_table(("VERSION", "STEP", "CREATED", "WHY", "VERIFIED", "POINTERS"), rows)
    owner = registry.owner()
    interrupted = "interrupted; the next start of the run finishes it or reports why it cannot"
    fate = f"being exported by {owner}" if owner else interrupted
    for step in pending:
        print(shown(f"step {step}: asked for, not finished: {fate}"))
    for outcome in registry.outcomes():
        print(shown(f"step {outcome['step']} {outcome['event']}: {outcome.get('reason', '')}"))
    for path, problem in registry.invalid():
        print(shown(f"{path.name}: not a version: {problem}"))
    return 0


def _summary(version: Version, pointers: dict[str, list[str]]) -> dict[str, Any]:
    record = version.record
    return {
        "version": version.name,
        "step": version.step,
        "path": str(version.path),
        "created_at": record.created_at,
        "triggers": list(record.triggers),
        "verification": record.verification,
        "dtype": record.dtype,
        "pointers": pointers.get(version.name, []),
        "superseded": version.superseded,
        "pinned": version.pinned,
    }


def _row(version: Version, pointers: dict[str, list[str]]) -> tuple[str, ...]:
    record = version.record
    why = ", ".join(t.get("name") or t.get("policy", "?") for t in record.triggers)
    values = {m: t["value"] for t in record.triggers if (m := t.get("metric")) and is_measured(t.get("value"))}
    why += "".join(f"; {metric}={value:.4g}" for metric, value in values.items())
    checks = [k for k, v in record.verification.items() if v.get("status") == "passed"]
    marks = [*pointers.get(version.name, ()), *(["pinned"] if version.pinned else [])]
    marks += ["superseded"] if version.superseded else []
    return version.name, str(version.step), record.created_at[:19], why, "+".join(checks), " ".join(marks)


def _show(args: argparse.Namespace) -> int:
    version = _existing(args.root).find(args.version)
    if args.json:
        print(json.dumps(version.record.to_dict(), indent=2))
        return 0
    record = version.record
    print(shown(version.path) + (" (superseded)" if version.superseded else ""))
    source = record.source
    where = "the running workers" if source.get("kind") == "live" else source.get("path")
    lines = {
        "step": record.step,
        "created": record.created_at,
        "model": f"{', '.join(record.architectures)}, {record.num_parameters:,} parameters, {record.dtype}",
        "source": f"{where} ({source.get('backend')}, {source.get('world_size')} ranks)",
        "base model": record.base_model,
        "seconds": ", ".join(f"{k} {v:g}" for k, v in record.timings_s.items()),
    }
    for key, value in lines.items():
        print(shown(f"  {key:<11} {value}"))
    for trigger in record.triggers:
        print(shown(f"  {'why':<11} {trigger.get('policy')}: {trigger.get('reason')}"))
    for name, check in record.verification.items():
        print(shown(f"  {name:<11} {check.get('status')}: {check.get('detail')}"))
    for file in record.files:
        print(shown(f"  {'file':<11} {file.get('name')} ({file.get('bytes', 0):,} bytes)"))
    for note in record.notes:
        print(shown(f"  {'note':<11} {note}"))
    return 0


def _request(args: argparse.Namespace) -> int:
    path = _existing(args.root).request(args.note)
    print(f"asked: {path}; the running job exports its next step that has weights (the next checkpoint)")
    return 0


def _pin(args: argparse.Namespace) -> int:
    registry = _existing(args.root)
    version = registry.find(args.version)
    (registry.pin if args.command == "pin" else registry.unpin)(version)
    print(f"{version.name}: {args.command}ned")
    return 0


def _prune(args: argparse.Namespace) -> int:
    from verl_autoexport.registry.retention import Keep, show_size

    registry = _existing(args.root)
    given = {key: value for key in _KEEP if (value := getattr(args, key)) is not None}
    keep = Keep(**given) if given else registry.noted_policy()
    if keep is None or not keep:
        found = "the run that exports there keeps all" if keep is not None else "no run has recorded any"
        options = ", ".join(f"--{key.replace('_', '-')}" for key in _KEEP)
        raise args.parser.error(f"{args.root}: no autoexport.keep.* to go by ({found}): give one or more of {options}")
    if args.best is not None and not registry.pointers().keys() - {"latest"}:
        raise RegistryError(
            f"{args.root}: no version was chosen by a `best` trigger, so --best has no metric to rank by"
        )
    plan, failed = (registry.plan_retention(keep), []) if args.dry_run else recovered(registry).prune(keep)
    removed, problems = plan.removed, [*plan.warnings, *failed]
    if args.json:
        print(json.dumps(_judgement(args, keep, plan, failed), indent=2))
    else:
        rows = [
            (v.version.name, str(v.version.step), show_size(v.nbytes), "keep" if v.keep else "remove", v.reason)
            for v in plan.verdicts
        ]
        print_table(("VERSION", "STEP", "SIZE", "DECISION", "WHY"), rows)
        what = f"{len(removed)} of {len(rows)} versions, {show_size(sum(v.nbytes for v in removed))}"
        print(shown(f"{'would remove' if args.dry_run else 'removed'} {what} ({keep})"))
    if problems:
        complain("; ".join(problems))
    return 1 if problems and not args.dry_run else 0


def _judgement(args: argparse.Namespace, keep: Keep, plan: RetentionPlan, failed: Sequence[str]) -> dict[str, Any]:
    verdicts = [
        {"version": v.version.name, "step": v.version.step, "bytes": v.nbytes, "keep": v.keep, "reason": v.reason}
        for v in plan.verdicts
    ]
    done = {"keep": keep.to_dict(), "dry_run": args.dry_run, "versions": verdicts}
    return done | {"warnings": list(plan.warnings), "not_deleted": list(failed)}


def recovered(registry: Registry) -> Registry:
    """Repairs a crash before any write, as the next start of the run would, and reports that."""
    for line in registry.recover():
        complain(f"recovered: {line}")
    return registry


def _existing(root: Path) -> Registry:
    from verl_autoexport.export.places import existing_registry

    return existing_registry(root)


def add_commands(commands: Any) -> None:
    add = arguments.add_command
    ls = add(commands, "ls", _ls, "the versions in an output directory, and why other milestones were not exported")
    show = add(commands, "show", _show, "one version: reasons, checks, files; all its metrics with --json")
    request = add(commands, "request", _request, "ask the run that exports to ROOT for a milestone")
    request.add_argument("--note", type=arguments.text, help="why, for the record")
    pin = add(commands, "pin", _pin, "mark a version as one to keep")
    unpin = add(commands, "unpin", _pin, "take that mark back")
    prune = _add_prune(commands)
    for command in (ls, show, request, pin, unpin, prune):
        command.add_argument("root", type=arguments.path, metavar="ROOT", help="the run's autoexport.output_dir")
    help_ = "v0001-step2, 1, step2, latest, best or best-NAME"
    for command in (show, pin, unpin):
        command.add_argument("version", type=arguments.text, metavar="VERSION", help=help_)
    for command in (ls, show, prune):
        command.add_argument("--json", action="store_true", help="print JSON")


def _add_prune(commands: Any) -> argparse.ArgumentParser:
    text = "remove the versions that no rule keeps; never latest, best… or a pinned one"
    prune = arguments.add_command(commands, "prune", _prune, text)
    prune.set_defaults(parser=prune)
    prune.add_argument("--dry-run", action="store_true", help="only say what would happen to each version, and why")
    rules = prune.add_argument_group("rules", "any of them replaces all autoexport.keep.* of the run, the default")
    rules.add_argument("--last", type=arguments.count, metavar="N", help="keep the newest N")
    rules.add_argument("--best", type=arguments.count, metavar="N", help="keep the top N by the metric of each best…")
    help_ = "keep the first version at or after each multiple of N"
    rules.add_argument("--every-n-steps", type=arguments.count, metavar="N", help=help_)
    help_ = "such as 500GB; of what would stay, the least valuable go until the rest fits"
    rules.add_argument("--max-bytes", type=arguments.size, metavar="B", help=help_)
    return prune

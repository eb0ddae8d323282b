"""`verl-autoexport`: export by hand, and look at what a run has exported. Needs neither verl nor a Ray cluster."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from verl_autoexport import __version__
from verl_autoexport.cli import arguments, signals
from verl_autoexport.cli.terminal import Bar, collected, complain, open_streams, print_table, write_out
from verl_autoexport.errors import AutoExportError, RegistryError, SourceError, shown
from verl_autoexport.milestones.events import is_measured

if TYPE_CHECKING:
    from pathlib import Path

    from verl_autoexport.export.pipeline import MergeRunner
    from verl_autoexport.export.spec import ExportSpec
    from verl_autoexport.registry.retention import Judgement, Keep
    from verl_autoexport.registry.store import Registry, Version
    from verl_autoexport.sources.protocol import ShardSource

_KEEP = ("last", "best", "every_n_steps", "max_bytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed (one line on stderr), 2 wrong usage."""
    code = 1
    with signals.Handled(raises=False), collected() as said:
        open_streams()
        try:
            args = _parser().parse_args(argv)
            code = _run(args)
        except SystemExit as e:
            code = e.code
        except KeyboardInterrupt:
            complain(signals.INTERRUPTED)
        except (AutoExportError, OSError) as e:
            complain(signals.INTERRUPTED if signals.came() else _told(e))
    return code if write_out(said()) else 1


def _run(args: argparse.Namespace) -> int:
    if args.run is _export:  # which imports for seconds before there is anything to clean up
        return _export(args)
    with signals.Handled(raises=True):
        return args.run(args)


def _told(error: Exception) -> str:
    if isinstance(error, OSError):
        return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    return str(error)


def _export(args: argparse.Namespace) -> int:
    # Collecting the million objects that imports make, then and again at exit, is a quarter of this process's time.
    gc.disable()
    try:
        return _export_once(args)
    finally:
        gc.freeze()


def _export_once(args: argparse.Namespace) -> int:
    from verl_autoexport.export import by_hand, pipeline, places
    from verl_autoexport.registry.store import Registry

    if args.base_model is not None:
        by_hand.check_base(args.base_model, only_named=args.lora == "adapter")
    if args.lora_config is not None:
        by_hand.check_lora_config(args.lora_config)
    if args.registry is not None:
        places.check_target(args.registry, "--registry", args.base_model)
    runner = _runner(args)
    options = {option: getattr(args, option) for option in arguments.export_options()}
    spec = pipeline.checkpoint_spec(args.checkpoint, source=_spread(args), verify=not args.no_verify, **options)
    with signals.Handled(raises=True), Bar() as bar:
        if args.output is not None:
            pipeline.export_to_directory(spec, args.output, runner, bar)
            print(args.output)
            return 0
        registry = _recovered(Registry.create(args.registry))
        if not args.again and (there := _published(registry, spec)):
            print(f"step {spec.step} is published already as {there.path}; --again exports it once more")
        else:
            print(pipeline.export_to_registry(spec, registry, runner, bar).path)
    return 0


def _published(registry: Registry, spec: ExportSpec) -> Version | None:
    return next((v for v in registry.versions() if v.step == spec.step and not v.superseded), None)


def _runner(args: argparse.Namespace) -> MergeRunner:
    if args.ray_address is None:
        from verl_autoexport.export.pipeline import LocalRunner

        return LocalRunner(args.workers)
    from verl_autoexport.cli.connect import connect
    from verl_autoexport.merge.ray_runner import RayRunner

    connect(args.ray_address, signals.end)
    return RayRunner(args.workers, num_cpus=1, schedule_timeout_s=30)


def _spread(args: argparse.Namespace) -> ShardSource | None:
    """The shards on the disks of the cluster's nodes, where they are not all on this machine's."""
    from verl_autoexport.sources.formats import open_source

    if args.ray_address is None:
        return None
    try:
        open_source(args.checkpoint)
    except SourceError:
        from verl_autoexport.sources.nodes.cluster import Nodes, SpreadFiles

        return SpreadFiles(Nodes(), args.checkpoint.absolute(), "actor")
    return None


def _verify(args: argparse.Namespace) -> int:
    from verl_autoexport.verify.directory import check_directory

    checks = check_directory(args.directory, load=not args.no_load, trust_remote_code=args.trust_remote_code)
    if args.json:
        print(json.dumps({name: check.to_json() for name, check in checks.items()}, indent=2))
    else:
        for name, check in checks.items():
            print(shown(f"{name:<10} {check.status:<8} {check.detail}"))
    if failed := [name for name, check in checks.items() if check.status == "failed"]:
        complain(f"{args.directory}: failed: {', '.join(failed)}")
    return 1 if failed else 0


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
    interrupted = "interrupted; the next start of the run finishes it or says why it cannot"
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
    lines = {
        "step": record.step,
        "created": record.created_at,
        "model": f"{', '.join(record.architectures)}, {record.num_parameters:,} parameters, {record.dtype}",
        "source": f"{source.get('path')} ({source.get('backend')}, {source.get('world_size')} ranks)",
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
    if not keep:
        found = "the run that exports there keeps all" if keep is not None else "no run has recorded any"
        options = ", ".join(f"--{key.replace('_', '-')}" for key in _KEEP)
        args.parser.error(f"{args.root}: no autoexport.keep.* to go by ({found}): give one or more of {options}")
    if args.best is not None and not registry.pointers().keys() - {"latest"}:
        raise RegistryError(
            f"{args.root}: no version was chosen by a `best` trigger, so --best has no metric to rank by"
        )
    judgement, failed = (registry.judge(keep), []) if args.dry_run else _recovered(registry).prune(keep)
    removed, problems = judgement.removed, [*judgement.warnings, *failed]
    if args.json:
        print(json.dumps(_judgement(args, keep, judgement, failed), indent=2))
    else:
        rows = [
            (v.version.name, str(v.version.step), show_size(v.nbytes), "keep" if v.keep else "remove", v.reason)
            for v in judgement.verdicts
        ]
        print_table(("VERSION", "STEP", "SIZE", "DECISION", "WHY"), rows)
        what = f"{len(removed)} of {len(rows)} versions, {show_size(sum(v.nbytes for v in removed))}"
        print(shown(f"{'would remove' if args.dry_run else 'removed'} {what} ({keep})"))
    if problems:
        complain("; ".join(problems))
    return 1 if problems and not args.dry_run else 0


def _judgement(args: argparse.Namespace, keep: Keep, judgement: Judgement, failed: Sequence[str]) -> dict[str, Any]:
    verdicts = [
        {"version": v.version.name, "step": v.version.step, "bytes": v.nbytes, "keep": v.keep, "reason": v.reason}
        for v in judgement.verdicts
    ]
    done = {"keep": keep.to_dict(), "dry_run": args.dry_run, "versions": verdicts}
    return done | {"warnings": list(judgement.warnings), "not_deleted": list(failed)}


def _recovered(registry: Registry) -> Registry:
    """Whatever writes goes on from a crash first, as the next start of the run would, and says so."""
    for line in registry.recover():
        complain(f"recovered: {line}")
    return registry


def _existing(root: Path) -> Registry:
    from verl_autoexport.export.places import existing_registry

    return existing_registry(root)


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(prog="verl-autoexport", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_export(commands)
    verify = _add(commands, "verify", _verify, "check a published or exported directory: hashes, names, loading")
    verify.add_argument("directory", type=arguments.path, metavar="DIR")
    verify.add_argument("--no-load", action="store_true", help="names and hashes only; do not load the model")
    arguments.add_option(verify, arguments.export_options()["trust_remote_code"])
    ls = _add(commands, "ls", _ls, "the versions in an output directory, and what was not exported and why")
    show = _add(commands, "show", _show, "one version: reasons, checks, files; all its metrics with --json")
    request = _add(commands, "request", _request, "ask the run that exports to ROOT for a milestone")
    request.add_argument("--note", type=arguments.text, help="why, for the record")
    pin = _add(commands, "pin", _pin, "mark a version as one to keep")
    unpin = _add(commands, "unpin", _pin, "take that mark back")
    prune = _add_prune(commands)
    for command in (ls, show, request, pin, unpin, prune):
        command.add_argument("root", type=arguments.path, metavar="ROOT", help="the run's autoexport.output_dir")
    help_ = "v0001-step2, 1, step2, latest, best or best-NAME"
    for command in (show, pin, unpin):
        command.add_argument("version", type=arguments.text, metavar="VERSION", help=help_)
    for command in (verify, ls, show, prune):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_export(commands: Any) -> None:
    export = _add(commands, "export", _export, "export one verl FSDP checkpoint")
    help_ = "a global_step_N, its actor/, policy/ or critic/"
    export.add_argument("checkpoint", type=arguments.path, metavar="CHECKPOINT", help=help_)
    where = export.add_mutually_exclusive_group(required=True)
    help_ = "a new directory; must not exist, or be empty"
    where.add_argument("--output", type=arguments.path, metavar="DIR", help=help_)
    where.add_argument("--registry", type=arguments.path, metavar="ROOT", help="publish as the next version in ROOT")
    arguments.add_export_options(export)
    help_ = "files merged at a time (default: by cores, at most 4; 4 in a cluster)"
    export.add_argument("--workers", type=arguments.count, metavar="N", help=help_)
    export.add_argument("--no-verify", action="store_true", help="skip loading and generating; structure is checked")
    export.add_argument("--again", action="store_true", help="export a step that ROOT has already")
    help_ = "merge in the Ray cluster at A; no Ray without this"
    export.add_argument("--ray-address", type=arguments.ray_address, metavar="A", help=help_)


def _add_prune(commands: Any) -> argparse.ArgumentParser:
    text = "remove the versions that no rule keeps; never latest, best… or a pinned one"
    prune = _add(commands, "prune", _prune, text)
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


def _add(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


if __name__ == "__main__":
    sys.exit(main())

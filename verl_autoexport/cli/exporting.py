"""The commands that make and check exports."""

from __future__ import annotations

import argparse
import gc
import json
from typing import TYPE_CHECKING, Any

from verl_autoexport.cli import arguments, signals, versions
from verl_autoexport.cli.terminal import Bar, complain
from verl_autoexport.errors import SourceError, shown

if TYPE_CHECKING:
    from verl_autoexport.export.spec import ExportSpec
    from verl_autoexport.merge.protocol import MergeRunner
    from verl_autoexport.registry.store import Registry, Version
    from verl_autoexport.sources.protocol import ShardSource


def export(args: argparse.Namespace) -> int:
    # Garbage collection of the million objects from imports, now and again at exit, takes a quarter of the run time.
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
        assert args.registry is not None, "argparse requires one of the two"
        registry = versions.recovered(Registry.create(args.registry))
        if not args.again and (there := _published(registry, spec)):
            print(f"step {spec.step} is published already as {there.path}; --again exports it once more")
        else:
            print(pipeline.export_to_registry(spec, registry, runner, bar).path)
    return 0


def _published(registry: Registry, spec: ExportSpec) -> Version | None:
    return next((v for v in registry.versions() if v.step == spec.step and not v.superseded), None)


def _runner(args: argparse.Namespace) -> MergeRunner:
    if args.ray_address is None:
        from verl_autoexport.merge.local_runner import LocalRunner

        return LocalRunner(args.workers)
    from verl_autoexport.cli.connect import connect
    from verl_autoexport.merge.ray_runner import RayRunner

    connect(args.ray_address, signals.end)
    return RayRunner(args.workers, num_cpus=1, schedule_timeout_s=30)


def _spread(args: argparse.Namespace) -> ShardSource | None:
    """The shards on the disks of the cluster's nodes, if some are not on this machine."""
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


def add_commands(commands: Any) -> None:
    _add_export(commands)
    verify = arguments.add_command(
        commands, "verify", _verify, "check a published or exported directory: hashes, names, loading"
    )
    verify.add_argument("directory", type=arguments.path, metavar="DIR")
    verify.add_argument("--no-load", action="store_true", help="names and hashes only; do not load the model")
    arguments.add_option(verify, arguments.export_options()["trust_remote_code"])
    verify.add_argument("--json", action="store_true", help="print JSON")


def _add_export(commands: Any) -> None:
    command = arguments.add_command(commands, "export", export, "export one verl checkpoint")
    help_ = "a global_step_N, its actor/, policy/ or critic/, with FSDP shards or Hugging Face weights"
    command.add_argument("checkpoint", type=arguments.path, metavar="CHECKPOINT", help=help_)
    where = command.add_mutually_exclusive_group(required=True)
    help_ = "a new directory; must not exist, or be empty"
    where.add_argument("--output", type=arguments.path, metavar="DIR", help=help_)
    where.add_argument("--registry", type=arguments.path, metavar="ROOT", help="publish as the next version in ROOT")
    arguments.add_export_options(command)
    help_ = "files merged at a time (default: by cores, at most 4; 4 in a cluster)"
    command.add_argument("--workers", type=arguments.count, metavar="N", help=help_)
    command.add_argument("--no-verify", action="store_true", help="skip loading and generating; structure is checked")
    command.add_argument("--again", action="store_true", help="export a step that ROOT has already")
    help_ = "merge in the Ray cluster at A; no Ray without this"
    command.add_argument("--ray-address", type=arguments.ray_address, metavar="A", help=help_)

"""What the package relies on in verl 0.9.1, torch, transformers and Hydra, checked on what is installed.

A failure here means that an upgrade broke an assumption, and says which. verl is read as source
where its order of statements matters, and imported where a signature or a behaviour does.
"""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.pieces import put_together
from tests.support.repository import PACKAGE
from verl_autoexport.model.transformers_api import TESTED, untested

FLAT = {"_fqns", "_shapes", "_shard_param_infos", "_sharded_size"}
"""Names of FSDP1's flat parameters that the live source reads."""
VERL = Path(str(metadata.distribution("verl").locate_file("verl")))
TRAINER = "trainer/ppo/v1/trainer_base.py"
MAIN = "trainer/main_ppo.py"


def tree(path: str) -> ast.Module:
    file = VERL / path
    assert file.is_file(), f"verl/{path} is gone; find where its code went"
    return ast.parse(file.read_text(encoding="utf-8"))


def function(path: str, name: str) -> ast.FunctionDef:
    """`Class.method` or `function` of a verl source file."""
    node: Any = tree(path)
    for part in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        assert node is not None, f"verl/{path}: no {name} any more"
    return node


def calls(node: ast.AST, name: str) -> list[ast.Call]:
    """The calls of `name`, such as `self.logger.log`, in order of their lines."""
    found = [n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) == name]
    return sorted(found, key=lambda n: n.lineno)


def line(node: ast.AST, name: str) -> int:
    """Line of the only call of `name` in `node`."""
    found = calls(node, name)
    assert len(found) == 1, f"{getattr(node, 'name', 'here')}: expected one call of {name}, found {len(found)}"
    return found[0].lineno


def keywords(call: ast.Call) -> dict[str, str]:
    return {str(k.arg): ast.unparse(k.value) for k in call.keywords}


def assigned(node: ast.AST, target: str) -> list[ast.Assign]:
    found = [n for n in ast.walk(node) if isinstance(n, ast.Assign) and target in map(ast.unparse, n.targets)]
    return sorted(found, key=lambda n: n.lineno)


def parameters(callable_: Any) -> list[str]:
    """`name`, `name=default`, `**name`, without annotations."""
    found = inspect.signature(callable_).parameters.values()
    return [str(p.replace(annotation=inspect.Parameter.empty)) for p in found]


# -- verl: the wheel -----------------------------------------------------------------------


def test_verl_is_the_version_that_these_facts_are_about() -> None:
    assert metadata.version("verl") == "0.9.1", "go through this file for the new version, then change pyproject.toml"


def test_installed_verl_is_unmodified() -> None:
    """Nothing here, the example included, patches verl's files: every one is as the wheel brought it."""
    record = metadata.distribution("verl").read_text("RECORD")
    assert record, "verl's RECORD is missing"
    rows = [row for row in csv.reader(record.splitlines()) if row[0].startswith("verl/") and row[0].endswith(".py")]
    assert len(rows) > 100
    changed = [name for name, expected, _ in rows if _record_hash(VERL.parent / name) != expected]
    assert not changed, f"differ from the wheel: {changed}"


def _record_hash(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


# -- verl: the checkpoint callback ---------------------------------------------------------


def test_callback_is_built_from_its_name_with_the_whole_config() -> None:
    from omegaconf import OmegaConf
    from verl.trainer.ppo.checkpoint_callback import CheckpointCallback, build_checkpoint_callback

    found = parameters(CheckpointCallback.on_save)
    wanted = ["self", "trainer", "global_step", "checkpoint_dir", "async_save=False", "**kwargs"]
    assert found == wanted, f"CheckpointCallback.on_save takes {found}"
    found = parameters(CheckpointCallback.__init__)
    assert found == ["self", "config=None"], f"CheckpointCallback takes {found}"

    fqn = f"{CheckpointCallback.__module__}.CheckpointCallback"
    config = OmegaConf.create({"trainer": {"checkpoint_callback_class": fqn}, "other": 1})
    built = build_checkpoint_callback(config)
    assert type(built) is CheckpointCallback, f"trainer.checkpoint_callback_class={fqn} gives {type(built)}"
    assert built.config is config, "the callback no longer gets the whole config"


def test_our_name_leads_verl_to_our_class() -> None:
    """`verl_autoexport.AutoExportCallback` is resolved lazily by the package; verl's loader must go through that."""
    from verl.utils.import_utils import load_class_from_fqn

    from verl_autoexport.trainers.verl_callback import AutoExportCallback

    name = "verl_autoexport.AutoExportCallback"
    found = load_class_from_fqn(name, "CheckpointCallback")
    assert found is AutoExportCallback, f"verl finds {found} under the name {name}"


@pytest.mark.parametrize(("given", "taken"), [(None, None), ("csv", "csv"), (["csv", "json"], "csv,json")])
def test_external_lib_is_what_verl_takes(given: Any, taken: str | None) -> None:
    from omegaconf import OmegaConf
    from verl.utils.import_utils import import_external_libs

    from verl_autoexport.trainers.verl_facts import modules

    import_external_libs(given)  # raises for what verl does not take
    assert modules(OmegaConf.create({"external_lib": given}).external_lib) == taken


def test_callback_is_built_first_in_the_trainer() -> None:
    first = [ast.unparse(statement) for statement in function(TRAINER, "PPOTrainer.__init__").body[:2]]
    expected = ["self.config = config", "self.checkpoint_callback = build_checkpoint_callback(config)"]
    assert first == expected, f"the callback is not built first, so a bad config is refused late: {first}"


def test_checkpoints_lie_where_they_are_looked_for() -> None:
    save = function(TRAINER, "PPOTrainer._save_checkpoint")
    (folder,) = assigned(save, "local_global_step_folder")
    expected = "os.path.join(self.config.trainer.default_local_dir, f'global_step_{self.global_steps}')"
    assert ast.unparse(folder.value) == expected, "holds lie in default_local_dir, beside global_step_N"
    for target, role in (("actor_local_path", "'actor'"), ("critic_local_path", "str(Role.Critic)")):
        (path,) = assigned(save, target)
        found = ast.unparse(path.value)
        assert found == f"os.path.join(local_global_step_folder, {role})", f"{target} is now {found}"
    from verl.trainer.ppo.utils import Role

    assert str(Role.Critic) == "critic", f"the critic's folder is now {Role.Critic}"


# -- verl: the order of a step -------------------------------------------------------------


def _loop(fit: ast.FunctionDef) -> ast.While:
    (loop,) = (n for n in fit.body if isinstance(n, ast.While))
    return loop


def test_a_step_trains_saves_validates_and_then_logs() -> None:
    loop = _loop(function(TRAINER, "PPOTrainer.fit"))
    (counted,) = (
        n for n in ast.walk(loop) if isinstance(n, ast.AugAssign) and ast.unparse(n.target) == "self.global_steps"
    )
    order = {
        name: line(loop, name) for name in ("self.step", "self._save_checkpoint", "self._validate", "self.logger.log")
    }
    lines = [*order.values(), counted.lineno]
    assert lines == sorted(lines), f"order of a step changed, metrics no longer belong to the saved weights: {order}"
    (log,) = calls(loop, "self.logger.log")
    assert keywords(log) == {"data": "metrics", "step": "self.global_steps"}, "log is called differently"
    assert ast.unparse(loop.test).endswith("self.global_steps <= self.total_training_steps")
    assert "current_epoch < self.config.trainer.total_epochs" in ast.unparse(loop.test), "the last step is another now"


def test_last_step_leaves_fit_without_on_train_end() -> None:
    """So the end of training is the return of `fit`, not `on_train_end`."""
    fit = function(TRAINER, "PPOTrainer.fit")
    (last,) = (
        n for n in ast.walk(_loop(fit)) if isinstance(n, ast.If) and ast.unparse(n.test) == "is_last_step"
        and isinstance(n.body[-1], ast.Return)
    )  # fmt: skip
    assert not calls(last, "self.on_train_end"), "the last step now calls on_train_end"
    assert line(fit, "self.on_train_end") > _loop(fit).end_lineno


def test_first_validation_is_logged_under_the_step_resumed_at() -> None:
    fit = function(TRAINER, "PPOTrainer.fit")
    first = calls(fit, "self.logger.log")[0]
    found = keywords(first)
    assert found == {"data": "val_metrics", "step": "self.global_steps"}, f"val_before_train logs {found}"
    started = next(
        n for n in ast.walk(fit) if isinstance(n, ast.AugAssign) and ast.unparse(n.target) == "self.global_steps"
    )
    assert calls(fit, "Tracking")[0].lineno < first.lineno < started.lineno < _loop(fit).lineno


def test_steps_are_known_before_fit() -> None:
    loads = function(TRAINER, "PPOTrainer._load_checkpoint")
    assert ast.unparse(loads.body[0]) == "self.global_steps = 0", "global_steps is not set by _load_checkpoint"
    setup = function(TRAINER, "PPOTrainer._setup")
    assert line(setup, "self._init_dataloader") < line(setup, "self._load_checkpoint")
    assert calls(function(TRAINER, "PPOTrainer.init"), "self._setup")
    data = function(TRAINER, "PPOTrainer._init_dataloader")
    for attribute in ("self.total_training_steps", "self.steps_per_epoch"):
        assert assigned(data, attribute), f"{attribute} is not assigned before fit"


def test_trainers_inherit_what_is_wrapped() -> None:
    """A constructor of a subclass's own must call the one that is wrapped."""
    for path in sorted((VERL / "trainer/ppo/v1").glob("trainer_*.py")):
        for cls in (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)):
            for init in (n for n in cls.body if getattr(n, "name", None) == "__init__" and cls.name != "PPOTrainer"):
                assert calls(init, "super().__init__"), f"{cls.name}.__init__ goes round PPOTrainer's"


# -- verl: files and keys ------------------------------------------------------------------


def test_fsdp_checkpoints_have_the_files_that_are_read() -> None:
    from verl.utils.checkpoint import fsdp_checkpoint_manager as manager

    save = inspect.getsource(manager.FSDPCheckpointManager.save_checkpoint)
    for name in (
        'f"model_world_size_{self.world_size}_rank_{self.rank}.pt"', '"fsdp_config.json"', '"huggingface"',
        "torch.save(model_state_dict, model_path)", "model_config.save_pretrained(hf_config_tokenizer_path)",
    ):  # fmt: skip
        assert name in save, f"FSDPCheckpointManager.save_checkpoint no longer has {name}"
    assert list(manager.FSDPConfig.__dataclass_fields__) == ["FSDP_version", "world_size"]


def test_lora_checkpoints_have_what_is_read_of_them() -> None:
    from verl.utils.checkpoint import fsdp_checkpoint_manager as manager

    found = {}
    for name in ("_get_lora_train_meta", "_save_lora_train_meta", "save_checkpoint"):
        found[name] = inspect.getsource(getattr(manager.FSDPCheckpointManager, name))
    assert '{"r": lora_rank, "lora_alpha": lora_alpha, "task_type": str(task_type)}' in found["_get_lora_train_meta"]
    assert '"lora_train_meta.json"' in found["_save_lora_train_meta"]
    assert 'if "lora_" in k or ".adapter_" in k' in found["save_checkpoint"], "what save_lora_only keeps"


def test_the_way_to_the_module_in_a_worker() -> None:
    """What the live source follows; sources/live/coordinator.py."""
    for file, line in (
        ("workers/engine_workers.py", "self.actor = self.actor_worker_cls("),
        ("workers/engine_workers.py", "self.engine"),
        ("workers/engine/fsdp/transformer_impl.py", "self.module = module"),
        ("workers/engine/fsdp/transformer_impl.py", "self.checkpoint_manager = FSDPCheckpointManager("),
        ("utils/checkpoint/checkpoint_manager.py", "self.processing_class = processing_class"),
        ("single_controller/ray/base.py", "self.worker_dict[key] = user_defined_cls("),
        ("trainer/ppo/v1/trainer_base.py", "self.actor_rollout_wg = all_wg[str(actor_role)]"),
        ("trainer/ppo/v1/trainer_base.py", "self.critic_wg = all_wg[str(Role.Critic)]"),
    ):
        assert line in (VERL / file).read_text(encoding="utf-8"), f"verl/{file} no longer has {line!r}"


def test_what_ray_gives_to_every_actor() -> None:
    """How functions get into verl's workers, and a dead one is told from a busy one: sources/live/."""
    import ray.actor
    from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

    source = inspect.getsource(ray.actor)
    for name in ("__ray_call__", "__ray_ready__"):
        assert f"def {name}(" in source, f"actors have no {name} any more"
    assert issubclass(ActorUnavailableError, RayActorError)
    assert not issubclass(ActorDiedError, ActorUnavailableError), "a restart can no longer be told from an end"


def test_what_fsdp1_tells_of_its_flattened_parameters() -> None:
    """sources/live/copier.py slices them by it."""
    from torch.distributed.fsdp._flat_param import FlatParameter, _ShardParamInfo

    names = ("in_shard", "offset_in_shard", "numel_in_shard", "intra_param_start_idx", "intra_param_end_idx")
    assert _ShardParamInfo._fields == names, "torch describes the parts of a flattened parameter in another way"
    told = FlatParameter.__annotations__
    assert told.keys() >= FLAT, f"FlatParameter has {list(told)}"


def test_lora_is_added_by_rank_and_in_the_base_dtype() -> None:
    source = (VERL / "workers/engine/fsdp/transformer_impl.py").read_text()
    assert "self._is_lora = self.model_config.lora_rank > 0" in source, "lora_adapter_path alone adds none"
    assert '"bias": "none",' in source
    assert "param.data = param.data.to(base_dtype)" in source, "lora_B tells the dtype that training loaded the base in"


ROLES = ("actor_rollout_ref.actor", "critic")
KEYS = {
    "trainer.use_v1": True, "trainer.checkpoint_callback_class": None, "trainer.val_only": False,
    "trainer.total_training_steps": None, "trainer.total_epochs": 30, "trainer.save_freq": -1, "trainer.test_freq": -1,
    "trainer.default_local_dir": "checkpoints/${trainer.project_name}/${trainer.experiment_name}",
    "trainer.project_name": "verl_examples", "trainer.experiment_name": "gsm8k",
    "algorithm.adv_estimator": "gae", "critic.enable": None, "trainer.v1.trainer_mode": "sync",
    **{f"{role}.strategy": "fsdp" for role in ROLES},
    **{f"{role}.checkpoint.save_contents": ["model", "optimizer", "extra"] for role in ROLES},
    **{
        f"{model}.{key}": value
        for model in ("actor_rollout_ref.model", "critic.model")
        for key, value in {
            "lora_rank": 0, "lora_adapter_path": None, "trust_remote_code": False, "external_lib": None,
            "path": "~/models/deepseek-llm-7b-chat",
        }.items()
    },
}  # fmt: skip
"""Keys of verl's PPO configuration that are judged or passed on, with verl's defaults."""


def _select(config: Any, key: str, missing: Any = None) -> Any:
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return missing
        config = config[part]
    return config


def test_keys_that_are_judged_exist_with_these_defaults() -> None:
    config = yaml.safe_load((VERL / "trainer/config/_generated_ppo_trainer.yaml").read_text())
    for key, default in KEYS.items():
        found = _select(config, key, missing="no such key")
        assert found == default, f"{key}: expected {default!r} in verl's configuration, found {found!r}"


def test_every_key_that_preflight_names_is_checked_here() -> None:
    source = (PACKAGE / "config/run_rules.py").read_text(encoding="utf-8")
    named = set(re.findall(r'(?:run\.get\(|_get\(cfg, |_get\(self\.cfg, )"([a-z_0-9.]+\.[a-z_0-9.]+)"', source))
    assert len(named) > 5
    assert named <= KEYS.keys(), f"add {sorted(named - KEYS.keys())} to KEYS"


@pytest.mark.parametrize(
    ("key", "folder"), [("async_training", "fully_async_policy"), ("rollout.nnodes", "one_step_off_policy")]
)
def test_keys_that_give_away_other_trainers(key: str, folder: str) -> None:
    """Their configurations have the key, that of main_ppo has not."""
    ppo = yaml.safe_load((VERL / "trainer/config/_generated_ppo_trainer.yaml").read_text())
    assert _select(ppo, key) is None, f"main_ppo has {key} now, and would be taken for another trainer"
    files = sorted((VERL / "experimental" / folder / "config").glob("*.yaml"))
    assert files, f"verl/experimental/{folder}/config is gone"
    for file in files:
        assert _select(yaml.safe_load(file.read_text()), key) is not None, f"{file}: no {key}"


# -- torch ---------------------------------------------------------------------------------


def test_loading_onto_meta_records_where_the_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "shard.pt"
    base = torch.arange(1000, dtype=torch.float32)
    tensors = {"a": base, "view": base[100:200], "b": torch.arange(7, dtype=torch.bfloat16), "i": torch.arange(5)}
    torch.save(tensors, path)
    raw = path.read_bytes()
    found = torch.load(path, weights_only=True, map_location="meta")
    for name, tensor in tensors.items():
        begin = getattr(found[name].untyped_storage(), "_checkpoint_offset", None)
        assert begin is not None, "torch.load(map_location='meta') no longer notes _checkpoint_offset"
        begin += found[name].storage_offset() * tensor.element_size()
        expected = tensor.view(torch.uint8).numpy().tobytes()
        assert raw[begin : begin + len(expected)] == expected, f"{name}: _checkpoint_offset is not where its bytes are"


# -- transformers --------------------------------------------------------------------------


def test_every_transformers_that_verl_allows_is_tested() -> None:
    from packaging.requirements import Requirement

    required = [Requirement(text) for text in metadata.requires("verl") or ()]
    (theirs,) = (r.specifier for r in required if r.name == "transformers" and r.specifier and not r.marker)
    allowed = {(i, j) for i in (4, 5) for j in range(70) if any(theirs.filter(f"{i}.{j}.{k}" for k in range(10)))}
    missing = sorted(v for v in allowed if not any(first <= v <= last for first, last in TESTED))
    assert not missing, f"verl asks for transformers{theirs}: {missing} are not TESTED in model/transformers_api.py"
    (oldest,) = (s.version for s in theirs if s.operator == ">=")
    makefile = (PACKAGE.parent / "Makefile").read_text(encoding="utf-8")
    assert oldest in makefile, f"the Makefile does not test transformers {oldest}, the oldest that verl allows"


def test_what_is_said_to_be_tested_is_what_warns_not() -> None:
    ranges = [f"{first[0]}.{first[1]} to {last[0]}.{last[1]}" for first, last in TESTED]
    for name in ("README.md", "docs/failures.md"):
        text = (PACKAGE.parent / name).read_text(encoding="utf-8")
        assert all(said in text for said in ranges), f"{name} does not say that transformers {ranges} are tested"
    assert untested() == []


PRIVATE = {  # name → where it must be, and the module here that uses it
    "_auto_class": ("transformers:PreTrainedModel", "model/custom_code.py"),
    "_exit": ("os", "signals.py"),  # documented, in spite of its name
    "_getframe": ("sys", "trainers/watching.py"),
    "_from_config": ("transformers:PreTrainedModel", "model/transformers_api.py"),
    "_get_dtype_plan": ("transformers:PreTrainedModel", "model/transformers_api.py"),
    "_keep_in_fp32_modules": ("transformers:PreTrainedModel", "model/transformers_api.py"),
    "_keys_to_ignore_on_save": ("transformers:PreTrainedModel", "model/transformers_skeleton.py"),
    "_keys_to_ignore_on_load_unexpected": ("transformers:PreTrainedModel", "model/transformers_skeleton.py"),
    "_keys_to_ignore_on_load_missing": ("transformers:PreTrainedModel", "model/transformers_skeleton.py"),
    "_model_mapping": ("transformers:AutoModelForTokenClassification", "model/value_head.py"),
    "_local_tensor": ("torch.distributed.tensor:DTensor", "sources/fsdp/second_reading.py"),
    "_cdata": ("torch:UntypedStorage", "model/trace.py"),
    "_schema": ("torch:ops.aten.clone.default", "model/trace.py"),
    "_non_persistent_buffers_set": ("torch.nn:Identity", "sources/live/copier.py"),
    "_parameters": ("torch.nn:Identity", "sources/live/copier.py"),
}
"""Private names of torch and transformers that the package uses, but for those of FSDP1's flat parameters."""
OLD = {
    "_checkpoint_conversion_mapping",
    "_fix_state_dict_key_on_load",
    "_fix_state_dict_keys_on_save",
    "_get_tied_weight_keys",
}
"""Private names of transformers 4.51 to 4.57 that model/transformers_api.py uses there alone."""
IMPORTED = {
    "transformers.conversion_mapping": {"get_model_conversion_mapping"},
    "transformers.core_model_loading": {
        "WeightConverter",
        "WeightRenaming",
        "build_glob_alternation",
        "rename_source_key",
        "revert_weight_conversion",
    },
    "transformers.dynamic_module_utils": {"get_class_from_dynamic_module"},
    "transformers.processing_utils": {"ProcessorMixin"},
    "torch.utils._python_dispatch": {"TorchDispatchMode"},
    "torch.utils._pytree": {"tree_leaves"},
}
"""Modules that they do not document, and what is imported from them."""


@pytest.mark.parametrize("name", PRIVATE)
def test_private_names_are_where_they_are_looked_for(name: str) -> None:
    place, user = PRIVATE[name]
    owner = pkgutil.resolve_name(place)
    owner = owner() if name in ("_non_persistent_buffers_set", "_parameters") else owner  # set by the constructor
    assert hasattr(owner, name), f"{place}.{name} is gone; {user} needs it"


def test_every_private_name_that_is_used_is_pinned_here() -> None:
    used, defined, imported = set(), set(), {}
    for node in (n for f in sorted(PACKAGE.rglob("*.py")) for n in ast.walk(ast.parse(f.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            used.add(node.attr)
            defined |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
        elif isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            defined.add(ast.unparse(node.target))
        elif isinstance(node, ast.ImportFrom) and re.match(r"transformers\.|torch\.(.*\.)?_", node.module or ""):
            imported.setdefault(node.module, set()).update(alias.name for alias in node.names)
    assert used - defined == PRIVATE.keys() | FLAT | OLD, "keep PRIVATE as the package is"
    assert imported == IMPORTED, "keep IMPORTED as the package is"


@pytest.mark.parametrize("module", IMPORTED)
def test_undocumented_modules_have_what_is_imported(module: str) -> None:
    try:
        gone = {name for name in IMPORTED[module] if not hasattr(importlib.import_module(module), name)}
    except ImportError as e:
        pytest.fail(f"{module} cannot be imported: {e}; model/transformers_api.py needs it")
    assert not gone, f"{module}: {sorted(gone)} gone; model/transformers_api.py imports it"


def _skeleton(**changes: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "vocab_size": 50}
    config = Qwen3MoeConfig(**sizes, **heads, **changes)
    with torch.device("meta"):
        return Qwen3MoeForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.bfloat16)


def test_skeletons_are_built_without_memory_in_the_dtype_asked_for() -> None:
    state = _skeleton().state_dict()
    assert {t.device.type for t in state.values()} == {"meta"}, "_from_config under torch.device('meta') allocates"
    found = {t.dtype for t in state.values() if t.is_floating_point()}
    assert found == {torch.bfloat16}, f"_from_config(dtype=torch.bfloat16) builds {found}"


def test_skeletons_set_the_dtype_of_nested_configs() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text, vision = {"model_type": "llama", **sizes}, {"model_type": "clip_vision_model", **sizes}
    config = LlavaConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        config = LlavaForConditionalGeneration._from_config(config, dtype=torch.float16).config
    found = {name: getattr(config, name).to_dict()["dtype"] for name in ("text_config", "vision_config")}
    assert set(found.values()) == {"float16"}, f"_from_config leaves {found}; export/assets.py writes them so"


def test_auto_classes_map_configs_to_classes() -> None:
    from transformers import AutoModelForTokenClassification, Qwen2Config, Qwen2ForTokenClassification

    found = AutoModelForTokenClassification._model_mapping.get(Qwen2Config, None)
    classes = found if isinstance(found, tuple) else (found,)
    assert classes == (Qwen2ForTokenClassification,), f"_model_mapping gives {found}; value_head.py expects a class"


def test_conversion_to_disk_names_takes_a_model_and_tensors() -> None:
    from transformers.core_model_loading import revert_weight_conversion

    found = list(inspect.signature(revert_weight_conversion).parameters)
    assert found == ["model", "state_dict"], f"revert_weight_conversion takes {found}; transformers_api.py gives it two"
    model = _skeleton()
    state = model.state_dict()
    made = revert_weight_conversion(model, dict(state))
    assert isinstance(made, dict), f"revert_weight_conversion returns {type(made)}; transformers_api.py expects a dict"
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in made, "packed experts are not unpacked"
    kept = {id(t) for t in made.values()}
    assert id(state["model.norm.weight"]) in kept, "a tensor that is only renamed is no longer passed through as it is"
    some = {k: v for k, v in state.items() if "layers.1." in k}
    names = {k for k in made if "layers.1." in k}
    assert revert_weight_conversion(model, some).keys() == names, "a part of a model gets other names than the whole"


MERGED = (["experts.*.gate.weight", "experts.*.up.weight"], "experts.gate_up")
OPERATIONS = {  # on loading → patterns in files, patterns in memory, operations, shapes in memory
    "MergeModulelist": ("experts.*.down.weight", "experts.down", [("MergeModulelist", {"dim": 0})], [(3, 4, 5)]),
    "Concatenate": (*MERGED, [("MergeModulelist", {"dim": 0}), ("Concatenate", {"dim": 1})], [(3, 8, 5)]),
    "Chunk": ("qkv.weight", ["q.weight", "k.weight", "v.weight"], [("Chunk", {"dim": 0})], [(4, 5)] * 3),
    "Transpose": ("x.weight", "y.weight", [("Transpose", {"dim0": 0, "dim1": 1})], [(4, 5)]),
    "Conv3dToLinear": (
        "conv.weight", "flat.weight", [("Conv3dToLinear", {"in_channels": 3, "kernel_size": (2, 4, 4)})], [(5, 96)],
    ),
    "ErnieFuseAndSplitTextVisionExperts": (
        MERGED[0], ["text.gate_up", "vision.gate_up"],
        [("ErnieFuseAndSplitTextVisionExperts", {"stack_dim": 0, "concat_dim": 1})], [(2, 8, 5)] * 2,
    ),
}  # fmt: skip
"""The operations of transformers' conversions, each with an example."""


def test_every_conversion_of_transformers_is_known() -> None:
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

    transforms = [t for found in _build_checkpoint_conversion_mapping().values() for t in found]
    used = {type(op).__name__ for t in transforms for op in getattr(t, "operations", ())}
    assert len(used) > 3
    new = sorted(used - OPERATIONS.keys())
    assert not new, f"transformers converts with {new} now: see if model/trace.py follows, add examples to OPERATIONS"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_conversions_are_followed_on_meta_tensors(operation: str) -> None:
    """What `trace` says that the results are made of is what transformers makes of real values."""
    from transformers import core_model_loading as loading

    from verl_autoexport.model.trace import trace
    from verl_autoexport.model.transformers_api import to_disk

    on_disk, in_memory, operations, shapes = OPERATIONS[operation]
    if not all(hasattr(loading, name) for name, _ in operations):
        pytest.skip(f"{operation} came with a later transformers")
    model = _skeleton()
    converters = [getattr(loading, name)(**arguments) for name, arguments in operations]
    model._weight_conversions = [loading.WeightConverter(on_disk, in_memory, operations=converters)]
    names = [f"model.{name}" for name in ([in_memory] if isinstance(in_memory, str) else in_memory)]
    values = {n: torch.randn(shape) for n, shape in zip(names, shapes, strict=True)}
    expected = to_disk(model, values)
    assert expected.keys() != values.keys(), f"{operation} is not applied on the way back"
    outputs = trace(partial(to_disk, model), {k: v.to("meta") for k, v in values.items()})
    assert [o.name for o in outputs] == list(expected), f"{operation}: other names on meta tensors"
    for output in outputs:
        found = put_together(output, values)
        assert torch.equal(found, expected[output.name]), f"{operation}: model/trace.py misreads {output.name}"


def test_tied_names_are_known_on_a_skeleton() -> None:
    tied = _skeleton(tie_word_embeddings=True).all_tied_weights_keys
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}, f"all_tied_weights_keys says {tied}"
    assert not _skeleton(tie_word_embeddings=False).all_tied_weights_keys, (
        "names are tied though the config unties them"
    )
    assert hasattr(_skeleton(), "_keys_to_ignore_on_save"), "PreTrainedModel has no _keys_to_ignore_on_save any more"


def test_dtype_plan_names_what_stays_in_float32() -> None:
    from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration
    from transformers.core_model_loading import build_glob_alternation

    assert list(inspect.signature(PreTrainedModel._get_dtype_plan).parameters) == ["self", "dtype"]
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
    with torch.device("meta"):
        model = T5ForConditionalGeneration._from_config(config, attn_implementation="eager", dtype=torch.float16)
    plan = model._get_dtype_plan(torch.float16)
    assert set(plan.values()) == {torch.float32}, f"T5 in float16 keeps `wo` in float32; _get_dtype_plan says {plan}"
    pattern = build_glob_alternation(list(plan))[0]
    assert pattern.search("encoder.block.0.layer.1.DenseReluDense.wo.weight"), "the plan's names no longer match so"
    assert not pattern.search("encoder.block.0.layer.0.SelfAttention.q.weight"), "the plan's names match everything"


def test_loading_reports_every_key_that_does_not_fit(tmp_path: Path) -> None:
    """The load check trusts `output_loading_info`: every non-empty entry is a problem."""
    from safetensors.torch import load_file, save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).save_pretrained(tmp_path)
    _, info = Qwen2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto", local_files_only=True)
    assert not any(info.values()), f"a whole model loads with remarks: {info}"
    weights = load_file(tmp_path / "model.safetensors")
    weights["strange.weight"] = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    _, info = Qwen2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto", local_files_only=True)
    assert "model.norm.weight" in info["missing_keys"], f"a missing key is not reported: {info}"
    assert "strange.weight" in info["unexpected_keys"], f"an unexpected key is not reported: {info}"


# -- Hydra ---------------------------------------------------------------------------------

APP = """
import hydra
from hydra.experimental.callback import Callback

class Stops(Callback):
    def on_job_start(self, config, **kwargs):
        raise SystemExit("stopped by the callback")

class Fails(Callback):
    def on_job_start(self, config, **kwargs):
        raise ValueError("a mere exception")

class Ends(Callback):
    def on_job_end(self, config, **kwargs):
        print("on_job_end ran")

@hydra.main(version_base=None)
def main(config):
    print("the job ran")

if __name__ == "__main__":
    main()
"""


def _hydra_app(folder: Path, callback: str) -> subprocess.CompletedProcess[str]:
    (folder / "app.py").write_text(APP)
    args = [f"hydra.run.dir={folder / 'run'}", f"+hydra.callbacks.x._target_=__main__.{callback}"]
    return subprocess.run([sys.executable, "app.py", *args], cwd=folder, capture_output=True, text=True, check=False)


def test_system_exit_of_a_callback_stops_the_job(tmp_path: Path) -> None:
    done = _hydra_app(tmp_path, "Stops")
    assert done.returncode == 1, f"SystemExit from on_job_start is swallowed: {done.stderr}"
    assert "stopped by the callback" in done.stderr, "the message of SystemExit is not printed"
    assert "the job ran" not in done.stdout, "SystemExit from on_job_start no longer keeps the job from running"


def test_other_exceptions_of_a_callback_do_not_stop_the_job(tmp_path: Path) -> None:
    """Why the guard turns everything into SystemExit."""
    done = _hydra_app(tmp_path, "Fails")
    assert done.returncode == 0, "Hydra lets a callback's exception through now: the guard can be simpler"
    assert "the job ran" in done.stdout


def test_on_job_end_comes_after_the_job(tmp_path: Path) -> None:
    printed = _hydra_app(tmp_path, "Ends").stdout.splitlines()
    assert printed == ["the job ran", "on_job_end ran"], f"on_job_end does not follow the job: {printed}"


def test_search_path_plugins_append_directories() -> None:
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    assert list(inspect.signature(SearchPathPlugin.manipulate_search_path).parameters) == ["self", "search_path"]
    assert list(inspect.signature(ConfigSearchPath.append).parameters)[:3] == ["self", "provider", "path"]
    found = {plugin.__name__ for plugin in Plugins.instance().discover(SearchPathPlugin)}
    assert "AutoExportSearchPath" in found, "Hydra no longer finds plug-ins in the namespace package hydra_plugins"

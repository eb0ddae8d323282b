"""The hook in real processes: modules that are imported later, Ray's workers, a user's own hook, and its absence."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.repository import environment


def run(code: str, folder: Path, *, fails: bool = False) -> str:
    """The output of a Python process whose working directory is on its path."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code))
    env = environment(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0")
    env["PYTHONPATH"] = f"{folder}:{env.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, str(script)], env=env, cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


def test_the_hook_itself_imports_neither_verl_nor_torch_nor_ray(tmp_path):
    code = "import sys, verl_autoexport; from verl_autoexport.trainers.hook import watch_modules; watch_modules();"
    code += "print(sorted({'torch', 'ray', 'verl', 'transformers'} & sys.modules.keys()))"
    assert run(code, tmp_path).strip() == "[]"


def test_modules_are_watched_whether_they_are_imported_before_or_after(tmp_path):
    for order in (("hook", "verl"), ("verl", "hook")):
        lines = {"hook": "verl_autoexport.install()", "verl": "from verl.trainer.ppo import ray_trainer"}
        code = "\n".join(["import verl_autoexport", *(lines[name] for name in order)])
        code += "\nfrom verl.utils.tracking import Tracking"
        code += "\nprint([hasattr(c.__init__, '_autoexport') for c in (ray_trainer.RayPPOTrainer, Tracking)])"
        assert run(code, tmp_path).strip().splitlines()[-1] == "[True, True]", order


def test_a_run_without_the_flag_is_left_alone(tmp_path):
    code = """
        import verl_autoexport
        verl_autoexport.install()
        from omegaconf import OmegaConf
        from verl.utils.tracking import Tracking
        from verl_autoexport.trainers.watching import Run, follow

        class Trainer:
            config = OmegaConf.create({"trainer": {}})
            def fit(self): pass

        trainer = Trainer()
        follow(trainer)
        Tracking("p", "e", "console").log({"a": 1}, 1)
        print(vars(trainer), Run.fitting)
    """
    assert run(code, tmp_path).strip().splitlines()[-1] == "{} None"


UNKNOWN = """
    import verl_autoexport
    verl_autoexport.install()
    from omegaconf import OmegaConf
    from verl.utils.tracking import Tracking

    class MyTrainer:
        def __init__(self):
            self.config = OmegaConf.create({"trainer": {}, "autoexport": {"enabled": True, "output_dir": "x"}})

        def fit(self):
            Tracking("p", "e", "console")
            print("trains")

    MyTrainer().fit()
"""


def test_a_trainer_that_is_not_known_stops_before_it_trains(tmp_path):
    error = run(UNKNOWN, tmp_path, fails=True).strip().splitlines()[-1]
    assert "MyTrainer is no trainer that autoexport knows: remove +autoexport=default" in error


def test_a_trainer_that_trains_while_it_samples_is_refused(tmp_path):
    code = """
        from omegaconf import OmegaConf
        from verl_autoexport.trainers.watching import follow

        class Async:
            config = OmegaConf.create({"trainer": {}, "autoexport": {"enabled": True}})
            async def fit(self): pass

        follow(Async())
    """
    assert "Async trains and samples at the same time" in run(code, tmp_path, fails=True)


WORKER = """
    import json, os, sys
    import ray

    @ray.remote(num_cpus=0)
    def seen():
        from omegaconf import OmegaConf
        from verl_autoexport.trainers.hook import RESOLVER
        return [OmegaConf.has_resolver(RESOLVER), os.environ.get("USERS_HOOK"), "torch" in sys.modules]
"""


def in_ray(folder: Path, start: str, *, fails: bool = False) -> str:
    (folder / "users.py").write_text("import os\n\ndef hook():\n    os.environ['USERS_HOOK'] = 'ran'\n")
    code = textwrap.dedent(WORKER) + textwrap.dedent(start) + "\nprint(json.dumps(ray.get(seen.remote())))\n"
    return run(code, folder, fails=fails)


OPTIONS = "num_cpus=1, include_dashboard=False, object_store_memory=100_000_000"


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (f"import verl_autoexport; verl_autoexport.install(); ray.init({OPTIONS})", [True, None, False]),
        (
            f"import verl_autoexport; verl_autoexport.install()\n"
            f"ray.init({OPTIONS}, runtime_env={{'worker_process_setup_hook': 'users.hook', 'env_vars': {{'A': '1'}}}})",
            [True, "ran", False],
        ),
        (
            f"import users, verl_autoexport; verl_autoexport.install()\n"
            f"ray.init({OPTIONS}, runtime_env={{'worker_process_setup_hook': users.hook}})",
            [True, "ran", False],
        ),
        (
            f"ray.init({OPTIONS}, runtime_env={{'worker_process_setup_hook': 'verl_autoexport.install'}})",
            [True, None, False],
        ),
        (f"ray.init({OPTIONS})", [False, None, False]),
    ],
    ids=["installed", "with a user's, by name", "with a user's function", "named by the user", "not installed"],
)
def test_rays_workers_have_the_hook_and_keep_a_users_own(tmp_path, start, expected):
    assert json.loads(in_ray(tmp_path, start).strip().splitlines()[-1]) == expected


def test_a_driver_without_the_hook_stops_in_one_line_when_verl_resolves_its_configuration(tmp_path):
    code = """
        from hydra import compose, initialize_config_dir
        import importlib.util, pathlib
        from omegaconf import OmegaConf
        verl = pathlib.Path(importlib.util.find_spec("verl").submodule_search_locations[0])
        with initialize_config_dir(str(verl / "trainer/config"), version_base=None):
            config = compose("ppo_trainer", ["+autoexport=default"])
        OmegaConf.resolve(config)
    """
    error = run(code, tmp_path, fails=True)
    assert "Unsupported interpolation type call_verl_autoexport_install_before_ray_init" in error

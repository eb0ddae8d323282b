"""Imported by Python in every process of a run: a verl that knows no CPU platform trains on a CPU, over gloo."""

import importlib.util
import sys
from importlib.abc import MetaPathFinder


class _BeforeVerl(MetaPathFinder):
    """Patches torch before verl is imported, and verl after it."""

    def find_spec(self, name, path=None, target=None):
        if name != "verl":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            import cpu_for_verl

            cpu_for_verl.patch_torch()
            execute(module)
            cpu_for_verl.patch_verl()

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _BeforeVerl())

"""Lets every Hydra application find the config group `autoexport`."""

from __future__ import annotations

from contextlib import suppress

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class AutoExportSearchPath(SearchPathPlugin):
    """Appends the directory that holds `autoexport/default.yaml`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        # Runs in every Hydra program on the machine: a broken installation of ours must not
        # break those. It is not silent: `+autoexport=default` is then an unknown group.
        with suppress(Exception):
            from verl_autoexport.config.group import config_dir

            search_path.append(provider="verl_autoexport", path=f"file://{config_dir()}")

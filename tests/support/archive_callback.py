"""A user's own checkpoint callback, for `autoexport.chain_callback`: keeps a copy of each step's shards.

`ARCHIVE_DIR` names where to; with `ARCHIVE_RAISE_AT=N` it fails at step N, as users' code
does; with `ARCHIVE_BREAK_AT=N` the directory `ARCHIVE_BREAK` is renamed away at step N.
"""

import os
import shutil

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback


class Archive(CheckpointCallback):
    def on_save(self, trainer, global_step, checkpoint_dir, async_save=False, **kwargs):
        target = os.path.join(os.environ["ARCHIVE_DIR"], f"global_step_{global_step}")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(checkpoint_dir, target)
        if global_step == int(os.environ.get("ARCHIVE_BREAK_AT", "-1")):
            os.rename(os.environ["ARCHIVE_BREAK"], os.environ["ARCHIVE_BREAK"] + ".gone")
            open(os.environ["ARCHIVE_BREAK"], "w").close()
        if global_step == int(os.environ.get("ARCHIVE_RAISE_AT", "-1")):
            raise RuntimeError("the user's own callback fails on purpose")

"""The hook by verl's own entry points, `verl.plugins` (verl 0.9): verl imports this module in every process.

So a run is followed even if its launcher started Ray without the hook. Without the flag it does nothing.
"""

from verl_autoexport.trainers.hook import watch_modules

watch_modules()

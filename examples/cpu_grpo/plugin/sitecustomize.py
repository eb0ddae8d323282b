"""Imported by every Python process that has this directory on PYTHONPATH, before anything else.

A verl run starts about ten processes, and each imports thousands of modules. With the default
thresholds a quarter of that time goes into garbage collections that find nothing.
"""

import gc

gc.set_threshold(100_000, 20, 100)

"""`python -m verl_autoexport` is `verl-autoexport`."""

import sys

from verl_autoexport.cli import main

sys.exit(main())

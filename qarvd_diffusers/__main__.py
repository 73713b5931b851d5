"""`python -m qarvd_diffusers` is the `qarvd` command."""

import sys

from .cli import main

sys.exit(main())

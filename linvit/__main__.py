"""`python -m linvit` runs the `linvit` command."""

import sys

from linvit.cli import main

sys.exit(main())

"""`python -m linvit` is the `linvit` command."""

import sys

from linvit.cli import main

sys.exit(main())

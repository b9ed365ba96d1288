"""`python -m moe_serve`: the command line, for launchers that start modules."""

import sys

from moe_serve.cli import main

sys.exit(main())

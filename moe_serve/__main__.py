"""`python -m moe_serve`: the command line, for launchers that start modules."""

import sys

from moe_serve.cli import main

# DeepSpeed's launcher puts this before a module's own arguments; LOCAL_RANK says the same.
sys.exit(main([word for word in sys.argv[1:] if not word.startswith("--local_rank=")]))

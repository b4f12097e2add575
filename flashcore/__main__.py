"""`python -m flashcore` prints what a bug report needs; with arguments it is the `flashcore` command."""

import sys

from flashcore.cli import main

sys.exit(main(sys.argv[1:] or ["info"]))

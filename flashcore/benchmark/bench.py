"""`flashcore bench`: FlashCore beside the other libraries, on the GPU's clock, on the host's, or in whole models.

    flashcore bench --suite nine --cold
    flashcore bench host
    flashcore bench models
    flashcore bench gradients
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flashcore.benchmark import compare_peers, gradients, host, models

NAMED = {"host": host, "models": models, "gradients": gradients}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names, else that of device time. Returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    named = NAMED.get(arguments[0]) if arguments else None
    return named.main(arguments[1:]) if named else compare_peers.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

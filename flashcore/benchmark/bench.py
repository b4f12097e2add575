"""`flashcore bench`: FlashCore beside the other libraries, on the GPU's clock or on the host's.

    flashcore bench --suite nine --cold
    flashcore bench host
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flashcore.benchmark import compare_peers, host


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names: `host`, else device time. Returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return host.main(arguments[1:]) if arguments[:1] == ["host"] else compare_peers.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""`flashcore bench`: FlashCore beside the other libraries on your GPU, for your shapes.

    flashcore bench --suite nine --cold
    flashcore bench --shape 32,12,384,64 --clock all --html bench.html
    flashcore bench --from-model bert-base-uncased
    flashcore bench host                                what a call costs the CPU, path by path
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flashcore.benchmark import compare_peers, host


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names: `host`, else all libraries. Returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return host.main(arguments[1:]) if arguments[:1] == ["host"] else compare_peers.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""``python -P -m spark_workers nursery FD PARENT``, or ``worker ENTRY PARENT CHANNEL BELL STDOUT STDERR``."""

import sys

from spark_workers import nursery


def _main(role: str, *rest: str) -> int:
    if role == "nursery":
        nursery.main(int(rest[0]), int(rest[1]))
        return 0
    entry, parent, *numbers = rest
    return nursery.run_worker(entry, nursery.Descriptors(*map(int, numbers)), int(parent))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))

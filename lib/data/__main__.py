"""``python -m lib.data NAME [--root FOLDER] [--size PIXELS]``: fetch a data set if needed, check it, say what is in it."""

from __future__ import annotations

import argparse
import sys

from lib.data import load
from lib.system.errors import CompanionError


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 1 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m lib.data", description=__doc__.partition(": ")[2])
    parser.add_argument("name", help="data set, e.g. cifar10")
    parser.add_argument("--root", help="where data sets lie (default: $COMPANION_DATA, else data/)")
    parser.add_argument("--size", type=int, help="scale to this side in pixels")
    options = parser.parse_args(arguments)
    try:
        data = load(options.name, root=options.root, size=options.size, download=True)
    except CompanionError as error:
        print(error, file=sys.stderr)
        return 1
    channels, height, width = data.train.shape
    print(
        f"{data.train.name}: {len(data.train)} training and {len(data.test)} test images of "
        f"{channels}x{height}x{width}, {data.train.num_classes} classes"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

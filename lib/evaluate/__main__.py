"""``python -m lib.evaluate PATH --data NAME``: judge a distilled set, ours or somebody else's, under a named protocol::

python -m lib.evaluate res_DSA_CIFAR10_ConvNet_10ipc.pt --data cifar10 --protocol dsa
python -m lib.evaluate images_best.pt --labels labels_best.pt --data cifar10 --space zca --protocol mtt --set lr=0.02
python -m lib.evaluate my_set.safetensors --data digits --protocol cpu-small

For sets that are judged with a teacher's labels (SRe2L, WMDD): ``python -m lib.scale run --images PATH ...``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from lib.data import load
from lib.data.whitening import WHITENINGS
from lib.evaluate import PROTOCOLS, evaluate, protocol
from lib.synset.imported import SPACES, synsets
from lib.system.errors import CompanionError
from lib.system.terminal import Parser, pair


def parser() -> argparse.ArgumentParser:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    top = Parser(prog="python -m lib.evaluate", description=__doc__, formatter_class=form)
    top.add_argument("path", metavar="PATH", help=".pt, .npz, .safetensors, or a folder of class folders")
    top.add_argument(
        "--data", required=True, help="data set to test on, such as cifar10, digits, folder:/path"
    )
    top.add_argument("--root", help="where data sets lie")
    top.add_argument("--size", type=int, metavar="N", help="side in pixels")
    top.add_argument("--space", default="normalised", help=f"of the pixels in the file: {', '.join(SPACES)}")
    top.add_argument("--labels", metavar="FILE", help="labels in a file of their own (MTT)")
    top.add_argument("--protocol", default="dc", help=f"{', '.join(PROTOCOLS)}; default: dc")
    top.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of the protocol")
    top.add_argument("--networks", type=int, metavar="N", help="networks per set; default: the protocol's")
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    return top


def main(words: list[str] | None = None) -> int:
    given = parser().parse_args(words)
    whiten = given.space if given.space in WHITENINGS else None
    data = load(given.data, given.root, given.device, given.size, whiten)
    sets = synsets(given.path, data.train, given.space, given.labels)
    chosen = protocol(given.protocol, data.train, **dict(map(pair, given.set)))
    print(
        f"{given.path}: {len(sets)} sets of {len(sets[0].targets)} images, {given.data}, space {given.space}"
    )
    print(chosen)
    kinds = {"own": "soft labels", "hard": "hard labels"} if sets[0].soft else {"hard": "hard labels"}
    for labels, text in kinds.items():
        found = evaluate(sets, data, replace(chosen, labels=labels), given.seed, given.networks)
        print(f"{text}: {found}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompanionError as error:
        print(f"lib.evaluate: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

r"""DCEP - Dataset Distillation with Channel Efficient Process. Zhou et al., ICASSP 2024 (IEEE 10446099). **A reconstruction.**

IDC (``lib.methods.idc``) with a formation that works on channels: from one stored colour image x four training images are
formed, $f_c:\mathbb R^n\to\mathbb R^{4n}$, at full resolution, where IDC's tiles lose half of it. Colour channels of images are
nearly redundant, so there is room in them.

All that could be found of the paper is its title and one line: gradient matching with a channel-wise multi-formation. Which
one is not known, and neither is any number of the paper. Four candidates (``FORMATIONS``), ours throughout:

    pack        every channel as a grey image, and the colour image
    tiles       IDC's four tiles, but channel c of formation j is taken from tile (j + c) mod 4
    permute     the image, its channels moved on by one and by two, and their mean
    learned     four mixtures of the channels, learned with the images: 36 numbers for the whole set
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lib.data.imageset import ImageSet
from lib.formation import CYCLES, ChannelMix, MultiFormation, decode_by_class
from lib.methods import idc
from lib.methods.idc import IDC
from lib.recipes import Recipe, Recipes, published, small
from lib.synset import SyntheticSet

FORMATIONS = {
    "pack": ChannelMix(),
    "tiles": MultiFormation(2, shifts=(0, 1, 2)),
    "permute": ChannelMix(CYCLES),
    "learned": ChannelMix(CYCLES, learned=True),
}


@dataclass
class State(idc.State):
    """IDC's, and the maps (k, 3, 3) that are learned, if any."""

    maps: Tensor | None = field(kw_only=True)


@dataclass(frozen=True)
class DCEP(IDC):
    """Hyper-parameters of IDC, and of learned mixtures. The other fields are IDC's.

    Attributes:
        formation: one of :data:`FORMATIONS`; lr_maps: learning rate of its channel maps, where it has some.
    """

    formation: Any = FORMATIONS["pack"]
    lr_maps: float = 1e-3

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> State:
        state, maps = super().begin(train, ipc, generator), None
        if self.formation.learned:
            maps = state.pixels.new_tensor(self.formation.maps).requires_grad_()
            state.optimiser.add_param_group({"params": [maps], "lr": self.lr_maps, "momentum": self.momentum})
        return State(**vars(state), maps=maps)

    def decode(self, state: State, stored: Tensor) -> Tensor:
        learned = () if state.maps is None else (state.maps,)
        return decode_by_class(self.formation.on(state.train.transform), stored, *learned)

    def finish(self, state: State) -> SyntheticSet:
        synset = super().finish(state)
        if state.maps is not None:
            synset.decoder = replace(synset.decoder, maps=state.maps.tolist())
        return synset


def _rows(formation: str, variant: str = "") -> list[list[Recipe]]:
    """IDC's settings; the paper's are not known."""

    def of(data: str, ipc: int | None = None) -> DCEP:
        return DCEP(**vars(idc.RECIPES.named(data, ipc).method) | {"formation": FORMATIONS[formation]})

    return [
        *(small(data, of(data), variant=variant) for data in ("photos16", "photos32")),
        published("cifar10 cifar100", (1, 10, 50), of("cifar10", 10), "idc", "IDC's settings: a reconstruction", variant=variant),
    ]  # fmt: skip


RECIPES = Recipes(
    *(small(data, DCEP(**vars(idc.RECIPES.named(data).method) | {"formation": FORMATIONS["tiles"]}))
      for data in ("digits", "fashion14")),  # grey: IDC
    *_rows("pack"),
    *(group for name in FORMATIONS if name != "pack" for group in _rows(name, name)),
)  # fmt: skip

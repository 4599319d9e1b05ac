r"""GLaD - Generalizing Dataset Distillation via Deep Generative Prior. Cazenavette, Wang, Torralba, Efros & Zhu, CVPR 2023,
arXiv 2305.01649.

$$\min_{Z}\ \mathcal L\big(\mathcal S\big),\qquad \mathcal S=\tilde G(Z)=\tfrac1s\Big(\tfrac{G(Z)+1}2-\mu\Big),\qquad
\frac{\partial\mathcal L}{\partial Z}=\Big(\frac{\partial\tilde G}{\partial Z}\Big)^{\!\top}\frac{\partial\mathcal L}{\partial\mathcal S}$$

$\mathcal L$ is any loss of images, here DC, DM or MTT (``objective``); what changes is where images live. G is a frozen generator,
and Z a point of one of its spaces: ``z``, the latents; ``w``, the styles of all layers (W+); ``fn``, the map behind layer n and the
styles of later layers. Early spaces keep images natural, late ones approach ``pixels``.

As published, $\partial\mathcal L/\partial\mathcal S$ is computed for given images, and every chunk of them is then generated again with its
graph and pulled back: exact, with the memory of one chunk of G.

Paper and code: the released loop runs iterations 0..N, that is N + 1 updates, ours N. In W+ the released code moves W at the first of its
two rates, and so does this: ``lr`` belongs to what is named by ``space``, ``lr_w`` to the styles beside a map. It normalises generated
images of ImageNet with another mean than real ones; here both have the data's. It reports the best of many tests, each on an average of
weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lib.data.imageset import ImageSet
from lib.formation import Pixels
from lib.formation.generated import Generated, depth, image_of
from lib.formation.start import initial_pixels
from lib.methods.dc import DC
from lib.methods.dm import DM
from lib.methods.mtt import MTT
from lib.nets.generators import Generator, LayeredVAE, Prior, SpatialVAE, the_prior
from lib.nets.generators.inversion import encoded
from lib.nets.generators.prior import Brought, room_for, to_data
from lib.recipes import Recipes, published, small
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError, choose, positive, whole

BOUND, BEYOND = 10.0, 5.0  # maps start clipped to +-10, where infinite at +-5
SAMPLES = 1000  # whose mean style "average" is
STARTS = ("noise", "real")


@dataclass
class State:
    codes: Tensor  # what is named by the space, (C * ipc, ...), class-major
    w: Tensor | None  # W beside a map of F_n
    optimiser: torch.optim.Optimizer
    learned: Generator | None  # G where it is learned too
    given: Any  # the objective's state, whose pixels are the images of the codes
    labels: Tensor = field(metadata={"constant": True})
    generator: Generator | None = field(metadata={"constant": True})  # G
    train: ImageSet = field(metadata={"constant": True})


@dataclass(frozen=True)
class GLaD:
    """Hyper-parameters of the released code; the defaults are those of DM at 128 pixels.

    Attributes:
        prior: how the generator is trained (``lib.nets.generators``); objective: the loss, ``DM()``, ``DC(inner=1)`` or ``MTT()``.
        space: what is learned: "z", "w", "f0", "f1", ... or "pixels".
        iterations: updates, 0 or more; lr: of maps, latents, W+ or pixels (published: DC 1, MTT 10 000); lr_w: of the styles beside a map
            (DC 0.001, MTT 10); momentum: of both; rates above 0.
        chunk: images generated at once with their graph, None: all.
        init: "noise": latents, or pixels, from a normal law; "real": those of random real images; average: W at the mean of its class,
            for IPC 1; random_map: the map drawn from a normal law with its own mean and deviation.
        learn_generator: the generator moves, too; lr_generator: of it (published for MTT: 0.1).
    """

    prior: Prior = LayeredVAE()
    objective: Any = DM()
    space: str = "f20"
    iterations: int = 1000
    lr: float = 10.0
    lr_w: float = 0.01
    momentum: float = 0.5
    chunk: int | None = 10
    init: str = "noise"
    average: bool = False
    random_map: bool = False
    learn_generator: bool = False
    lr_generator: float = 1e-4

    def __post_init__(self) -> None:
        choose("init", self.init, dict.fromkeys(STARTS))
        whole(self, iterations=0, **({} if self.chunk is None else {"chunk": 1}))
        positive(self, "lr", "lr_w", "lr_generator")
        if not isinstance(self.objective, DM | DC | MTT):
            raise CompanionError(f"objective {self.objective!r} is not allowed: DM(...), DC(...) or MTT(...)")
        formed = not isinstance(getattr(self.objective, "formation", Pixels()), Pixels)
        if formed or getattr(self.objective, "space", "normalised") != "normalised":
            raise CompanionError(
                "the objective of GLaD compares images as they are: no formation, no other pixel space"
            )

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def with_steps(self, count: int, ipc: int = 1) -> GLaD:
        """The same method with ``count`` updates of the codes."""
        return replace(self, iterations=count)

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> State:
        if self.average and ipc > 1:
            raise CompanionError(
                f"average styles at IPC {ipc}: all images of a class would be one; allowed at IPC 1"
            )
        y, G, w, learned = class_major(train.num_classes, ipc, train.device), None, None, None
        if self.space == "pixels":
            codes = initial_pixels(train, ipc, self.init, generator)
        else:
            G = the_prior(self.prior, train)
            n = depth(self.space, G)
            room_for(len(y), torch.Size(G.latent if n is None else G.styles).numel(), train.device)
            codes, w = self.start(G, n, y, train, generator)
        groups = [{"params": [codes.requires_grad_()], "lr": self.lr}]
        if w is not None:
            groups.append({"params": [w.requires_grad_()], "lr": self.lr_w})
        if self.learn_generator and G is not None:
            learned = G.alone()
            groups.append({"params": list(learned.parameters()), "lr": self.lr_generator})
        optimiser = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        given = self.objective.begin(train, ipc, generator)
        state = State(codes, w, optimiser, learned, given, y, G, train)
        self.show(state)
        return state

    def start(
        self, G: Generator, n: int | None, y: Tensor, train: ImageSet, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Where codes start, and W beside a map."""
        z = G.draw(y, generator)
        if self.init == "real":
            images = train.sample(len(y) // train.num_classes, generator).flatten(0, 1)
            z = encoded(G, images, y, train.transform)
        if n is None:
            return z, None
        with torch.no_grad():
            w = G.mapping(z, y).clone()
            if self.average:
                each = y.repeat_interleave(SAMPLES)
                w = G.mapping(G.draw(each, generator), each).unflatten(0, (len(y), SAMPLES)).mean(1)
            if n < 0:
                return w, None
            f = G.to_f(w, y, n).nan_to_num(0.0, BEYOND, -BEYOND).clamp(-BOUND, BOUND)
        if self.random_map:
            dims = tuple(range(1, f.dim()))
            noise = torch.randn(f.shape, generator=generator, device=f.device)
            f = f.mean(dims, keepdim=True) + f.std(dims, keepdim=True) * noise
        return f, w

    def images(self, state: State, rows: Tensor | slice) -> Tensor:
        """$\\tilde G$ of some codes, in the normalised space of the data."""
        codes, y = state.codes[rows], state.labels[rows]
        if self.space == "pixels":
            return codes
        G = state.learned or state.generator
        n = depth(self.space, G)
        if n is None:
            return to_data(G(codes, y), state.train.transform)
        w = codes if state.w is None else state.w[rows]
        return to_data(image_of(G, n, codes, w, y), state.train.transform)

    def chunks(self, state: State) -> tuple[Tensor, ...]:
        rows = torch.arange(len(state.codes), device=state.codes.device)
        return rows.split(self.chunk or len(rows))

    @torch.no_grad()
    def show(self, state: State) -> None:
        """Give the objective the images of the codes as they are."""
        for rows in self.chunks(state):
            state.given.pixels[rows] = self.images(state, rows)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of the codes."""
        metrics = self.objective.differentiate(state.given, generator)
        dL_dS, state.given.pixels.grad = state.given.pixels.grad, None

        state.optimiser.zero_grad()
        for rows in self.chunks(state):
            self.images(state, rows).backward(dL_dS[rows])
        state.optimiser.step()

        state.given.optimiser.step()  # what the objective learns besides images, which have no gradient now: MTT's rate
        self.show(state)
        self.objective.after(state.given, generator)
        return metrics

    def finish(self, state: State) -> SyntheticSet:
        """The codes, with the generator as their decoder."""
        train, codes, labels = state.train, state.codes.detach().clone(), state.labels
        rate = getattr(state.given, "rate", None)
        about = {"step_size": None if rate is None else rate.detach().clone()}
        if self.space == "pixels":
            return SyntheticSet(codes, labels, train.classes, train.transform, **about)
        G = state.learned or state.generator
        decoder = Generated.of(G, self.prior, train, self.space)
        if state.w is not None:
            w = state.w.detach()[:, G.read_after(depth(self.space, G))]
            codes = decoder.codes(codes, labels, w)
        else:
            codes = decoder.codes(codes, labels)
        return SyntheticSet(codes, labels, train.classes, train.transform, decoder, **about)


def _stylegan(size: int) -> Brought:
    return Brought(
        what=f"StyleGAN-XL at {size} pixels",
        where=f"imagenet{size}.pkl, G_ema, of github.com/autonomousvision/stylegan-xl",
    )


_DM = DM(iterations=150, real_batch=64, network="convnet-d2-w32", augmentation="none", init="noise")
_DIGITS = GLaD(objective=_DM, space="w", iterations=150, lr=0.1, chunk=None)
_DEEP = {"real_batch": 32, "network": "convnet-d3-w32"}
_PHOTOS = replace(
    _DIGITS, prior=SpatialVAE(), objective=replace(_DM, **_DEEP, augmentation="data"), space="z", lr=1.0
)
_DC = DC(real_batch=64, network="convnet-d2-w32", inner=1, epochs=1)
_PHOTOS_DC = replace(_PHOTOS, objective=replace(_DC, **_DEEP, augmentation="data"), lr=0.1)
_AS_DIGITS = "the settings of digits with a network for 14 pixels and a longer trained prior, not chosen on these data"
_FASHION = replace(_DIGITS, prior=LayeredVAE(steps=1000), objective=replace(_DM, **_DEEP))
_SETS = "imagenet-a imagenet-b imagenet-c imagenet-d imagenet-e"
_CODE = "defaults and README of the released code"


def _published(size: int, network: str, ipc: tuple[int, ...]):
    """The three objectives at one resolution."""
    prior, at = _stylegan(size), f"{_CODE}; {size} pixels"
    dm = DM(network=network)
    dc = DC(network=network, augmentation="data", inner=1, epochs=1)
    mtt = MTT(steps=20, expert_epochs=3, start_epochs=5, lr_rate=1e-6, network=network)
    rows = (
        ("", GLaD(prior, dm)),
        ("DC", GLaD(prior, dc, "f16", lr=1.0, lr_w=0.001)),
        ("MTT", GLaD(prior, mtt, "f12", 5000, lr=1e4, lr_w=10.0, lr_generator=0.1)),
    )
    named = {"": "DM"} if size != 128 else {}
    for name, method in rows:
        variant = name if size == 128 else f"{named.get(name, name)} {size}"
        yield published(_SETS, ipc, method, "glad", at, variant=variant)


RECIPES = Recipes(
    small("digits", _DIGITS),
    small("digits", replace(_DIGITS, objective=_DC, lr=0.01), variant="DC"),
    small("fashion14", _FASHION, source=_AS_DIGITS),
    small("fashion14", replace(_FASHION, objective=replace(_DC, **_DEEP), lr=0.01), variant="DC", source=_AS_DIGITS),
    small("photos16 photos32", _PHOTOS),
    small("photos16 photos32", _PHOTOS_DC, variant="DC"),
    *_published(128, "convnet-d5-w128", (1, 10)),
    *_published(256, "convnet-d6-w128", (1, 10)),
    *_published(512, "convnet-d7-w128", (1,)),
)

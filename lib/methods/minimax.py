r"""Minimax diffusion - Efficient Dataset Distillation via Minimax Diffusion. Gu et al., CVPR 2024, arXiv 2311.15529.

$$\min_\theta\ \mathbb E\,\ell_{diff}(\theta)+\frac{\lambda_r}{n_c}\sum_c\Big(1-\min_{q\in Q_c,\,m\in M_c}\sigma(q,m)\Big)
+\frac{\lambda_d}{n_c}\sum_c\ \max_{q\in Q_c,\,d\in D_c}\sigma(q,d)$$

A diffusion model that was trained before is fine-tuned by its own loss $\ell_{diff}$ (``lib.nets.generators.diffusion``) and by two
criteria on the clean images $\hat z$ that it predicts: not far from the least similar of the last real ones of the class (representative),
far from the most similar of its own last predictions (diverse; ``lib.match.latent_memory``). Then IPC images of every class are drawn
with guidance. Nothing is learned per image, so fine-tuning costs the same at every IPC.

Paper and code: the paper writes both criteria per image, the code takes one pair per class and batch; the two are one where a batch has
one image of a class, as published batches nearly do. Labels are dropped while the criteria are computed, so some predictions in a memory
have no class. The mean of the weights begins at the pretrained ones, of which 30 % are left after 12,000 steps at 0.9999. The code draws
images one by one, ours side by side. Many classes are fine-tuned in phases, each from the pretrained network.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lib.data.imageset import ImageSet
from lib.match.latent_memory import Memory, diversity, mean_over_classes, representativeness
from lib.nets.generators.denoiser import Denoiser, Encoded, LatentDiT, PixelUNet, denoising
from lib.nets.generators.loops import follow, rows_of_epoch
from lib.recipes import Recipes, published, small
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError, choose, positive, whole

DIFFFIT = ("bias", "norm", "gamma", "y_embed")  # in the names of what DiffFit trains (arXiv 2304.06648)
TRAINABLE = ("all", "difffit")


@dataclass
class State:
    network: nn.Module
    mean: nn.Module  # its running mean, from which images are drawn
    optimiser: torch.optim.Optimizer
    real: Memory  # M
    own: Memory  # D
    drawn: Tensor  # latents (C ipc, *shape) of the phases that are done
    deck: list[Tensor]  # batches not yet seen in this epoch
    phase: int  # counted from 0
    done: int  # steps of this phase
    seed: int  # of the noise that images are drawn from
    encoded: Encoded = field(metadata={"constant": True})
    pretrained: nn.Module = field(metadata={"constant": True})
    names: Tensor = field(metadata={"constant": True})  # what the network calls the classes, (C,)
    labels: Tensor = field(metadata={"constant": True})
    train: ImageSet = field(metadata={"constant": True})


@dataclass(frozen=True)
class Minimax:
    r"""Hyper-parameters of the published commands: DiT-XL/2, ten classes.

    Attributes:
        prior: the diffusion model, ``LatentDiT()`` or ``PixelUNet()``.
        iterations: of a phase, 0 or more; phases: parts of the classes, fine-tuned one after the other; lr, batch: of the fine-tuning.
        weight_real, weight_own: $\lambda_r$ and $\lambda_d$, 0 or more; memory: latents of a class that they look at, $N_M$.
        trainable: weights that move, "difffit" or "all"; average: decay of their running mean, below 1; drop: part of the labels that is
            dropped.
        sampling_steps: of drawing; guidance: its strength, 0 or more; together: images that are drawn side by side.
    """

    prior: Denoiser = LatentDiT()
    iterations: int = 12_000
    lr: float = 1e-3
    batch: int = 8
    weight_real: float = 0.002
    weight_own: float = 0.008
    memory: int = 64
    trainable: str = "difffit"
    average: float = 0.9999
    drop: float = 0.1
    sampling_steps: int = 50
    guidance: float = 4.0
    together: int = 50
    phases: int = 1

    def __post_init__(self) -> None:
        choose("set of trainable weights", self.trainable, dict.fromkeys(TRAINABLE))
        positive(self, "lr")
        whole(self, iterations=0, batch=1, memory=1, together=1, phases=1)
        if not isinstance(self.prior, Denoiser):
            raise CompanionError(
                f"prior {self.prior!r} is no diffusion model: allowed are PixelUNet and LatentDiT"
            )
        for name in ("average", "drop"):
            if not 0 <= getattr(self, name) < 1:
                raise CompanionError(f"{name} {getattr(self, name)!r} is not allowed: 0 or more, below 1")
        for name in ("weight_real", "weight_own", "guidance"):
            if not getattr(self, name) >= 0:
                raise CompanionError(f"{name} {getattr(self, name)!r} is not allowed: 0 or more")
        self.prior.chain.respaced(self.sampling_steps)

    def total_steps(self, ipc: int) -> int:
        return self.iterations * self.phases

    def with_steps(self, count: int, ipc: int = 1) -> Minimax:
        """The same method with ``count`` steps of fine-tuning in all."""
        return replace(self, iterations=-(-count // self.phases))

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> State:
        if train.num_classes % self.phases:
            raise CompanionError(
                f"{self.phases} phases of {train.num_classes} classes: allowed are divisors of {train.num_classes}"
            )
        pretrained, encoded = self.prior.network(train), self.prior.encoded(train)
        if pretrained.null is None and (self.guidance != 1 or self.drop):
            raise CompanionError(
                f"guidance {self.guidance:g} and label dropout {self.drop:g} need a network with a null class; allowed for this one: "
                "guidance=1, drop=0"
            )
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        labels = class_major(train.num_classes, ipc, train.device)
        drawn = torch.zeros(len(labels), *encoded.shape, device=train.device)
        network, optimiser, memories = self.restart(pretrained, train, encoded)
        return State(
            network, copy.deepcopy(network).requires_grad_(False), optimiser, *memories, drawn, [], 0, 0, seed,
            encoded, pretrained, self.prior.labels(train), labels, train,
        )  # fmt: skip

    def restart(
        self, pretrained: nn.Module, train: ImageSet, encoded: Encoded
    ) -> tuple[nn.Module, torch.optim.Optimizer, tuple[Memory, Memory]]:
        """What a phase begins with: the pretrained network, its optimiser, empty memories."""
        network = copy.deepcopy(pretrained)
        if self.trainable == "difffit" and hasattr(network, "scaled"):
            network.scaled()
        for name, parameter in network.named_parameters():
            chosen = self.trainable == "all" or any(part in name for part in DIFFFIT)
            parameter.requires_grad_(chosen and name != "pos_embed")
        learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(learned, lr=self.lr, weight_decay=0.0, fused=True)
        like = torch.zeros(1, *encoded.shape, device=train.device)
        return network, optimiser, tuple(Memory(train.num_classes, self.memory, like) for _ in range(2))

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of the network by its own loss and the two criteria."""
        rows = self.rows(state, generator)
        x, c = state.encoded.draw(rows, generator), state.train.labels[rows]

        terms = denoising(state.network, self.prior.chain, x, state.names[c], self.drop, generator)
        far = mean_over_classes(representativeness(terms.clean, c, state.real), c)
        alike = mean_over_classes(diversity(terms.clean, c, state.own), c)
        diffusion = terms.loss.mean()
        loss = diffusion + self.weight_real * far + self.weight_own * alike

        state.optimiser.zero_grad()
        loss.backward()
        state.optimiser.step()
        state.real.write(x, c)
        state.own.write(terms.clean.detach(), c)
        follow(dict(state.mean.named_parameters()), dict(state.network.named_parameters()), self.average)
        state.done += 1
        if state.done == self.iterations and state.phase + 1 < self.phases:
            self.next_phase(state)
        values = {"loss": loss, "diffusion": diffusion, "far": far, "alike": alike}
        return {name: value.detach() for name, value in values.items()}

    def rows(self, state: State, generator: torch.Generator) -> Tensor:
        """Positions of the next real batch, of the phase's classes."""
        if not state.deck:
            mine = self.classes(state, state.phase)
            places = torch.isin(state.train.labels, mine).nonzero().flatten()
            state.deck = [places[rows] for rows in rows_of_epoch(len(places), self.batch, generator)]
        return state.deck.pop()

    def classes(self, state: State, phase: int) -> Tensor:
        """The classes of a phase, counted from 0."""
        return torch.arange(state.train.num_classes, device=state.labels.device).chunk(self.phases)[phase]

    @torch.no_grad()
    def next_phase(self, state: State) -> None:
        """Draw the images of the classes that are done, and begin again with the pretrained network."""
        state.drawn = self.draw(state)
        network, optimiser, memories = self.restart(state.pretrained, state.train, state.encoded)
        for module in (state.network, state.mean):
            module.load_state_dict(network.state_dict())
        state.optimiser.load_state_dict(optimiser.state_dict())
        for mine, new in zip((state.real, state.own), memories, strict=True):
            mine.load_state_dict(new.state_dict())
        state.deck, state.phase, state.done = [], state.phase + 1, 0

    def draw(self, state: State) -> Tensor:
        """The latents of all classes: those of earlier phases as they were drawn, the others from the network as it is."""
        mine = torch.cat([self.classes(state, k) for k in range(state.phase, self.phases)])
        open_ = torch.isin(state.labels, mine)
        generator = torch.Generator(state.labels.device).manual_seed(state.seed)
        chain, rule = (
            self.prior.chain.respaced(self.sampling_steps),
            (self.guidance, self.prior.guided, self.prior.clip),
        )
        parts = [
            chain.sample(state.mean, state.names[some], state.encoded.shape, generator, *rule)
            for some in state.labels[open_].split(self.together)
        ]
        drawn = state.drawn.clone()
        drawn[open_] = torch.cat(parts)
        return drawn

    def finish(self, state: State) -> SyntheticSet:
        images, train = self.prior.decode(self.draw(state), state.train), state.train
        return SyntheticSet(images, state.labels, train.classes, train.transform)


_PAPER = Minimax()
_DIGITS = Minimax(
    prior=PixelUNet(width=24, steps=400, lr=4e-3),
    iterations=100,
    lr=5e-4,
    batch=64,
    trainable="all",
    average=0.98,
    sampling_steps=25,
    guidance=2.0,
)
_FASHION = replace(_DIGITS, prior=replace(_DIGITS.prior, steps=800))
_PHOTOS = replace(_DIGITS, prior=replace(_DIGITS.prior, steps=800))
_LONGER = "the settings of digits with a longer trained network, not chosen on these data"
_COMMAND = "published commands and section 4.1; weights='FILE' of DiT-XL/2 and an autoencoder are the user's; there random resized crops"
_PHASED = f"{_COMMAND}; phases of 20 classes (authors, issues 5 and 9)"
_TEN = "imagenette imagewoof imageidc"
RECIPES = Recipes(
    small("digits", _DIGITS),
    small("fashion14", _FASHION, source=_LONGER),
    small("photos16 photos32", _PHOTOS, source=_LONGER),
    published(_TEN, 10, _PAPER, "idc-imagenet-2000", _COMMAND),
    published(_TEN, (20, 50), _PAPER, "idc-imagenet-1500", _COMMAND),
    published("imagewoof", (70, 100), _PAPER, "idc-imagenet-1000", _COMMAND),
    published("imagenet100", 10, replace(_PAPER, phases=5), "idc-imagenet-1333", _PHASED),
    published("imagenet100", 20, replace(_PAPER, phases=5), "idc-imagenet-1000", _PHASED),
)

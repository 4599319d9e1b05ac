"""Diffusion networks as priors: a small UNet that is trained on pixels here, and DiT-XL/2 with weights that the user brings.

A :class:`Denoiser` says in which space its chain runs: :meth:`~Denoiser.encoded` brings real images there, :meth:`~Denoiser.decode` back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lib import nets
from lib.data import subsets
from lib.nets.generators.diffusion import Diffusion, Terms
from lib.nets.generators.dit import XL2, DiT, from_diffusers
from lib.nets.generators.loops import follow, rows_of_epoch
from lib.nets.generators.prior import Prior, check_state, state_in, the_prior, to_data, to_generator
from lib.nets.generators.unet import UNet
from lib.system.errors import CompanionError, whole

SCALE = 0.18215  # of DiT's latents: they then have deviation 1
ENCODED_AT_ONCE = 32
RELEASED = "DiT-XL-2-256x256.pt of the DiT authors, a plain state dict, or its safetensors; or diffusers' DiTTransformer2DModel"


def denoising(
    network: nn.Module, chain: Diffusion, x: Tensor, y: Tensor, drop: float, generator: torch.Generator
) -> Terms:
    """The terms of one batch at random times, its labels replaced by "no label" with probability ``drop``."""
    device = generator.device
    t = torch.randint(len(chain), y.shape, generator=generator, device=device)
    noise = torch.randn(x.shape, generator=generator, device=device)
    gone = torch.rand(y.shape, generator=generator, device=device) < drop
    if drop and network.null is None:
        raise CompanionError(
            f"labels dropped with probability {drop:g} need a network with a null class; allowed for this one: 0"
        )
    x_t = chain.noised(x, t, noise)
    return chain.terms(network(x_t, t, y.masked_fill(gone, network.null or 0)), x, x_t, t, noise)


@dataclass(frozen=True)
class Encoded:
    """N real images in the space of a chain.

    Attributes:
        means: ``(N, *shape)``, once for every view (plain, mirrored); deviations: of an encoder that draws, alike, or None.
    """

    means: list[Tensor]
    deviations: list[Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.means[0].shape[1:])

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """These images, each in a random view, with the encoder's noise."""
        device, view = rows.device, torch.zeros_like(rows)
        if len(self.means) > 1:
            view = torch.randint(len(self.means), rows.shape, generator=generator, device=device)
        x = self._of(self.means, rows, view)
        if self.deviations is None:
            return x
        noise = torch.randn(x.shape, generator=generator, device=device)
        return x + self._of(self.deviations, rows, view) * noise

    def _of(self, views: list[Tensor], rows: Tensor, view: Tensor) -> Tensor:
        if len(views) == 1:
            return views[0][rows]
        return torch.stack([one[rows] for one in views])[view, torch.arange(len(rows), device=rows.device)]


@dataclass(frozen=True)
class Denoiser(Prior):
    """A kind of diffusion prior. The fields are Prior's."""

    guided: ClassVar[int | None] = None  # channels that are guided; None: all
    clip: ClassVar[bool] = True  # the predicted clean image, while sampling

    @property
    def chain(self) -> Diffusion:
        return Diffusion()

    def network(self, train) -> nn.Module:
        """The pretrained network, frozen."""
        return the_prior(self, train)

    def labels(self, train) -> Tensor:
        """What the network calls the classes of the data, ``(C,)``."""
        return torch.arange(train.num_classes, device=train.device)

    def encoded(self, train) -> Encoded:
        """The real images in the chain's space, to be drawn from."""
        return Encoded([to_generator(train.images, train.transform)])

    def decode(self, latents: Tensor, train) -> Tensor:
        """Normalised images."""
        return to_data(latents.clamp(-1, 1), train.transform)


@dataclass(frozen=True)
class PixelUNet(Denoiser):
    """A UNet on pixels in [-1, 1], trained here: AdamW, labels dropped, a running mean of the weights. For small images.

    The other fields are Prior's.

    Attributes:
        width: channels of the first level; times: T, 2 or more.
        drop: part of the labels, below 1; 0: no null class, and no guidance; average: decay of the running mean, below 1.
    """

    kind: ClassVar[str] = "unet"
    steps: int = 600
    width: int = 48
    times: int = 200
    drop: float = 0.1
    average: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, width=1, times=2)
        for name in ("drop", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise CompanionError(f"{name} {getattr(self, name)!r} is not allowed: 0 or more, below 1")

    @property
    def chain(self) -> Diffusion:
        return Diffusion(self.times)

    def make(self, like) -> UNet:
        return UNet(like.shape[0], like.num_classes, self.width, guided=self.drop > 0).to(like.device)

    def initialise(self, network: UNet, generator: torch.Generator) -> None:
        nets.initialise(network, generator)
        network.start_at_zero()

    def fit(self, network: UNet, train, generator: torch.Generator) -> None:
        real, chain = self.encoded(train), self.chain
        adam = torch.optim.AdamW(network.parameters(), lr=self.lr, weight_decay=0.0, fused=True)
        mean = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        rows: list[Tensor] = []
        for _ in range(self.steps):
            rows = rows or rows_of_epoch(len(train), self.batch, generator)
            chosen = rows.pop()
            x, y = real.draw(chosen, generator), train.labels[chosen]
            loss = denoising(network, chain, x, y, self.drop, generator).loss.mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            follow(mean, network.state_dict(), self.average)
        network.load_state_dict(mean)


@dataclass(frozen=True)
class LatentDiT(Denoiser):
    """DiT-XL/2 at 256 pixels: ``weights`` and ``autoencoder`` are yours.

    The classes of the data are told to the network by their positions in ImageNet-1K (``lib.data.subsets``).
    The other fields are Prior's.

    Attributes:
        autoencoder: to encode: a folder that diffusers' AutoencoderKL reads, or its name; decoder: to decode, alike.
    """

    kind: ClassVar[str] = "dit-xl-2"
    guided: ClassVar[int | None] = 3
    clip: ClassVar[bool] = False
    autoencoder: str = "stabilityai/sd-vae-ft-ema"
    decoder: str = "stabilityai/sd-vae-ft-mse"

    def make(self, like) -> DiT:
        return DiT(**XL2).to(like.device)

    def fit(self, network: nn.Module, train, generator: torch.Generator) -> None:
        raise CompanionError(f"DiT-XL/2 is not trained here: weights='FILE' with {RELEASED}")

    def network(self, train) -> DiT:
        if not self.weights:
            raise CompanionError(f"no weights for DiT-XL/2: weights='FILE' with {RELEASED}")
        network = self.make(train)
        tensors = released(self.weights, len(network.blocks))
        # positions are computed, whoever stored them
        tensors = tensors | {"pos_embed": network.pos_embed.detach()}
        check_state(network, tensors, f"{self.weights} does not fit DiT-XL/2; allowed: {RELEASED}")
        network.load_state_dict(tensors)
        return network.eval().requires_grad_(False)

    def labels(self, train) -> Tensor:
        if train.name not in subsets.SUBSETS:
            raise CompanionError(
                f"DiT-XL/2 knows ImageNet's classes, not those of {train.name!r}; allowed: {', '.join(sorted(subsets.SUBSETS))}"
            )
        return torch.tensor(subsets.positions(train.name), device=train.device)

    @torch.no_grad()
    def encoded(self, train) -> Encoded:
        """Mean and deviation of every latent, plain and mirrored, so that the encoder runs once."""
        if tuple(train.shape) != (3, 256, 256):
            raise CompanionError(
                f"DiT-XL/2 takes images of (3, 256, 256), not {tuple(train.shape)}: load {train.name} with size=256"
            )
        vae = autoencoder(self.autoencoder, train.device)
        means, deviations = [], []
        for flip in (False, True):
            parts = []
            for rows in torch.arange(len(train), device=train.device).split(ENCODED_AT_ONCE):
                x = to_generator(train.images[rows], train.transform)
                law = vae.encode(x.flip(3) if flip else x).latent_dist
                parts.append((SCALE * law.mean, SCALE * law.std))
            means.append(torch.cat([mean for mean, _ in parts]))
            deviations.append(torch.cat([deviation for _, deviation in parts]))
        return Encoded(means, deviations)

    @torch.no_grad()
    def decode(self, latents: Tensor, train) -> Tensor:
        vae = autoencoder(self.decoder, train.device)
        images = torch.cat([vae.decode(part / SCALE).sample for part in latents.split(ENCODED_AT_ONCE)])
        return to_data(images.clamp(-1, 1), train.transform)


def autoencoder(where: str, device: torch.device) -> nn.Module:
    """diffusers' ``AutoencoderKL``, frozen: an optional extra, imported when it is asked for."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise CompanionError(
            f"the autoencoder {where!r} needs diffusers, which is not installed: pip install diffusers"
        ) from error
    try:
        network = AutoencoderKL.from_pretrained(where, use_safetensors=True)
    except (OSError, ValueError) as error:
        line = str(error).split("\n")[0]
        raise CompanionError(
            f"{where!r} is no AutoencoderKL: a folder with config.json and its safetensors ({line})"
        ) from error
    return network.to(device).eval().requires_grad_(False)


def released(path: str, depth: int) -> dict[str, Tensor]:
    """A state dict in a file, under the released names."""
    tensors = state_in(path, RELEASED)[1]
    if not any(name.startswith("transformer_blocks.") for name in tensors):
        return tensors
    try:
        return from_diffusers(tensors, depth)
    except KeyError as error:
        raise CompanionError(f"{path} lacks {error.args[0]}; allowed: {RELEASED}") from error

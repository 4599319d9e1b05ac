r"""DiT - Scalable Diffusion Models with Transformers (Peebles & Xie 2023, arXiv 2212.09748), with the released parameter names.

Tokens are patches of a latent; time and label modulate every block through adaLN-Zero, $x\leftarrow x+g\,F((1+s)\,\mathrm{LN}(x)+b)$ with
$(b,s,g)$ from a linear layer. DiT-XL/2: depth 28, width 1152, 16 heads, patch 2, latents ``(4, 32, 32)`` of 256 pixels, 1000 labels.

:meth:`DiT.scaled` adds the scale vectors $\gamma$ of DiffFit (arXiv 2304.06648), which start at 1 and change nothing until trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.nets.generators.unet import waves
from lib.system.errors import CompanionError

XL2 = {"size": 32, "channels": 4, "num_classes": 1000, "depth": 28, "width": 1152, "heads": 16, "patch": 2}
FREQUENCIES = 256  # of the time's embedding


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gamma_qkv = self.gamma_proj = None

    def forward(self, x: Tensor) -> Tensor:
        qkv = scaled(self.qkv(x), self.gamma_qkv).unflatten(2, (3, self.heads, -1))
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))  # (n, heads, tokens, width / heads)
        return scaled(self.proj(y.transpose(1, 2).flatten(2)), self.gamma_proj)


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = Attention(width, heads), MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.gamma1 = self.gamma2 = None

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(told).unsqueeze(1).chunk(6, 2)
        x = x + scaled(g1 * self.attn(modulated(self.norm1(x), b1, s1)), self.gamma1)
        return x + scaled(g2 * self.mlp(modulated(self.norm2(x), b2, s2)), self.gamma2)


class FinalLayer(nn.Module):
    def __init__(self, width: int, numbers: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, numbers)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return self.linear(
            modulated(self.norm_final(x), *self.adaLN_modulation(told).unsqueeze(1).chunk(2, 2))
        )


class DiT(nn.Module):
    """``(x_t, t, y)`` of latents ``(n, c, size, size)`` -> noise and variance, ``(n, 2 c, size, size)``.

    Attributes:
        null: the label that means "no label", the last row of the table.
    """

    def __init__(
        self, size: int, channels: int, num_classes: int, depth: int, width: int, heads: int, patch: int
    ):
        super().__init__()
        if width % heads or width % 4 or size % patch:
            raise CompanionError(
                f"a DiT of width {width}, {heads} heads, patch {patch}, latents of side {size}: allowed are widths that heads and 4 "
                "divide, and sides that the patch divides"
            )
        self.shape, self.patch, self.null = (channels, size, size), patch, num_classes
        self.x_embedder, self.t_embedder, self.y_embedder = nn.Module(), nn.Module(), nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.t_embedder.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder.embedding_table = nn.Embedding(num_classes + 1, width)
        self.pos_embed = nn.Parameter(positions(width, size // patch), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels * patch**2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise CompanionError(f"latents of {tuple(x.shape[1:])} for a DiT of {self.shape}")
        told = self.t_embedder.mlp(waves(t, FREQUENCIES).to(x.dtype)) + self.y_embedder.embedding_table(y)
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed  # (n, tokens, width)
        for block in self.blocks:
            h = block(h, told)
        side = x.shape[-1] // self.patch
        h = self.final_layer(h, told).unflatten(1, (side, side)).unflatten(3, (self.patch, self.patch, -1))
        return h.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *x.shape[2:])

    def scaled(self, blocks: int | None = None) -> DiT:
        """Add DiffFit's scale vectors to the first blocks (None: the first half, as Minimax does), in place."""
        for block in self.blocks[: len(self.blocks) // 2 if blocks is None else blocks]:
            width, like = block.attn.proj.out_features, block.attn.proj.weight
            block.gamma1, block.gamma2, block.attn.gamma_proj = (
                nn.Parameter(like.new_ones(width)) for _ in range(3)
            )
            block.attn.gamma_qkv = nn.Parameter(like.new_ones(3 * width))
        return self


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def positions(width: int, side: int) -> Tensor:
    """Fixed sines and cosines, half of the width for the column and half for the row of a token, ``(1, side^2, width)``."""
    frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    parts = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]
    return torch.cat([f(part) for part in parts for f in (torch.sin, torch.cos)], 1).float().unsqueeze(0)


def from_diffusers(theirs: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The weights of diffusers' ``DiTTransformer2DModel`` under the released names.

    Its blocks hold a copy of the embedders of time and label each, of which block 0's is also the last layer's: that one is kept.
    Its network spaces the frequencies of the time a little otherwise than the released code, after which ours are.
    """
    told = "transformer_blocks.0.norm1.emb"
    pairs = {
        "x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2", "final_layer.adaLN_modulation.1": "proj_out_1",
        "t_embedder.mlp.0": f"{told}.timestep_embedder.linear_1", "t_embedder.mlp.2": f"{told}.timestep_embedder.linear_2",
    }  # fmt: skip
    for i in range(depth):
        mine, block = f"blocks.{i}", f"transformer_blocks.{i}"
        pairs |= {
            f"{mine}.attn.proj": f"{block}.attn1.to_out.0", f"{mine}.adaLN_modulation.1": f"{block}.norm1.linear",
            f"{mine}.mlp.fc1": f"{block}.ff.net.0.proj", f"{mine}.mlp.fc2": f"{block}.ff.net.2",
        }  # fmt: skip
    kinds = ("weight", "bias")
    found = {f"{mine}.{kind}": theirs[f"{name}.{kind}"] for mine, name in pairs.items() for kind in kinds}
    for i in range(depth):
        for kind in kinds:
            parts = [theirs[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] for part in "qkv"]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    table = theirs[f"{told}.class_embedder.embedding_table.weight"]
    return found | {"y_embedder.embedding_table.weight": table}

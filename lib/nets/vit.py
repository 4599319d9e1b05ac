"""Vision transformer (Dosovitskiy et al., ICLR 2021) as used by DC-BENCH (Cui et al., NeurIPS 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lib.nets.layers import BlockNetwork
from lib.system.errors import CompanionError, unknown


class PatchEmbedding(nn.Module):
    """(n, c, size, size) -> (n, 1 + tokens, dim): linear embedding, class token in front, positions added.

    Token and positions are nn.Embedding tables for their default law, N(0, 1), which is the published one.
    """

    def __init__(self, channels: int, tokens: int, patch: int, dim: int, dropout: float):
        super().__init__()
        self.project = nn.Conv2d(channels, dim, patch, stride=patch)
        self.class_token = nn.Embedding(1, dim)
        self.position = nn.Embedding(1 + tokens, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.project(x).flatten(2).transpose(1, 2)  # (n, tokens, dim)
        first = self.class_token.weight.expand(len(x), -1, -1)
        return self.dropout(torch.cat([first, patches], dim=1) + self.position.weight)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); GELU, no bias in the query-key-value map."""

    def __init__(self, dim: int, heads: int, mlp: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp, dim), nn.Dropout(dropout)
        )

    def attention(self, x: Tensor) -> Tensor:
        # Written out: the fused CPU kernel has no second derivative, which matching gradients needs.
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (n, t, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (n, heads, t, d)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # (n, heads, t, t)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ClassToken(nn.Module):
    """(n, 1 + tokens, dim) -> (n, dim): the class token."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class ViT(BlockNetwork):
    """Patch 4, dim 512, depth 6, heads 8, mlp 512, dropout 0.1 on the embedding and in the blocks.

    ``patch`` defaults to 4, or less where an image would have fewer than 4x4 tokens (2 at 8x8 pixels); it
    must divide the image side, and ``heads`` must divide ``dim`` (CompanionError).  Dropout draws from
    torch's global generator of the device: seed that one, or pass ``dropout=0``, where a run in training
    mode has to be reproducible.
    Taps: ``depth`` token sequences (n, 1 + tokens, dim), class token first.  Embedding: (n, dim), the class
    token after the last norm.  Only ``norm="layer"``; ``first_padding`` is not used.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        size: int,
        *,
        norm: str = "layer",
        first_padding: int | None = None,
        patch: int | None = None,
        dim: int = 512,
        depth: int = 6,
        heads: int = 8,
        mlp: int = 512,
        dropout: float = 0.1,
    ):
        super().__init__()
        if norm != "layer":
            raise unknown("norm of the ViT", norm, ["layer"])
        patch = patch or max(1, min(4, size // 4))
        if size % patch:
            raise CompanionError(f"ViT: the image side must be a multiple of the patch {patch}, not {size}")
        if dim % heads:
            raise CompanionError(f"ViT: dim must be a multiple of the {heads} heads, not {dim}")
        embedding = PatchEmbedding(channels, (size // patch) ** 2, patch, dim, dropout)
        blocks = [TransformerBlock(dim, heads, mlp, dropout) for _ in range(depth)]
        self.blocks = nn.Sequential(nn.Sequential(embedding, blocks[0]), *blocks[1:])
        self.neck = nn.Sequential(ClassToken(), nn.LayerNorm(dim))
        self.classifier = nn.Linear(dim, num_classes)

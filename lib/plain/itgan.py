"""IT-GAN, plainly (Zhao & Bilen 2022): inversion, then matching by latents."""

from __future__ import annotations

import torch

from lib import nets
from lib.nets.generators import the_prior
from lib.plain import draw_omega, siamese


def itgan(p, train, ipc, g):
    G, C, losses = the_prior(p.prior, train), train.num_classes, []

    def image(z, c):  # in the normalised space of the data
        y = torch.full((len(z),), c, device=z.device)
        return train.transform.forward((G(z, y) + 1) / 2)

    X = train.sample(ipc, g)  # the real partner of every latent, (C, ipc, c, h, w)
    y = torch.arange(C, device=train.device).repeat_interleave(ipc)
    z = G.draw(y, g).unflatten(0, (C, ipc))
    if p.inversion == "encoder":
        z = torch.stack([G.encoder(2 * train.transform.inverse(X[c]) - 1, y[y == c])[0] for c in range(C)])
    if p.inversion == "adam":
        psi = nets.make(p.network, train, g).embed  # of an untrained network
        adam = torch.optim.Adam([z.requires_grad_()], lr=p.inversion_lr)
        for _ in range(p.inversion_steps):
            F, F_X, Y = (
                torch.stack(t)
                for t in zip(
                    *((psi(image(z[c], c)), psi(X[c]), image(z[c], c)) for c in range(C)), strict=True
                )
            )
            loss = (F - F_X.detach()).square().mean() + (Y - X).square().mean()
            (z.grad,) = torch.autograd.grad(loss, z)
            adam.step()

    z = z.detach().requires_grad_()
    adam, lam = torch.optim.Adam([z], lr=p.lr), p.regulariser
    for _ in range(p.iterations):
        psi, values = nets.make(p.network, train, g).embed, []  # a new random network, never trained
        for rows in torch.arange(ipc).split(p.batch or ipc):
            T, omega, loss = train.sample(p.real_batch, g), draw_omega(p, train, g), 0
            for c in range(C):
                f, r, t = (psi(siamese(x, omega[c])) for x in (image(z[c, rows], c), X[c, rows], T[c]))
                loss = loss + (1 - lam) * (f.mean(0) - t.detach().mean(0)).square().sum()
                if lam > 1e-5:
                    loss = loss + lam * (f - r.detach()).square().sum(1).mean()
            (z.grad,) = torch.autograd.grad(loss, z)
            adam.step()
            values.append(loss.item())
        losses.append(sum(values) / len(values))
    return torch.cat([z.detach().flatten(0, 1).flatten(1), y[:, None].float()], 1), losses

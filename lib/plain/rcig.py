"""RCIG, plainly (Loo, Hasani, Lechner & Rus 2023): Jacobian and Hessian written out, as matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import functional_call, jacrev

from lib.nets.widening import FeatureNet
from lib.plain import AdaBelief


def rcig(p, train, ipc, g):
    C, X = train.num_classes, train.sample(ipc, g).flatten(0, 1)  # random real images, (m, c, h, w)
    Y, tau = (torch.eye(C).repeat_interleave(ipc, 0) - 1 / C).to(X), torch.zeros(()).to(X)
    lambda_, mean_X, mean_Y, losses = p.ridge * len(X), 0.0, 0.0, []
    pool = [softplus_net(p, train, g) for _ in range(p.networks)]
    adam, ages = [learner(f, p) for f in pool], [0] * p.networks
    step_X, step_Y, step_tau = AdaBelief(p.lr), AdaBelief(p.lr), AdaBelief(p.lr_scale)
    for _ in range(p.iterations):
        k = int(torch.randint(p.networks, (), generator=g))
        rows, f = torch.randperm(len(train), generator=g)[: p.real_batch], pool[k]
        X, Y, tau = X.requires_grad_(), Y.requires_grad_(), tau.requires_grad_()
        X_s, Y_s = (torch.cat([X, X.flip(3)]), torch.cat([Y, Y])) if p.flip else (X, Y)
        (phi_s, J_s), (phi_t, J_t) = expand(f, X_s), expand(f, train.images[rows])  # J: (n, C, P)
        Y_s, scale = Y_s.double(), lambda_ / Y_s.numel()
        A = (phi_s @ phi_s.T + lambda_ * torch.eye(len(X_s))).inverse()
        H = scale * (torch.einsum("icp,ij,jcq->pq", J_s, A, J_s) + torch.eye(J_s.shape[2]))
        b = scale * torch.einsum("icp,ij,jc->p", J_s, A, Y_s)  # L_S = d H d / 2 - b d + const
        moving = torch.arange(len(b)).lt(len(b) - f.classifier.weight.numel() - C).double()
        moving[-C:] = 1  # the last layer is solved for, but for its bias
        delta = solve(H, b, p.lr_inner, moving, p) if p.displaced else torch.zeros_like(b)
        delta.requires_grad_()

        P = J_t @ delta + phi_t @ phi_s.T @ A @ (Y_s - J_s @ delta)
        first, second = Y.topk(2).values.T
        L_T = F.cross_entropy(tau.exp() * P, train.labels[rows]) - (first - second).clamp(max=0.5 / C).mean()
        *direct, g_T = torch.autograd.grad(L_T, (X, Y, tau, delta), retain_graph=True, materialize_grads=True)
        v = solve(H, g_T, p.lr_solver, moving if p.solver == "exact" else 1, p)
        along = v @ (H @ delta.detach() - b)  # of v and the gradient of the inner loss
        implicit = torch.autograd.grad(along, (X, Y, tau), materialize_grads=True)
        if p.displaced and p.implicit:  # with its minus, and never longer than the direct part
            direct = [d - clip(i, d) for d, i in zip(direct, implicit, strict=True)]
        X, Y, tau = step_X(X, direct[0]), step_Y(Y, direct[1]), step_tau(tau, direct[2])
        mean_X, mean_Y = 0.99 * mean_X + 0.01 * X, 0.99 * mean_Y + 0.01 * Y
        steps = 1 + int(torch.randint(p.most_updates, (), generator=g))
        train_network(f, adam[k], X, Y, steps, p.flip)
        ages[k] += steps
        if ages[k] >= p.online_updates:  # old: draw it anew
            f.reset(g)
            adam[k], ages[k] = learner(f, p), 0
        losses.append(L_T.item())
    share = 1 - 0.99**p.iterations
    return (mean_X / share, mean_Y / share), losses


def solve(H, b, lr, moving, p):
    """The x, 0 where it does not move, with H x = b: exactly, or as far as 20 steps of Adam on x H x / 2 - b x come."""
    H, b = H.detach(), b.detach()
    if p.solver == "exact":
        on = moving.bool()
        x = torch.zeros_like(b)
        x[on] = torch.linalg.solve(H[on][:, on], b[on])
        return x
    x, m, s = torch.zeros_like(b), 0.0, 0.0
    for t in range(1, p.solver_steps + 1):
        gradient = moving * (H @ x - b)
        m, s = 0.9 * m + 0.1 * gradient, 0.999 * s + 0.001 * gradient**2
        x = x - lr * m / (1 - 0.9**t) / ((s / (1 - 0.999**t)).sqrt() + 1e-8)
    return x


def clip(i, d):
    """i, at most as long as d."""
    return i * min(1, d.norm() / i.norm()) if i.norm() > 0 else i


class Softplus(FeatureNet):
    """FRePo's network with another activation."""

    def embed(self, x):
        for convolution in self.blocks[1::2]:
            z = convolution(x)
            x = F.avg_pool2d(F.softplus(z, self.beta, 40) if self.beta else z.relu(), 2)
        return x.flatten(1)


def softplus_net(p, train, g):
    f = Softplus(train, p.width, p.depth, norm=False).to(train.images)
    f.beta = p.softplus
    f.reset(g)
    return f


def learner(f, p):
    return torch.optim.Adam(f.parameters(), lr=p.lr_network)


def expand(f, x):
    """Features (n, D) and Jacobian (n, C, P) at the weights as they are, 64 bits."""
    theta = {name: weight.detach() for name, weight in f.named_parameters()}
    J = jacrev(lambda theta: functional_call(f, theta, (x,)))(theta)
    return f.embed(x).double(), torch.cat([part.flatten(2) for part in J.values()], 2).double()


def train_network(f, adam, X, Y, steps, flip):
    """Steps of Adam on the squared error of the whole set."""
    X, Y = (torch.cat([X, X.flip(3)]), torch.cat([Y, Y])) if flip else (X, Y)
    for _ in range(steps):
        adam.zero_grad()
        ((f(X) - Y).square().mean() / 2).backward()
        adam.step()

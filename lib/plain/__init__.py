"""Every algorithm as a reader would write it: one class and one network after the other, the paper's symbols, no options.

Each file holds one function of the method's name, ``f(p, train, ipc, g)``: settings (an instance of the method, of which it reads the
paper's hyper-parameters), training images, stored images per class, random numbers. It returns the images ``(C * ipc, c, h, w)``
(with the labels, where these are learned) and the losses of all steps. One text, three uses: it is shown in the method's notebook, it
is what the tests compare the fast version with, number by number, and what the benchmarks time it against.

Here is what the loops share.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lib import augment, nets
from lib.augment import views
from lib.nets.convnet import ConvNet
from lib.system.errors import unknown


def plain(name: str) -> Callable:
    """The plain version of the method of that name in ``lib.methods.METHODS``."""
    try:
        module = importlib.import_module(f"lib.plain.{name}")
    except ModuleNotFoundError:
        from lib.methods import METHODS

        raise unknown("method", name, METHODS) from None
    return getattr(module, name)


def text(name: str) -> str:
    """The source of a plain version, as it is shown."""
    return inspect.getsource(plain(name)).rstrip()


class Momentum:
    r"""SGD with momentum, $v\leftarrow\beta v+g,\ x\leftarrow x-\eta v$."""

    def __init__(self, eta: float, beta: float = 0.5):
        self.eta, self.beta, self.v = eta, beta, 0.0

    def __call__(self, x: Tensor, gradient: Tensor) -> Tensor:
        self.v = self.beta * self.v + gradient
        return (x - self.eta * self.v).detach()


class AdaBelief:
    r"""$m\leftarrow\beta_1m+(1-\beta_1)g,\ s\leftarrow\beta_2s+(1-\beta_2)(g-m)^2+\epsilon,\
    x\leftarrow x-\eta\,\frac{m}{1-\beta_1^t}\Big/\Big(\sqrt{s/(1-\beta_2^t)}+\epsilon\Big)$."""

    def __init__(self, eta: float):
        self.eta, self.m, self.s, self.t = eta, 0.0, 0.0, 0

    def __call__(self, x: Tensor, g: Tensor) -> Tensor:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.s = 0.999 * self.s + 0.001 * (g - self.m) ** 2 + 1e-16
        step = self.m / (1 - 0.9**self.t) / ((self.s / (1 - 0.999**self.t)).sqrt() + 1e-16)
        return (x - self.eta * step).detach()


class Lamb:
    r"""Adam's direction $u$ at the length of the tensor: $x\leftarrow x-\eta\,\frac{\lVert x\rVert}{\lVert u\rVert}u$."""

    def __init__(self):
        self.m, self.v, self.t = 0.0, 0.0, 0

    def __call__(self, x: Tensor, g: Tensor, eta: float) -> Tensor:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        u = self.m / (1 - 0.9**self.t) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-6)
        return (x - eta * x.norm() / u.norm() * u).detach()


def draw_omega(p, train, g: torch.Generator) -> list[augment.Draw | None]:
    r"""$\omega_c$ for every class: one family of transforms and its parameters (none without augmentation)."""
    names = augment.families(p.augmentation, train)
    if not names:
        return [None] * train.num_classes
    omega = augment.draw(names, train.num_classes, g, mode=p.mode)
    return [
        augment.Draw(omega.names, omega.choice[c : c + 1], omega.u[c : c + 1], omega.mode)
        for c in range(train.num_classes)
    ]


def siamese(images: Tensor, omega: augment.Draw | None) -> Tensor:
    r"""$\mathcal A_\omega$: the same transform for all images."""
    if omega is None:
        return images
    return torch.cat([augment.apply(image[None], omega) for image in images])


def gradient(
    theta: torch.nn.Module, weights: list[Tensor], x: Tensor, c: int, graph: bool = False
) -> tuple[Tensor, ...]:
    r"""$\nabla_\theta\,\ell(x;\theta)$ of the mean cross-entropy of images of class c, with respect to these weights."""
    loss = F.cross_entropy(theta(x), torch.full((len(x),), c, device=x.device))
    return torch.autograd.grad(loss, weights, create_graph=graph, materialize_grads=True)


def row_cosine(A: tuple[Tensor, ...], B: tuple[Tensor, ...]) -> Tensor:
    """DC's distance of two gradients: one minus cosine, summed over rows (output channels) and layers, without vectors."""
    rows = [(a.flatten(1), b.flatten(1)) for a, b in zip(A, B, strict=True) if a.dim() > 1]
    return sum((1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum() for a, b in rows)


def tiles(x: Tensor) -> Tensor:
    """IDC's formation: the four tiles of every image, row by row, each enlarged, ``(m, c, h, w) -> (4 m, c, h, w)``."""
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    parts = [x[..., i : i + h, j : j + w] for i in (0, h) for j in (0, w)]
    return torch.cat([F.interpolate(part, scale_factor=2, mode="bilinear") for part in parts])


def tiled(x: Tensor, ipc: int) -> Tensor:
    """Every second pixel of ``(C, 4 ipc, c, h, w)`` images in the four tiles of ``(C, ipc, c, h, w)``, row by row."""
    part = x[..., ::2, ::2].unflatten(1, (2, 2, ipc))
    return torch.cat([torch.cat([part[:, i, j] for j in (0, 1)], -1) for i in (0, 1)], -2)


DRAWN = 32  # the fast version draws the random numbers of so many epochs at a time


def batches(
    m: int,
    size: int,
    epochs: int,
    g: torch.Generator,
    names: tuple[str, ...] = (),
    mode: str = "single",
    mixed: bool = False,
) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor], tuple[Tensor, Tensor]]]:
    r"""All mini-batches of some epochs over m images: rows, the batch's $\mathcal A$ (own parameters for every image), and for
    CutMix the partners and four uniform numbers."""
    count, options = -(-m // size), len(augment.alternatives(names, mode))
    for epoch in range(epochs):
        if epoch % DRAWN == 0:  # for all of them
            order = torch.arange(m).expand(DRAWN, m)
            if count > 1:
                order = torch.rand(DRAWN, m, generator=g).argsort(1)
            choice = (torch.rand(DRAWN, count, generator=g) * options).long() if options else None
            u = torch.rand(DRAWN, m, 1 if mode == "single" else len(names), 3, generator=g) if names else None
            if mixed:
                mixing, partners = torch.rand(DRAWN, count, 4, generator=g), torch.rand(DRAWN, m, generator=g)
        for b in range(count):
            at, span = epoch % DRAWN, slice(b * size, (b + 1) * size)
            rows = order[at, span]
            omega = None
            if names:
                family = choice[at, b].expand(len(rows)) if options else None
                omega = augment.Draw(names, family, u[at, span], mode)
            mix = (partners[at, span].argsort(0), mixing[at, b]) if mixed else None
            yield rows, lambda x, omega=omega: x if omega is None else augment.apply(x, omega), mix


def learn(
    theta: torch.nn.Module, learner: torch.optim.Optimizer, x: Tensor, y: Tensor, p, train, g: torch.Generator
) -> None:
    """IDC's epoch of a network on real images: every image with an augmentation of its own, and CutMix."""
    names = augment.families(p.augmentation_network, train)
    for rows, A, mix in batches(len(x), p.network_batch, 1, g, names, p.mode, bool(p.cutmix)):
        images, labels, r, partner = A(x[rows]), y[rows], 1.0, None
        if mix is not None and mix[1][0] < p.cutmix:
            partner = mix[0]
            images, r = (value[0] for value in augment.cutmix(images[None], partner[None], mix[1][None, 1:4]))
        logits = theta(images)
        loss = r * F.cross_entropy(logits, labels)
        if partner is not None:
            loss = loss + (1 - r) * F.cross_entropy(logits, labels[partner])
        weights = list(theta.parameters())
        steps = torch.autograd.grad(loss, weights, materialize_grads=True)
        for weight, step in zip(weights, steps, strict=True):
            weight.grad = step
        learner.step()


def experts(p, train, network: str = "") -> list[list[list[Tensor]]]:
    r"""MTT's buffer: $\theta^*_t$ of expert k, a list of weights, after t = 0, 1, .. epochs on the real images, as far as it is read."""
    recorded, e = [], p.experts
    for g in e.generators(train.device):
        learner = nets.make(network or p.network, train, g)
        weights = list(learner.parameters())
        trajectory = [[w.detach().clone() for w in weights]]  # copies: the weights go on in place
        per_epoch = -(-len(train) // e.batch)
        names = augment.families(e.augmentation, train)
        for i, (rows, A, _) in enumerate(batches(len(train), e.batch, p.reach, g, names)):
            loss = F.cross_entropy(learner(A(train.images[rows])), train.labels[rows])
            steps = torch.autograd.grad(loss, weights, materialize_grads=True)
            with torch.no_grad():
                for w, step in zip(weights, steps, strict=True):
                    w -= e.lr * step
            if (i + 1) % per_epoch == 0:
                trajectory.append([w.detach().clone() for w in weights])
        recorded.append(trajectory)
    return recorded


def at(network: nn.Module, theta: list[Tensor], x: Tensor) -> Tensor:
    r"""Logits of the network with weights $\theta$ in the place of its own."""
    names = [name for name, _ in network.named_parameters()]
    return functional_call(network, dict(zip(names, theta, strict=True)), (x,))


def parts(network: nn.Module, vector: Tensor) -> list[Tensor]:
    """A vector of all weights as the list of the network's."""
    shapes = [w.shape for w in network.parameters()]
    pieces = vector.split([shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def initial_weights(network: nn.Module, p, kept: Tensor | None, g: torch.Generator) -> list[list[Tensor]]:
    """DD's networks at their start, each a list of weights that carry gradients."""
    thetas = p.start.draw(network, kept, p.networks, g)
    return [[part.requires_grad_() for part in parts(network, theta)] for theta in thetas]


def independent(images: Tensor, names: tuple[str, ...], g: torch.Generator) -> Tensor:
    r"""$\mathcal A$: one family for the batch, and parameters of its own for every image."""
    return augment.apply(images, augment.draw(names, 1, g, rows=len(images))) if names else images


def descent(*parts) -> Callable[[Tensor], None]:
    """One step of SGD down a loss, in place: for lists of tensors, each followed by its rate and its momentum."""
    triples = [parts[i : i + 3] for i in range(0, len(parts), 3)]
    groups = [{"params": list(tensors), "lr": eta, "momentum": beta} for tensors, eta, beta in triples]
    learned = [tensor.requires_grad_() for group in groups for tensor in group["params"]]
    sgd = torch.optim.SGD(groups)

    def step(loss: Tensor) -> None:
        steps = torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
        for tensor, gradient in zip(learned, steps, strict=True):
            tensor.grad = gradient
        sgd.step()

    return step


def squared(A: list[Tensor], B: list[Tensor]) -> Tensor:
    """Squared distance of two lists of weights."""
    return sum((a - b).square().sum() for a, b in zip(A, B, strict=True))


def first_hallucinators(p, train, g: torch.Generator) -> list[Tensor]:
    """HaBa's numbers at the start: convolutions (weights, biases), scales, shifts and transposed convolutions of all hallucinators."""
    m, (c, h, w), a = p.hallucinators, train.shape, p.identity
    eye = torch.zeros(c, c, 3, 3)
    eye[range(c), range(c), 1, 1] = a

    def law(*size):
        return (1 - a) * (2 * torch.rand(m, *size, generator=g) - 1) / (9 * c) ** 0.5

    W, b, V, d = eye + law(c, c, 3, 3), law(c), eye + law(c, c, 3, 3), law(c)
    return [W, b, torch.ones(m, c, h - 2, w - 2), torch.zeros(m, c, h - 2, w - 2), V, d]


def supcon(e0: Tensor, e1: Tensor, labels: Tensor, T: float) -> Tensor:
    """SupCon: the log share of every row's own class among all other rows, averaged."""
    e, y = F.normalize(torch.cat([e0, e1])), torch.cat([labels, labels])
    total = 0
    for i in range(len(e)):
        others = torch.arange(len(e)) != i
        share = (e[others] @ e[i] / T).log_softmax(0)
        total = total - share[y[others] == y[i]].mean() / len(e)
    return total


def mosaic(images: Tensor, mode: str) -> Tensor:
    """Four images ``(4, m, c, h, w)`` at half their size in the quarters of one, ``(m, c, h, w)``: down, then right."""
    a, b, c, d = (F.interpolate(image, scale_factor=0.5, mode=mode) for image in images)
    return torch.cat([torch.cat([a, b], -2), torch.cat([c, d], -2)], -1)


def expand(images: Tensor) -> Tensor:
    """The quarters of every image, each enlarged to the full size, ``(m, c, h, w) -> (4 m, c, h, w)``."""
    h, w = images.shape[-2] // 2, images.shape[-1] // 2
    quarters = (images[..., :h, :w], images[..., h:, :w], images[..., :h, w:], images[..., h:, w:])
    return torch.cat([F.interpolate(part, scale_factor=2, mode="bilinear") for part in quarters])


# -- recovery from a frozen network ------------------------------------------------------------------------------------------


def see(network: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """What enters every BatchNorm layer, what enters the last layer, and the logits."""
    if isinstance(network, ConvNet):
        a, f = network.look(x, "conv")
        return a, f, network.classifier(f)
    seen: dict[nn.Module, Tensor] = {}
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.Linear)]
    hooks = [m.register_forward_pre_hook(lambda m, inputs: seen.update({m: inputs[0]})) for m in layers]
    logits = network(x)
    for hook in hooks:
        hook.remove()
    *norms, last = layers
    return [seen[m] for m in norms], seen[last], logits


def draw_views(p, side: int, g: torch.Generator) -> list[tuple]:
    r"""$\mathcal A$ of every iteration: crop (top, left, height, width), mirrored or not, pixels down and right."""
    R = p.iterations
    crops = views.crop_boxes(torch.full((R,), p.crop or 1.0, dtype=torch.float64), side, g)
    mirrored = torch.randint(2, (R, 1), generator=g) * int(p.flip)
    shifts = torch.randint(p.roll[0], p.roll[1] + 1, (R, 2), generator=g)
    whole = torch.tensor([[0, 0, side, side]])
    crops = whole.expand_as(crops) if p.crop is None else crops
    return torch.cat([crops, mirrored, shifts], 1).tolist()


def view(x: Tensor, numbers: tuple) -> Tensor:
    r"""$\mathcal A(x)$: crop, resize to what it was, mirror, roll."""
    top, left, height, width, mirrored, *shift = numbers
    seen = x[:, :, top : top + height, left : left + width]
    seen = F.interpolate(seen, x.shape[2:], mode="bilinear", align_corners=False)
    return (seen.flip(3) if mirrored else seen).roll(shift, (2, 3))


def pixel_range(train) -> tuple[Tensor, Tensor]:
    """The normalised values of black and white, per channel."""
    return tuple(
        train.transform.forward(torch.full((train.channels, 1, 1), v).to(train.images)) for v in (0.0, 1.0)
    )


def gradients(z: Tensor, h: Tensor, y: Tensor) -> Tensor:
    r"""$g_i=[e_i;\ \mathrm{vec}(e_ih_i^\top)],\ e=p-y$: of the cross-entropy of every image by the last layer, ``(n, C (1 + d))``, from
    its logits ``(n, C)``, inputs ``(n, d)`` and labels."""
    e = z.softmax(1) - F.one_hot(y, z.shape[1])
    return torch.cat([e, (e[:, :, None] * h[:, None, :]).flatten(1)], 1)


def critic_loss(D, x, y, x_, y_, p, penalised: bool, g: torch.Generator) -> Tensor:
    r"""DiM's critic: $D_s(\hat x)-D_s(x)$, both classes, and in some steps how far its slope between them is from 1."""
    (source, classes), (source_, classes_) = D(x), D(x_)
    loss = source_.mean() - source.mean() + F.cross_entropy(classes_, y_) + F.cross_entropy(classes, y)
    if not penalised:
        return loss
    alpha = torch.rand(len(y), generator=g)[:, None, None, None]
    between = (alpha * x + (1 - alpha) * x_).requires_grad_()
    (slope,) = torch.autograd.grad(D(between)[0].sum(), between, create_graph=True)
    return loss + p.penalty * p.penalty_every * ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()


def cosines(latents: Tensor, kept: list[Tensor]) -> Tensor:
    """Of every latent with every one of a memory of flattened ones."""
    return F.cosine_similarity(latents.flatten(1)[:, None], torch.stack(kept)[None], dim=2)


def ancestral(eps, y, null: int, shape, abar: Tensor, count: int, scale: float, g: torch.Generator) -> Tensor:
    r"""DDPM backwards over ``count`` of the steps of $\bar\alpha$, with guidance; the predicted image is clamped."""
    last = len(abar) - 1
    x, steps = torch.randn(len(y), *shape, generator=g), [round(k * last / (count - 1)) for k in range(count)]
    for k in reversed(range(count)):
        now, before = abar[steps[k]], abar[steps[k - 1]] if k else torch.ones(())
        t, none = torch.full_like(y, steps[k]), torch.full_like(y, null)
        without = eps(x, t, none)
        e = without + scale * (eps(x, t, y) - without)
        clean = ((x - (1 - now).sqrt() * e) / now.sqrt()).clamp(-1, 1)
        beta = 1 - now / before
        x = (before.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - before) * x) / (1 - now)
        if k:
            x = x + (beta * (1 - before) / (1 - now)).sqrt() * torch.randn(x.shape, generator=g)
        x = x.float().detach()
    return x

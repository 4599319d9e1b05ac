r"""Ridge regression with a network that is replaced by its first-order expansion in the weights (a frozen finite NTK model).

With features $\phi$ and Jacobian $J$ at the weights of a network (``lib.nets.tangent``), $K=\phi_s\phi_s^\top$ and $R=Y-J_s\delta$, the
last layer is solved in closed form, and what is left of the loss is quadratic in the displacement $\delta$ of the other weights:

$$L_S(\delta)=\frac{\lambda}{2nC}\Big[\operatorname{tr}R^\top(K+\lambda I)^{-1}R+\lVert\delta\rVert^2\Big]
=\tfrac12\delta^\top H\delta-b^\top\delta+\text{const},\qquad
H=\frac{\lambda}{nC}\Big[J_s^\top\big((K+\lambda I)^{-1}\otimes I_C\big)J_s+I\Big]$$

so that its minimiser and every $v=H^{-1}g$ are one linear system, which is solved by name: ``exact`` with one Cholesky factor of the dual
$M=K\otimes I_C+J_sJ_s^\top+\lambda I$, of size nC, in 64 bits; ``cg`` by conjugate gradients; ``adam`` by a few Adam steps, as published.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.kernels import ridge
from lib.nets.tangent import TangentNet
from lib.system.errors import CompanionError

SOLVERS = ("adam", "cg", "exact")
LARGEST = (
    2**29
)  # entries of a Jacobian that is kept, 4 GB in 64 bits; beyond, every product is a pass through the network
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Inner:
    """The inner problem of one network and one set: all that does not depend on the displacement.

    Attributes:
        network: theta_0, frozen; x, y: the support (n, c, h, w) and its labels (n, C), 64 bits; lam: lambda as it stands.
        gram: K + lambda I (n, n); factor: its Cholesky factor; J: the Jacobian (nC, P), rows image by image, or None.
    """

    network: TangentNet
    x: Tensor
    y: Tensor
    lam: float
    gram: Tensor
    factor: Tensor
    J: Tensor | None

    @classmethod
    def at(cls, network: TangentNet, x: Tensor, y: Tensor, lam: float, largest: int = LARGEST) -> Inner:
        """Features, kernel and, unless it has more than ``largest`` entries, the Jacobian."""
        x, y = x.detach(), y.detach().double()
        with torch.no_grad():
            phi = network.embed(x).double()
        gram = ridge.regularised(phi @ phi.T, lam, scaled=False)
        J = network.jacobian(x).flatten(0, 1).double() if y.numel() * network.size <= largest else None
        return cls(network, x, y, lam, gram, ridge.cholesky(gram), J)

    @property
    def scale(self) -> float:
        """lambda / (nC), at most the smallest eigenvalue of H."""
        return self.lam / self.y.numel()

    def push(self, delta: Tensor) -> Tensor:
        """J delta, (n, C)."""
        if self.J is not None:
            return (self.J @ delta).view_as(self.y)
        with torch.no_grad():
            return self.network.tangent(self.x, delta)[1].double()

    def pull(self, u: Tensor) -> Tensor:
        """J^T u, (P,), of (n, C)."""
        if self.J is not None:
            return self.J.T @ u.flatten()
        zero = self.y.new_zeros(self.network.size).requires_grad_()
        o = self.network.tangent(self.x, zero)[1]
        return torch.autograd.grad((o * u.to(o.dtype)).sum(), zero)[0]

    def dual(self, r: Tensor) -> Tensor:
        """(K + lambda I)^-1 r, (n, C)."""
        return torch.cholesky_solve(r, self.factor)

    def loss(self, delta: Tensor) -> Tensor:
        """L_S(delta)."""
        r = self.y - self.push(delta)
        return self.scale / 2 * ((r * self.dual(r)).sum() + delta.square().sum())

    def hessian(self, v: Tensor) -> Tensor:
        """H v, (P,)."""
        return self.scale * (self.pull(self.dual(self.push(v))) + v)

    @functools.cached_property
    def b(self) -> Tensor:
        """Minus the gradient of L_S at delta = 0: the gradient at delta is H delta - b."""
        return self.scale * self.pull(self.dual(self.y))

    @functools.cached_property
    def factor_of_m(self) -> Tensor:
        """Cholesky factor of M = K (x) I + J J^T + lambda I, rows image by image.

        Raises:
            CompanionError: the Jacobian is too large to be kept.
        """
        if self.J is None:
            rows, columns = self.y.numel(), self.network.size
            raise CompanionError(
                f"solver 'exact' needs a Jacobian of {rows} x {columns} entries; allowed: {LARGEST} entries, or solver cg or adam"
            )
        eye = torch.eye(self.y.shape[1], dtype=self.y.dtype, device=self.y.device)
        return ridge.cholesky(torch.kron(self.gram, eye) + self.J @ self.J.T)

    def inverse(self, g: Tensor) -> Tensor:
        """H^-1 g = (nC / lambda) (g - J^T M^-1 J g)."""
        factor = self.factor_of_m
        return (g - self.J.T @ torch.cholesky_solve((self.J @ g)[:, None], factor)[:, 0]) / self.scale

    def minimiser(self) -> Tensor:
        """delta* = J^T M^-1 vec(Y), the exact H^-1 b."""
        factor = self.factor_of_m
        return self.J.T @ torch.cholesky_solve(self.y.reshape(-1, 1), factor)[:, 0]


def gradient_along(v: Tensor, network: TangentNet, x: Tensor, y: Tensor, lam: float, delta: Tensor) -> Tensor:
    r"""$\langle v,\partial_\delta L_S(\delta)\rangle$ as a function of the support, differentiable in ``x`` and ``y``."""
    phi, o = network.tangent(x, delta)
    along = network.tangent(x, v)[1].double()  # J_s v
    gram = ridge.regularised(phi.double() @ phi.double().T, lam, scaled=False)
    a = ridge.solve(gram, y.double() - o.double())
    return lam / y.numel() * (delta @ v - (along * a).sum())


def adam(
    hessian: Product, b: Tensor, steps: int, lr: float, moving: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Adam from 0 on x^T H x / 2 - b^T x: x (P,), and x^T (H x - 2 b), twice the objective, before every step, (steps,).

    Args:
        moving: (P,), 0 where x stays 0.
    """
    x, m, s, seen = torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b), []
    for t in range(1, steps + 1):
        product = hessian(x)
        gradient = moving * (product - b)
        seen.append(x @ (product - 2 * b))
        m = 0.9 * m + 0.1 * gradient
        s = 0.999 * s + 0.001 * gradient.square()
        x = x - lr * (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + 1e-8)
    return x, torch.stack(seen)


def conjugate_gradient(hessian: Product, b: Tensor, steps: int, tolerance: float = 1e-10) -> Tensor:
    """x with H x = b, of at most so many steps from 0; it stays where the residual is below ``tolerance`` of b."""
    x, r = torch.zeros_like(b), b.clone()
    p, rho = r, r @ r
    enough = tolerance**2 * rho
    for _ in range(steps):
        going = rho > enough
        q = hessian(p)
        alpha = torch.where(going, rho / torch.where(going, p @ q, 1), 0)
        x, r = x + alpha * p, r - alpha * q
        new = r @ r
        p, rho = r + torch.where(going, new / torch.where(going, rho, 1), 0) * p, new
    return x


def predict(network, x_s: Tensor, y_s: Tensor, lam: float, delta: Tensor | None, x_t: Tensor) -> Tensor:
    """P = o_t + phi_t phi_s^T (K + lambda I)^-1 (Y_s - o_s) in 64 bits, (targets, C); without ``delta``, o = 0."""
    if delta is None:
        (phi_s, o_s), (phi_t, o_t) = ((network.embed(x).double(), 0) for x in (x_s, x_t))
    else:
        (phi_s, o_s), (phi_t, o_t) = (map(Tensor.double, network.tangent(x, delta)) for x in (x_s, x_t))
    return o_t + ridge.predict(phi_t @ phi_s.T, phi_s @ phi_s.T, y_s.double() - o_s, lam, scaled=False)

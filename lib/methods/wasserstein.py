r"""WassersteinDM - distribution matching by optimal transport. A reconstruction: no paper or code of it is published.

"Dataset Condensation by Minimizing Wasserstein Distance" (Chen et al. 2024) is known by name and by its definition alone,

$$W_1(\mu,\nu)=\max_{\lVert\theta\rVert_{Lip}\le1}|\mathbb E_\mu\theta-\mathbb E_\nu\theta|
 =\min_{\gamma\in\Gamma(\mu,\nu)}\mathbb E_\gamma\lVert X-Y\rVert .$$

Here every step is DM's (``lib.methods.dm``), with the distance of the class means replaced by a distance D of the two sets of
embeddings (``lib.match.points``: W_2^2, W_1, Sinkhorn, sliced, or the dual of W_1 by learned critics on pixels),

$$\min_{\mathcal S}\ \mathbb E_{\theta,\omega}\ \sum_c D\big(\{\psi_\theta(\mathcal A_\omega(x_{c,i}))\}_{i\le n},
 \{\psi_\theta(\mathcal A_\omega(s_{c,j}))\}_{j\le m}\big).$$

No numbers are published, so none are quoted; learned weights of the synthetic images are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lib.match.distance import Distance
from lib.match.features import ClassMean
from lib.match.points import Critic, Sinkhorn, Sliced, Wasserstein
from lib.methods.dm import DM
from lib.recipes import Recipes, published, small


@dataclass(frozen=True)
class WassersteinDM(DM):
    """DM's hyper-parameters: nothing is published. ``real_batch`` should be at least five times the IPC. The fields are DM's.

    Attributes:
        distance: one of :data:`DISTANCES`.
    """

    distance: Distance = Wasserstein(p=2)


DISTANCES = {
    "mean": ClassMean(),
    "w1": Wasserstein(p=1),
    "w2": Wasserstein(p=2),
    "sinkhorn": Sinkhorn(),
    "sliced": Sliced(),
    "critic": Critic(),
}
_W2 = WassersteinDM()
_DATA = "mnist fashionmnist svhn cifar10 cifar100"
_OURS = "ours: nothing is published; as DM"
# On the small photographs the noise of small batches' plans asks for a lower rate.
# W_1 has unit vectors for gradients: its rate is multiplied by a typical displacement.
RECIPES = Recipes(
    small(
        "digits", WassersteinDM(iterations=200, real_batch=64, network="convnet-d2-w32", augmentation="none")
    ),
    small(
        "fashion14",
        WassersteinDM(iterations=80, lr=3.0, real_batch=32, network="convnet-d3-w32", augmentation="none"),
    ),
    small(
        "photos16 photos32", WassersteinDM(iterations=200, lr=0.3, real_batch=64, network="convnet-d3-w32")
    ),
    published(_DATA, (1, 10, 50), _W2, "dsa", _OURS),
    published(
        "tinyimagenet", (1, 10, 50), replace(_W2, iterations=10_000, network="convnet-d4-w128"), "dsa", _OURS
    ),
    *(
        published(
            _DATA, (1, 10, 50), replace(_W2, distance=DISTANCES[name], lr=lr), "dsa", _OURS, variant=name
        )
        for name, lr in (("w1", 10.0), ("sinkhorn", 1.0), ("sliced", 1.0), ("critic", 10.0))
    ),
)

"""K networks of one architecture, trained and applied as one: every parameter is stacked to ``(K, ...)``.

A ConvNet runs as one network with K groups, which is what makes five evaluations cost little more than one at small sizes.
Other architectures are applied one network after the other, with the same interface and the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lib import nets
from lib.nets.convnet import ConvNet
from lib.system.errors import CompanionError


class Ensemble:
    """K independent networks.

    Attributes:
        template: a module of the architecture; only its structure and its train/eval mode matter.
        parameters: name -> ``(K, ...)`` leaf tensors that require grad.
        buffers: name -> ``(K, ...)`` (running statistics of batch norms).
    """

    def __init__(self, template: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor]):
        self.template, self.parameters, self.buffers = template, parameters, buffers
        self.size = next(iter(parameters.values())).shape[0]

    @classmethod
    def make(
        cls, network: str | Callable[[], nn.Module], like, generators: Sequence[torch.Generator]
    ) -> Ensemble:
        """One network per generator, network k drawn from generator k alone (so that it does not depend on K).

        Args:
            network: a name (:func:`lib.nets.make`), or what makes a module; its own initialisation then holds, from the seed of the
                generator.
        """
        own = not isinstance(network, str)
        template = _made(network, like, generators[0]) if own else nets.make(network, like)
        states = []
        for generator in generators:
            drawn = _made(network, like, generator) if own else nets.initialise(template, generator)
            states.append({key: tensor.detach().clone() for key, tensor in drawn.state_dict().items()})
        stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
        names = {key for key, _ in template.named_parameters()}
        return cls(
            template,
            {key: tensor.requires_grad_() for key, tensor in stacked.items() if key in names},
            {key: tensor for key, tensor in stacked.items() if key not in names},
        )

    @classmethod
    def of(cls, network: nn.Module) -> Ensemble:
        """One given network, whose weights are shared, as an ensemble of one."""
        parameters = {name: tensor.detach().unsqueeze(0) for name, tensor in network.named_parameters()}
        return cls(
            network, parameters, {name: tensor.unsqueeze(0) for name, tensor in network.named_buffers()}
        )

    def train(self, mode: bool = True) -> Ensemble:
        """Train or eval mode (batch norm, dropout)."""
        self.template.train(mode)
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``(K, n, classes)`` of ``x``: ``(K, n, c, h, w)``, or ``(1, n, c, h, w)`` for the same images to all."""
        return apply(self.template, self.parameters | self.buffers, x, "logits")

    def embed(self, x: Tensor) -> Tensor:
        """Inputs of the last linear layer, ``(K, n, d)``."""
        return apply(self.template, self.parameters | self.buffers, x, "embed")

    def detached(self) -> Ensemble:
        """The same networks, to whose weights no gradient flows."""
        fixed = {name: tensor.detach() for name, tensor in self.parameters.items()}
        return Ensemble(self.template, fixed, self.buffers)

    def network(self, k: int) -> nn.Module:
        """A stand-alone copy of network k."""
        import copy

        network = copy.deepcopy(self.template)
        tensors = self.parameters | self.buffers
        network.load_state_dict({name: tensors[name][k] for name in network.state_dict()})
        return network


def _made(make: Callable[[], nn.Module], like, generator: torch.Generator) -> nn.Module:
    """A network of somebody else, initialised as it does itself, from the generator's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        network = make()
    if not isinstance(network, nn.Module):
        raise CompanionError(f"network {make!r} makes {type(network).__name__}; allowed: a torch.nn.Module")
    return network.to(like.device)


class _Method(nn.Module):
    """``functional_call`` reaches only ``forward``; this makes another method of a network its forward."""

    def __init__(self, net: nn.Module, method: str):
        super().__init__()
        self.net, self.method = net, method

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.net, self.method)(x)


def apply(template: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, output: str = "logits") -> Tensor:
    """Apply G networks with stacked parameters and buffers, ``(G, n, c, h, w) -> (G, n, ...)``.

    Args:
        template: the architecture; its own weights are not used.
        tensors: name -> ``(G, ...)``, parameters and buffers. Running statistics are updated in place in train mode.
        x: one batch per network, or ``(1, n, c, h, w)`` for all.
        output: ``logits`` or ``embed``.
    """
    if isinstance(template, ConvNet):
        return (template.grouped_logits if output == "logits" else template.grouped_embed)(tensors, x)
    groups = next(iter(tensors.values())).shape[0]
    module = _Method(template, "forward" if output == "logits" else "embed")
    batches = x.expand(groups, *x.shape[1:])
    return torch.stack(
        [
            functional_call(
                module, {f"net.{name}": tensor[k] for name, tensor in tensors.items()}, (batches[k],)
            )
            for k in range(groups)
        ]
    )

"""The library's hot spots at a given size: methods beside their plain versions (``lib.plain``), the rest beside the plain loops of
``benchmarks.reference``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.harness import REFERENCE, HotSpot, difference
from lib import augment
from lib.augment import augment_by_class
from lib.data.imageset import NATURAL, ImageSet
from lib.data.whitening import Standardise
from lib.evaluate import networks as fresh
from lib.evaluate.protocol import Protocol
from lib.formation import by_class
from lib.methods import method as class_of
from lib.methods.dm import DM
from lib.nets.ensemble import Ensemble
from lib.nets.training import _Chance, predict
from lib.plain import plain
from lib.synset import SyntheticSet, class_major

NETWORKS = 5
# Largest relative errors. In float32 it is the few ReLUs at zero that fall either way at size L (in float64 the gradients
# agree to 1e-14); in bfloat16 the class means nearly cancel in DM.
FLOAT32, BFLOAT16 = 1e-2, 0.2


@dataclass(frozen=True)
class Setting:
    """Shapes of one benchmark; random images, 3 channels."""

    side: int
    depth: int
    width: int
    classes: int = 10
    ipc: int = 10
    real: int = 64  # per class and step
    test: int = 2000
    epochs: int = 10  # of the evaluation networks, in one timed call
    mixed: bool = False  # also time bfloat16 where the library offers it
    warm_up: int = 1  # calls before the timed ones
    device: torch.device = torch.device("cpu")

    @property
    def network(self) -> str:
        return f"convnet-d{self.depth}-w{self.width}"

    def images(self, count: int, seed: int) -> ImageSet:
        """``count`` random images per class."""
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(self.classes * count, 3, self.side, self.side, generator=generator)
        names = tuple(f"class {c}" for c in range(self.classes))
        transform = Standardise(torch.full((3,), 0.5), torch.full((3,), 0.25))
        return ImageSet(
            "random", pixels, class_major(self.classes, count, "cpu"), names, transform, NATURAL
        ).to(self.device)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def plain_network(self, state: dict[str, Tensor] | None = None) -> reference.ConvNet:
        network = reference.ConvNet(3, self.classes, self.side, self.width, self.depth).to(self.device)
        if state is not None:
            network.load_state_dict(state)
        return network


SIZES = {
    "S": Setting(8, 2, 32),
    "L": Setting(32, 3, 128, test=256, epochs=1, mixed=True),
}


def _given(names: tuple[str, ...], omega: augment.Draw) -> reference.Augment:
    """The reference's siamese augmentation with the library's draw."""
    return lambda c, x: reference.FAMILIES[names[omega.choice[c]]](x, omega.u[c].expand(len(x), 3))


def _seeded(names: tuple[str, ...], counter) -> reference.Augment:
    """The reference's own: a new seed for every step, shared by the two calls of a class."""
    seed = next(counter)
    return lambda c, x: reference.siamese(names, 1000 * seed + c, x)


STEPS = 2  # of a distillation in one timed call


def distillation(
    setting: Setting, title: str, name: str, methods: dict, train=None, ipc: int | None = None
) -> HotSpot:
    """All steps of a method beside its plain version (``lib.plain``), which draws the same random numbers: networks are made,
    real images drawn and augmented, stored images updated.

    Args:
        methods: candidate -> settings; the plain version reads those of the first.
        train, ipc: other real images, and images per class, than the setting's.
    """
    ipc, slow = ipc or setting.ipc, plain(name)
    train = train or setting.images(max(setting.real, 4 * ipc), 0)
    first = next(iter(methods.values()))

    def fast(method) -> tuple[Tensor, Tensor]:
        g = setting.generator(1)
        state = method.begin(train, ipc, g)
        losses = [method.step(state, g)["loss"] for _ in range(method.total_steps(ipc))]
        return method.finish(state).codes, torch.stack(losses)

    def reference_run() -> tuple[Tensor, list[float]]:
        made, losses = slow(first, train, ipc, setting.generator(1))
        return made[0] if isinstance(made, tuple) else made, losses  # the labels too, where these are learned

    def check() -> dict[str, float]:
        start = first.finish(first.begin(train, ipc, setting.generator(1))).codes
        images, losses = reference_run()
        worst = {}
        for candidate, method in methods.items():
            codes, found = fast(method)
            wanted = torch.tensor(losses, device=found.device)
            worst[candidate] = max(difference(found, wanted), difference(codes - start, images - start))
        return worst

    calls = {candidate: lambda method=method: fast(method) for candidate, method in methods.items()}
    units = first.total_steps(ipc)
    return HotSpot(title, "step", units, {REFERENCE: reference_run} | calls, check, _tolerances(methods))


def candidates(setting: Setting, method, grouped: str = "all classes at once") -> dict:
    """The method as it is, and with its real side in bfloat16 where that is timed too."""
    found = {grouped: method}
    if setting.mixed:
        found["real side in bfloat16"] = replace(method, mixed=True)
    return found


def dm(setting: Setting) -> HotSpot:
    """DM iterations: new network, real batch, siamese augmentation, update of the pixels."""
    method = DM(real_batch=setting.real, network=setting.network, iterations=STEPS)
    return distillation(setting, "DM step", "dm", candidates(setting, method))


def grouped(setting: Setting) -> str:
    """How a matching step goes about the classes at this size."""
    small = setting.side < 32 or setting.device.type == "cuda"
    return "all classes in one graph" if small else "class by class"


def matching(setting: Setting, name: str) -> HotSpot:
    """Matching steps of DC or DSA with their updates of the pixels, each in a new network that is not trained."""
    common = {"real_batch": setting.real, "network": setting.network, "outer": STEPS, "inner": 1}
    method = class_of(name)(**common)
    return distillation(
        setting, f"{name.upper()} matching step", name, candidates(setting, method, grouped(setting))
    )


def _tolerances(methods: dict) -> dict[str, float]:
    return {
        name: BFLOAT16 if getattr(method, "mixed", False) else FLOAT32 for name, method in methods.items()
    }


def evaluation(setting: Setting) -> HotSpot:
    """Training of the evaluation networks on S, with DSA, as ``lib.evaluate`` does it."""
    train = setting.images(setting.ipc, 0)
    protocol = Protocol(
        "benchmark", network=setting.network, epochs=setting.epochs, schedule="constant", augmentation="data"
    )
    synset = SyntheticSet(train.images, train.labels, train.classes, train.transform)
    runs = fresh._together([synset], NETWORKS, train, protocol)
    names = augment.strategy(train.augmentation)

    def ours(protocol: Protocol = protocol) -> list[Ensemble]:
        ensembles = []
        for pairs in runs:
            generators = [setting.generator(k) for _, k in pairs]
            networks = Ensemble.make(setting.network, train, generators)
            images, labels = (
                tensor.expand(len(pairs), *tensor.shape) for tensor in (train.images, train.labels)
            )
            fresh.train(networks, images, labels, generators, protocol, train)
            ensembles.append(networks)
        return ensembles

    def plain() -> None:
        for _ in range(NETWORKS):
            network = setting.plain_network()
            reference.train(
                network,
                train.images,
                train.labels,
                setting.epochs,
                lambda e, b, x: reference.per_image(names, x),
            )

    def check() -> dict[str, float]:
        short = replace(protocol, epochs=min(3, setting.epochs))
        trained = [ensemble.network(k) for ensemble in ours(short) for k in range(ensemble.size)]
        worst = 0.0
        for k in range(NETWORKS):
            generator = setting.generator(k)
            start = Ensemble.make(setting.network, train, [generator]).network(0).state_dict()
            chance = _Chance([generator], len(train), min(protocol.batch, len(train)), names, "single", 0.0)
            network = setting.plain_network(start)
            reference.train(
                network, train.images, train.labels, short.epochs, _recorded(chance), _orders(chance)
            )
            learned = [_vector(net.state_dict()) - _vector(start) for net in (trained[k], network)]
            worst = max(worst, difference(*learned))
        return {name: worst}

    name = f"{len(runs[0])} networks side by side" if len(runs) < NETWORKS else "one network, resident data"
    units = NETWORKS * setting.epochs
    return HotSpot("evaluation", "network-epoch", units, {REFERENCE: plain, name: ours}, check, {name: 1e-2})


def _recorded(chance: _Chance):
    def augmented(epoch: int, b: int, x: Tensor) -> Tensor:
        omega = chance.omega(epoch, b)
        return reference.FAMILIES[omega.names[omega.choice[0]]](x, omega.u[:, 0])

    return augmented


def _orders(chance: _Chance):
    def batches(epoch: int) -> list[list[int]]:
        rows = [chance.rows(epoch, b) for b in range(chance.batches)]
        return [list(range(chance.m)) if row is None else row[0].tolist() for row in rows]

    return batches


def _vector(state: dict[str, Tensor]) -> Tensor:
    # The bias of a convolution in front of an instance norm has no gradient but rounding noise.
    return torch.cat([value.flatten() for key, value in state.items() if not _idle(key)])


def _idle(key: str) -> bool:
    """``features.{4i}.bias``, the bias of a convolution."""
    part, *rest = key.split(".")
    return part == "features" and rest[1] == "bias" and int(rest[0]) % 4 == 0


def test_pass(setting: Setting) -> HotSpot:
    """Accuracy of the evaluation networks on the test images."""
    test = setting.images(max(1, setting.test // setting.classes), 4)
    networks = Ensemble.make(setting.network, test, [setting.generator(k) for k in range(NETWORKS)])
    plain_networks = [setting.plain_network(networks.network(k).state_dict()) for k in range(NETWORKS)]

    def plain() -> list[float]:
        return [reference.test(network, test.images, test.labels) for network in plain_networks]

    def ours() -> Tensor:
        return fresh.accuracy(predict(networks, test.images), test)

    @torch.no_grad()
    def check() -> dict[str, float]:
        logits = torch.stack([network.eval()(test.images) for network in plain_networks])
        accuracies = (ours().cpu() - torch.tensor(plain(), dtype=torch.float64)).abs().max()
        # An image whose two best logits tie to rounding may fall either way.
        assert accuracies * len(test) <= 2, accuracies
        return {"chunks, networks together": difference(predict(networks, test.images), logits)}

    name = "chunks, networks together"
    return HotSpot("test pass", "network", NETWORKS, {REFERENCE: plain, name: ours}, check, {name: 1e-4})


def siamese(setting: Setting) -> HotSpot:
    """Siamese augmentation of the real and the synthetic batch of every class, forward."""
    train = setting.images(max(setting.real, setting.ipc), 0)
    real, syn = (
        by_class(train.images, setting.classes)[:, :n].contiguous() for n in (setting.real, setting.ipc)
    )
    names, g, counter = augment.strategy(train.augmentation), setting.generator(1), itertools.count()

    def loop(aug: reference.Augment) -> list[Tensor]:
        return [torch.cat([aug(c, real[c]), aug(c, syn[c])]) for c in range(setting.classes)]

    def ours(omega: augment.Draw | None = None) -> tuple[Tensor, Tensor]:
        omega = omega or augment.draw(names, setting.classes, g)
        return augment_by_class(real, omega), augment_by_class(syn, omega)

    def check() -> dict[str, float]:
        worst = 0.0
        for _ in range(5):
            omega = augment.draw(names, setting.classes, g)
            worst = max(worst, difference(torch.cat(ours(omega), 1), torch.stack(loop(_given(names, omega)))))
        return {name: worst}

    name = "rows of a family together" if setting.device.type == "cpu" else "every family, then pick"
    candidates = {REFERENCE: lambda: loop(_seeded(names, counter)), name: ours}
    return HotSpot("siamese DSA", "call", 1, candidates, check, {name: 1e-4})


HOT_SPOTS = {
    "dm": dm,
    "dc": lambda setting: matching(setting, "dc"),
    "dsa": lambda setting: matching(setting, "dsa"),
    "evaluation": evaluation,
    "siamese": siamese,
    "test": test_pass,
}

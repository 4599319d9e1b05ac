"""One step of every relative of DM beside the plain per-class loop of ``benchmarks.reference_features``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import reference_features as plain
from benchmarks.harness import REFERENCE, HotSpot, difference
from benchmarks.hot_spots import (
    Setting,
    _compare,
    _given,
    _pixels,
    _real_of,
    _seeded,
    _tolerances,
    _vector,
)
from lib import augment, nets
from lib.match.attention import VARIANTS
from lib.methods.cafe import CAFE
from lib.methods.datadam import DataDAM
from lib.methods.ddm import DDM
from lib.methods.dm import DM
from lib.methods.idm import IDM
from lib.methods.m3d import M3D
from lib.methods.wasserstein import WassersteinDM


def relative(setting: Setting, title: str, method: DM, distance: Callable, together=None) -> HotSpot:
    """One step: new network, real batch, siamese augmentation, update of the pixels."""
    train = setting.images(max(setting.real, setting.ipc), 0)
    methods = {"all classes at once": method}
    if setting.mixed:
        methods["real side in bfloat16"] = replace(method, mixed=True)
    names = augment.strategy(train.augmentation)
    counter, real_of = itertools.count(), _real_of(train, setting.real)

    def begin(one: DM):
        return one.begin(train, setting.ipc, setting.generator(1))

    def network(state=None):
        return setting.plain_network(state)

    pixels, optimiser = _pixels(begin(method))

    def loop() -> Tensor:
        aug = _seeded(names, counter)
        return plain.step(network(), pixels, optimiser, setting.classes, real_of, aug, distance, together)

    def check() -> dict[str, float]:
        g = setting.generator(2)  # the library's order of draws: weights, images, augmentation
        state = begin(method)
        weights = nets.initialise(state.network, g).state_dict()
        real = train.sample(setting.real, g)
        omega = augment.draw(names, setting.classes, g)
        own, own_optimiser = _pixels(state)
        loss = plain.step(
            network(weights), own, own_optimiser, setting.classes, real.__getitem__, _given(names, omega),
            distance, together,
        )  # fmt: skip
        return {
            name: _compare(_matched(one), begin(one), setting, loss, own) for name, one in methods.items()
        }

    states = {name: begin(one) for name, one in methods.items()}
    g = setting.generator(3)
    candidates = {name: lambda one=one, s=states[name]: _matched(one)(s, g) for name, one in methods.items()}
    return HotSpot(title, "step", 1, {REFERENCE: loop} | candidates, check, _tolerances(methods))


def _matched(method: DM):
    """The image update under a new network, whatever else a step of the method does."""
    return lambda state, g: method.match(state, DM.encoder(method, state, g), g)


def m3d(setting: Setting) -> HotSpot:
    # Whole images and one network per step, as the others; the released settings decode mosaics and share networks.
    method = M3D(
        **_common(setting), init="real", augmentation="data", mode="single", space="normalised", factor=1, ipm=1,
        sequential=False,
    )  # fmt: skip
    return relative(setting, "M3D step", method, plain.gaussian_mmd)


def datadam(setting: Setting) -> HotSpot:
    method = DataDAM(**_common(setting))
    distance = plain.attention(VARIANTS["paper"].p, method.task_balance, method.scale)
    return relative(setting, "DataDAM step", method, distance)


def ddm(setting: Setting, kind: str) -> HotSpot:
    weights = {"gram": 0.0, "moments": 0.0, "diversity": 0.0} | {kind: 1e4}
    return relative(
        setting, f"DDM step, {kind}", DDM(**_common(setting), **weights), getattr(plain, kind)(1e4)
    )


def cafe(setting: Setting) -> HotSpot:
    method = CAFE(**_common(setting), init="real", augmentation="data")
    *relus, pool = method.layer_weights(setting.depth)
    distance = plain.layers((*relus, pool))
    return relative(setting, "CAFE matching step", method, distance, plain.discrimination(method.beta))


def wasserstein(setting: Setting) -> HotSpot:
    return relative(setting, "Wasserstein step (exact)", WassersteinDM(**_common(setting)), plain.exact_w2)


def idm_queue(setting: Setting) -> HotSpot:
    """Two networks of IDM's queue, ten training steps each on 256 real images."""
    train = setting.images(max(setting.real, setting.ipc), 0)
    method = IDM(network=setting.network, queue=5, fetch=2, train_steps=10, factor=1)
    shape = (method.train_steps, method.fetch, min(method.train_batch, len(train)))

    def begin():
        return method.begin(train, setting.ipc, setting.generator(1))

    def loop(networks, rows) -> None:
        plain.queue_training(
            networks, lambda k, t: (train.images[rows[t, k]], train.labels[rows[t, k]]), method.train_steps
        )

    def check() -> dict[str, float]:
        state, before, g = (
            begin(),
            begin(),
            setting.generator(2),
        )  # the library's order of draws: networks, rows
        members = torch.randperm(state.size, generator=g, device=setting.device)[: method.fetch].tolist()
        rows = torch.randint(len(train), shape, generator=g, device=setting.device)
        networks = [setting.plain_network(before.networks.network(k).state_dict()) for k in members]
        loop(networks, rows)
        method.train_queue(state, setting.generator(2))
        worst = 0.0
        for k, network in zip(members, networks, strict=True):
            start = _vector(before.networks.network(k).state_dict())
            learned = _vector(state.networks.network(k).state_dict()) - start
            worst = max(worst, difference(learned, _vector(network.state_dict()) - start))
        return {name: worst}

    name = "both networks side by side"
    state, g = begin(), setting.generator(3)
    networks = [setting.plain_network(state.networks.network(k).state_dict()) for k in range(method.fetch)]

    def reference_call() -> None:
        loop(networks, torch.randint(len(train), shape, generator=g, device=setting.device))

    candidates = {REFERENCE: reference_call, name: lambda: method.train_queue(state, g)}
    units = method.fetch * method.train_steps
    return HotSpot("IDM queue training", "step", units, candidates, check, {name: 1e-2})


def _common(setting: Setting) -> dict:
    return {"real_batch": setting.real, "network": setting.network}


FEATURE_SPOTS = {
    "m3d": m3d,
    "datadam": datadam,
    "ddm-gram": lambda setting: ddm(setting, "gram"),
    "ddm-moments": lambda setting: ddm(setting, "moments"),
    "cafe": cafe,
    "wasserstein": wasserstein,
    "idm-queue": idm_queue,
}

r"""A generative prior: how a generator is trained, and the one that comes of it, frozen.

Images are then codes of $G(z, y)$, a point of latent space and a class, and a method optimises codes in the place of pixels. A prior is
trained once for all methods and all sets of a run (:func:`the_prior`, kept in the cache as teachers are), read from a file that
:func:`save_prior` wrote, or, for the recipes in ``COMMITTED``, found beside this file in half precision.

A kind of prior is a subclass of :class:`Prior`: its fields are its hyper-parameters, ``make`` builds the network and ``fit`` trains it.
Networks that map a code to an image are a :class:`Generator`; others (a denoiser) are any module.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors
import torch
from torch import Tensor, nn

from lib import nets
from lib.system.cache import digest, stored
from lib.system.code import code_digest
from lib.system.errors import CompanionError, check_seed, positive, whole
from lib.system.files import read_safetensors, write_tensors

FORMAT = "distillation-companion/prior-1"
COMMITTED = (  # files beside this one, named <kind>_<data>.safetensors
    "layered_digits.safetensors",
    "spatial_photos16.safetensors",
)
LEAST_SPREAD = 0.1  # of generated images around the mean of their class, relative to real ones: below, a prior has collapsed
LOOKED_AT = 32  # images per class that the spread is measured on


class Generator(nn.Module):
    r"""$G(z,y)$, codes ``(n, *latent)`` and classes ``(n,)`` to images ``(n, c, h, w)`` in [-1, 1], in layers.

    $$W=\mathrm{mapping}(z,y),\qquad h_0=g_0(W,y),\quad h_k=g_k(h_{k-1},W,y),\qquad G(z,y)=h_L$$

    A subclass sets the attributes and writes :meth:`mapping` (if W is not z itself), :meth:`start` and :meth:`layer`; one without
    layers overrides ``forward`` alone and leaves ``layers`` 0.

    Attributes:
        latent: shape of a code z; styles: shape of its W, () where only latents are codes.
        shape: ``(c, h, w)`` of an image; num_classes: C; layers: L.
        aside: names of submodules that training or inversion needs and generation does not (an encoder, a critic).
    """

    latent: tuple[int, ...]
    styles: tuple[int, ...] = ()
    shape: tuple[int, int, int]
    num_classes: int
    layers: int = 0
    aside: ClassVar[tuple[str, ...]] = ()

    def mapping(self, z: Tensor, y: Tensor) -> Tensor:
        """W, ``(n, ...)``."""
        return z

    def start(self, w: Tensor, y: Tensor) -> Tensor:
        """$h_0$."""
        raise NotImplementedError

    def layer(self, k: int, h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        """$h_k$ of $h_{k-1}$, k from 1 to L."""
        raise NotImplementedError

    def read_after(self, n: int) -> slice:
        """Which rows of W the layers n + 1 .. L read."""
        return slice(None)

    def to_f(self, w: Tensor, y: Tensor, n: int) -> Tensor:
        """$h_n$, the point of the space $F_n$ that W reaches."""
        h = self.start(w, y)
        for k in range(1, n + 1):
            h = self.layer(k, h, w, y)
        return h

    def from_f(self, f: Tensor, w: Tensor, y: Tensor, n: int) -> Tensor:
        """The image of a point f of $F_n$, by the layers n + 1 .. L."""
        for k in range(n + 1, self.layers + 1):
            f = self.layer(k, f, w, y)
        return f

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        self.check(z)
        w = self.mapping(z, y)
        return self.from_f(self.start(w, y), w, y, 0)

    def draw(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal codes for the classes y, ``(n, *latent)``."""
        return torch.randn(len(y), *self.latent, generator=generator, device=y.device)

    def check(self, z: Tensor) -> None:
        """Refuse codes of another shape, in one line."""
        if tuple(z.shape[1:]) != tuple(self.latent):
            raise CompanionError(
                f"latents of shape {tuple(z.shape[1:])}: {type(self).__name__} takes {tuple(self.latent)}"
            )

    def alone(self) -> Generator:
        """A copy that can be learned, without :attr:`aside`."""
        copied = copy.deepcopy(self).requires_grad_(True)
        for name in self.aside:
            delattr(copied, name)
        return copied

    def generating(self) -> dict[str, Tensor]:
        """The tensors that make images, by name: all but those of :attr:`aside`."""
        return {k: v for k, v in self.state_dict().items() if k.split(".")[0] not in self.aside}


@dataclass(frozen=True)
class Prior(ABC):
    """How a prior is trained. Kinds add fields of their own and change defaults.

    ``kind`` is the name under which files and ``lib.nets.generators.KINDS`` know the class.

    Attributes:
        steps: of the training, 0 or more; lr: above 0; batch: images, 1 or more.
        weights: a file of save_prior instead of training; foreign: whether it may be of other data of the same shape and number of
            classes.
        seed: one prior for all distilled sets.
    """

    kind: ClassVar[str]
    released: ClassVar[str] = ""  # the form of files of others that hold its weights; "": none
    steps: int = 500
    lr: float = 2e-3
    batch: int = 64
    weights: str = ""
    foreign: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        whole(self, steps=0, batch=1)
        positive(self, "lr")
        check_seed(self.seed)

    @abstractmethod
    def make(self, like) -> nn.Module:
        """The network, of any weights, for the images of ``like`` (shape, num_classes, device)."""

    def initialise(self, network: nn.Module, generator: torch.Generator) -> None:
        """Draw all weights from the generator, in place."""
        nets.initialise(network, generator)

    @abstractmethod
    def fit(self, network: nn.Module, train, generator: torch.Generator) -> None:
        """Train the network in place; every random number comes from the generator."""

    def recipe(self) -> dict[str, Any]:
        """Kind and fields as plain values; where the weights lie is no part of it."""
        fields = dataclasses.asdict(self)
        return {"kind": self.kind} | {k: v for k, v in fields.items() if k not in ("weights", "foreign")}


@dataclass(frozen=True)
class Brought(Prior):
    """A prior that the user brings: large generators of others are no part of this companion.

    The other fields are Prior's.

    Attributes:
        what: the generator that a paper used; where: who publishes its weights.
    """

    kind: ClassVar[str] = "brought"
    what: str = "a generator"
    where: str = ""

    def make(self, like) -> nn.Module:
        raise CompanionError(
            f"the prior {self.what} must be brought ({self.where}): write a Prior whose make builds that Generator and set its weights "
            "to a safetensors file of save_prior"
        )

    def fit(self, network: nn.Module, train, generator: torch.Generator) -> None:
        raise CompanionError(f"the prior {self.what} is not trained here")


def room_for(codes: int, each: int, device: torch.device, copies: int = 4) -> None:
    """Refuse more codes than memory holds, in one line.

    Args:
        codes: how many; each: numbers of one; copies: the codes, their gradient and two moments of Adam.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = 4 * codes * each * copies
    if needed > memory:
        raise CompanionError(
            f"{codes} codes of {each} numbers need {needed / 1e9:.3g} GB with their optimiser, {device} has {memory / 1e9:.3g} GB: "
            f"allowed are at most {memory // (4 * each * copies)} codes"
        )


# -- between the data's space and the generator's ------------------------------------------------------------------------


def to_data(images: Tensor, transform) -> Tensor:
    r"""$((G+1)/2-\mu)/s$: generated images in the normalised space of the data; with gradients."""
    return transform.forward((images + 1) / 2)


def to_generator(images: Tensor, transform) -> Tensor:
    """The inverse: normalised images in [-1, 1]."""
    return 2 * transform.inverse(images) - 1


# -- where a prior comes from --------------------------------------------------------------------------------------------


def the_prior(prior: Prior, train) -> nn.Module:
    """The network that a recipe stands for on these data, in eval mode and frozen: from its file, committed, cached, or trained now.

    Raises:
        CompanionError: a file that is missing, of another kind, of another architecture or of other data; training diverged.
    Warns:
        that the prior has collapsed: its images of a class hardly differ.
    """
    if prior.weights:
        network = load_prior(prior, train)
    elif path := committed(prior, train):
        network = load_prior(dataclasses.replace(prior, weights=str(path)), train)
    else:
        network = train_prior(prior, train)
    if isinstance(network, Generator) and train.smallest_class > 1:
        spread = relative_spread(network, train)
        if spread < LEAST_SPREAD:
            warnings.warn(
                f"the prior {prior.kind} has collapsed on {train.name}: its images of a class spread {spread:.2g} times as far as "
                f"real ones do; expected at least {LEAST_SPREAD:g}",
                stacklevel=2,
            )
    return network


def train_prior(prior: Prior, train) -> nn.Module:
    """Train a prior, or take the one that the same call made before from the cache."""
    code = code_digest(type(prior).__module__, __name__)
    key = digest(prior.recipe(), train.fingerprint, train.device.type, code)

    def compute() -> dict[str, Tensor]:
        network, generator = prior.make(train), torch.Generator(train.device).manual_seed(prior.seed)
        prior.initialise(network, generator)
        prior.fit(network.train(), train, generator)
        return network.state_dict()

    tensors = stored(f"prior-{key}", compute)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise CompanionError(f"the prior {prior.kind} diverged on {train.name} at learning rate {prior.lr:g}")
    return _filled(prior.make(train), tensors)


def _filled(network: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


# -- files -----------------------------------------------------------------------------------------------------------------


def save_prior(network: nn.Module, prior: Prior, train, path: Path | str, half: bool = False) -> Path:
    """Write a trained prior to one safetensors file, with its recipe and its data in the header.

    Args:
        half: in half precision.
    """
    data = {"name": train.name, "sha256": train.fingerprint, "shape": list(train.shape), "classes": list(train.classes)}  # fmt: skip
    header = {"format": FORMAT, "prior": json.dumps(prior.recipe()), "data": json.dumps(data)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    if half:
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    write_tensors(path, tensors, header)
    return Path(path)


def load_prior(prior: Prior, train) -> nn.Module:
    """The frozen network in ``prior.weights``, for these data.

    Raises:
        CompanionError: as :func:`the_prior`.
    """
    path = prior.weights
    header, tensors = state_in(path, prior.released) if prior.released else read_safetensors(path)
    if prior.released and header.get("format") != FORMAT:
        network = prior.make(train)
        check_state(
            network, tensors, f"{path} does not fit {prior.kind} on {train.name}; allowed: {prior.released}"
        )
        return _filled(network, tensors)
    if header.get("format") != FORMAT:
        raise CompanionError(
            f"{path} is no prior: its header says {header.get('format')!r}; allowed: {FORMAT!r}"
        )
    kind, data = json.loads(header["prior"])["kind"], json.loads(header["data"])
    if kind != prior.kind:
        raise CompanionError(f"{path} holds a prior of kind {kind!r}, not {prior.kind!r}")
    same_form = (tuple(data["shape"]), len(data["classes"])) == (tuple(train.shape), train.num_classes)
    if not same_form or (data["sha256"] != train.fingerprint and not prior.foreign):
        theirs = f"{data['name']} ({tuple(data['shape'])}, {len(data['classes'])} classes)"
        allowed = (
            "allowed with foreign=True" if same_form else "allowed: the same shape and number of classes"
        )
        raise CompanionError(
            f"{path} is a prior of other data: {theirs}, not {train.name} ({tuple(train.shape)}, {train.num_classes} classes); {allowed}"
        )
    network = prior.make(train)
    check_state(network, tensors, f"{path} does not fit {prior.kind} on {train.name}")
    return _filled(network, tensors)


def state_in(path: str, allowed: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file, or the tensors of a plain state dict that others saved by torch.

    Raises:
        CompanionError: there is no such file, or it holds something else; the line ends with ``allowed``.
    """
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    if not Path(path).is_file():
        raise CompanionError(f"no file {path}; allowed: {allowed}")
    try:
        tensors = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a dozen kinds for damaged files
        raise CompanionError(f"{path} is damaged ({type(error).__name__}); allowed: {allowed}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CompanionError(f"{path} is no plain state dict; allowed: {allowed}")
    return {}, tensors


def check_state(network: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Refuse weights that are missing, left over or of another shape, in one line that begins with ``what``."""
    wanted = network.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        have, want = (tuple(state[name].shape) if name in state else "absent" for state in (tensors, wanted))
        if have != want:
            raise CompanionError(f"{what}: {name} is {have}, expected {want}")


def committed(prior: Prior, train) -> Path | None:
    """The file beside this one that holds this recipe's prior of these data, if there is one."""
    name = f"{prior.kind}_{train.name}.safetensors"
    if name not in COMMITTED:
        return None
    path = Path(__file__).with_name(name)
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata()
    same = (json.loads(header["prior"]), json.loads(header["data"])["sha256"])
    return path if same == (json.loads(json.dumps(prior.recipe())), train.fingerprint) else None


# -- whether it is any good ------------------------------------------------------------------------------------------------


def spread(images: Tensor) -> Tensor:
    r"""$\frac1C\sum_c\frac1n\sum_i\lVert x_{c,i}-\bar x_c\rVert_2^2$ of ``(C, n, ...)``, n/(n-1) of it: how far the images of a class
    lie apart, whatever n is; nan for one image."""
    return images.flatten(2).var(1).sum(1).mean()


@torch.no_grad()
def relative_spread(network: Generator, train, per_class: int = LOOKED_AT) -> float:
    """:func:`spread` of generated images relative to that of as many real ones, in [0, 1] pixels."""
    generator = torch.Generator(train.device).manual_seed(0)
    y = torch.arange(train.num_classes, device=train.device).repeat_interleave(per_class)
    fake = (network(network.draw(y, generator), y) + 1) / 2
    real = train.transform.inverse(train.sample(min(per_class, train.smallest_class), generator))
    return float(spread(fake.unflatten(0, (train.num_classes, -1))) / spread(real))

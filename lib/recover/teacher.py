"""The squeeze stage of SRe2L and WMDD: one network trained on all real data, frozen, and from then on asked for everything.

Its BatchNorm statistics, features and logits are what images are recovered from and relabelled with. A teacher is trained here
(:func:`train_teacher`, kept in the cache), read from a file (:func:`load_teacher`), or torchvision's (:func:`pretrained`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import augment, nets
from lib.augment import views
from lib.nets.training import cosine_schedule
from lib.synset import read_safetensors
from lib.system.arithmetic import PLAIN, Arithmetic
from lib.system.cache import digest, stored
from lib.system.checkpoint import Checkpoint, Training, Unkept, of_device
from lib.system.code import code_digest
from lib.system.errors import CompanionError, unknown
from lib.system.files import write_tensors

FORMAT = "distillation-companion/teacher-1"
TORCHVISION = "torchvision-"  # names of torchvision's networks; "-tiny" behind a ResNet: the stem of WMDD's Tiny-ImageNet
UNLIKE = ("googlenet", "inception_v3", "maxvit_t")  # more than one output in training, or one image size only
# torchvision's VisionTransformer with 12 layers and the widths and heads of ViT-Ti and ViT-S (DeiT, arXiv 2012.12877)
SMALL_VIT = re.compile(r"vit_(ti|s)_([1-9]\d*)")
WIDTHS = {"ti": (192, 3), "s": (384, 6)}
VITS = ("vit_ti_<patch>", "vit_s_<patch>")
LOWEST = 0.08  # share of the area of a random resized crop, torchvision's default
SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Teacher:
    """How the teacher is trained: by default torchvision's classification recipe as WMDD's script calls it.

    SGD along a cosine to 0 by epochs, no warm-up, no label smoothing; the weights of the last epoch are used.

    Attributes:
        network: any of ``lib.nets`` with batch norm, or torchvision-<name>[-tiny].
        epochs, lr, momentum, weight_decay, batch: of SGD.
        augmentation: "resized": random resized crop and flip; or "none", or families of ``lib.augment``, all applied.
        weights: instead of training: "pretrained", or a file of save_teacher; seed: one teacher for all distilled sets.
    """

    network: str = "torchvision-resnet18"
    epochs: int = 50
    lr: float = 0.025
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch: int = 32
    augmentation: str = "resized"
    weights: str = ""
    seed: int = 0

    def __post_init__(self):
        if self.augmentation != "resized":
            augment.strategy(self.augmentation)
        for name in ("epochs", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CompanionError(f"{name} {value!r} of a teacher: must be a whole number of at least 1")


# -- where a teacher comes from ------------------------------------------------------------------------------------------


def make_teacher(name: str, like) -> nn.Module:
    """An untrained network for the images of ``like`` (channels, num_classes, size, first_padding, device)."""
    if not name.startswith(TORCHVISION):
        return nets.make(name, like)
    import torchvision

    kind, tiny = name.removeprefix(TORCHVISION), name.endswith("-tiny")
    kind = kind.removesuffix("-tiny")
    models = torchvision.models.list_models(module=torchvision.models)
    small_vit = SMALL_VIT.fullmatch(kind)
    allowed = [model for model in models if model not in UNLIKE and (not tiny or model.startswith("resnet"))]
    if kind not in allowed and (tiny or not small_vit):
        raise unknown("torchvision network", name, [TORCHVISION + kind for kind in (*allowed, *VITS)])
    if like.channels != 3:
        raise CompanionError(f"{name} takes 3 channels; {like.channels} is not allowed")
    if small_vit or kind.startswith("vit_"):
        patch = int(kind.split("_")[-1])
        if like.size % patch:
            raise CompanionError(f"{name}: the image side must be a multiple of {patch}, not {like.size}")
    if small_vit:
        dim, heads = WIDTHS[small_vit[1]]
        network = torchvision.models.VisionTransformer(
            like.size, patch, 12, heads, dim, 4 * dim, num_classes=like.num_classes
        )
    else:
        sized = {"image_size": like.size} if kind.startswith("vit_") else {}
        network = torchvision.models.get_model(kind, num_classes=like.num_classes, **sized)
    if tiny:  # padding 3 with a 3x3 kernel is the published code's
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, stride=2, padding=3, bias=False)
        network.maxpool = nn.Identity()
    return network.to(like.device)


def drawn(name: str, like, generator: torch.Generator) -> nn.Module:
    """:func:`make_teacher` with weights that are a function of the generator: the law of ``lib.nets.initialise``, or torchvision's own."""
    if not name.startswith(TORCHVISION):
        return nets.initialise(make_teacher(name, like), generator)
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator of the CPU
        torch.random.default_generator.manual_seed(seed)
        return make_teacher(name, like)


def the_teacher(teacher: Teacher, train) -> nn.Module:
    """The frozen network that a recipe stands for: trained, read from a file, or torchvision's."""
    if not teacher.weights:
        return train_teacher(teacher, train)
    if teacher.weights == "pretrained":
        return pretrained(teacher.network.removeprefix(TORCHVISION), train.classes).to(train.device)
    return load_teacher(teacher.weights, teacher.network, train)


def frozen(network: nn.Module) -> nn.Module:
    """The network in eval mode, its parameters without gradient: a backward pass then costs two thirds."""
    network.zero_grad(set_to_none=True)
    return network.eval().requires_grad_(False)


def train_teacher(teacher: Teacher, train, generator: torch.Generator | None = None) -> nn.Module:
    """Train a teacher on ``train`` (in memory or a stream), or take the one that the same call made before from the cache.

    Args:
        generator: of initial weights, order and augmentation; without it one seeded with ``teacher.seed``.
    Returns:
        the network, in eval mode and frozen.
    Raises:
        CompanionError: training diverged.
    """
    generator = generator or torch.Generator(train.device).manual_seed(teacher.seed)
    data = getattr(train, "fingerprint", None) or digest(
        [str(path) for path in train.paths], train.labels, train.size
    )
    start = generator.get_state().cpu()
    key = digest(asdict(teacher), data, train.device.type, start, code_digest(__name__))

    def compute() -> dict[str, Tensor]:
        network = drawn(teacher.network, train, generator)
        fit(network, teacher, train, generator)
        return {f"network.{name}": tensor for name, tensor in network.state_dict().items()}

    found = stored(f"teacher-{key}", compute)
    network = make_teacher(teacher.network, train)
    network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in found.items()})
    return converged(network, teacher, train)


def converged(network: nn.Module, teacher: Teacher, train) -> nn.Module:
    """The trained network, frozen; an error in one line if its training diverged."""
    if not all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values()):
        raise CompanionError(
            f"the teacher {teacher.network} diverged on {train.name} at learning rate {teacher.lr:g}"
        )
    return frozen(network)


def fit(
    network: nn.Module,
    teacher: Teacher,
    train,
    generator: torch.Generator,
    rank: int = 0,
    world: int = 1,
    checkpoint: Checkpoint | None = None,
    arithmetic: Arithmetic = PLAIN,
) -> None:
    """The training loop, in place; the network may be wrapped (DDP).

    The batch of the recipe is that of ``world`` processes together, and process ``rank`` takes rows rank, rank + world, ... of
    it. Order and augmentation are drawn for the whole batch in every process.

    Args:
        train: the data, in memory or a stream, the same in every process.
        checkpoint: where the loop is kept and from where it goes on.
    """
    network, checkpoint = arithmetic.laid_out(network), checkpoint or Unkept()
    optimiser = torch.optim.SGD(
        network.parameters(), lr=0.0, momentum=teacher.momentum, weight_decay=teacher.weight_decay
    )
    rate, mine = cosine_schedule(teacher.lr, teacher.epochs), slice(rank, None, world)
    at = Training(network.state_dict(), optimiser, [generator, *of_device(generator.device)])
    checkpoint.begin(at)
    network.train()
    for epoch in range(at.epoch, teacher.epochs):
        at.new_epoch(epoch)
        for group in optimiser.param_groups:
            group["lr"] = rate(epoch)
        order = torch.randperm(len(train), generator=generator, device=generator.device)
        drawn_once = teacher.augmentation == "resized"
        key = torch.rand((), generator=generator, device=generator.device).item() if drawn_once else 0.0
        # the variance of a single image is 0
        whole = [rows for rows in order.split(teacher.batch) if len(rows) >= 2 * world]
        left = range(len(whole))[at.goes_on() :]
        for b, (x, y) in zip(left, shown(train, teacher, whole, left, mine, key, generator), strict=True):
            logits = arithmetic(network, x)
            if world == 1:
                loss = F.cross_entropy(logits, y)
            else:  # DDP takes the mean over processes, whose parts of a last batch may differ by one image
                loss = F.cross_entropy(logits, y, reduction="sum") * (world / len(whole[b]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            checkpoint.after(at)


def shown(
    train, teacher: Teacher, whole: list[Tensor], left: range, mine: slice, key: float, generator
) -> Iterable[tuple[Tensor, Tensor]]:
    """(augmented images, labels) of the batches ``left`` of an epoch, of each the rows ``mine``.

    Random resized crops are cut from the whole image file, and their numbers follow from ``key``, so that files can be read
    ahead; other augmentations are drawn from ``generator`` batch by batch.
    """
    chunks = (whole[b][mine] for b in left)
    if teacher.augmentation != "resized":
        for b, (x, y) in zip(left, in_turn(train, chunks), strict=True):
            yield augmented(x, teacher.augmentation, generator, mine, len(whole[b])), y
        return
    crops = (
        views.Crops.draw(torch.full((len(whole[b]),), LOWEST), views.keyed("augment", key, b), flip=True)[
            mine
        ]
        for b in left
    )
    if hasattr(train, "in_turn"):
        yield from train.in_turn((chunk.cpu() for chunk in chunks), crops)
    else:
        for chunk, crop in zip(chunks, crops, strict=True):
            yield resized(train.images[chunk], crop), train.labels[chunk]


def in_turn(train, chunks: Iterable[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    """(images, labels) at each chunk of positions, from memory or from a stream."""
    if hasattr(train, "in_turn"):
        return train.in_turn(chunk.cpu() for chunk in chunks)
    return ((train.images[chunk], train.labels[chunk]) for chunk in chunks)


def resized(x: Tensor, crop: views.Crops) -> Tensor:
    """Random resized crops and mirror images of images in memory."""
    boxes = crop.boxes(torch.tensor(x.shape[-2:]).expand(len(x), 2)).to(x.device)
    return views.resample(x, *views.crop_matrices(boxes, crop.flips.to(x.device), x.shape[-1], dtype=x.dtype))


def augmented(x: Tensor, augmentation: str, generator: torch.Generator, rows: slice, total: int) -> Tensor:
    """A batch of real images through families of ``lib.augment``, own parameters per image.

    Args:
        rows: those of a batch of ``total`` images that x is; parameters are drawn for all of them.
    """
    if names := augment.strategy(augmentation):
        draw = augment.draw(names, total, generator, mode="multiple")
        return augment.apply(x, replace(draw, u=draw.u[rows]))
    return x


def pretrained(
    name: str, classes: tuple[str, ...], state: dict | None = None, categories: tuple | None = None
) -> nn.Module:
    """torchvision's ImageNet-1K network (its first weights), if its class indices are those of the data.

    Args:
        name: ``resnet18``, ``resnet50``, ...; classes: of the data, in the order of their labels.
        state, categories: weights and class names to use instead of torchvision's (which it downloads once).
    Raises:
        CompanionError: another number of classes, or another order: the first class that differs is named.
    """
    import torchvision

    if state is None:
        try:
            weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        except (ValueError, KeyError) as error:
            raise CompanionError(f"torchvision has no ImageNet-1K weights of {name!r}: {error}") from error
        categories = tuple(weights.meta["categories"])
        check_classes(f"torchvision's {name}", categories, classes)
        state = weights.get_state_dict(progress=False)
    else:
        check_classes(name, tuple(categories or classes), classes)
    network = torchvision.models.get_model(name, num_classes=len(classes))
    network.load_state_dict(state)
    return frozen(network)


def check_classes(what: str, theirs: tuple[str, ...], classes: tuple[str, ...]) -> None:
    """Refuse a teacher whose output k is not class k of the data.

    ImageNet's folders are named by synsets (``n01440764``), torchvision's outputs by words: both count synsets in ascending
    order, so a data set named by synsets must have them ascending.
    """
    if len(theirs) != len(classes):
        raise CompanionError(
            f"the teacher {what} has {len(theirs)} classes, the data {len(classes)}; allowed: the same number"
        )
    by_synset = all(SYNSET.fullmatch(name) for name in classes) and not all(
        SYNSET.fullmatch(name) for name in theirs
    )
    expected = sorted(classes) if by_synset else list(theirs)
    for k, (want, have) in enumerate(zip(expected, classes, strict=True)):
        if want != have:
            raise CompanionError(
                f"the teacher {what} and the data count their classes in different orders: "
                f"class {k} is {want!r} there, {have!r} in the data"
            )


def save_teacher(network: nn.Module, path: Path | str, name: str, classes: tuple[str, ...]) -> Path:
    """Write weights, the network's name and the class names to one safetensors file."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    write_tensors(path, tensors, {"format": FORMAT, "network": name, "classes": json.dumps(list(classes))})
    return Path(path)


def load_teacher(path: Path | str, name: str, like) -> nn.Module:
    """The frozen teacher of a file that :func:`save_teacher` wrote, for the data ``like``.

    Raises:
        CompanionError: no such file or another kind of file; another network; classes that are not those of the data.
    """
    header, tensors = read_safetensors(path)
    if header.get("format") != FORMAT:
        raise CompanionError(
            f"{path} is no teacher: its header says {header.get('format')!r}; allowed: {FORMAT!r}"
        )
    if header["network"] != name:
        raise CompanionError(f"{path} holds a {header['network']}, not the {name} asked for")
    check_classes(str(path), tuple(json.loads(header["classes"])), like.classes)
    network = make_teacher(name, like)
    for key, want in network.state_dict().items():
        shape = tuple(tensors[key].shape) if key in tensors else "absent"
        if shape != tuple(want.shape):
            raise CompanionError(
                f"{path} does not fit {name} on {like.name}: {key} is {shape}, not {tuple(want.shape)}"
            )
    network.load_state_dict(tensors)
    return frozen(network)


_CIFAR = Teacher("resnet18-batch", epochs=200, lr=0.1, weight_decay=5e-4, batch=128, augmentation="crop_flip")
_SMALL = Teacher("convnet-d2-w32-batch", epochs=12, lr=0.05, weight_decay=5e-4, batch=64, augmentation="none")
TEACHERS = {
    "digits": _SMALL,
    "photos16": replace(_SMALL, network="convnet-d3-w32-batch", epochs=8, augmentation="crop_flip"),
    "wmdd": Teacher(),  # ImageNette and ImageNet-1K
    "wmdd-tinyimagenet": Teacher("torchvision-resnet18-tiny"),  # stem of stride 2, padding 3, no pooling
    "sre2l-tinyimagenet": Teacher("resnet18-batch"),  # stem of stride 1, padding 1, no pooling
    "imagenet": Teacher(weights="pretrained"),  # SRe2L
    "cifar": _CIFAR,  # SRe2L on CIFAR-100: 78.72 %
}

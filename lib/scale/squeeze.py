"""The teacher, by one process or by several that share every batch.

    torchrun --nproc-per-node 8 -m lib.scale.squeeze --out runs/imagenet-10
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m lib.scale.squeeze --out ...

The batch of the recipe is the batch of all processes together: process r of n takes rows r, r + n, ... of it. Order and
augmentation are drawn for the whole batch in every process, so that their number changes nothing but the order of sums: the same
network up to rounding, with one exception. BatchNorm: on GPUs its statistics are those of the whole batch (``SyncBatchNorm``); on
CPUs, and in ConvNets, each process normalises by its own rows, as DDP does by default, and the running statistics are those of
process 0. A last batch with fewer than two images per process is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lib import augment, nets, views
from lib.errors import CompanionError
from lib.methods.teacher import Teacher, frozen, make_teacher, the_teacher
from lib.nets.convnet import ConvNet
from lib.scale.plan import Run, open_run, real, same_data
from lib.scale.store import done, save
from lib.scale.units import method, unit
from lib.train import cosine_schedule


def squeeze(run: Run, device: torch.device, rank: int = 0, world: int = 1) -> nn.Module:
    """The teacher of a plan: read, torchvision's, or trained by ``world`` processes of which this is number ``rank``."""
    teacher = method(run).teacher
    if teacher.weights:
        return the_teacher(teacher, dataclasses.replace(run.form, device=device))
    train = real(run.plan, "train", device)
    same_data(run.form, train)
    return train_shared(teacher, train, rank, world)


def train_shared(teacher: Teacher, train, rank: int = 0, world: int = 1, say=None) -> nn.Module:
    """:func:`lib.methods.teacher.train_teacher` with every batch shared by ``world`` processes; the same bits for one.

    Args:
        train: the data, the same in every process; say: called with a line of text after every epoch.
    """
    generator = torch.Generator(train.device).manual_seed(teacher.seed)
    plain = nets.initialise(make_teacher(teacher.network, train), generator)
    network = plain
    if world > 1:
        fused = isinstance(
            plain, ConvNet
        )  # its norms are no modules in use, and absorb the biases before them
        if train.device.type == "cuda" and not fused:
            network = plain = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
        network = DistributedDataParallel(plain, find_unused_parameters=fused)
    optimiser = torch.optim.SGD(
        plain.parameters(), lr=0.0, momentum=teacher.momentum, weight_decay=teacher.weight_decay
    )
    rate = cosine_schedule(teacher.lr, teacher.epochs)
    network.train()
    for epoch in range(teacher.epochs):
        for group in optimiser.param_groups:
            group["lr"] = rate(epoch)
        order = torch.randperm(len(train), generator=generator, device=generator.device)
        whole = [rows for rows in order.split(teacher.batch) if len(rows) >= 2 * world]
        for rows, (x, y) in zip(whole, images(train, [rows[rank::world] for rows in whole]), strict=True):
            x = augmented(x, slice(rank, None, world), len(rows), teacher.augmentation, generator)
            # DDP takes the mean over processes, whose parts of a last batch may differ by one image
            loss = F.cross_entropy(network(x), y, reduction="sum") * (world / len(rows))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if say is not None:
            say(f"epoch {epoch + 1}/{teacher.epochs}, last loss {loss.item():.3f}")
    if not all(bool(tensor.isfinite().all()) for tensor in plain.state_dict().values()):
        raise CompanionError(
            f"the teacher {teacher.network} diverged on {train.name} at learning rate {teacher.lr:g}"
        )
    return frozen(plain)


def images(train, chunks: list[Tensor]):
    """(images, labels) at each chunk of positions."""
    if hasattr(train, "in_turn"):
        return train.in_turn(chunk.cpu() for chunk in chunks)
    return ((train.images[chunk], train.labels[chunk]) for chunk in chunks)


def augmented(x: Tensor, rows: slice, total: int, augmentation: str, generator: torch.Generator) -> Tensor:
    """The rows of a batch of ``total`` images that are here, as the recipe shows them: parameters are drawn for all rows."""
    if augmentation == "resized":
        numbers = views.keyed("augment", torch.rand((), generator=generator, device=generator.device).item())
        boxes = views.crop_boxes(torch.full((total,), 0.08), x.shape[-1], numbers)[rows]
        flips = (torch.rand(total, generator=numbers) < 0.5)[rows]
        return views.resample(
            x, *views.crop_matrices(boxes.to(x.device), flips.to(x.device), x.shape[-1], dtype=x.dtype)
        )
    if names := augment.strategy(augmentation):
        drawn = augment.draw(names, total, generator, mode="multiple")
        return augment.apply(x, dataclasses.replace(drawn, u=drawn.u[rows]))
    return x


def main(words: list[str] | None = None) -> int:
    """Train the teacher of a plan; under ``torchrun`` with all its processes. Process 0 writes the file."""
    parser = argparse.ArgumentParser(
        prog="torchrun ... -m lib.scale.squeeze", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder of a planned run")
    parser.add_argument("--force", action="store_true", help="also if its file is there")
    given = parser.parse_args(words)
    run = open_run(given.out)
    one = unit(run, "squeeze", 0)
    if done(run, one) and not given.force:
        print(f"{one}: there already")
        return 0
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    rank = int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        network = squeeze(run, device, rank, world)
        if rank == 0:
            save(run, one, network.state_dict())
            print(f"{one}: written by process 0 of {world}")
        if world > 1:
            dist.barrier()
    finally:
        if world > 1:
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompanionError as error:
        print(f"lib.scale.squeeze: {error}", file=sys.stderr)
        sys.exit(2)

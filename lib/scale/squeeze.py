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
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lib.nets.convnet import ConvNet
from lib.recover.teacher import Teacher, converged, drawn, fit, the_teacher
from lib.scale.plan import Run, open_run, real, same_data
from lib.scale.store import done, keeping, save
from lib.scale.units import method, unit
from lib.system.arithmetic import PLAIN, Arithmetic
from lib.system.checkpoint import Checkpoint
from lib.system.errors import CompanionError


def squeeze(
    run: Run, device: torch.device, rank: int = 0, world: int = 1, checkpoint: Checkpoint | None = None
) -> nn.Module:
    """The teacher of a plan: read, torchvision's, or trained by ``world`` processes of which this is number ``rank``."""
    teacher = method(run).teacher
    if teacher.weights:
        return the_teacher(teacher, dataclasses.replace(run.form, device=device))
    train = real(run.plan, "train", device)
    same_data(run.form, train)
    return train_shared(teacher, train, rank, world, checkpoint, run.plan.arithmetic)


def train_shared(
    teacher: Teacher,
    train,
    rank: int = 0,
    world: int = 1,
    checkpoint: Checkpoint | None = None,
    arithmetic: Arithmetic = PLAIN,
) -> nn.Module:
    """:func:`lib.recover.teacher.train_teacher` with every batch shared by ``world`` processes; the same bits for one.

    Args:
        train: the data, the same in every process.
    """
    generator = torch.Generator(train.device).manual_seed(teacher.seed)
    plain = arithmetic.laid_out(drawn(teacher.network, train, generator))
    network = plain
    if world > 1:
        fused = isinstance(
            plain, ConvNet
        )  # its norms are no modules in use, and absorb the biases before them
        if train.device.type == "cuda" and not fused:
            network = plain = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
        network = DistributedDataParallel(plain, find_unused_parameters=fused)
    fit(network, teacher, train, generator, rank, world, checkpoint, arithmetic)
    return converged(plain, teacher, train)


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
        checkpoint = keeping(run, one, f"-of-{world}" if world > 1 else "")
        checkpoint.writes = rank == 0
        network = squeeze(run, device, rank, world, checkpoint)
        if rank == 0:
            save(run, one, network.state_dict())
            checkpoint.done()
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

"""The units of lib.scale as one rule, side by side here or on a cluster: files as targets, resources per stage.

From the project's root, for a folder that was planned before (`python -m lib.scale plan --out runs/x ...`):

    snakemake -s workflow/scale.smk --profile workflow/profiles/local --cores 8 --config out=runs/x
    snakemake -s workflow/scale.smk --profile workflow/profiles/gpu --cores 8 --resources gpu=2 --config out=runs/x gpu=1
    snakemake -s workflow/scale.smk --profile workflow/profiles/slurm --config out=runs/x gpu=1

`gpu=1` asks for a GPU per unit, which on one machine is no other unit's; `squeeze_gpus=8` trains the teacher with torchrun on eight. Minutes and memory per stage:
`--config minutes='{"recover": 30}' mem_mb='{"train": 64000}'`.
"""

import shlex
import sys
from pathlib import Path

ROOT = Path(workflow.basedir).resolve().parent
sys.path.insert(0, str(ROOT))

from lib.system.errors import CompanionError
from lib.scale.plan import open_run
from lib.scale.store import discard_damaged
from lib.scale.units import STAGES, needs, unit, units


workdir: str(ROOT)


OUT = Path(config["out"]).as_posix()
QUOTED = shlex.quote(OUT)
try:
    RUN = open_run(OUT)
except CompanionError as error:
    sys.exit(f"scale.smk: {error}")
PYTHON = shlex.quote(sys.executable)
GPU = int(config.get("gpu", 0))
SQUEEZE_GPUS = int(config.get("squeeze_gpus", GPU))
CPUS = int(config.get("cpus", 1 if GPU == 0 else 8))
MINUTES = dict.fromkeys(STAGES, 60) | {"squeeze": 24 * 60, "train": 12 * 60} | config.get("minutes", {})
MEM_MB = dict.fromkeys(STAGES, 4000 if GPU == 0 else 32000) | config.get("mem_mb", {})

# A file that was cut short is no result; jobs of a cluster read this file again and leave that to the main process.
if workflow.is_main_process and not workflow.dryrun:
    for text in discard_damaged(RUN):
        print(text, file=sys.stderr)


def reads(one):
    # What is there is done, as for `lib.scale run`: an input that was made again has the same content.
    if (RUN.folder / one.name).exists():
        return []
    return [ancient(f"{OUT}/{other.name}") for other in needs(RUN, one)]


def command(wildcards):
    if wildcards.stage == "squeeze" and SQUEEZE_GPUS > 1:
        return f"{PYTHON} -m torch.distributed.run --nproc-per-node {SQUEEZE_GPUS} -m lib.scale.squeeze --out {QUOTED}"
    one_gpu = f"{PYTHON} -m workflow.machine " if GPU else ""
    return f"{one_gpu}{PYTHON} -m lib.scale run --out {QUOTED} --stage {wildcards.stage} --unit {int(wildcards.number)}"


def gpus(wildcards):
    return SQUEEZE_GPUS if wildcards.stage == "squeeze" else GPU


localrules:
    everything,
    aggregate,


wildcard_constraints:
    stage="|".join(STAGES[:-1]),
    number=r"\d\d\d\d+",


rule everything:
    input:
        [f"{OUT}/{one.name}" for stage in STAGES for one in units(RUN, stage)],


rule aggregate:
    input:
        reads(unit(RUN, "aggregate", 0)),
    output:
        f"{OUT}/summary.json",
        f"{OUT}/table.csv",
        f"{OUT}/curves.csv",
    shell:
        PYTHON + " -m lib.scale run --out {QUOTED} --stage aggregate --unit 0"


rule unit:
    input:
        lambda w: reads(unit(RUN, w.stage, int(w.number))),
    output:
        OUT + "/{stage}/{number}.safetensors",
    params:
        command=command,
    threads: CPUS
    resources:
        mem_mb=lambda w: MEM_MB[w.stage],
        runtime=lambda w: MINUTES[w.stage],
        gpu=gpus,
    log:
        OUT + "/logs/{stage}-{number}.log",
    shell:
        "{params.command} > {log:q} 2>&1"

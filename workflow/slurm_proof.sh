#!/usr/bin/env bash
# The units of lib.scale on a real one-node SLURM: run, break two jobs, resume, compare with a local run, stop SLURM.
# As root, with Debian's slurm-wlm and munge installed: `workflow/slurm_proof.sh [FOLDER]` (default: a temporary one).
# Exit status 0 only if no finished unit was computed again and every file has the bytes of the local run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${COMPANION_ENV:-.venv}/bin/python
folder=${1:-$(mktemp -d /var/tmp/scale-proof.XXXXXX)}
local_run=$folder/local cluster=$folder/slurm
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD
plan=(--data digits --ipc 2 --preset digits --options iterations=400 block_images=10 --teacher network=convnet-d2-w32-batch epochs=2
  --labels store --relabel epochs=200 --epochs-per-unit 200 --architectures convnet-d2-w32-batch --seeds 0)

fail() {
  printf 'slurm_proof.sh: %s\n' "$1" >&2
  exit 1
}

snake() {
  "$python" -m snakemake -s workflow/scale.smk --profile workflow/profiles/slurm --jobs 2 --slurm-status-command squeue \
    --config "out=$cluster" >>"$folder/snakemake.log" 2>&1
}

# Wait until a job is at work on a unit of this stage; prints the process that computes it.
process_of() {
  local stage=$1 pid
  for _ in $(seq 3000); do
    for pid in $(pgrep -f -- "-m lib.scale run --out $cluster --stage $stage " || true); do
      if [[ $(ps -o comm= -p "$pid") == python* ]]; then
        echo "$pid"
        return
      fi
    done
    sleep 0.2
  done
  fail "no unit of stage $stage began; see $folder/snakemake.log"
}

# The SLURM job that a process belongs to.
job_of() { tr '\0' '\n' <"/proc/$1/environ" | sed -n 's/^SLURM_JOB_ID=//p'; }

unit_of() { tr '\0' ' ' <"/proc/$1/cmdline" | sed -n 's/.*--stage \([a-z]*\) --unit \([0-9]*\).*/\1 \2/p'; }

files() { (cd "$1" && find . -name '[0-9]*.safetensors' -o -name table.csv -o -name summary.json | LC_ALL=C sort); }

times() { (cd "$1" && xargs stat -c '%n %y'); }

hashes() { (cd "$1" && files . | xargs sha256sum); }

# What is there now must stay as it is.
remember() {
  kept=$(files "$cluster")
  stamps=$(times "$cluster" <<<"$kept")
  echo "$(wc -l <<<"$kept") of $(files "$local_run" | wc -l) files are there"
}

untouched() { [[ $stamps == "$(times "$cluster" <<<"$kept")" ]] || fail "a finished unit was computed again"; }

mkdir -p "$folder"
echo "folder: $folder"
"$python" -m lib.scale run --out "$local_run" "${plan[@]}" --workers 2 >"$folder/local.log"
"$python" -m lib.scale plan --out "$cluster" "${plan[@]}"

trap 'workflow/slurm_single_node.sh stop' EXIT
workflow/slurm_single_node.sh start
scheduler=
# only now is the cluster certainly ours, and so are its jobs
trap 'set +e; kill $scheduler 2>/dev/null; scancel --partition main; sleep 3; workflow/slurm_single_node.sh stop' EXIT

echo "--- first run: the process of a unit of recover is killed"
snake &
scheduler=$!
pid=$(process_of recover)
echo "kill -9 $pid ($(unit_of "$pid"))"
kill -9 "$pid"
wait "$scheduler" && fail "the run did not notice the killed unit"
remember

echo "--- second run: resumes; the job of a unit of train is cancelled"
snake &
scheduler=$!
pid=$(process_of train)
echo "scancel $(job_of "$pid") ($(unit_of "$pid"))"
scancel "$(job_of "$pid")"
wait "$scheduler" && fail "the run did not notice the cancelled job"
untouched
remember

echo "--- third run: resumes to the end"
snake
untouched
[[ $(hashes "$local_run") == "$(hashes "$cluster")" ]] || fail "the files differ from those of the local run"
echo "$(files "$cluster" | wc -l) files, byte for byte those of the local run; nothing that was finished was computed again"

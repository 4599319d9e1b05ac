#!/usr/bin/env bash
# The whole project by one command; `./run_all.sh --help` says how. Needs bash and conda, mamba, micromamba or Python >= 3.11.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
export COMPANION_CALLER=$PWD # paths on the command line are relative to where it was typed
for name in COMPANION_DATA COMPANION_CACHE COMPANION_ENV; do
  if [[ -n ${!name-} && ${!name} != /* ]]; then export "$name=$PWD/${!name}"; fi
done
cd "$root"

env_dir=${COMPANION_ENV:-$root/.venv}
python=$env_dir/bin/python
stamp=$env_dir/.companion-stamp # written last: an interrupted set-up has none and is taken up again
log=$root/.setup/setup.log
needed_mb=8000
commands="run test lab refresh gallery lock clean"
options="--profile --only --dataset --ipc --seed -p --cores --executor --force --dry-run --list --no-setup --help"

usage() {
  cat <<'TEXT'
Usage: ./run_all.sh [COMMAND] [OPTIONS]

Commands
  run         (default) run every notebook of the profile that is not up to date, then build the tables and the gallery
  test        the tests of lib/, then every notebook against its stored outputs
  lab         JupyterLab on the project, at its notebooks
  refresh     run, then write the outputs back into notebooks/
  gallery     build figures/index.html from the results that are there
  lock        resolve environment.yml afresh and write requirements.lock
  clean       delete what runs leave behind (caches, logs, executed notebooks, runs with changed parameters);
              keeps the environment, the data and the results of the plain profiles
Every command first creates or repairs the environment (conda or .venv) when environment.yml has changed.

Options of run and refresh
  --profile NAME        how much to compute: cpu (default), overnight, paper
  --only NB [NB ...]    these notebooks only: 20_dm, or a beginning of the name that fits one, such as 20
  --dataset NAME        data set instead of the profile's
  --ipc N               images per class instead of the profile's
  --seed N              seed instead of 0
  -p NAME=VALUE         any other parameter of the notebooks; may be repeated
  --cores N             use N cores (default: all of this machine); a cpu notebook takes one
  --executor NAME       where: local (default), gpu, slurm, kubernetes
  --force               also run what is up to date
  --dry-run             say what would run and why
  --list                list the notebooks and whether they are up to date
Any command
  --no-setup            use the environment as it is
  -h, --help            this text
Words after `--` go to pytest (test) or to JupyterLab (lab) as they are.

Changed parameters never touch the plain results: they go to results/cpu+ipc=10/ and figures/cpu+ipc=10/.

Variables
  COMPANION_ENV         folder of the environment, default .venv
  COMPANION_DATA        folder of downloaded data sets, default data
  COMPANION_CACHE       folder of stored intermediate results, default .cache
  COMPANION_TEST_MINUTES  test: begin no further notebook after so many minutes; it is reported as skipped (default: no limit)

Examples
  ./run_all.sh
  ./run_all.sh --only 20_dm 12_dc --dataset photos16 --ipc 10
  ./run_all.sh --only 20_dm --dataset folder:my/images -p size=32      (class folders; without size: at most 32 pixels)
  ./run_all.sh --profile paper --executor slurm
TEXT
}

fail() {
  printf 'run_all.sh: %s\n' "$1" >&2
  exit "${2:-1}"
}

# ---------------------------------------------------------------- environment

# Hash of everything that decides what is installed.
wanted_stamp() {
  cat environment.yml requirements.lock pyproject.toml | if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -d' ' -f1
}

set_up_already() { [[ -x $python && -f $stamp && $(<"$stamp") == "$(wanted_stamp)" ]]; }
pins() { sed -nE 's/^ +- ([A-Za-z0-9._-]+==[^ #]+).*/\1/p' environment.yml; }

# Run a command quietly; if it fails, say which step broke and where its output is.
step() {
  local what=$1
  shift
  echo "--- $what: $*" >>"$log"
  if ! "$@" >>"$log" 2>&1 </dev/null; then
    fail "$what failed; the reason is at the end of $log: $(grep -iE 'error|no space|not found' "$log" | tail -n 1 || true)"
  fi
}

# The first Python that can make a venv; 3.11 first because the tests ran with it.
find_python() {
  local candidate
  for candidate in python3.11 python3 python3.12 python3.13 python3.14 python; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer with its venv module is needed (Debian, Ubuntu: apt install python3-venv), or conda, mamba or micromamba; found $(python3 --version 2>&1 || true)"
}

create_environment() {
  local tool free folder base
  if [[ -e $env_dir && ! -e $env_dir/pyvenv.cfg && ! -e $env_dir/conda-meta && -n $(ls -A "$env_dir") ]]; then
    fail "$env_dir exists and is not a Python environment: move it away or set COMPANION_ENV to another folder"
  fi
  rm -rf -- "$env_dir"
  folder=$(dirname "$env_dir")
  mkdir -p "$folder"
  free=$(df -Pm "$folder" | awk 'NR == 2 {print $4}')
  ((free >= needed_mb)) ||
    fail "the environment needs $needed_mb MB of disk, $folder has $free MB free: make room or set COMPANION_ENV to a folder elsewhere"
  for tool in mamba micromamba conda; do
    command -v "$tool" >/dev/null || continue
    step "creating the environment with $tool" "$tool" create -y -p "$env_dir" -c conda-forge --override-channels python=3.11 pip
    return
  done
  base=$(find_python)
  step "creating the environment" "$base" -m venv "$env_dir"
}

# uv: that on the path, else one in the environment; with the index and the certificates that pip is configured with.
find_uv() {
  local config pair name value
  uv=$(command -v uv || echo "$env_dir/bin/uv")
  [[ -x $uv ]] || step "installing uv" "$python" -m pip install uv
  config=$("$python" -m pip config list)
  for pair in UV_DEFAULT_INDEX=index-url UV_INDEX=extra-index-url UV_FIND_LINKS=find-links SSL_CERT_FILE=cert; do
    name=${pair%%=*}
    value=$(sed -nE "s/^(:env:|global|install)\.${pair#*=}='(.*)'\$/\2/p" <<<"$config" | head -n 1 | sed 's/\\n/ /g')
    if [[ -z ${!name-} && -n $value ]]; then export "$name=$value"; fi
  done
  # as pip does: of several indexes the best version; the cache lies on the environment's disk
  export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match} UV_CACHE_DIR=${UV_CACHE_DIR:-$root/.setup/uv} UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
}

set_up() {
  local pin
  if set_up_already; then return; fi
  for pin in $(pins | tr '[:upper:]_' '[:lower:]-'); do
    grep -qE "^${pin//./\\.}( |\$)" requirements.lock || fail "requirements.lock lacks $pin of environment.yml: run ./run_all.sh lock"
  done
  mkdir -p "$root/.setup" "$(dirname "$env_dir")"
  if command -v flock >/dev/null; then
    exec 9>"$env_dir.lock" # beside the environment, which several clones may share
    flock 9 # a second call waits, then finds the work done
    if set_up_already; then return; fi
  fi
  echo "Setting up $env_dir (a first time takes some minutes and about 3 GB of download; log: $log)" >&2
  : >"$log"
  rm -f -- "$stamp"
  # An environment whose pip does not start was cut off while it was made.
  if ! "$python" -m pip --version >/dev/null 2>&1; then create_environment; fi
  find_uv
  # Compiled here, once: where Python may not write bytecode, every start would compile torch anew, ten seconds of a processor.
  step "installing requirements.lock" "$uv" pip install --python "$python" --compile-bytecode -r requirements.lock
  # compat: a plain path entry, so that a clone never finds another clone's modules through a shared environment
  step "installing the project" "$uv" pip install --python "$python" --no-deps --no-build-isolation --config-setting editable_mode=compat -e "$root"
  wanted_stamp >"$stamp"
  rm -rf -- "$root/.setup/uv"
  exec 9>&- || true
}

# Without set-up the environment may also be one that the caller activated.
use_environment() {
  if [[ $setup == yes ]]; then
    set_up
  elif [[ ! -x $python ]]; then
    if [[ -n ${COMPANION_ENV:-} ]]; then fail "no environment at $env_dir; leave out --no-setup to create it"; fi
    python=$(command -v python3 || command -v python || true)
    if [[ -z $python ]] || ! "$python" -c 'import papermill, torch' 2>/dev/null; then
      fail "no environment at $env_dir and none activated; leave out --no-setup to create it"
    fi
  fi
  PATH=$(dirname "$python"):$PATH
  export PATH
  # this clone's lib, even where the environment is shared between clones
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  export JUPYTER_PREFER_ENV_PATH=1 # the kernel of this environment, not one of the same name in the home folder
}

# ---------------------------------------------------------------- commands

run_tests() {
  local status=0 notebooks=0 word plain=() shown=() words=()
  # one thread per process, as in a run of the notebooks
  export OMP_NUM_THREADS=1 COMPANION_BARS=0
  if [[ -n ${COMPANION_TEST_MINUTES-} ]]; then
    [[ $COMPANION_TEST_MINUTES =~ ^[0-9]{1,5}$ ]] || fail "COMPANION_TEST_MINUTES is '$COMPANION_TEST_MINUTES'; allowed: a whole number of minutes" 2
    export COMPANION_TEST_UNTIL=$(($(date +%s) + 60 * 10#$COMPANION_TEST_MINUTES))
  fi
  for word in "$@"; do
    # a file is looked for here, then where the command was typed
    if [[ $word != [-/]* && ! -e ${word%%::*} && -e $COMPANION_CALLER/${word%%::*} ]]; then word=$COMPANION_CALLER/$word; fi
    case $word in
      notebooks | notebooks/* | *.ipynb) shown+=("$word") ;;
      *) if [[ $word != -* && -e ${word%%::*} ]]; then plain+=("$word"); else words+=("$word"); fi ;;
    esac
  done
  if ((${#plain[@]} + ${#shown[@]} == 0)); then
    plain=(tests)
    if compgen -G "notebooks/*.ipynb" >/dev/null; then shown=(notebooks); fi
  fi
  set -- -n "$(cores_here)" ${words[@]+"${words[@]}"}
  if ((${#plain[@]})); then "$python" -m pytest "${plain[@]}" --dist loadfile "$@" || status=$?; fi
  if ((${#shown[@]})); then
    if [[ -f tests/nbval_sanitize.cfg ]]; then shown+=(--nbval-sanitize-with tests/nbval_sanitize.cfg); fi
    # loadscope keeps the cells of a notebook in one process
    "$python" -m pytest "${shown[@]}" --nbval --nbval-current-env --nbval-kernel-startup-timeout 120 --dist loadscope "$@" || notebooks=$?
  fi
  if ((${#words[@]})); then # a choice by -k may leave nothing in one of the two
    if ((status == 5)); then status=0; fi
    if ((notebooks == 5)); then notebooks=0; fi
  fi
  return $((status > 0 ? status : notebooks))
}

# Not in the environment, because the old lock may be what breaks its set-up. Versions that still fit are kept.
lock() {
  python=$(find_python)
  mkdir -p .setup
  : >"$log"
  if ! command -v uv >/dev/null; then
    env_dir=$root/.setup/lock-env
    step "creating an environment for uv" "$python" -m venv "$env_dir"
    python=$env_dir/bin/python
  fi
  find_uv
  cp requirements.lock .setup/new.lock
  pins | "$uv" pip compile - --universal --python-version 3.11 --no-annotate --custom-compile-command "./run_all.sh lock" \
    -o .setup/new.lock --quiet || fail "environment.yml could not be resolved"
  mv .setup/new.lock requirements.lock
  rm -rf -- .setup/lock-env
}

cores_here() { "$python" -c 'from workflow.machine import cores; print(cores())'; }

# Whether a process holds this lock file; its id stands in it, for systems without flock.
in_use() {
  if command -v flock >/dev/null; then ! flock -n "$1" true; else kill -0 "$(awk '{print $1; exit}' "$1")" 2>/dev/null; fi
}

clean() {
  local path lock
  shopt -s nullglob
  for lock in results/logs/*/lock results/logs/*/work/*/lock figures/.[!.]*/lock "$env_dir".lock; do
    if [[ -e $lock ]] && in_use "$lock"; then fail "something is at work in $(dirname "$lock") (process $(awk '{print $1; exit}' "$lock")): wait for it or stop it, then clean"; fi
  done
  for path in .cache .snakemake .setup .pytest_cache .ruff_cache .hypothesis ./*.egg-info results/logs results/cache results/*+*/ figures/*+*/ \
    results/*/*/executed*.ipynb \
    figures/*.{html,js,inv} figures/_* figures/html figures/.[!.]* notebooks/.ipynb_checkpoints; do
    if [[ -e $path ]]; then
      echo "deleting ${path%/}"
      rm -rf -- "${path%/}"
    fi
  done
  find . -path "./.venv" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
}

# Check the words before anything slow happens; values of options are checked by workflow/command.py.
command=run setup=yes rest=() extra=() after_option=no
if (($# > 0)) && [[ $1 != -* ]]; then
  command=$1
  shift
  [[ " $commands " == *" $command "* ]] || fail "unknown command '$command'; allowed: $commands" 2
fi
while (($# > 0)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --no-setup) setup=no ;;
    --)
      shift
      extra=("$@")
      break
      ;;
    -*)
      [[ " $options " == *" ${1%%=*} "* ]] || fail "unknown option '$1'; allowed: $options" 2
      rest+=("$1")
      after_option=yes
      ;;
    *)
      [[ $after_option == yes ]] || fail "unknown word '$1'; a command comes first and is one of: $commands" 2
      rest+=("$1")
      ;;
  esac
  shift
done
case $command in
  run | refresh) ((${#extra[@]} == 0)) || fail "'$command' takes no words after --" 2 ;;
  *) ((${#rest[@]} == 0)) || fail "'$command' does not take '${rest[0]}'; allowed: --no-setup --help, and for test and lab words after --" 2 ;;
esac

case $command in
  clean) clean ;;
  lock)
    lock
    ;;
  test)
    use_environment
    run_tests ${extra[@]+"${extra[@]}"}
    ;;
  gallery)
    use_environment
    exec "$python" -m workflow.pages.gallery
    ;;
  lab)
    use_environment
    cd "$COMPANION_CALLER" # paths among the words are relative to where they were typed
    # a folder given as a word would become the one that is served; results and figures are to be opened, too
    exec "$python" -m jupyter lab --ServerApp.root_dir="$root" --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb \
      --ServerApp.contents_manager_class=workflow.lab.Notebooks ${extra[@]+"${extra[@]}"}
    ;;
  *)
    use_environment
    exec "$python" -m workflow.command "$command" ${rest[@]+"${rest[@]}"}
    ;;
esac

#!/usr/bin/env bash
# A real SLURM cluster of one node, this machine, to try the slurm profile: `slurm_single_node.sh start` and `stop`, as root,
# with Debian's slurm-wlm and munge installed. For trying only: no accounting, state in a folder of its own, and it
# refuses to touch a machine that has a slurm.conf of somebody else's.
set -euo pipefail

state=${SLURM_STATE:-/var/tmp/slurm-single-node}
conf=/etc/slurm/slurm.conf
mark="# written by slurm_single_node.sh"

fail() {
  printf 'slurm_single_node.sh: %s\n' "$1" >&2
  exit 1
}

running() { [[ -f $state/$1.pid ]] && kill -0 "$(<"$state/$1.pid")" 2>/dev/null; }

write_conf() {
  local host cpus memory
  host=$(hostname -s)
  cpus=$(nproc)
  memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
  mkdir -p /etc/slurm "$state/ctld" "$state/d"
  cat >"$conf" <<CONF
$mark
ClusterName=single
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge/socket
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/d
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
# finished jobs stay visible to squeue this long, in seconds
MinJobAge=300
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
  local tool
  for tool in slurmctld slurmd munged; do
    command -v "$tool" >/dev/null || fail "$tool is missing: apt-get install slurm-wlm munge"
  done
  [[ $(id -u) == 0 ]] || fail "start it as root"
  if [[ -e $conf ]] && ! grep -qF "$mark" "$conf"; then fail "$conf exists and is not from this script"; fi
  if running slurmctld; then fail "already running; stop it first"; fi
  [[ -f /etc/munge/munge.key ]] || /usr/sbin/mungekey --create
  chown munge: /etc/munge/munge.key
  mkdir -p "$state/munge"
  chmod 755 "$state" "$state/munge"
  chown munge: "$state/munge"
  write_conf
  setpriv --reuid munge --regid munge --clear-groups /usr/sbin/munged --socket "$state/munge/socket" \
    --pid-file "$state/munge/munged.pid" --log-file "$state/munge/munged.log" --seed-file "$state/munge/seed"
  slurmctld
  slurmd
  for _ in $(seq 30); do
    if sinfo --noheader --format %t 2>/dev/null | grep -q idle; then
      sinfo
      return
    fi
    sleep 1
  done
  fail "the node did not come up; see $state/slurmctld.log and $state/slurmd.log"
}

stop() {
  local pid_file
  for pid_file in "$state/slurmd.pid" "$state/slurmctld.pid" "$state/munge/munged.pid"; do
    if [[ -f $pid_file ]]; then kill "$(<"$pid_file")" 2>/dev/null || true; fi
  done
  sleep 2
  if [[ -e $conf ]] && grep -qF "$mark" "$conf"; then rm -f "$conf"; fi
  rm -rf -- "${state:?}"
}

case ${1:-} in
  start) start ;;
  stop) stop ;;
  *) fail "unknown word '${1:-}'; allowed: start stop" ;;
esac

#!/usr/bin/env bash
# Runs a command on the first of N hosts of a SLURM cluster that are emulated on this machine:
#
#   scripts/slurm_on_one_machine.sh 2 sbatch --wait --ntasks-per-node=1 scripts/slurm.sh ARGUMENTS
#
# To try scripts/slurm.sh, or mpirun under salloc; `bash` as command gives a shell. The hosts node1,
# node2, ... are network namespaces on a bridge, each with its own name, processes and /dev/shm; all
# disks are shared. Their CPUs and GPUs exist in SLURM's tables only: set JAX_PLATFORMS=cpu and, for
# two devices a process, XLA_FLAGS=--xla_force_host_platform_device_count=2.
#
# Needs root on Linux and of Debian's packages slurmctld, slurmd, slurm-client, munge and iproute2,
# and openmpi-bin for mpirun. Tried with SLURM 22.05. Jobs and hosts end with the command.
set -eu
if ! [[ ${1:-} =~ ^[1-9]$ && $# -gt 1 ]]; then
  echo "usage: $0 N COMMAND..." >&2
  exit 2
fi
count=$1
shift
bridge=freqformer0
if [[ -e /sys/class/net/$bridge ]]; then
  echo "error: $bridge is there already: another cluster runs." >&2
  exit 2
fi

folder=$(mktemp -d)
export SLURM_CONF=$folder/slurm.conf
pids=()
stop() {
  # A daemon is the first process of its host's part: what it has started ends with it.
  for pid in "${pids[@]}"; do pkill -KILL --parent "$pid" || kill "$pid"; done
  wait
  for ((i = 1; i <= count; i++)); do
    ip netns del "node$i"
    rm -r "/etc/netns/node$i"
  done
  ip link del $bridge
  rm -r "$folder"
} 2>/dev/null
trap 'set +e; stop' EXIT

# on HOST COMMAND...: runs it there
on() {
  local mine='hostname "$0" && mount -t tmpfs none /dev/shm && exec "$@"'
  exec ip netns exec "$1" unshare --uts --mount --pid --fork --kill-child=KILL --mount-proc \
    bash -c "$mine" "$@"
}

ip link add $bridge type bridge
ip link set $bridge up
for ((i = 1; i <= count; i++)); do
  ip netns add "node$i"
  mkdir -p "/etc/netns/node$i" # ip puts these files in place of those in /etc
  {
    echo 127.0.0.1 localhost
    for ((j = 1; j <= count; j++)); do echo "10.77.0.$j node$j"; done
  } >"/etc/netns/node$i/hosts"
  ip link add "freqformer$i" type veth peer name eth0 netns "node$i"
  ip link set "freqformer$i" master $bridge up
  ip -n "node$i" addr add "10.77.0.$i/24" dev eth0
  ip -n "node$i" link set eth0 up
  ip -n "node$i" link set lo up
  mkdir "$folder/node$i"
done

for ((i = 0; i < 8; i++)); do mknod "$folder/gpu$i" c 1 3; done # as /dev/null
echo "Name=gpu File=$folder/gpu[0-7]" >"$folder/gres.conf"
echo "CgroupPlugin=cgroup/v1" >"$folder/cgroup.conf" # else it looks for one, in vain
cat >"$SLURM_CONF" <<END
ClusterName=emulated
SlurmctldHost=node1
SlurmUser=root
AuthInfo=socket=$folder/munge
StateSaveLocation=$folder
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n/slurmd.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[1-$count] CPUs=64 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES
END

chmod 755 "$folder" # munged wants its folder open
head -c 1024 /dev/urandom >"$folder/key"
chmod 400 "$folder/key"
munged --foreground --socket="$folder/munge" --key-file="$folder/key" \
  --pid-file="$folder/munge.pid" --seed-file="$folder/munge.seed" 2>"$folder/munge.log" &
pids+=($!)
(on node1 slurmctld -D) >/dev/null 2>&1 &
pids+=($!)
for ((i = 1; i <= count; i++)); do
  (on "node$i" slurmd -D) >/dev/null 2>&1 &
  pids+=($!)
done
for ((i = 0; i < 60; i++)); do
  idle=$( (on node1 sinfo -h -t idle -o %D) 2>/dev/null || true)
  [[ $idle == "$count" ]] && break
  sleep 0.5
done
if [[ $idle != "$count" ]]; then
  echo "error: SLURM did not start:" >&2
  tail -n 5 "$folder"/*.log "$folder"/*/*.log >&2
  exit 1
fi
(on node1 "$@")

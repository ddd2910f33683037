#!/usr/bin/env bash
# Trains in N processes on this machine, as on N hosts:
#
#   scripts/local_cluster.sh 4 --config=configs/ucf101.py --workdir=runs/ucf101
#
# Process i has GPU i. On CPUs, XLA_FLAGS=--xla_force_host_platform_device_count=2 gives each
# process two devices. Ctrl-C and SIGTERM save and stop, as they do for one process; a second one
# kills. Where one process fails, all are ended.
set -u
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 N ARGUMENTS-OF-TRAIN.PY" >&2
  exit 2
fi
count=$1
shift
free_port='import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])'
port=$(python -c "$free_port") || exit

pids=()
for ((i = 0; i < count; i++)); do
  JAX_LOCAL_DEVICE_IDS=$i python "$(dirname "$0")/../train.py" "$@" \
    --coordinator="localhost:$port" --processes="$count" --process="$i" &
  pids+=($!)
done

# Bash lets background processes ignore Ctrl-C.
signal=TERM
stop() {
  kill -$signal "${pids[@]}" 2>/dev/null
  signal=KILL
}
trap stop INT TERM

code=0
declare -A ended_ones=()
while ((${#ended_ones[@]} < count)); do
  wait -n -p ended 2>/dev/null # Bash would name those that it has killed
  status=$?
  if [[ -z ${ended:-} ]]; then
    [[ $(jobs -pr) ]] && continue # a signal ended the wait, no process
    break                         # the others had ended before
  fi
  ended_ones[$ended]=1
  if ((status && !code)); then
    code=$status
    kill -KILL "${pids[@]}" 2>/dev/null
  fi
done
for pid in "${pids[@]}"; do
  [[ ${ended_ones[$pid]:-} ]] && continue
  wait "$pid" 2>/dev/null
  status=$?
  ((status && !code)) && code=$status
done
exit $code

#!/usr/bin/env bash
# One node of a training on several: torchrun, with the rendezvous at node 0. What Kubernetes and SkyPilot start.
#
#   NODES=2 NODE=0 RENDEZVOUS=HOST-OF-NODE-0:29500 [PROCESSES=8] node.sh CONFIG.yaml [section.key=value ...]
#
# Its exit code says what the one who started it should do, since torchrun's is 1 for a preemption too:
#   0   the run has come to its end
#   64  the config is not valid: starting again does not help
#   85  asked to stop, by SIGTERM here or on another node; what there was to save is saved: start again
#   1   anything else
set -uo pipefail
trap 'exit 85' TERM # nothing runs yet
: "${NODES:?how many nodes there are}" "${NODE:?the number of this one}" "${RENDEZVOUS:?HOST:PORT of node 0}"
[ "$#" -ge 1 ] || { echo "error: no config: node.sh CONFIG.yaml [section.key=value ...]" >&2; exit 64; }

run=$(python launch/run_folder.py "$@") || { [ "$?" = 64 ] && exit 64; exit 1; }

# The trainer's marker in the run folder, which pods share. One that was there before is not this attempt's.
marker() { stat --format='%i %y' "$run/preempted" 2>/dev/null; }
before=$(marker)
stopped_here() { [ -n "$(marker)" ] && [ "$(marker)" != "$before" ]; }

host=${RENDEZVOUS%:*}
until getent hosts "$host" >/dev/null; do # its name appears when node 0 does
  [ "$SECONDS" -lt 1800 ] || { echo "error: $host, node 0, has no address after 30 minutes" >&2; exit 1; }
  sleep 2
done

echo "node $NODE of $NODES, node 0 is $RENDEZVOUS: $*"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# GRACE: seconds that torchrun leaves its workers after SIGTERM, for a checkpoint. Of USR1 it would die, and they with it.
torchrun \
  --nnodes="$NODES" \
  --nproc_per_node="${PROCESSES:-gpu}" \
  --shutdown-timeout="${GRACE:-270}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  --rdzv-id=partial_fc \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$RENDEZVOUS" \
  --rdzv-conf="is_host=$([ "$NODE" = 0 ] && echo true || echo false),timeout=1800,join_timeout=1800" \
  launch/train.py "$@" &
torchrun=$!

asked=no
trap 'asked=yes; kill -TERM "$torchrun"' TERM
while kill -0 "$torchrun" 2>/dev/null; do
  sleep 2 &
  wait -n "$torchrun" $! # a signal ends the wait, not torchrun
  # All is saved and the workers have ended: torchrun would wait five minutes more for that of the node that is to go,
  # deaf to SIGTERM.
  if stopped_here && [ -z "$(cat /proc/"$torchrun"/task/*/children 2>/dev/null)" ]; then
    kill -KILL "$torchrun" 2>/dev/null
  fi
done
wait "$torchrun"
code=$?

if [ "$code" != 0 ] && [ "$asked" = yes ] || stopped_here; then
  echo "node $NODE: asked to stop; started again, the run goes on"
  exit 85
fi
[ "$code" = 0 ] || exit 1

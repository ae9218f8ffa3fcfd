#!/usr/bin/env bash
# Runs a command, and leaves with 143 where a SIGTERM has stopped it. `train` itself saves and leaves with 0 then, from
# which a scheduler could not tell a run that was stopped from one that is finished.
#
#   launch/stoppable.sh COMMAND [ARGUMENT ...]
set -uo pipefail
stopped=''
trap 'stopped=1; kill -TERM "$child" 2>/dev/null' TERM
"$@" &
child=$!
while true; do
  wait "$child"
  code=$?
  kill -0 "$child" 2>/dev/null || break  # a signal ends `wait`, not the command
done
if [[ $stopped && $code -eq 0 ]]; then code=143; fi
exit "$code"

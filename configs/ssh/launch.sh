#!/usr/bin/env bash
# launch.sh: one ft_launcher on each of some machines, over ssh; the output of all of them here, the end of all of them
# with Ctrl-C here.
#
#     HOSTS="node1 node2 node3" FT_TOKEN_FILE=~/.ft-token bash launch.sh --nproc-per-node gpu train.py --epochs 3
#
# It needs on each machine: ssh without a password, this directory at the same path, ft_launcher in the same place as
# here, and the token file (mode 0600), if one is named. On more than some dozens of machines, take a scheduler.
set -euo pipefail
read -ra hosts <<<"${HOSTS:?the machines, with spaces between, the first one first}"
port=${PORT:-29400}
launcher=$(command -v ft_launcher)
endpoints=$(printf '%s\n' "${hosts[@]}" | awk '!seen[$0]++' | head -n 3 | sed "s/\$/:$port/" | paste -sd ,)
flags=(--nnodes "${NNODES:-${#hosts[@]}}" --rdzv-backend c10d --rdzv-endpoint "$endpoints"
    --rdzv-id "${RUN_ID:-$(date +%Y%m%d-%H%M%S)-$$}")
[ -z "${FT_TOKEN_FILE:-}" ] || flags+=(--ft-token-file "$FT_TOKEN_FILE")

sessions=()
for index in "${!hosts[@]}"; do
    printf -v command 'cd %q && GROUP_RANK=%q exec %q' "$PWD" "$index" "$launcher"
    printf -v words ' %q' "${flags[@]}" "$@"
    # With a terminal (-tt) the launcher hears SIGHUP when its ssh ends here; without one it would go on.
    ssh -tt -o BatchMode=yes "${hosts[index]}" "$command$words" </dev/null > >(sed -u "s/^/[${hosts[index]}] /") 2>&1 &
    sessions+=($!)
done
trap 'kill "${sessions[@]}" 2>/dev/null || true' INT TERM EXIT

code=0
for session in "${sessions[@]}"; do
    its=0
    wait "$session" || its=$?
    [ "$its" -le "$code" ] || code=$its
done
exit "$code"

#!/bin/bash
# dsg beside its peers on one GPU: builds nothing, needs 8 minutes at most, prints one table last and leaves results.json in OUT.
# BENCH="dotnet .../DeepSeekGraph.GpuBenchmarks.dll" PEERS=DIR OUT=DIR COMMIT=HASH bash benchmarks/gpu/run.sh
# PEERS holds hf_proxy.py and torch_proxy.py. On a GPU of 80 GB the equality run has 3 layers: fp32 masters of 4 do not fit a peer.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
OUT=${OUT:-.}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
lines=$work/lines

measure() {
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" >"$work/log" 2>&1
  local rc=$?
  [ $rc -eq 0 ] || { echo "rc $rc"; tail -5 "$work/log" | cut -c1-300; }
  grep '^{' "$work/log" | sed "s/^{/{\"name\":\"$name\",/" | tee -a "$lines" | cut -c1-200
  cp "$work/log" "$OUT/${name// /_}.log"
}

measure "dsg" 100 $BENCH
measure "dsg clipped" 100 $BENCH --clip 1
measure "dsg by kernel" 100 $BENCH --profile --repeats 5
measure "PyTorch compiled" 150 python3 "$PEERS/torch_proxy.py" compile
measure "transformers" 120 python3 "$PEERS/hf_proxy.py" grouped_mm
# SKIP=equal leaves out the 20 steps beside the peer
if [ "${SKIP:-}" != equal ]; then
echo "== equal"
timeout 150 $BENCH --like-peer --same --clip 1e9 --layers 3 --steps 20 --lr 1e-5 --repeats 1 --dump "$work/weights" --losses "$OUT/losses_dsg.txt" >"$OUT/equal_dsg.log" 2>&1 || tail -3 "$OUT/equal_dsg.log"
timeout 150 python3 "$here/equal.py" "$PEERS/torch_proxy.py" "$work/weights" 3 20 "$OUT/losses_peer.txt" 2>"$OUT/equal_peer.log" || tail -3 "$OUT/equal_peer.log"
fi
python3 "$here/table.py" "$lines" "$OUT"

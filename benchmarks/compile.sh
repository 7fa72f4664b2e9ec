#!/bin/sh
# Times a cold `dsg compile` of the 671B job for 1024 ranks, at 61, 122 and 244 layers: a fresh process each, no plan cache.
# Usage: benchmarks/compile.sh [ROUNDS]. Prints a table: median wall and processor seconds, and the most memory, over the rounds.
set -eu
cd "$(dirname "$0")/.."
rounds=${1:-5}
command -v /usr/bin/time >/dev/null || { echo 'GNU time is needed (package time)' >&2; exit 1; }
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
./dsg --help >/dev/null # builds it if need be

median() { sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }

echo '| layers | wall s | processor s | memory MiB | plan bytes |'
echo '|---|---|---|---|---|'
for layers in 61 122 244; do
  i=0
  while [ "$i" -lt "$rounds" ]; do
    /usr/bin/time -a -o "$out/$layers" -f '%e %U %S %M' ./dsg compile --recipe deepseek_v3_pretrain \
      --set "model.num_layers=$layers" --set recipe.layout= --out "$out/plan" >/dev/null
    i=$((i + 1))
  done
  wall=$(cut -d' ' -f1 "$out/$layers" | median)
  cpu=$(awk '{ print $2 + $3 }' "$out/$layers" | median)
  memory=$(awk '{ print int($4 / 1024) }' "$out/$layers" | sort -n | tail -n 1)
  echo "| $layers | $wall | $cpu | $memory | $(wc -c <"$out/plan") |"
done

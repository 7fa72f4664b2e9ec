#!/bin/sh
# dsg import and export beside cp -r, whole processes: benchmarks/import.sh [ROUNDS [LAYERS [import]]]; committed results are in
# results/import.md. In DSG_BENCH_FOLDER, without it in /dev/shm, where no disk is in the way: 10 GB for 6 layers; 12 layers of import only, too.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d "${DSG_BENCH_FOLDER:-/dev/shm}/dsg-import-XXXXXX")
trap 'rm -rf "$folder"' EXIT
cd "$root"
export MSBUILDDISABLENODEREUSE=1
dotnet build src/Cli -nologo -v quiet
dotnet build benchmarks/Checkpoints -nologo -v quiet
dotnet artifacts/bin/CheckpointBenchmarks/release/DeepSeekGraph.CheckpointBenchmarks.dll "$folder" "dotnet artifacts/bin/Cli/release/dsg.dll" "${1:-5}" ${2:+"$2"} ${3:+"$3"}

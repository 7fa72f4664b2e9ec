#!/bin/sh
# dsg import and export beside cp -r, whole processes: benchmarks/import.sh [ROUNDS [FOLDER]]; committed results are in results/import.md.
# FOLDER needs 13 GB; without, one in /dev/shm, where no disk is in the way.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d "${2:-/dev/shm}/dsg-import-XXXXXX")
trap 'rm -rf "$folder"' EXIT
cd "$root"
export MSBUILDDISABLENODEREUSE=1
dotnet build src/Cli -nologo -v quiet
dotnet build benchmarks/Checkpoints -nologo -v quiet
dotnet artifacts/bin/CheckpointBenchmarks/release/DeepSeekGraph.CheckpointBenchmarks.dll "$folder" artifacts/bin/Cli/release/dsg.dll "${1:-5}"

#!/bin/sh
# Everything a developer or CI does: ./build.sh [build | test [AREA...] | check | fix | bench | publish]; see CONTRIBUTING.md.
set -u
cd "$(dirname "$0")" || exit 1
export DOTNET_CLI_TELEMETRY_OPTOUT=1 DOTNET_NOLOGO=1 MSBUILDDISABLENODEREUSE=1
csharp='src/Runtime src/Model src/Cli'

# Leaves the time of the build where ./dsg looks for it.
build() {
  dotnet restore DeepSeekGraph.sln -nologo -v quiet && mkdir -p artifacts && touch artifacts/dsg.stamp.new &&
    dotnet build DeepSeekGraph.sln -nologo -v quiet -m:2 --no-restore && mv artifacts/dsg.stamp.new artifacts/dsg.stamp
}

# Runs the test programs (all, or those of the areas named) and adds up their closing lines. A program that
# crashes, hangs or prints no closing line counts as one more failure.
run_tests() {
  [ $# -gt 0 ] || set -- $(ls tests | sed -n 's/\.Tests$//p')
  passed=0 failed=0 skipped=0 status=0
  log=$(mktemp) && trap 'rm -f "$log"' EXIT
  for area in "$@"; do
    echo "== $area"
    { timeout 1200 dotnet "artifacts/bin/$area.Tests/release/DeepSeekGraph.$area.Tests.dll" 2>&1; echo "exit code $?"; } | tee "$log"
    counts=$(sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped$/\1 \2 \3/p' "$log" | tail -n 1)
    set -- ${counts:-0 0 0}
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + $3))
    if [ -z "$counts" ] || { [ "$2" -eq 0 ] && ! grep -qx 'exit code 0' "$log"; }; then
      echo "$area: the test program broke off"
      failed=$((failed + 1))
    fi
  done
  printf '\n%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
  [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
}

# A tree that does not build is one failure: the closing line is always there.
test_all() {
  build || { printf '\n0 passed, 1 failed, 0 skipped\n'; return 1; }
  run_tests "$@"
}

check_style() {
  ! grep -n '://' paket.lock || { echo 'paket.lock names a source: run build/paket.sh install'; return 1; }
  dotnet tool restore >/dev/null && dotnet fantomas --check src tests || return 1
  for folder in $csharp; do
    dotnet format whitespace "$folder" --folder --verify-no-changes || return 1
  done
}

fix_style() {
  dotnet tool restore >/dev/null && dotnet fantomas src tests || return 1
  for folder in $csharp; do
    dotnet format whitespace "$folder" --folder || return 1
  done
  build/architecture.sh --write
}

# One folder that runs on a node without .NET. LibTorch (500 MB) goes into it too; with --no-libtorch, DSG_LIBTORCH says where it is
# (docs/cluster.md).
publish() {
  folder=artifacts/publish/dsg with=yes
  for word in "$@"; do
    case "$word" in
      --no-libtorch) with=no ;;
      -*) echo "publish: there is no option '$word': choose --no-libtorch" >&2; return 2 ;;
      *) folder=$word ;;
    esac
  done
  dotnet publish src/Cli -nologo -v quiet --self-contained -o "$folder" || return 1
  # beside the program, not where this machine has its packages
  libtorch=$(cat "$folder/libtorch.path") && rm "$folder/libtorch.path" || return 1
  if [ "$with" = yes ]; then
    cp "$libtorch"/*.so* "$folder/" || return 1
  fi
  echo "published to $folder: $(du -sh "$folder" | cut -f 1); start $folder/dsg"
}

command=${1:-test}
[ $# -eq 0 ] || shift
case "$command" in
  build) build ;;
  test) test_all "$@" ;;
  check) check_style && test_all ;;
  fix) fix_style ;;
  # The training step by hand, compiled and interpreted, side by side; committed results are in benchmarks/results.
  bench) build && THP_MEM_ALLOC_ENABLE=1 dotnet artifacts/bin/Benchmarks/release/DeepSeekGraph.Benchmarks.dll "$@" ;;
  publish) publish "$@" ;;
  *) echo 'usage: ./build.sh [build | test [AREA...] | check | fix | bench [ROUNDS [--profile]] | publish [FOLDER] [--no-libtorch]]' >&2; exit 2 ;;
esac

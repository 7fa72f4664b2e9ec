#!/bin/sh
# Prints every source file with its first comment: F# in compile order, C# by name. With --write it puts the
# list into ARCHITECTURE.md, below the marker; Repository.Tests compares the two.
cd "$(dirname "$0")/.." || exit 1
marker='<!-- The list below is written by build/architecture.sh. -->'

sources_of() {
  case "$1" in
    *.fsproj) sed -n 's/.*<Compile Include="\([^"]*\)".*/\1/p' "$1" ;;
    *) (cd "$(dirname "$1")" && find . -name obj -prune -o -name '*.cs' -print | sed 's#^\./##' | LC_ALL=C sort) ;;
  esac
}

list() {
  for area in Plan Graph Compiler Runtime Model Cli; do
    project=$(ls src/$area/$area.*proj)
    printf '\n## %s\n\n' "$area"
    sources_of "$project" | while read -r file; do
      sentence=$(sed -n 's#^///* *##p' "src/$area/$file" | head -n 1)
      printf -- '- [%s](src/%s/%s): %s\n' "$file" "$area" "$file" "$sentence"
    done
  done
}

if [ "${1:-}" != --write ]; then
  list
  exit
fi
{ awk -v marker="$marker" '{ print } $0 == marker { exit }' ARCHITECTURE.md; list; } >ARCHITECTURE.md.new
mv ARCHITECTURE.md.new ARCHITECTURE.md

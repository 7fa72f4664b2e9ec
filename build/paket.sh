#!/bin/sh
# Runs the local paket tool with NuGet's own package source, so that the repository names none.
# The build calls it through PaketExePath (Directory.Build.props); use it for install and update too.
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
caller=$PWD

# paket.dependencies says "source %PKG_SOURCE%": the first enabled source that NuGet is configured with.
if [ -z "$PKG_SOURCE" ]; then
  PKG_SOURCE=$(dotnet nuget list source --format Short | sed -n 's/^E //p' | head -n 1)
  [ -n "$PKG_SOURCE" ] || { echo "paket.sh: NuGet has no enabled package source" >&2; exit 1; }
  export PKG_SOURCE
fi

# A fresh clone has no paket yet, and projects restore in parallel: one installs it, the others wait.
# The lock is a file of its own, since .NET locks the files it opens in the same way.
cd "$root" || exit 1
if ! dotnet paket --version >/dev/null 2>&1; then
  mkdir -p paket-files && flock paket-files/tool.lock dotnet tool restore >/dev/null || exit 1
fi
cd "$caller" || exit 1

dotnet paket "$@"
status=$?

# These commands resolve the source and write its address into the lock file: put the name back.
case "$1" in
  install | update | add | remove)
    sed -i 's#^\( *remote: \).*#\1%PKG_SOURCE%#' "$root/paket.lock" ;;
esac
exit $status

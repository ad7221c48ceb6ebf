#!/usr/bin/env bash
# On a machine that has flite: packs the program and its voices (15 MB) for one that cannot
# install it. Both must be x86-64 Linux.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p build
program=$(command -v flite)
libraries=$(ldd "$program" | grep -oE '/[^ ]*lib(flite|asound)[^ ]*')
tar -czhf build/flite.tar.gz --transform 's,.*/,flite/,' "$program" $libraries
ls -l build/flite.tar.gz

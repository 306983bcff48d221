#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# check_tidy.sh CLANG_TIDY ROOT: the host headers, alone and as `evaluate` uses them, and `evaluate` itself, by the
# profile in ROOT/.clang-tidy. Each version has other checks, so that only the one of the profile counts.
set -euo pipefail
tidy=$1
cd "$2"
wanted=14
version=$("$tidy" --version | sed -n 's/.*version \([0-9]*\).*/\1/p')
if [[ $version != "$wanted" ]]; then
  echo "SKIPPED: clang-tidy is version ${version:-unknown}, the profile is for $wanted"
  exit
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo '#include <packkv/packkv.hpp>' >"$work/umbrella.cpp"
failed=0
for source in "$work/umbrella.cpp" examples/evaluate/*.cpp; do
  # Findings go to stdout, how many were suppressed in system headers to stderr.
  "$tidy" --quiet --config-file=.clang-tidy --header-filter='/(packkv|evaluate)/' "$source" -- \
    -std=c++17 -I "$PWD/include" -I "$PWD/examples" -DPACKKV_EVALUATE_CUDA=0 2>"$work/log" || {
    cat "$work/log"
    echo "FAILED: $source"
    failed=1
  }
done
exit "$failed"

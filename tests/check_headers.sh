#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# check_headers.sh COMPILER INCLUDE_DIR STANDARD...: every .hpp alone, syntax only, warnings are errors.
set -euo pipefail
compiler=$1 include_dir=$2
shift 2
failed=0
while IFS= read -r header; do
  for standard in "$@"; do
    if ! printf '#include <%s>\n' "$header" |
      "$compiler" -fsyntax-only "-std=$standard" -Wall -Wextra -Wshadow -Werror -I "$include_dir" -x c++ -; then
      echo "FAILED: $header with $compiler -std=$standard"
      failed=1
    fi
  done
done < <(cd "$include_dir" && find packkv -name '*.hpp' | LC_ALL=C sort)
exit "$failed"

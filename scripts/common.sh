# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts: packages, and nothing else.

# need COMMAND|FILE=PACKAGE...: installs with apt-get the packages whose command (or absolute file) is missing. Where that
# cannot be done it says so and goes on: configuring the build has the last word.
need() {
  local item thing package missing=()
  for item in "$@"; do
    thing=${item%%=*} package=${item#*=}
    # shellcheck disable=SC2086  # a file may be a pattern
    if [[ $thing == /* ]]; then
      compgen -G "$thing" >/dev/null || missing+=("$package")
    else
      command -v "$thing" >/dev/null || missing+=("$package")
    fi
  done
  ((${#missing[@]})) || return 0
  local sudo=()
  [[ $(id -u) == 0 ]] || sudo=(sudo -n)
  if ! command -v apt-get >/dev/null || { ((${#sudo[@]})) && ! sudo -n true 2>/dev/null; }; then
    echo "Missing, and not installable from here (that takes apt-get, and root or sudo): ${missing[*]}" >&2
    return 0
  fi
  echo "Installing ${missing[*]}"
  { "${sudo[@]}" apt-get update -qq &&
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    </dev/null >/dev/null || echo "apt-get could not install: ${missing[*]}" >&2
}

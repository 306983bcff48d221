#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""direction.py INCLUDE_DIR: which header may include which, and how long a header may be.

An include points down the layers, never up or sideways; a .hpp, which any host compiler takes, includes no .cuh;
nothing but the standard library is included from outside, and CUDA only by the one door to it. Names file, line and
include.
"""
import pathlib
import re
import sys

MOST_LINES = 400

# What a folder may include beside its own headers. The host's half stands on core and codec and never meets a kernel;
# policies are numbers about formats, which kernels and device-wide calls read.
BELOW = {"core": set()}
BELOW["detail"] = {"core"}
BELOW["codec"] = BELOW["detail"] | {"detail"}
for folder in "policy", "reference", "cache", "calibrate":
    BELOW[folder] = BELOW["codec"] | {"codec"}
BELOW["thread"] = BELOW["codec"] | {"codec"}
BELOW["warp"] = BELOW["thread"] | {"thread"}
BELOW["block"] = BELOW["warp"] | {"warp"}
BELOW["kernel"] = BELOW["block"] | {"block", "policy"}
BELOW["device"] = BELOW["kernel"] | {"kernel"}
UMBRELLAS = {"packkv.hpp", "packkv.cuh"}  # include everything, and nothing includes them

# (file, include): why it may point up all the same.
EXCEPTIONS = {
    ("core/float_formats.hpp", "detail/arith.hpp"): "rounded operations on bits; needs core/config.hpp only",
    ("detail/report.cuh", "codec/pages.hpp"): "how a kernel writes the report that a call of codec/pages.hpp declares",
}
OUTSIDE = {("detail/cuda.cuh", "cuda_runtime.h"), ("detail/cuda.cuh", "packkv_simt.hpp")}

INCLUDE = re.compile(r'^\s*#\s*include\s*(?:<([^>]*)>|"([^"]*)")')


def complaint(name, text, root, used):
    """Why the file `name` may not include `text`, or None."""
    if not text.startswith("packkv/"):
        if "." in text or "/" in text:
            return None if (name, text) in OUTSIDE else "not part of the standard library"
        return None
    target = text.removeprefix("packkv/")
    if not (root / target).is_file():
        return "no such header"
    if target in UMBRELLAS:
        return None if (name, target) == ("packkv.cuh", "packkv.hpp") else "only users include all at once"
    if name.endswith(".hpp") and target.endswith(".cuh"):
        return "a .hpp compiles without nvcc"
    if name in UMBRELLAS:
        return None
    if (name, target) in EXCEPTIONS:
        used.add((name, target))
        return None
    here, there = name.split("/")[0], target.split("/")[0]
    if here != there and there not in BELOW[here]:
        return f"{here} may include {', '.join(sorted(BELOW[here])) or 'nothing'}"
    return None


def cycle(includes):
    """A ring of headers, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name):] + [name]
        if name in done:
            return None
        path.append(name)
        for target in includes.get(name, ()):
            ring = visit(target)
            if ring:
                return ring
        path.pop()
        done.add(name)
        return None

    return next(filter(None, map(visit, includes)), None)


def main():
    root = pathlib.Path(sys.argv[1]) / "packkv"
    failures, used, includes = [], set(), {}
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".hpp", ".cuh")):
        name = path.relative_to(root).as_posix()
        if name not in UMBRELLAS and name.split("/")[0] not in BELOW:
            failures.append(f"{name}: no layer of this script has that folder")
            continue
        lines = path.read_text().splitlines()
        if len(lines) > MOST_LINES:
            failures.append(f"{name}: {len(lines)} lines, at most {MOST_LINES}")
        includes[name] = []
        for number, line in enumerate(lines, 1):
            found = INCLUDE.match(line)
            if not found:
                continue
            text = found.group(1) or found.group(2)
            includes[name].append(text.removeprefix("packkv/"))
            why = "write <packkv/...>" if found.group(2) else complaint(name, text, root, used)
            if why:
                failures.append(f"{name}:{number}: includes {text}: {why}")
    failures += [f"{file}: includes {target} no more: drop the exception" for file, target in EXCEPTIONS.keys() - used]
    ring = cycle(includes)
    if ring:
        failures.append("headers include each other: " + " -> ".join(ring))
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"{len(includes)} headers, {sum(map(len, includes.values()))} includes, {len(failures)} failures")
    return 1 if failures or not includes else 0


if __name__ == "__main__":
    sys.exit(main())

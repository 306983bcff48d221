#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""gates.py --nvcc NVCC [--update] [SOURCE...]: what the kernels of tests/compile/*.cu cost, against budgets.txt.

Each source is compiled for sm_90a, or for the architectures that its line "// Architectures: ..." names, with warnings
as errors. A kernel fails that needs more registers, shared memory, stack or bytes of spill stores than the table says,
or four times the seconds in ptxas; so does a source that takes four times the seconds of the CPU, a kernel that is not
in the table, and one of the table that is no more. A kernel spills nothing unless spills.txt says why. The numbers are
those of one version of nvcc: with another one registers, shared memory and stack may be 10 % more (at least 8
registers, 256 bytes) and spills twice as many, but none where there are none. --update writes what it measured. Without
sources: all of them, and whether each kernel of include/packkv/kernel is in the table and each line of spills.txt is
needed.
"""
import argparse
import fnmatch
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
INCLUDE = HERE.parent.parent / "include"
TABLE, REASONS = HERE / "budgets.txt", HERE / "spills.txt"
COLUMNS = ("registers", "spilled", "stack", "shared", "ptxas_s")
SLOWER, LEAST_SECONDS = 4, 5  # machines differ, and others compile beside us


def shortened(name):
    """void packkv::kernel::f<packkv::x<...>, (packkv::e)2, 4>(...) as f<x, 2, 4>."""
    out, depth = "", 0
    for c in name.removeprefix("void "):
        depth -= c == ">"
        if c == "(" and depth == 0:
            break
        if depth == 0 or (depth == 1 and c not in "<>"):
            out += c
        depth += c == "<"
    return re.sub(r"\([\w:]+\)(?=-?\d)|\w+::| (?=[,>])", "", out)


def demangled(names):
    run = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True)
    return [shortened(line) for line in run.stdout.splitlines()]


def kernels_of(report):
    """{kernel: numbers} of what `ptxas -v` said; a function that a kernel calls adds to its spills."""
    kernels, numbers = {}, None
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)'", line):
            numbers = kernels[found.group(1)] = dict.fromkeys(COLUMNS, 0)
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if numbers is not None:
                numbers["stack"] += int(found.group(1))
                numbers["spilled"] += int(found.group(2))
        elif found := re.search(r"Used (\d+) registers", line):
            numbers["registers"] = int(found.group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            numbers["shared"] = int(shared.group(1)) if shared else 0
        elif found := re.search(r"Compile time = ([\d.]+) ms", line):
            numbers["ptxas_s"] = round(float(found.group(1)) / 1000, 1)
    names = demangled(list(kernels))
    if len(set(names)) != len(names):
        sys.exit("two kernels have the same short name; give each format a source of its own:\n" + "\n".join(names))
    return dict(zip(names, kernels.values()))


def architectures_of(source):
    found = re.search(r"^// Architectures: (.*)$", source.read_text(), re.M)
    return [f"sm_{a}" for a in found.group(1).split()] if found else ["sm_90a"]


def compiled(nvcc, source, architecture):
    """(kernels, seconds of the CPU), or None if nvcc failed."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run([nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas", "-v",
                              "-Werror", "all-warnings", "-I", INCLUDE, source, "-o", f"{folder}/gate.cubin"],
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode != 0 or re.search(r"\bwarning\b", run.stdout):
        print(run.stdout)
        return None
    return kernels_of(run.stdout), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def read_table():
    """(version of nvcc, {(source, architecture): (seconds, {kernel: numbers})})."""
    version, table, kernels = None, {}, None
    for line in TABLE.read_text().splitlines() if TABLE.exists() else ():
        if line.startswith("nvcc "):
            version = line.split()[1]
        elif found := re.match(r"(\S+) for (\S+): ([\d.]+) s", line):
            kernels = {}
            table[found.group(1), found.group(2)] = float(found.group(3)), kernels
        elif found := re.match(r"  (.*>)" + r" +([\d.]+)" * len(COLUMNS) + "$", line):
            kernels[found.group(1)] = dict(zip(COLUMNS, map(float, found.groups()[1:])))
    return version, table


def write_table(version, table):
    lines = [
        "# What tests/compile/gates.py compares with, and writes with --update: registers of a thread; bytes of spill",
        "# stores, stack and static shared memory; seconds in ptxas; behind a source seconds of the CPU for nvcc.",
        f"nvcc {version}", f"date {time.strftime('%Y-%m-%d')}"]
    for (source, architecture), (seconds, kernels) in sorted(table.items()):
        lines += ["", f"{source} for {architecture}: {seconds:.1f} s",
                  f"  {'kernel':<64}" + "".join(f"{c:>10}" for c in COLUMNS)]
        lines += [f"  {name:<64}" + "".join(f"{numbers[c]:>10g}" for c in COLUMNS)
                  for name, numbers in sorted(kernels.items())]
    TABLE.write_text("\n".join(lines) + "\n")


def spill_patterns():
    """(source, kernel) of the lines of spills.txt that give a reason."""
    lines = (line for line in REASONS.read_text().splitlines() if line and not line.startswith("#"))
    return [tuple(line.split(": ", 1)[0].split(" ", 1)) for line in lines if re.search(": *\\S", line)]


def matches(pattern, source, kernel):
    return fnmatch.fnmatchcase(source, pattern[0]) and fnmatch.fnmatchcase(kernel, pattern[1])


def limit(column, value, same_version):
    if column == "ptxas_s":
        return SLOWER * value + LEAST_SECONDS
    if same_version:
        return value
    if column == "spilled":
        return 2 * value
    return value + max(value // 10, 8 if column == "registers" else 256)


def compared(source, kernels, budget, same_version):
    """What is wrong, one line each."""
    for kernel in sorted(kernels.keys() | budget.keys()):
        if kernel not in kernels:
            yield f"{kernel}: in the table, but not compiled"
        elif kernel not in budget:
            yield f"{kernel}: not in the table"
        else:
            for column in COLUMNS:
                number, most = kernels[kernel][column], limit(column, budget[kernel][column], same_version)
                if number > most:
                    yield f"{kernel}: {column} {number:g}, the budget is {most:g}"
        spilled = kernel in kernels and kernels[kernel]["spilled"]
        if spilled and not any(matches(pattern, source, kernel) for pattern in spill_patterns()):
            yield f"{kernel}: spills {spilled} bytes, and {REASONS.name} gives no reason"


def kernel_name(text):
    """Of what stands behind `__global__ void`: maybe launch bounds, and the name."""
    name, text = text.split("(", 1)
    name = name.strip()
    if name != "__launch_bounds__":
        return name
    depth = 1
    while depth:
        depth += {"(": 1, ")": -1}.get(text[0], 0)
        text = text[1:]
    return kernel_name(text)


def unused_patterns(table):
    """Lines of spills.txt for kernels that spill no more."""
    spilling = [(source, kernel) for (source, _), (_, kernels) in table.items()
                for kernel, numbers in kernels.items() if numbers["spilled"]]
    return [pattern for pattern in spill_patterns() if not any(matches(pattern, *names) for names in spilling)]


def missing_kernels(table):
    """(kernels of the library that no source compiles for sm_90a, how many kernels it has)."""
    headers = (INCLUDE / "packkv/kernel").glob("*.cuh")
    declared = {kernel_name(text) for header in headers for text in header.read_text().split("__global__ void")[1:]}
    seen = {kernel.split("<")[0] for (_, architecture), (_, kernels) in table.items() if architecture == "sm_90a"
            for kernel in kernels}
    return sorted(declared - seen), len(declared)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--complete", action="store_true", help="compile nothing: only the check of the table")
    parser.add_argument("sources", nargs="*", type=pathlib.Path)
    options = parser.parse_args()
    sources = options.sources or ([] if options.complete else sorted(HERE.glob("*.cu")))

    recorded, table = read_table()
    failures = []
    if sources:
        text = subprocess.run([options.nvcc, "--version"], check=True, capture_output=True, text=True).stdout
        version = re.search(r"V([\d.]+)", text).group(1)
        if version != recorded and not options.update:
            print(f"nvcc {version}, the table is of {recorded}: margins apply")
    for source in sources:
        name = source.stem
        wanted = architectures_of(source)
        if options.update:
            table = {key: row for key, row in table.items() if key[0] != name}
        for architecture in wanted:
            result = compiled(options.nvcc, source, architecture)
            if result is None:
                failures.append(f"{name} for {architecture}: does not compile without warnings")
                continue
            kernels, seconds = result
            if options.update:
                table[name, architecture] = seconds, kernels
            usual, budget = table.get((name, architecture), (0, {}))
            print(f"{name} for {architecture}: {len(kernels)} kernels, {seconds:.1f} s of the CPU, usual {usual:.1f} s")
            failures += [f"{name} for {architecture}: {line}"
                         for line in compared(name, kernels, budget, version == recorded or options.update)]
            if seconds > limit("ptxas_s", usual, True):
                failures.append(f"{name} for {architecture}: {seconds:.0f} s of the CPU, the budget is "
                                f"{limit('ptxas_s', usual, True):.0f} s")
        failures += [f"{name} for {architecture}: in the table, but not compiled"
                     for known, architecture in table if known == name and architecture not in wanted]
    if options.update:
        if not options.sources:
            names = {source.stem for source in sources}
            table = {key: row for key, row in table.items() if key[0] in names}
        write_table(version, table)
    if not options.sources:
        missing, count = missing_kernels(table)
        failures += [f"{kernel}: a kernel of include/packkv/kernel that no source of {HERE.name} compiles"
                     for kernel in missing]
        failures += [f"{source} {kernel}: a reason in {REASONS.name} for what does not spill"
                     for source, kernel in unused_patterns(table)]
        print(f"{count} kernels in include/packkv/kernel, {count - len(missing)} of them in the table")
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Removes each barrier and fence of the kernels in turn and says whether the tests on the CPU executor notice.

    tests/simt/mutants.py [--cxx g++] [--jobs 2] [--schedules in_order,random:1] [--without-detector]

A mutant is a copy of include/ with one __syncthreads(), __syncwarp() or __threadfence() gone; the kernel tests are
built against it as packkv_simt_race_tests is (with -O1: it is the compiler that takes the time) and should fail.
Exit status: how many survive.
"""
import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

root = pathlib.Path(__file__).resolve().parents[2]
call = re.compile(r"__(?:syncthreads|syncwarp|threadfence)\w*\([^()]*\);")
flags = ["-std=c++17", "-O1", "-w", "-DPACKKV_SIMT_EXECUTOR", f'-DPACKKV_TEST_DATA="{root}/tests/data"',
         "-fno-strict-aliasing", f"-I{root}/tests/simt", f"-I{root}/tests", f"-I{root}/tests/device"]


def places():
    """(file, start, end, text) of every barrier and fence of code, not of comments."""
    for path in sorted((root / "include").rglob("*.cuh")):
        text = path.read_text()
        for m in call.finditer(text):
            if "//" not in text[text.rfind("\n", 0, m.start()) + 1:m.start()]:
                yield path.relative_to(root), text.count("\n", 0, m.start()) + 1, m.start(), m.end(), m.group()


def run(command, **options):
    return subprocess.run([str(x) for x in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          **options)


def compile_to(cxx, extra, source, output):
    result = run([cxx, *flags, *extra, "-x", "c++", "-c", source, "-o", output])
    if result.returncode != 0:
        sys.exit(f"{source} does not compile:\n{result.stdout[-3000:]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cxx", default="g++")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--schedules", default="in_order,random:1")
    parser.add_argument("--without-detector", action="store_true", help="what the values alone show")
    options = parser.parse_args()
    instrument = [] if options.without_detector else ["-fsanitize=thread", "-g1", "-DPACKKV_SIMT_RACE"]
    work = pathlib.Path(tempfile.mkdtemp(prefix="packkv_mutants_"))
    workers = concurrent.futures.ThreadPoolExecutor(options.jobs)
    tests = sorted((root / "tests/device").glob("*.cu"))
    own = ["-I", str(root / "include")]

    def source_of(folder, test):
        source = folder / (test.stem + ".cpp")
        source.write_text(f'#include "{test}"\n')
        return source

    # What does not depend on the mutant: the executor and, for each header, the tests that do not include it.
    executor = [root / "tests/simt" / f for f in ("engine.cpp", "race.cpp", "symbols.cpp")]
    executor.append(root / "tests/device/main.cpp")
    objects = {s: work / (s.stem + ".o") for s in executor + tests}
    sources = {s: source_of(work, s) if s in tests else s for s in objects}
    list(workers.map(
        lambda s: compile_to(options.cxx, own + (instrument if s in tests else []), sources[s], objects[s]), objects))
    includes = {t: run([options.cxx, *flags, *own, "-x", "c++", "-MM", sources[t]]).stdout for t in tests}

    def outcome(program):
        for schedule in options.schedules.split(","):
            try:
                result = run([program], env={**os.environ, "PACKKV_SIMT_SCHEDULE": schedule}, timeout=300, cwd=work)
            except subprocess.TimeoutExpired:
                return f"caught ({schedule}): no end after 300 s"
            if result.returncode != 0:
                race = re.search(r"race on a byte of (\w+) memory", result.stdout)
                return f"caught ({schedule}): {race.group(0) if race else 'wrong values or an error'}"
        return "SURVIVED"

    def link(output, these):
        result = run([options.cxx, "-o", output, *these, "-lCatch2", "-lpthread"])
        if result.returncode != 0:  # Catch2 2 is headers alone
            result = run([options.cxx, "-o", output, *these, "-lpthread"])
        if result.returncode != 0:
            sys.exit(result.stdout[-3000:])

    def try_mutant(k, place):
        path, line, begin, end, text = place
        folder = work / str(k)
        shutil.copytree(root / "include", folder / "include")
        whole = (root / path).read_text()
        (folder / path).write_text(whole[:begin] + ";" + whole[end:])
        mine = dict(objects)
        for test in tests:
            if str(path) in includes[test]:
                mine[test] = folder / (test.stem + ".o")
                changed = ["-I", str(folder / "include"), *instrument]
                compile_to(options.cxx, changed, source_of(folder, test), mine[test])
        link(folder / "tests", mine.values())
        result = outcome(folder / "tests")
        shutil.rmtree(folder)
        print(f"{path}:{line}: without {text} {result}", flush=True)
        return result

    try:
        link(work / "tests", objects.values())
        if (unchanged := outcome(work / "tests")) != "SURVIVED":
            sys.exit(f"the unchanged kernels: {unchanged}")
        results = list(workers.map(try_mutant, *zip(*enumerate(places()))))
    finally:
        shutil.rmtree(work)
    survivors = results.count("SURVIVED")
    print(f"{len(results)} mutants, {len(results) - survivors} caught, {survivors} survived")
    return survivors


if __name__ == "__main__":
    sys.exit(main())

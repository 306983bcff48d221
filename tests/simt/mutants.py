#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Seeds defects into the kernels, one at a time, and says whether the tests on the CPU executor notice.

    tests/simt/mutants.py [--cxx g++] [--jobs 2] [--schedules in_order,random:1] [--list] [--only REGEX] [--share 1/3]
                          [--listed] [--work DIR]

One idea: mutant schemata. One copy of include/ holds every mutant behind a switch read at run time (mutant.hpp), so
the tests are built once, as packkv_simt_race_tests is. A first run of each test case notes which places it reaches; a
mutant then takes only the test cases that reach it, the quickest first, up to the first failure.

What is mutated: the table `rules`, which goes by the names of functions, and comparisons and constants of bounds. Left
alone: what the compiler must know (constexpr, static_assert, template arguments), and preprocessor branches for the
executor or for the device only. A mutant's name is file:line:class:line of code with {before => after}.

mutant_survivors.txt lists the survivors with a reason, without their line numbers. What is listed is taken to survive,
or, with --listed, run in the first order: most of the time, since all tests that reach it have to pass. Exit status: 0
only if at least 95 % of those not listed as equivalent are caught, every survivor is listed and every listed one has
survived (those listed as out of bounds need not).
"""
import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

root = pathlib.Path(__file__).resolve().parents[2]
here = root / "tests/simt"
least_caught = 0.95  # of those that are not listed as equivalent


# ------------------------------------------------------------------------------------------------------------- mutants
@dataclasses.dataclass
class Change:
    """Text put around [begin, end); it holds `%d` where the number of the mutant goes. `new` is what readers see."""
    begin: int
    end: int
    before: str
    after: str
    new: str


def remove(source, call):
    """The whole statement, or what `?` chooses."""
    before, after = source.text_of(call.start - 1), source.text_of(call.close + 1)
    if before in (";", "{", "}", ")", "else", ":") and after == ";" or before == "?" and after == ":":
        nothing = f"decltype({source.flat(call.start, call.close)})()"
        yield source.around(call.start, call.close, f"(packkv_simt::mutant(%d) ? {nothing} : ", ")", "")


def argument(n, function, new):
    """Argument n through a function of mutant.hpp."""
    def operator(source, call):
        if n < len(call.arguments):
            first, last = call.arguments[n]
            yield source.around(first, last, f"packkv_simt::{function}", ")", new.format(source.flat(first, last)))
    return operator


def brought(n, neutral):
    """Argument n is not that of lane 31."""
    return argument(n, f"brought(%d, packkv_simt::neutral::{neutral}, threadIdx.x % 32 == 31, ",
                    "{} but not of lane 31")


def operand(n, i, j):
    """Registers i and j of argument n are swapped while the instruction reads them."""
    def operator(source, call):
        if n < len(call.arguments):
            text = source.flat(*call.arguments[n])
            yield source.around(call.start, call.close,
                                "[&]() -> decltype(auto) { const packkv_simt::with_swapped "
                                f"swapped(%d, {text}, {i}, {j}); return ", "; }()",
                                f"registers {i} and {j} of {text} swapped")
    return operator


def loaded(i, j):
    """Registers i and j of what a load gives, returned or in argument 0, are swapped."""
    def operator(source, call):
        text = source.flat(*call.arguments[0])
        yield source.around(call.start, call.close,
                            f"packkv_simt::load_swapped(%d, {i}, {j}, [&]() -> decltype(auto) {{ return ",
                            f"; }}, {text})", f"registers {i} and {j} of the result swapped")
    return operator


def instead(n):
    """Argument n instead of the call's result."""
    def operator(source, call):
        text = source.flat(*call.arguments[n])
        yield source.around(call.start, call.close, f"(packkv_simt::mutant(%d) ? ({text}) : ", ")", text)
    return operator


def renamed(name):
    """Another function with the same arguments."""
    def operator(source, call):
        text = re.sub(rf"\b{call.name}\b", name, source.flat(call.start, call.close), count=1)
        yield source.around(call.start, call.close, f"(packkv_simt::mutant(%d) ? {text} : ", ")", text)
    return operator


def quotient(source, call):
    a, b = (source.flat(*x) for x in call.arguments)
    yield source.around(call.start, call.close, f"(packkv_simt::mutant(%d) ? ({a}) / ({b}) : ", ")", f"{a} / {b}")


# (class, regular expression of the function's whole name, operator): a line more is a pattern more.
rules = [
    ("barrier", r"__syncthreads|__syncwarp|__barrier_sync\w*|named_barrier\w*", remove),
    ("fence", r"__threadfence\w*|fence_\w+", remove),
    ("wait", r"wait|wait_\w+|commit_\w+|arrive\w*", remove),
    ("lane", r"__\w+_sync|__syncwarp", argument(0, "without_last_lane(%d, ", "{} without lane 31")),
    ("lane", r"shuffle_xor", argument(1, "exclusive_or(%d, 1, ", "({}) ^ 1")),
    ("lane", r"shuffle_xor", argument(1, "halved(%d, ", "({}) / 2")),
    ("lane", r"shuffle", argument(1, "plus_one(%d, ", "{} + 1")),
    ("lane", r"__shfl_xor_sync", argument(2, "exclusive_or(%d, 1, ", "({}) ^ 1")),
    ("lane", r"__shfl_sync", argument(2, "plus_one(%d, ", "{} + 1")),
    ("lane", r"warp_(?:sum|max|min)", instead(0)),
    ("lane", r"warp_sum", brought(0, "zero")),
    ("lane", r"warp_max", brought(0, "lowest")),
    ("lane", r"warp_min", brought(0, "highest")),
    ("lane", r"__(?:reduce_\w+|any|all)_sync", instead(1)),
    ("lane", r"__(?:reduce_(?:add|or|xor)|any|ballot)_sync", brought(1, "zero")),
    ("lane", r"__(?:reduce_and|all)_sync", brought(1, "ones")),
    ("lane", r"__reduce_max_sync", brought(1, "lowest")),
    ("lane", r"__reduce_min_sync", brought(1, "highest")),
    ("fragment", r"mma_\w+", operand(1, 0, 1)),
    ("fragment", r"mma_\w+", operand(2, 0, 1)),
    ("fragment", r"movmatrix", instead(0)),
    ("fragment", r"ldmatrix(?:_transposed)?", loaded(0, 1)),
    ("fragment", r"ldmatrix", renamed("ldmatrix_transposed")),
    ("fragment", r"ldmatrix_transposed", renamed("ldmatrix")),
    ("fragment", r"row_slot", argument(0, "exclusive_or(%d, 8, ", "{} ^ 8")),
    ("fragment", r"locate", argument(1, "exclusive_or(%d, 8, ", "{} ^ 8")),
    ("fragment", r"locate", argument(2, "exclusive_or(%d, 8, ", "{} ^ 8")),
    ("tail", r"ceil_div", quotient),
]
comparisons = {"<": ("less{%d}", "<="), "<=": ("less_equal{%d}", "<"), ">": ("greater{%d}", ">="),
               ">=": ("greater_equal{%d}", ">")}
lane_name = r"\b(lane|lane_id ?\( ?\)|threadIdx ?\. ?x)$"
not_kernels = ("include/packkv/device/",)  # host code: no bounds there
# Files whose mutants have not been gone through since they were written or changed: only with --only.
# docs/reliability.md says what is missing.
unexamined = re.compile(r"include/packkv/(detail/(cuda|bits|limbs|packed_bytes)|device/(decode_attention|gemv|pack_gemv|packs)|kernel/(fused_(decode|gemv)|pack_)|thread/pack_|"
                        r"block/(decode_unit|greedy_order|gemv_units|part_merge|row_ranges|unit_parts|unit_work|work_split)|"
                        r"warp/(attention_row|grouped_(key_scores|output|weights)|lazy_softmax|mma_|offset_chain|pack_(codes|group|key_scores|row|stream|value_sum)|raw_attention|scaled_weights|score_|side_stream|"
                        r"tile_(ring|stream)|value_output|lane_numbers))")
instructions = ("include/packkv/detail/matrix.cuh", "include/packkv/detail/async.cuh")  # each a definition, not a use


def bounds(source):
    """Off by one: comparisons, the last round of a loop, + 1 and - 1, lane + 32 * half."""
    tokens = source.tokens
    for i, t in enumerate(tokens):
        if source.frozen[i]:
            continue
        before, after = source.text_of(i - 1), source.text_of(i + 1)
        if t.text in comparisons and source.spaced(i):
            loop = source.loop_condition(i)
            step = source.flat(loop[1] + 1, loop[2] - 1) if loop else ""
            constant = loop is not None and source.constant(i + 1, loop[1] - 1)
            if loop and t.text == ">" and after == "0" and re.search(r"(/=|>>=) ", step):
                zero = tokens[i + 1]
                yield "lane", Change(zero.begin, zero.end, "(packkv_simt::mutant(%d) ? 1 : ", ")", "1")
                continue
            name, changed = comparisons[t.text]
            # One round too many of a loop with a constant bound leaves the registers of the thread: undefined, no tail.
            if not constant:
                yield "tail", Change(t.begin, t.end, "", f" packkv_simt::{name} {t.text}", changed)
            if loop and t.text == "<":
                yield "tail", Change(t.begin, t.end, "+ packkv_simt::one(%d) ", "", "+ 1 <")
        elif t.text == "0" and before == "==" and re.search(lane_name, source.left_of(i - 1)):
            # Not "== 1": what one lane does for all of them, lane 1 mostly does as well.
            yield "lane", Change(t.begin, t.end, "(packkv_simt::mutant(%d) ? -1 : ", ")", "none")
        elif t.text == "1" and before in ("+", "-") and re.match(r"[\w)\]]", source.text_of(i - 2)[-1:]):
            yield "tail", Change(t.begin, t.end, "packkv_simt::zero(%d, ", ")", "0")
        elif t.text == "32" and before == "+" and after == "*" and \
                re.search(lane_name, source.left_of(i - 1)):
            half = tokens[i + 2]
            yield "lane", Change(half.begin, half.end, "packkv_simt::exclusive_or(%d, 1, ", ")", f"({half.text} ^ 1)")


# -------------------------------------------------------------------------------------------------------------- source
token_pattern = re.compile(r"""(?P<gap>\s+|//[^\n]*|/\*.*?\*/) | (?P<directive>\#(?:\\\n|[^\n])*)
    | (?P<token>"(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | \d(?:[eEpP][-+]|[\w.'])* | [A-Za-z_]\w*
    | ::|->|<<=|>>=|<=|>=|==|!=|&&|\|\||\+\+|--|[-+*/%&|^]=|<<|(?<=\s)>>(?=\s)|.)""", re.S | re.X)
keywords = ("return", "else", "case", "throw", "do", "and", "or", "not")


@dataclasses.dataclass
class Token:
    text: str
    begin: int
    end: int


@dataclasses.dataclass
class Call:
    """Tokens start..close are the call with what qualifies its name; arguments are pairs of first and last token."""
    name: str
    start: int
    close: int
    arguments: list


class Source:
    def __init__(self, path):
        self.path, self.text, self.tokens = path, (root / path).read_text(), []
        hidden = []  # for each #if that is open: does it choose between executor and device?
        for m in token_pattern.finditer(self.text):
            if m.lastgroup == "directive":
                if re.match(r"#\s*if", m.group()):
                    hidden.append(re.search("PACKKV_SIMT_EXECUTOR|__CUDA_ARCH__", m.group()) is not None)
                elif re.match(r"#\s*endif", m.group()):
                    hidden.pop()
            elif m.lastgroup == "token" and not any(hidden):
                self.tokens.append(Token(m.group(), m.start(), m.end()))
        self.match_brackets()
        self.freeze()

    def text_of(self, i):
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def flat(self, first, last):
        """Tokens on one line, as they are spaced."""
        if last < first:
            return ""
        part = self.text[self.tokens[first].begin:self.tokens[last].end]
        return re.sub(r"\s+", " ", re.sub(r"//[^\n]*", " ", part))

    def left_of(self, i):
        """The few tokens before token i."""
        return " ".join(t.text for t in self.tokens[max(i - 4, 0):i])

    def around(self, first, last, before, after, new):
        return Change(self.tokens[first].begin, self.tokens[last].end, before, after, new)

    def spaced(self, i):
        """The code's formatting tells operators from the brackets of templates."""
        t = self.tokens[i]
        return self.text[t.begin - 1].isspace() and self.text[t.end:t.end + 1].isspace()

    def match_brackets(self):
        self.match, stack = {}, []
        for i, t in enumerate(self.tokens):
            opens = t.text in ("(", "[", "{") or t.text == "<" and not self.spaced(i)
            if opens:
                stack.append(i)
            elif t.text in (")", "]", "}", ">") and not (t.text == ">" and self.spaced(i)):
                want = {")": "(", "]": "[", "}": "{", ">": "<"}[t.text]
                if t.text != ">":
                    while stack and self.tokens[stack[-1]].text == "<" != want:
                        stack.pop()
                if stack and self.tokens[stack[-1]].text == want:
                    other = stack.pop()
                    self.match[i], self.match[other] = other, i
        self.parents = {}

    def freeze(self):
        """frozen[i]: the compiler must know the value of token i, or it is part of a declaration."""
        self.frozen = [False] * len(self.tokens)

        def hide(first, last):
            self.frozen[first:last + 1] = [True] * (last + 1 - first)

        for i, t in enumerate(self.tokens):
            if t.text == "<" and i in self.match:
                hide(i, self.match[i])
            elif t.text in ("static_assert", "__launch_bounds__", "__align__", "alignas", "decltype", "sizeof"):
                if self.text_of(i + 1) == "(":
                    hide(i, self.match[i + 1])
            elif t.text == "[" and re.match(r"[\w>\]]", self.text_of(i - 1)[-1:]) and self.declares(i - 1):
                hide(i, self.match[i])
            elif t.text == "constexpr" and self.text_of(i - 1) == "if":
                hide(i, self.match[i + 1])
            elif t.text == "constexpr":  # a variable up to its ';', a function with its body
                j = i
                while j < len(self.tokens) and self.tokens[j].text != ";":
                    body = self.tokens[j].text == "{"
                    j = self.match.get(j, j) if self.match.get(j, j) > j else j
                    if body and self.text_of(j + 1) not in (";", ",", ")"):
                        break
                    j += 1
                hide(i, min(j, len(self.tokens) - 1))

    def declares(self, i):
        """Is the name at token i (or before its array bounds) being declared?"""
        while self.text_of(i) == "]":
            i = self.match[i] - 1
        before = self.text_of(i - 1)
        return bool(re.fullmatch(r"[A-Za-z_]\w*|>", before)) and before not in keywords

    def loop_condition(self, i):
        """(for, ';' after the condition, ')') if token i stands in the condition of a for loop."""
        depth = 0
        for j in range(i - 1, -1, -1):
            t = self.tokens[j].text
            if t in (")", "]", "}"):
                depth += 1
            elif t in ("(", "[", "{"):
                if depth == 0:
                    return None
                depth -= 1
            elif t == ";" and depth == 0:
                break
        else:
            return None
        while j >= 0 and not (self.tokens[j].text == "(" and self.match.get(j, 0) > i):
            if self.tokens[j].text == "{" and self.match.get(j, 0) > i:
                return None
            j -= 1
        if self.text_of(j - 1) != "for":
            return None
        end = next(k for k in range(i, self.match[j]) if self.tokens[k].text == ";")
        return j - 1, end, self.match[j]

    def constant(self, first, last):
        """A bound made of literals, template parameters and constexpr names."""
        return all(re.fullmatch(r"\d\w*|[A-Z]\w*|[-+*/%()]|::|detail|policy", t.text) or t.text in constants
                   for t in self.tokens[first:last + 1])

    def calls(self):
        for i, t in enumerate(self.tokens):
            if not re.match(r"[A-Za-z_]", t.text) or self.frozen[i]:
                continue
            open_ = i + 1
            if self.text_of(open_) == "<" and open_ in self.match:
                open_ = self.match[open_] + 1
            if self.text_of(open_) != "(" or open_ not in self.match:
                continue
            start, close = i, self.match[open_]
            while self.text_of(start - 1) in ("::", ".", "->"):
                previous = start - 2
                while previous in self.match and self.tokens[previous].text in (")", "]", ">"):
                    previous = self.match[previous] - 1
                if not re.match(r"[A-Za-z_]", self.text_of(previous)):
                    break
                start = previous
            before = self.text_of(start - 1)
            if re.fullmatch(r"[A-Za-z_]\w*|>", before) and before not in keywords or \
                    self.text_of(close + 1) in ("{", "const", "noexcept"):
                continue  # a declaration
            arguments, first, j = [], open_ + 1, open_ + 1
            while j <= close:
                if j == close or self.tokens[j].text == ",":
                    if j > first:
                        arguments.append((first, j - 1))
                    first = j + 1
                j = self.match[j] + 1 if self.match.get(j, 0) > j else j + 1
            yield Call(t.text, start, close, arguments)

    def changes(self):
        """Pairs of class and Change in the order of the text."""
        found = []
        for call in self.calls():
            for class_, name, operator in rules:
                if re.fullmatch(name, call.name):
                    found += [(class_, change) for change in operator(self, call)]
        if not self.path.startswith(not_kernels):
            found += bounds(self)
        return sorted(found, key=lambda x: (x[1].begin, x[1].end))

    def line_with(self, change):
        """The line of code with {before => after}, and without its comment."""
        begin = self.text.rfind("\n", 0, change.begin) + 1
        end = self.text.find("\n", change.end)
        old = self.text[change.begin:change.end]
        line = self.text[begin:change.begin] + "{" + old + " => " + change.new + "}" + \
            re.sub(r"//.*", "", self.text[change.end:end])
        return re.sub(r"\s+", " ", line).strip().replace(" }", "}")


@dataclasses.dataclass
class Mutant:
    number: int
    path: str
    line: int
    class_: str
    text: str
    outcome: str = ""

    @property
    def key(self):
        return self.path, self.class_, self.text

    def __str__(self):
        return f"{self.path}:{self.line}:{self.class_}:{self.text}"


constants = set()


def instrument(into):
    """Writes the instrumented copy of include/; the mutants."""
    mutants = []
    for path in sorted((root / "include").rglob("*")):
        if path.suffix in (".cuh", ".hpp"):
            constants.update(re.findall(r"constexpr\s+[\w:]+\s+(\w+)\s*=", path.read_text()))
    for path in sorted((root / "include").rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(root).as_posix()
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".cuh" or name in instructions:
            target.write_bytes(path.read_bytes())
            continue
        source = Source(name)
        pieces = []  # (position, order, text): at one place inner ends come before outer ends, then outer begins
        for class_, c in source.changes():
            k = len(mutants) + 1
            mutants.append(Mutant(k, name, source.text.count("\n", 0, c.begin) + 1, class_, source.line_with(c)))
            pieces.append((c.begin, (1, -c.end, k), c.before.replace("%d", str(k))))
            pieces.append((c.end, (0, -c.begin, -k), c.after.replace("%d", str(k))))
        text, at = [], 0
        for position, _, piece in sorted(pieces, key=lambda p: p[:2]):
            text += [source.text[at:position], piece]
            at = position
        whole = "".join(text) + source.text[at:]
        assert whole.count("\n") == source.text.count("\n")
        target.write_text(whole)
    return mutants


# --------------------------------------------------------------------------------------------------------------- tests
def run(command, **options):
    return subprocess.run([str(x) for x in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace", **options)


def checked(command):
    result = run(command)
    if result.returncode != 0:
        sys.exit(f"{' '.join(str(x) for x in command)}:\n{result.stdout[-4000:]}\n"
                 "If this is a place that the compiler must know, Source.freeze has to leave it alone.")
    return result.stdout


def build(options, work, workers):
    """The tests with all mutants in them."""
    include = [f"-I{work}/include", f"-I{here}", f"-I{root}/tests", f"-I{root}/tests/device"]
    include += [f"-I{path}" for path in options.include]
    flags = ["-std=c++17", "-w", "-DPACKKV_SIMT_EXECUTOR", f'-DPACKKV_TEST_DATA="{root}/tests/data"',
             "-fno-strict-aliasing", *include]
    instrumented = ["-O1", "-g1", "-fsanitize=thread", "-DPACKKV_SIMT_RACE", "-include", here / "mutant.hpp"]
    if "clang" not in run([options.cxx, "--version"]).stdout:
        instrumented.append("-fno-aggressive-loop-optimizations")  # a loop that runs too far is what some mutants are
    jobs = []
    for test in sorted((root / "tests/device").glob("*.cu"), key=lambda p: -p.stat().st_size):
        if test.name in ("real_cache_test.cu", "snippets_test.cu"):  # nothing without real caches; nothing new
            continue
        jobs.append((test, [*flags, *instrumented, "-x", "c++"]))
    jobs.append((here / "mutant.hpp", [*flags, "-O1", "-DPACKKV_SIMT_MUTANT_DEFINITIONS", "-x", "c++"]))
    if not options.objects:
        jobs += [(p, [*flags, "-O1"]) for p in sorted(here.glob("*.cpp")) if not p.stem.endswith("_test")]
        jobs.append((root / "tests/device/main.cpp", [*flags, "-O0"]))

    inputs = [p for p in [*(work / "include").rglob("*"), *here.iterdir(), *(root / "tests/device").iterdir(),
                          *(root / "tests/support").iterdir()] if p.is_file() and p.suffix not in (".txt", ".py")]
    state = hashlib.sha256(repr([jobs, options.cxx, options.objects, options.libraries]).encode())
    for path in sorted(inputs):
        state.update(path.read_bytes())
    program, stamp = work / "tests", work / "stamp"
    if program.exists() and stamp.exists() and stamp.read_text() == state.hexdigest():
        return program

    def compile_one(job):
        output = work / (job[0].name + ".o")
        checked([options.cxx, *job[1], "-c", job[0], "-o", output])
        return output

    objects = list(workers.map(compile_one, jobs)) + options.objects
    link = [options.cxx, "-o", program, *objects]
    if run([*link, *(options.libraries or ["-lCatch2"]), "-lpthread"]).returncode != 0:
        checked([*link, "-lpthread"])  # Catch2 2 is headers alone
    stamp.write_text(state.hexdigest())
    return program


def test_names(program):
    listed = run([program, "--list-test-names-only"])  # Catch2 2; returns their number
    if "nrecogni" in listed.stdout:
        listed = run([program, "--list-tests", "--verbosity", "quiet"])
    names = [line.strip() for line in listed.stdout.splitlines() if line.strip()]
    if not names:
        sys.exit(f"no tests are listed:\n{listed.stdout}")
    return names


class Runner:
    def __init__(self, program, work):
        self.program, self.work, self.seconds, self.reached, self.sound = program, work, {}, {}, {}

    def once(self, test, schedule, mutant, limit, **environment):
        """'' or how the test case failed."""
        spec = re.sub(r"([\\,\[\]*])", r"\\\1", test)
        try:
            result = run([self.program, spec, "--abort"], timeout=limit, cwd=self.work,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
                         env={**os.environ, "PACKKV_SIMT_SCHEDULE": schedule, "PACKKV_SIMT_MUTANT": str(mutant),
                              **environment})
        except subprocess.TimeoutExpired:
            return f"no end after {limit:.0f} s"
        if "No test cases matched" in result.stdout or "No tests ran" in result.stdout:
            sys.exit(f"Catch2 does not find: {spec}")
        if result.returncode == 0:
            return ""
        race = re.search(r"race on a byte of \w+ memory", result.stdout)
        crash = re.search(r"SIG\w+", result.stdout) or result.returncode < 0
        broken = re.search(r"schedule |\.cuh:\d+", result.stdout)
        return race.group() if race else "crash" if crash else "executor error" if broken else "wrong values"

    def learn(self, number, test, schedule):
        """Time and places of a test case without a mutant, which must pass."""
        log, begin = self.work / f"reached_{number}", time.monotonic()
        log.unlink(missing_ok=True)
        failed = self.once(test, schedule, -1, 600, PACKKV_SIMT_MUTANT_LOG=str(log))
        self.seconds[test] = time.monotonic() - begin
        self.reached[test] = {int(k) for k in log.read_text().split()} if log.exists() else set()
        self.sound[test, schedule] = True
        if failed:
            sys.exit(f"without a mutant, \"{test}\" fails: {failed}")

    def require_sound(self, test, schedule):
        """Without a mutant the test case passes in this schedule, too."""
        if (test, schedule) not in self.sound:
            if failed := self.once(test, schedule, 0, 600):
                sys.exit(f"without a mutant, \"{test}\" fails in schedule {schedule}: {failed}")
            self.sound[test, schedule] = True

    def try_mutant(self, mutant, schedules):
        tests = sorted((t for t in self.reached if mutant.number in self.reached[t]), key=self.seconds.get)
        mutant.outcome = "SURVIVED" if tests else "SURVIVED (no test reaches it)"
        for schedule in schedules:
            for test in tests:
                failed = self.once(test, schedule, mutant.number, max(30.0, 20 * self.seconds[test]))
                if failed:
                    self.require_sound(test, schedule)
                    mutant.outcome = f"caught ({schedule}): {failed}"
                    return mutant
        return mutant


# -------------------------------------------------------------------------------------------------------------- report
def listed_survivors():
    """Counter of keys, and the reasons. A line: file | class | line of code with {before => after} | reason."""
    listed, reasons = collections.Counter(), {}
    for line in (here / "mutant_survivors.txt").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        path, class_, rest = line.split(" | ", 2)
        text, reason = rest.rsplit(" | ", 1)
        listed[path, class_, text] += 1
        reasons[path, class_, text] = reason
    return listed, reasons


def report(mutants, reasons):
    width = max(len(m.class_) for m in mutants) + 1
    print(f"\n{'class':{width}} {'mutants':>8} {'caught':>8} {'survived':>9}")
    for class_ in [*dict.fromkeys(r[0] for r in rules), "all"]:
        these = [m for m in mutants if class_ in (m.class_, "all")]
        caught = sum(m.outcome.startswith("caught") for m in these)
        print(f"{class_:{width}} {len(these):8} {caught:8} {len(these) - caught:9}")
    how = collections.Counter(re.sub(r"after .*", "", m.outcome.split(": ", 1)[1]).strip()
                              for m in mutants if m.outcome.startswith("caught"))
    print("caught by: " + ", ".join(f"{name} {count}" for name, count in how.most_common()))
    for m in mutants:
        if not m.outcome.startswith("caught"):
            print(f"{m}\n    {m.outcome}; {reasons.get(m.key, 'NOT LISTED')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cxx", default="g++")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--schedules", default="in_order,random:1",
                        help="the later ones for what survives the earlier and is not listed")
    parser.add_argument("--list", action="store_true", help="name the mutants and stop")
    parser.add_argument("--only", metavar="REGEX", help="of the mutants' names")
    parser.add_argument("--share", metavar="K/N", default="1/1", help="every Nth mutant, from the Kth on")
    parser.add_argument("--listed", action="store_true", help="run those of mutant_survivors.txt, too")
    parser.add_argument("--work", metavar="DIR", type=pathlib.Path, help="keep the build there, for the next run too")
    parser.add_argument("--include", metavar="DIR", action="append", default=[], help="where Catch2 is")
    parser.add_argument("--libraries", metavar="FILE", nargs="*", default=[], help="of Catch2")
    parser.add_argument("--objects", metavar="FILE", nargs="*", default=[], help="the executor and main(), if built")
    options = parser.parse_args()
    begin = time.monotonic()
    temporary = None if options.work else tempfile.TemporaryDirectory(prefix="packkv_mutants_")
    work = (options.work or pathlib.Path(temporary.name)).resolve()
    workers = concurrent.futures.ThreadPoolExecutor(options.jobs)
    mutants = instrument(work)
    chosen = [m for m in mutants if (re.search(options.only, str(m)) if options.only else not unexamined.match(m.path))]
    part, parts = (int(x) for x in options.share.split("/"))
    chosen = chosen[part - 1::parts]
    if options.list:
        print(*(f"{m.number}: {m}" for m in chosen), sep="\n")
        return 0
    schedules = options.schedules.split(",")
    listed, reasons = listed_survivors()
    runner = Runner(build(options, work, workers), work)
    built = time.monotonic()
    list(workers.map(lambda x: runner.learn(*x, schedules[0]), enumerate(test_names(runner.program))))
    all_of, known = collections.Counter(m.key for m in mutants), collections.Counter(m.key for m in chosen)
    left = []
    for m in sorted(chosen, key=lambda m: m.key not in listed):  # the long ones first: those that are known to survive
        if options.listed or all_of[m.key] > listed[m.key]:
            left.append(workers.submit(runner.try_mutant, m, schedules[:1] if m.key in listed else schedules))
        else:
            m.outcome = "not run, taken to survive"
    for future in concurrent.futures.as_completed(left):
        m = future.result()
        print(f"{m.number}: {m} {m.outcome}", flush=True)

    report(chosen, reasons)
    caught = sum(m.outcome.startswith("caught") for m in chosen)
    print(f"{len(chosen)} mutants, {caught} caught ({100 * caught / len(chosen):.1f} %), "
          f"{len(chosen) - caught} survived; {len(mutants) - len(chosen)} left out; {built - begin:.0f} s to build, {time.monotonic() - built:.0f} s to run")
    survived = collections.Counter(m.key for m in chosen if not m.outcome.startswith("caught"))
    new, stale = survived - listed, listed - survived
    for key in list(stale):
        left_out = known[key] < all_of[key] or key not in all_of and (options.only or unexamined.match(key[0]))
        if left_out or key in known and reasons[key].startswith("out of bounds: "):
            del stale[key]
    for title, keys in (("not in mutant_survivors.txt", new), ("stale in mutant_survivors.txt", stale)):
        for key in keys.elements():
            print(f"{title}: {' | '.join(key)}")
    others = sum(not reasons.get(m.key, "").startswith("equivalent: ") for m in chosen)
    enough = options.only is not None or caught >= least_caught * others
    if not enough:
        print(f"fewer than {100 * least_caught:.0f} % of the {others} that are not equivalent are caught")
    return 0 if enough and not new and not stale else 1


if __name__ == "__main__":
    sys.exit(main())

// SPDX-License-Identifier: Apache-2.0
// Fibers and their scheduler. Everything runs on the host thread that called launch; launches exclude each other.
#include "engine.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <numeric>
#include <vector>

#include "async.hpp"
#include "race.hpp"
#include "runtime.hpp"
#include "scheduler.hpp"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(PACKKV_SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on the running stack, leaves its top in *from and continues at `to`.
extern "C" void packkv_simt_switch(void** from, void* to);
__asm__(
    ".text\n"
    ".globl packkv_simt_switch\n"
    ".type packkv_simt_switch, @function\n"
    "packkv_simt_switch:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  ret\n"
    ".size packkv_simt_switch, .-packkv_simt_switch\n");
#endif

namespace packkv_simt {
namespace {

using detail::kind;
namespace race = detail::race;

constexpr int lanes = 32;
constexpr int max_threads = 1024;
constexpr int max_warps = max_threads / lanes;
#if defined(PACKKV_SIMT_ASAN) || !defined(__OPTIMIZE__)
constexpr std::size_t stack_bytes = 512 * 1024;
#else
constexpr std::size_t stack_bytes = 128 * 1024;
#endif
constexpr std::size_t guard_bytes = 4096;
constexpr std::size_t max_shared_bytes = 227 * 1024;  // of a block on sm_90

/// SplitMix64.
std::uint64_t next_random(std::uint64_t& state) {
  std::uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

int lowest(std::uint32_t bits) { return __builtin_ctz(bits); }
int highest(std::uint32_t bits) { return 31 - __builtin_clz(bits); }
/// The first set bit at or after `from`, cyclically.
int next_bit(std::uint32_t bits, unsigned from) {
  from &= 31u;
  const std::uint32_t turned = from == 0 ? bits : bits >> from | bits << (32 - from);
  return static_cast<int>((static_cast<unsigned>(lowest(turned)) + from) & 31u);
}

const char* name_of(kind k) {
  switch (k) {
    case kind::none: break;
    case kind::syncwarp: return "__syncwarp";
    case kind::shfl: return "__shfl_sync";
    case kind::shfl_up: return "__shfl_up_sync";
    case kind::shfl_down: return "__shfl_down_sync";
    case kind::shfl_xor: return "__shfl_xor_sync";
    case kind::vote: return "a vote";
    case kind::match: return "__match_any_sync";
    case kind::reduce_add: return "__reduce_add_sync";
    case kind::reduce_min: return "__reduce_min_sync";
    case kind::reduce_max: return "__reduce_max_sync";
    case kind::reduce_or: return "__reduce_or_sync";
    case kind::reduce_and: return "__reduce_and_sync";
    case kind::reduce_xor: return "__reduce_xor_sync";
    case kind::together: return "a matrix instruction";
    case kind::syncthreads: return "__syncthreads";
    case kind::phase: return "mbarrier.try_wait";
  }
  return "nothing";
}

std::string text_of(site s) { return std::string(s.file) + ":" + std::to_string(s.line); }
std::string text_of(uint3 i) { return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")"; }
std::string text_of_mask(std::uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

bool same_site(site a, site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

/// Where a thread waits.
struct arrival {
  kind what;
  std::uint32_t mask;
  site where;
  int source;
  void (*combine)(void* const*) = nullptr;  // of kind::together, and its name
  const char* name = nullptr;
};
bool same_collective(const arrival& a, const arrival& b) {
  return a.what == b.what && a.mask == b.mask && a.combine == b.combine && same_site(a.where, b.where);
}
const char* name_of(const arrival& a) { return a.name != nullptr ? a.name : name_of(a.what); }

/// A stack and what it takes to go on with it.
struct context {
  unsigned char* stack = nullptr;  // lowest usable byte; null: the host thread's own
  std::size_t bytes = 0;
#if defined(__x86_64__)
  void* top = nullptr;
#else
  ucontext_t machine;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct fiber : context {
  uint3 index{};
  int warp = 0, lane = 0;
};

struct warp_state {
  // Lanes: not exited; can run; wait in a warp collective; in __syncthreads; for a phase of an mbarrier.
  std::uint32_t live, ready, meeting, at_barrier, asleep;
  arrival at[lanes];
  std::uint64_t in[lanes], out[lanes];
};

struct engine {
  std::mutex busy;
  schedule plan;
  counters count;

  // The launch.
  const void* kernel = nullptr;
  void (*thread)(void*) = nullptr;
  void* argument = nullptr;
  std::string failure;
  std::uint64_t random = 0;
  unsigned char* shared_arena = nullptr;  // dynamic shared memory ends where an unmapped page begins
  detail::memory_range shared{nullptr, 0};

  // The block.
  std::vector<fiber> fibers;  // as many as the largest block so far
  warp_state warps[max_warps];
  int threads = 0, live = 0, waiting_at_barrier = 0;
  unsigned predicates = 0, barrier_result = 0;
  std::uint32_t ready_warps = 0;
  int favourite = 0;  // order::ahead
  context host;
  fiber* current = nullptr;
  const fiber* abandoned = nullptr;  // the one that found a race
};

engine& the_engine() {
  static engine* e = [] {
    engine* made = new engine;  // never destroyed: fibers may hold abandoned frames
    if (const char* text = std::getenv("PACKKV_SIMT_SCHEDULE")) made->plan = parse_schedule(text);
    return made;
  }();
  return *e;
}
engine& e_ = the_engine();

// ------------------------------------------------------------------------------------------------------------ switching
void thread_main();

void after_switch([[maybe_unused]] context& self) {
#if defined(PACKKV_SIMT_ASAN)
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &bytes);
  if (e_.host.bytes == 0) {  // the first fiber of a launch comes from the host thread
    e_.host.stack = const_cast<unsigned char*>(static_cast<const unsigned char*>(bottom));
    e_.host.bytes = bytes;
  }
#endif
}

/// Continues at `to`; returns when something continues at `from`.
void switch_context(context& from, context& to, [[maybe_unused]] bool for_ever = false) {
  ++e_.count.switches;
#if defined(PACKKV_SIMT_ASAN)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake_stack, to.stack, to.bytes);
#endif
#if defined(__x86_64__)
  packkv_simt_switch(&from.top, to.top);
#else
  swapcontext(&from.machine, &to.machine);
#endif
  after_switch(from);
}

void go_to(fiber& next, bool for_ever = false) {
  fiber& self = *e_.current;
  e_.current = &next;
  threadIdx = next.index;
  race::switch_to(next.warp * lanes + next.lane, next.stack, next.bytes);
  switch_context(self, next, for_ever);
}

[[noreturn]] void leave_to_host() {
  fiber& self = *e_.current;
  e_.current = nullptr;
  race::leave_kernel();
  switch_context(self, e_.host, true);
  std::abort();
}

/// Makes a fiber start in thread_main.
void prepare(fiber& f, [[maybe_unused]] int number) {
  if (f.stack == nullptr) {
    void* memory = mmap(nullptr, stack_bytes + guard_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard_bytes, PROT_NONE) != 0) throw std::bad_alloc();
    f.stack = static_cast<unsigned char*>(memory) + guard_bytes;
    f.bytes = stack_bytes;
  }
  f.fake_stack = nullptr;
#if defined(PACKKV_SIMT_ASAN)
  // The red zones of the frames that an exited thread never left: thread_main and what it called to go away.
  __asan_unpoison_memory_region(f.stack + f.bytes - 65536, 65536);
#endif
#if defined(__x86_64__)
  // Tops at different cache sets: otherwise the hot frames of all lanes would share one.
  auto* top = reinterpret_cast<void**>(f.stack + f.bytes - 64 - static_cast<std::size_t>(number % 64) * 320);
  *--top = nullptr;  // thread_main's return address: the end of the stack for debuggers and unwinders
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.top = top;
#else
  getcontext(&f.machine);
  f.machine.uc_stack.ss_sp = f.stack;
  f.machine.uc_stack.ss_size = f.bytes;
  f.machine.uc_link = nullptr;
  makecontext(&f.machine, &thread_main, 0);
#endif
}

// ---------------------------------------------------------------------------------------------------------- scheduling
/// The thread that runs next, or null if all that live wait.
fiber* choose() {
  const std::uint32_t warps = e_.ready_warps;
  if (warps == 0) return nullptr;
  int w = 0, l = 0;
  switch (e_.plan.kind) {
    case order::in_order:
      w = lowest(warps);
      l = lowest(e_.warps[w].ready);
      break;
    case order::reverse:
      w = highest(warps);
      l = highest(e_.warps[w].ready);
      break;
    case order::random: {
      const std::uint64_t r = next_random(e_.random);
      w = next_bit(warps, static_cast<unsigned>(r));
      l = next_bit(e_.warps[w].ready, static_cast<unsigned>(r >> 32));
      break;
    }
    case order::ahead:
      w = (warps >> e_.favourite & 1u) != 0 ? e_.favourite : next_bit(warps, e_.current == nullptr ? 0u : static_cast<unsigned>(e_.current->warp) + 1);
      l = lowest(e_.warps[w].ready);
      break;
  }
  return &e_.fibers[static_cast<std::size_t>(w * lanes + l)];
}

void make_ready(int w, std::uint32_t mask) {
  e_.warps[w].ready |= mask;
  if (e_.warps[w].ready != 0) e_.ready_warps |= 1u << w;
}
void make_waiting(const fiber& f) {
  warp_state& w = e_.warps[f.warp];
  w.ready &= ~(1u << f.lane);
  if (w.ready == 0) e_.ready_warps &= ~(1u << f.warp);
}

std::string thread_name(const fiber& f) {
  return "thread " + text_of(f.index) + " (warp " + std::to_string(f.warp) + ", lane " + std::to_string(f.lane) + ")";
}
std::string where_is(int warp, int lane) {
  const warp_state& w = e_.warps[warp];
  const std::string who = "lane " + std::to_string(lane);
  if (warp * lanes + lane >= e_.threads) return who + " does not exist";
  if ((w.live >> lane & 1u) == 0) return who + " has exited";
  if (((w.meeting | w.at_barrier | w.asleep) >> lane & 1u) == 0) return who + " has not arrived";
  const arrival& a = w.at[lane];
  if (a.what == kind::phase) return who + " waits at " + text_of(a.where) + " for a " + detail::async::describe(warp * lanes + lane);
  return who + " waits at " + name_of(a) + (a.what == kind::syncthreads ? "" : " (mask " + text_of_mask(a.mask) + ")") + " at " + text_of(a.where);
}

/// Leaves the running thread once e_.failure says why; thread_main catches it.
struct stop {};

void describe_failure(const fiber& f, const std::string& what, const std::string& where) {
  e_.failure = "packkv_simt: " + what + "\n  in " + detail::function_name(e_.kernel) + ", block " + text_of(blockIdx) + ", " + thread_name(f) + where +
               "\n  schedule " + to_string(e_.plan) + ", launch " + std::to_string(e_.count.launches);
}
[[noreturn]] void fail_thread(const fiber& f, const std::string& what, site where) {
  describe_failure(f, what, ", at " + text_of(where));
  throw stop{};
}

/// Nobody can run and somebody lives: says who waits for whom.
[[noreturn]] void fail_deadlock() {
  const auto fiber_at = [](int w, int l) -> const fiber& { return e_.fibers[static_cast<std::size_t>(w * lanes + l)]; };
  const int warps = (e_.threads + lanes - 1) / lanes;
  for (int w = 0; w < warps; ++w)
    if (const std::uint32_t meeting = e_.warps[w].meeting) {
      const int l = lowest(meeting);
      const arrival& a = e_.warps[w].at[l];
      std::string what = std::string("deadlock: ") + name_of(a) + " (mask " + text_of_mask(a.mask) + ") waits for ever:";
      int shown = 0;
      for (int other = 0; other < lanes; ++other) {
        const bool here = (meeting >> other & 1u) != 0 && same_collective(e_.warps[w].at[other], a);
        if ((a.mask >> other & 1u) != 0 && !here && ++shown <= 3) what += (shown == 1 ? " " : "; ") + where_is(w, other);
      }
      fail_thread(fiber_at(w, l), what, a.where);
    }
  for (int w = 0; w < warps; ++w)
    if (const std::uint32_t asleep = e_.warps[w].asleep)
      fail_thread(fiber_at(w, lowest(asleep)), "deadlock: " + where_is(w, lowest(asleep)), e_.warps[w].at[lowest(asleep)].where);
  // All wait at __syncthreads, so they came to different ones (or it would have opened).
  const fiber* first = nullptr;
  for (int w = 0; w < warps; ++w)
    for (int l = 0; l < lanes; ++l)
      if ((e_.warps[w].at_barrier >> l & 1u) != 0) {
        const arrival& a = e_.warps[w].at[l];
        if (first == nullptr) first = &fiber_at(w, l);
        else if (const arrival& b = e_.warps[first->warp].at[first->lane]; !same_site(a.where, b.where))
          fail_thread(*first, "divergent __syncthreads: " + thread_name(fiber_at(w, l)) + " waits at another one at " + text_of(a.where), b.where);
      }
  std::abort();
}

/// The thread that runs next; copies land until there is one. Null if there never will be.
fiber* choose_or_land() {
  fiber* next = choose();
  while (next == nullptr && detail::async::land_one()) next = choose();
  return next;
}

/// Lets the schedule choose; returns when the running thread is chosen again.
void yield() {
  detail::async::perhaps_land();
  fiber* next = choose_or_land();
  if (next == nullptr) fail_deadlock();
  if (next != e_.current) go_to(*next);
}

/// Opens the barrier if all that live are there, and at the same one.
void try_barrier() {
  if (e_.live == 0 || e_.waiting_at_barrier != e_.live) return;
  const arrival* first = nullptr;
  const int warps = (e_.threads + lanes - 1) / lanes;
  for (int w = 0; w < warps; ++w)
    for (std::uint32_t rest = e_.warps[w].at_barrier; rest != 0; rest &= rest - 1) {
      const arrival& a = e_.warps[w].at[lowest(rest)];
      if (first == nullptr) first = &a;
      else if (!same_site(first->where, a.where)) return;  // fail_deadlock names both
    }
  race::order_block();
  for (int w = 0; w < warps; ++w) {
    make_ready(w, e_.warps[w].at_barrier);
    e_.warps[w].at_barrier = 0;
  }
  e_.barrier_result = e_.predicates;
  e_.predicates = 0;
  e_.waiting_at_barrier = 0;
}

/// What each lane of a complete meeting gets.
void resolve(warp_state& w, const arrival& a) {
  const auto each = [&](auto&& f) {
    for (std::uint32_t rest = a.mask; rest != 0; rest &= rest - 1) f(lowest(rest));
  };
  const auto all_get = [&](std::uint64_t x) { each([&](int l) { w.out[l] = x; }); };
  const auto reduce = [&](auto&& combine) {
    auto x = static_cast<std::uint32_t>(w.in[lowest(a.mask)]);
    for (std::uint32_t rest = a.mask & (a.mask - 1); rest != 0; rest &= rest - 1) x = combine(x, static_cast<std::uint32_t>(w.in[lowest(rest)]));
    all_get(x);
  };
  using u = std::uint32_t;
  switch (a.what) {
    case kind::none:
    case kind::syncwarp:
    case kind::syncthreads:
    case kind::phase: break;
    case kind::together: {
      void* operands[lanes];
      for (int l = 0; l < lanes; ++l) operands[l] = reinterpret_cast<void*>(static_cast<std::uintptr_t>(w.in[l]));
      race::pause(true);
      a.combine(operands);
      race::pause(false);
      break;
    }
    case kind::shfl:
    case kind::shfl_up:
    case kind::shfl_down:
    case kind::shfl_xor: each([&](int l) { w.out[l] = w.in[w.at[l].source]; }); break;
    case kind::vote: {
      std::uint32_t ballot = 0;
      each([&](int l) { ballot |= w.in[l] != 0 ? 1u << l : 0u; });
      all_get(ballot);
      break;
    }
    case kind::match:
      each([&](int l) {
        std::uint32_t equal = 0;
        each([&](int m) { equal |= w.in[m] == w.in[l] ? 1u << m : 0u; });
        w.out[l] = equal;
      });
      break;
    case kind::reduce_add: reduce([](u x, u y) { return x + y; }); break;
    case kind::reduce_min: reduce([](u x, u y) { return x < y ? x : y; }); break;
    case kind::reduce_max: reduce([](u x, u y) { return x > y ? x : y; }); break;
    case kind::reduce_or: reduce([](u x, u y) { return x | y; }); break;
    case kind::reduce_and: reduce([](u x, u y) { return x & y; }); break;
    case kind::reduce_xor: reduce([](u x, u y) { return x ^ y; }); break;
  }
}

/// The running thread has come to its end; returns who runs next, or null if it was the last of its block.
fiber* retire() {
  detail::async::end_thread();
  fiber& self = *e_.current;
  make_waiting(self);
  e_.warps[self.warp].live &= ~(1u << self.lane);
  --e_.live;
  try_barrier();
  if (e_.live == 0) e_.failure = detail::async::end_block();
  fiber* next = e_.live == 0 ? nullptr : choose_or_land();
  if (next == nullptr && e_.live > 0) fail_deadlock();
  return next;
}

void thread_main() {
  after_switch(*e_.current);
  fiber* next = nullptr;
  try {
    e_.thread(e_.argument);
    next = retire();
    if (!e_.failure.empty()) describe_failure(*e_.current, e_.failure, "");
  } catch (const stop&) {
  } catch (const std::exception& x) {
    describe_failure(*e_.current, std::string("the kernel threw: ") + x.what(), "");
  } catch (...) {
    describe_failure(*e_.current, "the kernel threw", "");
  }
  if (next == nullptr) leave_to_host();
  go_to(*next, true);
  std::abort();
}

// ------------------------------------------------------------------------------------------------------------ launching
/// One instruction where there is one: no sanitizer sees it, and there are megabytes to fill before every block. Sizes in
/// the symbol table may include AddressSanitizer's red zones.
__attribute__((no_sanitize("address"), noinline)) void fill(const detail::memory_range& r, unsigned char byte) {
#if defined(__x86_64__)
  void* begin = r.begin;
  std::size_t bytes = r.bytes;
  __asm__ volatile("rep stosb" : "+D"(begin), "+c"(bytes) : "a"(byte) : "memory");
#else
  for (std::size_t i = 0; i < r.bytes; ++i) {
    r.begin[i] = byte;
    __asm__ volatile("" ::: "memory");  // no call of memset, which is instrumented
  }
#endif
}

/// Fills shared variables, so that a block finds nothing of another. NaN and "true" may hide a defect as well as 0 and
/// "false", so the byte depends on the schedule.
void poison_shared() {
  const unsigned char byte = detail::garbage();
  for (const detail::memory_range& r : detail::shared_variables()) fill(r, byte);
  fill(e_.shared, byte);
}

/// Dynamic shared memory of the launch: its last byte (rounded up to the alignment) is the last of a page, and
/// AddressSanitizer and the race detector know its exact bounds.
void place_shared(std::size_t bytes) {
  constexpr std::size_t alignment = 128, arena = 256 * 1024;
  if (e_.shared_arena == nullptr) {
    void* memory = mmap(nullptr, arena + 2 * guard_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    e_.shared_arena = static_cast<unsigned char*>(memory) + guard_bytes;
    if (mprotect(e_.shared_arena, arena, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
  e_.shared = {e_.shared_arena + arena - (bytes + alignment - 1) / alignment * alignment, bytes};
  race::dynamic_shared(e_.shared_arena, arena, e_.shared);
#if defined(PACKKV_SIMT_ASAN)
  __asan_poison_memory_region(e_.shared_arena, arena);
  __asan_unpoison_memory_region(e_.shared.begin, e_.shared.bytes);
  for (const detail::memory_range& r : detail::shared_guards()) __asan_poison_memory_region(r.begin, r.bytes);
#endif
}

void run_block(uint3 block) {
  blockIdx = block;
  e_.live = e_.threads;
  e_.waiting_at_barrier = 0;
  e_.predicates = 0;
  e_.ready_warps = 0;
  const int warps = (e_.threads + lanes - 1) / lanes;
  for (int w = 0; w < warps; ++w) {
    const int count = std::min(lanes, e_.threads - w * lanes);
    e_.warps[w].live = count == lanes ? 0xffffffffu : (1u << count) - 1;
    e_.warps[w].ready = e_.warps[w].meeting = e_.warps[w].at_barrier = e_.warps[w].asleep = 0;
    make_ready(w, e_.warps[w].live);
  }
  const auto bx = blockDim.x, by = blockDim.y;
  for (int i = 0; i < e_.threads; ++i) {
    fiber& f = e_.fibers[static_cast<std::size_t>(i)];
    const auto t = static_cast<unsigned>(i);
    f.index = {t % bx, t / bx % by, t / bx / by};
    f.warp = i / lanes;
    f.lane = i % lanes;
    prepare(f, i);
  }
  detail::async::begin_block();
  e_.favourite = e_.plan.warp % warps;
  fiber* first = choose();
  e_.current = first;
  threadIdx = first->index;
  e_.host.bytes = 0;
  race::switch_to(first->warp * lanes + first->lane, first->stack, first->bytes);
  switch_context(e_.host, *first);
  ++e_.count.blocks;
  if (std::string what; race::take_report(what)) {
    threadIdx = e_.abandoned->index;
    describe_failure(*e_.abandoned, what, "");
  }
  if (e_.failure.empty()) return;
#if defined(PACKKV_SIMT_ASAN)
  for (fiber& f : e_.fibers)
    if (f.stack != nullptr) __asan_unpoison_memory_region(f.stack, f.bytes);
#endif
  std::string failure;
  failure.swap(e_.failure);
  throw error(failure);
}

}  // namespace

schedule get_schedule() { return e_.plan; }
void set_schedule(const schedule& s) {
  e_.plan = s;
  e_.random = s.seed;
}
counters get_counters() { return e_.count; }

schedule parse_schedule(const std::string& text) {
  const std::size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  const unsigned long long number = colon == std::string::npos ? 0 : std::stoull(text.substr(colon + 1));
  schedule s;
  if (name == "in_order") s.kind = order::in_order;
  else if (name == "reverse") s.kind = order::reverse;
  else if (name == "random") s.kind = order::random, s.seed = number;
  else if (name == "ahead") s.kind = order::ahead, s.warp = static_cast<int>(number % max_warps);
  else throw std::invalid_argument("packkv_simt: a schedule is in_order, reverse, random:SEED or ahead:WARP, not " + text);
  return s;
}
std::string to_string(const schedule& s) {
  switch (s.kind) {
    case order::in_order: break;
    case order::reverse: return "reverse";
    case order::random: return "random:" + std::to_string(s.seed);
    case order::ahead: return "ahead:" + std::to_string(s.warp);
  }
  return "in_order";
}

namespace detail {

void abandon() {
  e_.abandoned = e_.current;
  leave_to_host();
}

unsigned lane() { return e_.current == nullptr ? 0 : static_cast<unsigned>(e_.current->lane); }

void fail(const std::string& what, site where) {
  if (e_.current == nullptr) throw error("packkv_simt: " + what + "\n  outside of a kernel, at " + text_of(where));
  fail_thread(*e_.current, what, where);
}

int running() { return e_.current == nullptr ? -1 : e_.current->warp * lanes + e_.current->lane; }

void sleep(site where) {
  fiber& self = *e_.current;
  warp_state& w = e_.warps[self.warp];
  w.at[self.lane] = {kind::phase, 0xffffffffu, where, 0};
  w.asleep |= 1u << self.lane;
  make_waiting(self);
  yield();
}

void wake(int thread) {
  e_.warps[thread / lanes].asleep &= ~(1u << thread % lanes);
  make_ready(thread / lanes, 1u << thread % lanes);
}

std::uint64_t draw() { return next_random(e_.random); }

unsigned char garbage() {
  if (e_.plan.kind == order::random) return (next_random(e_.random) & 1u) != 0 ? 0xff : 0x00;
  return e_.plan.kind == order::reverse ? 0x00 : 0xff;
}

memory_range dynamic_range() { return e_.shared; }

void* dynamic_shared() { return e_.shared.begin; }

void check_aligned(const void* p, std::size_t bytes, site where) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0)
    fail("an access of " + std::to_string(bytes) + " bytes to an address that is not a multiple of it", where);
}

void preempt() {
  if (e_.current == nullptr || e_.plan.kind != order::random) return;
  if ((next_random(e_.random) & 7u) == 0) yield();
}

namespace {

std::uint64_t meet(const arrival& mine, std::uint64_t value) {
  const auto& [k, mask, where, source, combine, name] = mine;
  if (e_.current == nullptr) fail(std::string(name_of(mine)) + " by the host", where);
  fiber& self = *e_.current;
  warp_state& w = e_.warps[self.warp];
  const int lane = self.lane;
  const std::uint32_t bit = 1u << lane;
  const auto refuse = [&](const std::string& why) {
    fail_thread(self, std::string(name_of(mine)) + " (mask " + text_of_mask(mine.mask) + "): " + why, mine.where);
  };
  if ((mask & bit) == 0) refuse("the mask does not name the calling lane");
  if ((mask & ~w.live) != 0) refuse("the mask names a lane that will not come: " + where_is(self.warp, lowest(mask & ~w.live)));
  if ((mask & w.at_barrier) != 0) refuse("the mask names a lane that will not come: " + where_is(self.warp, lowest(mask & w.at_barrier)));
  if (const std::uint32_t others = w.meeting & mask) {
    const int other = lowest(others);
    if ((w.at[other].mask & bit) != 0 && !same_collective(w.at[other], mine)) refuse("lanes of the mask are at different collectives: " + where_is(self.warp, other));
  }
  w.at[lane] = mine;
  w.in[lane] = value;
  w.meeting |= bit;
  bool complete = (w.meeting & mask) == mask;
  for (std::uint32_t rest = complete ? mask : 0; rest != 0 && complete; rest &= rest - 1) complete = same_collective(w.at[lowest(rest)], mine);
  if (complete) {
    resolve(w, mine);
    if (k == kind::syncwarp) race::order_lanes(self.warp, mask);
    w.meeting &= ~mask;
    make_ready(self.warp, mask);
  } else {
    make_waiting(self);
  }
  yield();
  return w.out[lane];
}

}  // namespace

std::uint64_t meet(kind k, unsigned mask, std::uint64_t value, site where, int source) {
  return meet(arrival{k, mask, where, source}, value);
}

void meet_all(void* operand, void (*combine)(void* const*), const char* name, site where) {
  meet(arrival{kind::together, 0xffffffffu, where, 0, combine, name}, reinterpret_cast<std::uintptr_t>(operand));
}

unsigned barrier(bool predicate, site where) {
  if (e_.current == nullptr) fail("__syncthreads by the host", where);
  fiber& self = *e_.current;
  warp_state& w = e_.warps[self.warp];
  w.at[self.lane] = {kind::syncthreads, 0xffffffffu, where, 0};
  w.at_barrier |= 1u << self.lane;
  e_.predicates += predicate ? 1 : 0;
  ++e_.waiting_at_barrier;
  make_waiting(self);
  try_barrier();
  yield();
  return e_.barrier_result;
}

int run_grid(const void* kernel, void (*thread)(void*), void* argument, dim3 grid, dim3 block, std::size_t shared_bytes) {
  thread_local bool launching = false;
  if (launching) fail("a launch from within a kernel", {"(unknown)", 0});
  const std::lock_guard<std::mutex> lock(e_.busy);
  struct in_launch {
    in_launch() { launching = true; }
    ~in_launch() { launching = false; }
  } guard;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > max_threads || block.x > max_threads || block.y > max_threads || block.z > 64 || blocks == 0 ||
      grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes > max_shared_bytes) return cudaErrorInvalidValue;
  e_.kernel = kernel;
  e_.thread = thread;
  e_.argument = argument;
  e_.threads = static_cast<int>(threads);
  if (e_.fibers.size() < threads) e_.fibers.resize(threads);
  blockDim = block;
  gridDim = grid;
  ++e_.count.launches;
  race::begin_launch(blocks);
  place_shared(shared_bytes);

  std::vector<std::uint32_t> shuffled;
  if (e_.plan.kind == order::random && blocks <= (1u << 20)) {
    shuffled.resize(blocks);
    std::iota(shuffled.begin(), shuffled.end(), 0u);
    for (std::size_t i = shuffled.size() - 1; i > 0; --i) std::swap(shuffled[i], shuffled[next_random(e_.random) % (i + 1)]);
  }
  for (std::uint64_t i = 0; i < blocks; ++i) {
    std::uint64_t b = i;
    if (e_.plan.kind == order::reverse) b = blocks - 1 - i;
    if (e_.plan.kind == order::ahead) b = i == 0 ? blocks - 1 : i - 1;
    if (!shuffled.empty()) b = shuffled[i];
    poison_shared();
    race::begin_block(b, e_.threads);
    run_block({static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y), static_cast<unsigned>(b / grid.x / grid.y)});
  }
  return cudaSuccess;
}

}  // namespace detail
}  // namespace packkv_simt

// SPDX-License-Identifier: Apache-2.0
// Happens-before by clocks. A thread counts its own releases; what it knows of the others of its block is the greatest
// of `base` (the last __syncthreads), its row of its warp's matrix (__syncwarp) and `acquired` (atomics and fences),
// which is also all that it knows of other blocks. An access is remembered as (block, thread, its clock then). Copies
// count as threads of their own: one for each mbarrier, whose clock is its phase, and one for the cp.async of each
// thread, whose clock is its group.
#include "race.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "engine.hpp"
#include "symbols.hpp"

namespace packkv_simt::detail::race {
namespace {

constexpr int lanes = 32;
constexpr int max_threads = 1024;
constexpr int max_warps = max_threads / lanes;
constexpr std::uint64_t max_blocks = std::uint64_t{1} << 22;
constexpr int max_agents = 4096 - max_threads;  // agents are "threads" from max_threads on

using clock_type = std::uint32_t;

// ------------------------------------------------------------------------------------------------------------
// knowledge
/// Clocks of the threads of some blocks, up to which everything is known.
using block_clocks = std::shared_ptr<const std::vector<clock_type>>;
using knowledge_map = std::map<std::uint32_t, block_clocks>;
using knowledge = std::shared_ptr<const knowledge_map>;

knowledge join(const knowledge& a, const knowledge& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  auto result = std::make_shared<knowledge_map>(*a);
  for (const auto& [block, clocks] : *b) {
    block_clocks& mine = (*result)[block];
    if (mine == nullptr) {
      mine = clocks;
    } else if (mine != clocks) {
      auto both = std::make_shared<std::vector<clock_type>>(*mine);
      both->resize(std::max(both->size(), clocks->size()));
      for (std::size_t i = 0; i < clocks->size(); ++i) (*both)[i] = std::max((*both)[i], (*clocks)[i]);
      mine = std::move(both);
    }
  }
  return result;
}

/// Fences have two scopes. `device` is part of `block` for threads of the same block.
struct scoped {
  knowledge device, block;
};

struct thread_state {
  clock_type clock = 1;
  knowledge acquired;
  scoped fenced;   // what the next atomic releases
  scoped pending;  // what atomics have brought and the next fence acquires
};

void join_into(thread_state& a, const thread_state& b) {
  a.acquired = join(a.acquired, b.acquired);
  a.fenced.device = join(a.fenced.device, b.fenced.device);
  a.fenced.block = join(a.fenced.block, b.fenced.block);
  a.pending.device = join(a.pending.device, b.pending.device);
  a.pending.block = join(a.pending.block, b.pending.block);
}
void copy_to(thread_state& to, const thread_state& from) {
  to.acquired = from.acquired;
  to.fenced = from.fenced;
  to.pending = from.pending;
}

/// What atomics on one address carry.
struct sync_variable {
  scoped released;  // .block: by threads of `block` only
  std::uint32_t block = 0;
};

// ---------------------------------------------------------------------------------------------------------------
// shadow
/// 22 bits of block, 12 of thread, 30 of clock; 0 is nothing, for clocks begin at 1.
using epoch = std::uint64_t;
epoch make_epoch(std::uint32_t block, int thread, clock_type clock) {
  return std::uint64_t{block} << 42 | static_cast<std::uint64_t>(thread) << 30 | (clock & 0x3fffffffu);
}
std::uint32_t block_of(epoch e) { return static_cast<std::uint32_t>(e >> 42); }
int thread_of(epoch e) { return static_cast<int>(e >> 30 & 4095u); }
clock_type clock_of(epoch e) { return static_cast<clock_type>(e & 0x3fffffffu); }

enum access { write = 0, read = 1, atomic = 3 };  // the first slot of each in a cell

/// One byte's past in this launch (global) or block (shared): its last plain write, and two plain reads and two
/// atomics, if there are two of different warps then of different warps. All those since then that nothing orders would
/// be exact; two are enough as long as every barrier is one of whole warps.
struct cell {
  epoch when[5];
  std::uint32_t where[5];  // program counters, relative to the program
  std::uint32_t round;     // to which launch or block it belongs
};
static_assert(sizeof(cell) == 64);

enum class content { nothing, global, shared, guard };  // nothing: the gaps in between
struct region {
  std::uintptr_t begin = 0, end = 0;
  content what = content::nothing;
  cell* cells = nullptr;
};

/// What mbarriers carry from those that arrive to those that wait.
struct phase_state {
  knowledge arrived, complete;  // in the present phase; in those before
  int agent;
  clock_type clock = 0;  // phases that are over
};

enum class finding { none, race, unwritten, outside, misaligned };

/// A line of source text that stands where program counters do.
struct place {
  site where;
  const char* name;
  int thread;
};
constexpr std::uint32_t place_flag = 0x80000000u;

struct detector {
  std::mutex registering;
  std::map<std::uintptr_t, region> regions;  // by end
  region recent[4];
  int next_recent = 0;
  bool shared_known = false;

  std::uintptr_t stack = 0, stack_end = 0;
  int self = 0;
  std::uint32_t launch = 0, block_round = 0, block = 0;
  int threads = 0;
  thread_state state[max_threads];
  clock_type base[max_threads];
  clock_type row[max_warps][lanes][lanes];  // [warp][who][of whom]
  std::unordered_map<std::uintptr_t, sync_variable> variables;
  std::map<void*, phase_state> phases;  // of this block
  std::map<int, int> copiers;           // thread: agent of its cp.async
  int agents = 0;
  std::vector<place> places;
  std::uintptr_t arena = 0;
  memory_range dynamic{nullptr, 0};

  // What ended the launch.
  finding found = finding::none;
  std::uintptr_t address = 0;
  const char* kinds[2] = {};
  epoch who[2] = {};
  std::uint32_t where[2] = {};
  bool in_shared = false;
};

// Not in the detector: instrumented code runs before that is there.
bool instrumented_ = false;
bool in_kernel_ = false;  // a fiber runs
bool in_atomic_ = false;
bool paused_ = false;

detector& the_detector() {
  static detector* d = new detector;  // never destroyed: arrays may be freed after it
  return *d;
}
detector& d_ = the_detector();

cell* map_cells(std::size_t bytes) {
  void* p =
      mmap(nullptr, bytes * sizeof(cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<cell*>(p);
}

void forget_recent() {
  for (region& r : d_.recent) r = region{};
}
void add_region(std::uintptr_t begin, std::size_t bytes, content what) {
  if (bytes > 0) d_.regions[begin + bytes] = region{begin, begin + bytes, what, nullptr};
  forget_recent();
}
void remove_region(std::uintptr_t end) {
  const auto it = d_.regions.find(end);
  if (it == d_.regions.end()) return;
  if (it->second.cells != nullptr) munmap(it->second.cells, (it->second.end - it->second.begin) * sizeof(cell));
  d_.regions.erase(it);
  forget_recent();
}

/// The region or gap that an address lies in.
const region& find(std::uintptr_t p) {
  for (const region& r : d_.recent)
    if (p >= r.begin && p < r.end) return r;
  region& r = d_.recent[d_.next_recent];
  d_.next_recent = (d_.next_recent + 1) % 4;
  const auto next = d_.regions.upper_bound(p);
  if (next != d_.regions.end() && next->second.begin <= p) {
    if (next->second.cells == nullptr && next->second.what != content::guard)
      next->second.cells = map_cells(next->second.end - next->second.begin);
    r = next->second;
  } else {
    r = region{};
    r.begin = next == d_.regions.begin() ? 0 : std::prev(next)->second.end;
    r.end = next == d_.regions.end() ? ~std::uintptr_t{0} : next->second.begin;
  }
  return r;
}

// -------------------------------------------------------------------------------------------------------------
// ordering
/// Where vectors of clocks have an agent.
std::size_t slot_of(int thread) {
  return static_cast<std::size_t>(thread < max_threads ? thread : d_.threads + thread - max_threads);
}
clock_type clock_in(const std::vector<clock_type>& clocks, int thread) {
  return slot_of(thread) < clocks.size() ? clocks[slot_of(thread)] : 0;
}

clock_type known_of_own_block(int other) {
  clock_type k = other < max_threads ? d_.base[other] : 0;
  if (other / lanes == d_.self / lanes) k = std::max(k, d_.row[d_.self / lanes][d_.self % lanes][other % lanes]);
  if (const knowledge& a = d_.state[d_.self].acquired; a != nullptr)
    if (const auto it = a->find(d_.block); it != a->end())
      k = std::max(k, clock_in(*it->second, other));
  return k;
}

/// Does the running thread come after that access?
bool ordered(epoch e) {
  const std::uint32_t block = block_of(e);
  const int thread = thread_of(e);
  if (block == d_.block) return thread == d_.self || clock_of(e) <= known_of_own_block(thread);
  const knowledge& a = d_.state[d_.self].acquired;
  if (a == nullptr) return false;
  const auto it = a->find(block);
  return it != a->end() && thread < max_threads && clock_of(e) <= clock_in(*it->second, thread);
}

/// Everything that the running thread knows, itself included.
knowledge snapshot() {
  thread_state& s = d_.state[d_.self];
  auto clocks = std::make_shared<std::vector<clock_type>>(static_cast<std::size_t>(d_.threads));
  for (int t = 0; t < d_.threads; ++t)
    (*clocks)[static_cast<std::size_t>(t)] = t == d_.self ? s.clock : known_of_own_block(t);
  for (int a = max_threads; a < max_threads + d_.agents; ++a) clocks->push_back(known_of_own_block(a));
  auto all = s.acquired == nullptr ? std::make_shared<knowledge_map>() : std::make_shared<knowledge_map>(*s.acquired);
  (*all)[d_.block] = std::move(clocks);
  return all;
}

// -------------------------------------------------------------------------------------------------------------
// accesses
const char* name_of(int slot) { return slot == write ? "write" : slot < atomic ? "read" : "atomic"; }

/// The running thread now has `clock` of an agent of its block.
void acquire_agent(int agent, clock_type clock) {
  thread_state& s = d_.state[d_.self];
  auto clocks = std::make_shared<std::vector<clock_type>>(slot_of(agent) + 1);
  clocks->back() = clock;
  s.acquired = join(s.acquired, std::make_shared<knowledge_map>(knowledge_map{{d_.block, std::move(clocks)}}));
}

int new_agent() {
  if (d_.agents == max_agents) throw error("packkv_simt: more mbarriers and copying threads than the race detector can count");
  return max_threads + d_.agents++;
}

std::uint32_t place_of_site(site where, const char* name) {
  d_.places.push_back({where, name, d_.self});
  return place_flag | static_cast<std::uint32_t>(d_.places.size() - 1);
}

[[noreturn]] void report_access(finding what, std::uintptr_t p, access now, std::uint32_t pc) {
  d_.found = what;
  d_.address = p;
  d_.kinds[0] = name_of(now);
  d_.who[0] = make_epoch(d_.block, d_.self, 1);
  d_.where[0] = pc;
  in_kernel_ = false;
  abandon();
}

[[noreturn]] void report(std::uintptr_t p, bool shared, const cell& c, int slot, access now, std::uint32_t pc) {
  d_.found = finding::race;
  d_.address = p;
  d_.in_shared = shared;
  d_.kinds[0] = name_of(now);
  d_.who[0] = make_epoch(d_.block, d_.self, 1);
  d_.where[0] = pc;
  d_.kinds[1] = name_of(slot);
  d_.who[1] = c.when[slot];
  d_.where[1] = c.where[slot];
  in_kernel_ = false;
  abandon();
}

void remember(cell& c, int first, epoch now, std::uint32_t pc) {
  // Of two slots: one that is empty, of this thread or ordered before it; else that of its own warp; else the second.
  int slot = first + 1;
  const auto replaceable = [&](int i) { return c.when[i] == 0 || ordered(c.when[i]); };
  const auto same_warp = [&](int i) {
    return block_of(c.when[i]) == d_.block && thread_of(c.when[i]) / lanes == d_.self / lanes;
  };
  if (replaceable(first))
    slot = first;
  else if (replaceable(first + 1))
    slot = first + 1;
  else if (same_warp(first) && !same_warp(first + 1))
    slot = first;
  c.when[slot] = now;
  c.where[slot] = pc;
}

/// `as` is who is remembered: the running thread, or a copy.
void check(std::uintptr_t p, std::size_t bytes, access what, std::uint32_t pc, epoch as = 0) {
  const region r = find(p);
  if (r.what == content::guard) report_access(finding::outside, p, what, pc);
  if (r.what == content::nothing) return;
  const bool shared = r.what == content::shared;
  if (shared && p + bytes > r.end) report_access(finding::outside, r.end, what, pc);
  const std::uint32_t round = shared ? d_.block_round : d_.launch;
  const epoch now = as != 0 ? as : make_epoch(d_.block, d_.self, d_.state[d_.self].clock);
  const std::uintptr_t end = std::min(p + bytes, r.end);
  for (; p < end; ++p) {
    cell& c = r.cells[p - r.begin];
    if (c.round != round) {
      if (shared && what != write) report_access(finding::unwritten, p, what, pc);
      std::memset(&c, 0, sizeof c);
      c.round = round;
      c.when[what] = now;
      c.where[what] = pc;
      continue;
    }
    if (c.when[what] == now || (what != write && c.when[what + 1] == now)) {
      // Again within the same step: what is new since then has been checked against this one.
      bool alone = true;
      for (int i = 0; i < 5; ++i)
        alone = alone && (c.when[i] == 0 || c.when[i] == now || (what == read && i != write && i < atomic) ||
                          (what == atomic && i >= atomic));
      if (alone) continue;
    }
    if (c.when[write] != 0 && !ordered(c.when[write])) report(p, shared, c, write, what, pc);
    if (what != read)
      for (int i = read; i < atomic; ++i)
        if (c.when[i] != 0 && !ordered(c.when[i])) report(p, shared, c, i, what, pc);
    if (what != atomic)
      for (int i = atomic; i < 5; ++i)
        if (c.when[i] != 0 && !ordered(c.when[i])) report(p, shared, c, i, what, pc);
    if (what == write) {
      for (int i = 1; i < 5; ++i) c.when[i] = 0;  // all before this one
      c.when[write] = now;
      c.where[write] = pc;
    } else {
      remember(c, what, now, pc);
    }
  }
}

extern "C" const char __executable_start;
std::uint32_t relative(const void* pc) {
  return static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(pc) -
                                    reinterpret_cast<std::uintptr_t>(&__executable_start));
}

/// `size` is what the compiler takes the address to be a multiple of.
void on_access(const void* address, std::size_t bytes, access what, const void* pc, std::size_t size = 1) {
  if (!in_kernel_ || in_atomic_ || paused_) return;
  const auto p = reinterpret_cast<std::uintptr_t>(address);
  if (p >= d_.stack && p < d_.stack_end) return;
  if (p % size != 0) report_access(finding::misaligned, p, what, relative(pc));
  check(p, bytes, what, relative(pc));
}

// ---------------------------------------------------------------------------------------------------------------
// report
/// File and line of an instruction, from the debug information if addr2line is there; inlined calls innermost first.
std::string place_of(std::uint32_t pc) {
  if ((pc & place_flag) != 0) {
    const place& p = d_.places[pc & ~place_flag];
    return std::string(p.where.file) + ":" + std::to_string(p.where.line);
  }
  char command[128];
  std::snprintf(command, sizeof command, "addr2line -i -e /proc/%d/exe 0x%x 2>/dev/null", static_cast<int>(getpid()),
                pc - 1);
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    char line[1024];
    int frames = 0;
    while (frames < 6 && std::fgets(line, sizeof line, pipe) != nullptr) {
      line[std::strcspn(line, "\n")] = 0;
      if (line[0] == '?' || std::strstr(line, "/usr/") == line) continue;
      if (std::strstr(line, "engine.hpp") != nullptr || std::strstr(line, "intrinsics.hpp") != nullptr) continue;
      if (char* extra = std::strstr(line, " (discriminator")) *extra = 0;
      text += (frames++ == 0 ? "" : ", from ") + std::string(line);
    }
    pclose(pipe);
  }
  if (!text.empty()) return text;
  std::snprintf(command, sizeof command, "program + 0x%x", pc);
  return command;
}

std::string coordinates(std::uint64_t i, const dim3& size) {
  return "(" + std::to_string(i % size.x) + "," + std::to_string(i / size.x % size.y) + "," +
         std::to_string(i / size.x / size.y) + ")";
}

}  // namespace

bool enabled() { return instrumented_; }

void begin_launch(std::uint64_t blocks) {
  if (!instrumented_) return;
  if (blocks >= max_blocks) throw error("packkv_simt: more blocks than the race detector can count");
  if (!d_.shared_known) {
    d_.shared_known = true;
    for (const memory_range& r : shared_variables())
      add_region(reinterpret_cast<std::uintptr_t>(r.begin), r.bytes, content::shared);
    for (const memory_range& r : shared_guards())
      add_region(reinterpret_cast<std::uintptr_t>(r.begin), r.bytes, content::guard);
  }
  ++d_.launch;
  d_.variables.clear();
  d_.places.clear();
}

void dynamic_shared(void* arena, std::size_t arena_bytes, const memory_range& used) {
  const auto begin = reinterpret_cast<std::uintptr_t>(arena), end = begin + arena_bytes;
  const auto first = reinterpret_cast<std::uintptr_t>(used.begin), last = first + used.bytes;
  if (!instrumented_ || (d_.arena == begin && d_.dynamic.begin == used.begin && d_.dynamic.bytes == used.bytes)) return;
  remove_region(reinterpret_cast<std::uintptr_t>(d_.dynamic.begin));
  remove_region(reinterpret_cast<std::uintptr_t>(d_.dynamic.begin) + d_.dynamic.bytes);
  remove_region(end);
  add_region(begin, first - begin, content::guard);
  add_region(first, used.bytes, content::shared);
  add_region(last, end - last, content::guard);
  d_.arena = begin;
  d_.dynamic = used;
}

void begin_block(std::uint64_t block, int threads) {
  if (!instrumented_) return;
  ++d_.block_round;
  d_.phases.clear();
  d_.copiers.clear();
  d_.agents = 0;
  d_.block = static_cast<std::uint32_t>(block);
  d_.threads = threads;
  for (int t = 0; t < threads; ++t) d_.state[t] = thread_state{};
  std::fill_n(d_.base, threads, clock_type{0});
  std::memset(d_.row, 0, sizeof d_.row[0] * static_cast<std::size_t>((threads + lanes - 1) / lanes));
}

void switch_to(int thread, const void* stack, std::size_t stack_bytes) {
  d_.self = thread;
  d_.stack = reinterpret_cast<std::uintptr_t>(stack);
  d_.stack_end = d_.stack + stack_bytes;
  in_kernel_ = instrumented_;
  in_atomic_ = paused_ = false;
}
void leave_kernel() { in_kernel_ = false; }
void pause(bool on) { paused_ = on; }

// ----------------------------------------------------------------------------------------------------------- copies
void read_by_instruction(const void* p, std::size_t bytes, site where) {
  if (in_kernel_) check(reinterpret_cast<std::uintptr_t>(p), bytes, read, place_of_site(where, nullptr));
}

void phase_object(void* barrier, bool initialise, site where) {
  if (!in_kernel_) return;
  const auto p = reinterpret_cast<std::uintptr_t>(barrier);
  const std::uint32_t pc = place_of_site(where, nullptr);
  if (!initialise) return check(p, 8, atomic, pc);
  check(p, 8, write, pc);
  phase_state s;
  s.agent = new_agent();
  d_.phases[barrier] = s;
}

void phase_arrive(void* barrier) {
  if (!in_kernel_) return;
  phase_state& p = d_.phases.at(barrier);
  p.arrived = join(p.arrived, snapshot());
  ++d_.state[d_.self].clock;
}

void phase_ends(void* barrier) {
  if (!instrumented_) return;
  phase_state& p = d_.phases.at(barrier);
  p.complete = join(p.complete, p.arrived);
  p.arrived = nullptr;
  ++p.clock;
}

void phase_wait(void* barrier) {
  if (!in_kernel_) return;
  const phase_state& p = d_.phases.at(barrier);
  thread_state& s = d_.state[d_.self];
  s.acquired = join(s.acquired, p.complete);
  acquire_agent(p.agent, p.clock);
}

void begin_copy(void* to, std::size_t bytes, const void* from, std::size_t source_bytes, void* barrier,
                std::uint64_t group, site where, const char* name) {
  if (!in_kernel_) return;
  int agent = 0;
  if (barrier != nullptr) {
    agent = d_.phases.at(barrier).agent;
  } else {
    const auto [it, added] = d_.copiers.try_emplace(d_.self, 0);
    if (added) it->second = new_agent();
    agent = it->second;
  }
  const std::uint32_t pc = place_of_site(where, name);
  check(reinterpret_cast<std::uintptr_t>(from), source_bytes, read, pc);
  check(reinterpret_cast<std::uintptr_t>(to), bytes, write, pc,
        make_epoch(d_.block, agent, static_cast<clock_type>(group) + 1));
}

void copies_waited(std::uint64_t groups) {
  if (!in_kernel_) return;
  if (const auto it = d_.copiers.find(d_.self); it != d_.copiers.end())
    acquire_agent(it->second, static_cast<clock_type>(groups));
}

void order_lanes(int warp, std::uint32_t mask) {
  if (!instrumented_) return;
  clock_type all[lanes] = {};
  const auto each = [&](auto&& f) {
    for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) f(__builtin_ctz(rest));
  };
  thread_state* const state = d_.state + warp * lanes;
  thread_state& first = state[__builtin_ctz(mask)];
  each([&](int l) {
    for (int m = 0; m < lanes; ++m) all[m] = std::max(all[m], d_.row[warp][l][m]);
    all[l] = std::max(all[l], state[l].clock);
    join_into(first, state[l]);
  });
  each([&](int l) {
    std::copy_n(all, lanes, d_.row[warp][l]);
    ++state[l].clock;
    copy_to(state[l], first);
  });
}

void order_block() {
  if (!instrumented_) return;
  for (int t = 0; t < d_.threads; ++t) {
    d_.base[t] = d_.state[t].clock++;
    if (t > 0) join_into(d_.state[0], d_.state[t]);
  }
  for (int t = 1; t < d_.threads; ++t) copy_to(d_.state[t], d_.state[0]);
}

bool take_report(std::string& text) {
  if (d_.found == finding::none) return false;
  const finding what = d_.found;
  d_.found = finding::none;
  char address[32];
  std::snprintf(address, sizeof address, "%p", reinterpret_cast<void*>(d_.address));
  if (what == finding::race) text = std::string("race on a byte of ") + (d_.in_shared ? "shared" : "global") + " memory";
  if (what == finding::unwritten) text = "shared memory is read before it was written";
  if (what == finding::outside) text = "an access beside the variables of shared memory";
  if (what == finding::misaligned) text = "an access to an address that is not a multiple of its size";
  text += std::string(" at ") + address + ":";
  for (int i = 0; i < (what == finding::race ? 2 : 1); ++i) {
    const bool is_place = (d_.where[i] & place_flag) != 0;
    const char* copy = is_place ? d_.places[d_.where[i] & ~place_flag].name : nullptr;
    const int thread = is_place ? d_.places[d_.where[i] & ~place_flag].thread : thread_of(d_.who[i]);
    text += std::string("\n    ") + d_.kinds[i] + " by " + (copy != nullptr ? std::string(copy) + " of " : "") + "block " +
            coordinates(block_of(d_.who[i]), gridDim) + ", thread " +
            coordinates(static_cast<std::uint64_t>(thread), blockDim) + " at " + place_of(d_.where[i]);
  }
  return true;
}

}  // namespace packkv_simt::detail::race

namespace packkv_simt::detail {

using race::d_;

void add_global(void* p, std::size_t bytes) {
  if (!race::instrumented_ || p == nullptr) return;
  const std::lock_guard<std::mutex> lock(d_.registering);
  race::add_region(reinterpret_cast<std::uintptr_t>(p), bytes, race::content::global);
}

void remove_global(void* p) {
  if (!race::instrumented_ || p == nullptr) return;
  const std::lock_guard<std::mutex> lock(d_.registering);
  const auto it = d_.regions.upper_bound(reinterpret_cast<std::uintptr_t>(p));
  if (it != d_.regions.end() && it->second.begin == reinterpret_cast<std::uintptr_t>(p)) race::remove_region(it->first);
}

void begin_atomic(const void* p, std::size_t bytes) {
  if (!race::in_kernel_) return;
  race::on_access(p, bytes, race::atomic, __builtin_return_address(0));
  race::in_atomic_ = true;
  race::thread_state& s = d_.state[d_.self];
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  if (s.fenced.block == nullptr && d_.variables.empty()) return;
  race::sync_variable& v = d_.variables[address];
  if (v.block != d_.block) {
    v.block = d_.block;
    v.released.block = nullptr;
  }
  s.pending.device = race::join(s.pending.device, v.released.device);
  s.pending.block = race::join(s.pending.block, v.released.block);
  v.released.device = race::join(v.released.device, s.fenced.device);
  v.released.block = race::join(v.released.block, s.fenced.block);
}
void end_atomic() { race::in_atomic_ = false; }

void fence(bool device) {
  if (race::in_kernel_) {
    race::thread_state& s = d_.state[d_.self];
    s.acquired = race::join(s.acquired, s.pending.block);
    if (device) s.acquired = race::join(s.acquired, s.pending.device);
    s.fenced.block = race::snapshot();
    if (device) s.fenced.device = s.fenced.block;
    ++s.clock;
  }
  preempt();
}

}  // namespace packkv_simt::detail

// ------------------------------------------------------------------------------------ what instrumented code calls
// The names are the compilers' (ThreadSanitizer's interface).
#define PACKKV_SIMT_PC __builtin_return_address(0)
namespace {
namespace race = packkv_simt::detail::race;
}
extern "C" {

void __tsan_init() { race::instrumented_ = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_ignore_thread_begin() {}
void __tsan_ignore_thread_end() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Compilers call the aligned functions for accesses of 16 bytes that they take to be a multiple of 8.
#define PACKKV_SIMT_ALIGNMENT(n) ((n) < 8 ? (n) : 8)
#define PACKKV_SIMT_ACCESS(n)                                                                     \
  void __tsan_read##n(void* p) { race::on_access(p, n, race::read, PACKKV_SIMT_PC, PACKKV_SIMT_ALIGNMENT(n)); }   \
  void __tsan_write##n(void* p) { race::on_access(p, n, race::write, PACKKV_SIMT_PC, PACKKV_SIMT_ALIGNMENT(n)); } \
  void __tsan_unaligned_read##n(void* p) { race::on_access(p, n, race::read, PACKKV_SIMT_PC); }   \
  void __tsan_unaligned_write##n(void* p) { race::on_access(p, n, race::write, PACKKV_SIMT_PC); } \
  void __tsan_volatile_read##n(void* p) { race::on_access(p, n, race::read, PACKKV_SIMT_PC); }    \
  void __tsan_volatile_write##n(void* p) { race::on_access(p, n, race::write, PACKKV_SIMT_PC); }  \
  void __tsan_read_write##n(void* p) { race::on_access(p, n, race::write, PACKKV_SIMT_PC); }      \
  void __tsan_unaligned_read_write##n(void* p) { race::on_access(p, n, race::write, PACKKV_SIMT_PC); }
PACKKV_SIMT_ACCESS(1)
PACKKV_SIMT_ACCESS(2)
PACKKV_SIMT_ACCESS(4)
PACKKV_SIMT_ACCESS(8)
PACKKV_SIMT_ACCESS(16)

void __tsan_read_range(void* p, std::size_t n) { race::on_access(p, n, race::read, PACKKV_SIMT_PC); }
void __tsan_write_range(void* p, std::size_t n) { race::on_access(p, n, race::write, PACKKV_SIMT_PC); }
void* __tsan_memcpy(void* to, const void* from, std::size_t n) {
  race::on_access(from, n, race::read, PACKKV_SIMT_PC);
  race::on_access(to, n, race::write, PACKKV_SIMT_PC);
  return std::memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, std::size_t n) {
  race::on_access(from, n, race::read, PACKKV_SIMT_PC);
  race::on_access(to, n, race::write, PACKKV_SIMT_PC);
  return std::memmove(to, from, n);
}
void* __tsan_memset(void* to, int byte, std::size_t n) {
  race::on_access(to, n, race::write, PACKKV_SIMT_PC);
  return std::memset(to, byte, n);
}

// std::atomic and friends: host code.
#define PACKKV_SIMT_ATOMIC(bits, T)                                                                                 \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }           \
  void __tsan_atomic##bits##_store(volatile T* p, T x, int) { __atomic_store_n(p, x, __ATOMIC_SEQ_CST); }           \
  T __tsan_atomic##bits##_exchange(volatile T* p, T x, int) { return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T x, int) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T x, int) { return __atomic_fetch_sub(p, x, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_and(volatile T* p, T x, int) { return __atomic_fetch_and(p, x, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_or(volatile T* p, T x, int) { return __atomic_fetch_or(p, x, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##bits##_fetch_xor(volatile T* p, T x, int) { return __atomic_fetch_xor(p, x, __ATOMIC_SEQ_CST); } \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* old, T x, int, int) {                         \
    return __atomic_compare_exchange_n(p, old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                       \
  }                                                                                                                 \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* old, T x, int, int) {                           \
    return __atomic_compare_exchange_n(p, old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                       \
  }                                                                                                                 \
  T __tsan_atomic##bits##_compare_exchange_val(volatile T* p, T old, T x, int, int) {                               \
    __atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                             \
    return old;                                                                                                     \
  }
PACKKV_SIMT_ATOMIC(8, std::uint8_t)
PACKKV_SIMT_ATOMIC(16, std::uint16_t)
PACKKV_SIMT_ATOMIC(32, std::uint32_t)
PACKKV_SIMT_ATOMIC(64, std::uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"

// SPDX-License-Identifier: Apache-2.0
#include "async.hpp"

#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "race.hpp"
#include "scheduler.hpp"

namespace packkv_simt::detail {
namespace {

constexpr std::int64_t most_expected_bytes = (1 << 20) - 1;  // what an mbarrier can count

std::string text_of(site s) { return std::string(s.file) + ":" + std::to_string(s.line); }

/// A copy that is under way or has landed.
struct copy {
  unsigned char* to;
  const unsigned char* from;
  unsigned bytes, source_bytes;
  site where;
  std::uint64_t* barrier;  // null: cp.async of `thread`
  int thread;
  std::uint64_t group;  // number of the phase, or of the thread's group
  bool landed = false;
};

struct barrier_state {
  unsigned arrivals, missing;
  std::int64_t bytes = 0;  // announced and not copied (less than 0: copied and not yet announced)
  std::uint64_t phase = 0;
  std::uint64_t waited = 0;  // phases whose end somebody has waited for
  int initialiser;
  bool fenced = false;
  site where;
  std::vector<int> sleepers;
};

struct thread_copies {
  std::uint64_t committed = 0, waited = 0;
  bool open = false;  // copies since the last commit
};

struct {
  std::map<std::uint64_t*, barrier_state> barriers;
  std::map<int, thread_copies> threads;
  std::deque<copy> copies;  // of this block, in order of issue; those that were waited for have left
  std::map<int, std::pair<std::uint64_t*, unsigned>> sleeping;  // thread: barrier and parity
} a_;

void require_kernel(const char* what, site where) {
  if (running() < 0) fail(std::string(what) + " by the host", where);
}

bool contains(const memory_range& r, const void* p, std::size_t bytes) {
  const auto* begin = static_cast<const unsigned char*>(p);
  return begin >= r.begin && bytes <= r.bytes && static_cast<std::size_t>(begin - r.begin) <= r.bytes - bytes;
}

void check_shared(const void* p, std::size_t bytes, std::size_t alignment, const std::string& what, site where) {
  if (reinterpret_cast<std::uintptr_t>(p) % alignment != 0)
    fail(what + ": the address in shared memory is not a multiple of " + std::to_string(alignment), where);
  bool inside = contains(dynamic_range(), p, bytes);
  for (const memory_range& r : shared_variables()) inside = inside || contains(r, p, bytes);
#if defined(PACKKV_SIMT_ASAN)  // clang counts a variable's red zone as its own
  inside = inside && __asan_region_is_poisoned(const_cast<void*>(p), bytes) == nullptr;
#endif
  if (!inside) fail(what + ": " + std::to_string(bytes) + " bytes that do not lie within one variable of shared memory", where);
}

/// The value that an initialised object has in memory, so that a stray write to it is noticed.
std::uint64_t mark_of(const std::uint64_t* state) { return reinterpret_cast<std::uintptr_t>(state) * 0x9e3779b97f4a7c15ull | 1; }

barrier_state& barrier_at(std::uint64_t* state, const char* what, site where) {
  require_kernel(what, where);
  const auto found = a_.barriers.find(state);
  if (found == a_.barriers.end()) fail(std::string(what) + ": the mbarrier has not been initialised", where);
  if (*state != mark_of(state)) fail(std::string(what) + ": the mbarrier has been overwritten", where);
  return found->second;
}

void end_phase_if_complete(std::uint64_t* state, barrier_state& b) {
  if (b.missing != 0 || b.bytes != 0) return;
  b.missing = b.arrivals;
  ++b.phase;
  race::phase_ends(state);
  for (const int thread : b.sleepers) wake(thread);
  b.sleepers.clear();
}

void land(copy& c) {
  c.landed = true;
  if (c.source_bytes > 0) std::memcpy(c.to, c.from, c.source_bytes);  // from nowhere, otherwise
  std::memset(c.to + c.source_bytes, 0, c.bytes - c.source_bytes);
  if (c.barrier == nullptr) return;
  barrier_state& b = a_.barriers.at(c.barrier);
  b.bytes -= c.bytes;
  end_phase_if_complete(c.barrier, b);
}

void start(copy c, const char* what) {
  race::begin_copy(c.to, c.bytes, c.from, c.source_bytes, c.barrier, c.group, c.where, what);
  a_.copies.push_back(c);
  const order kind = get_schedule().kind;
  if (kind == order::in_order || (kind == order::random && draw() % 4 == 0))
    land(a_.copies.back());
  else
    std::memset(c.to, garbage(), c.bytes);
  preempt();
}

/// Forgets copies that a wait has covered; they land first if they have not.
template <class Covered>
void finish(Covered&& covered) {
  for (std::size_t i = 0; i < a_.copies.size();) {
    if (!covered(a_.copies[i])) {
      ++i;
      continue;
    }
    if (!a_.copies[i].landed) land(a_.copies[i]);
    a_.copies.erase(a_.copies.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

}  // namespace

void read_shared(const void* p, std::size_t bytes, std::size_t alignment, const char* what, site where) {
  require_kernel(what, where);
  check_shared(p, bytes, alignment, what, where);
  race::read_by_instruction(p, bytes, where);
}

void barrier_init(std::uint64_t* state, unsigned arrivals, site where) {
  require_kernel("mbarrier.init", where);
  check_shared(state, 8, 8, "mbarrier.init", where);
  if (arrivals == 0 || arrivals > most_expected_bytes) fail("mbarrier.init: 1 to 2^20 - 1 arrivals", where);
  if (a_.barriers.count(state) != 0) fail("mbarrier.init: the mbarrier is in use already", where);
  race::phase_object(state, true, where);
  *state = mark_of(state);
  barrier_state b{};
  b.arrivals = b.missing = arrivals;
  b.initialiser = running();
  b.where = where;
  a_.barriers.emplace(state, b);
}

void fence_barrier_init(site where) {
  require_kernel("fence.mbarrier_init", where);
  for (auto& [state, b] : a_.barriers) b.fenced = b.fenced || b.initialiser == running();
}

void barrier_arrive(std::uint64_t* state, unsigned expected_bytes, site where) {
  barrier_state& b = barrier_at(state, "mbarrier.arrive", where);
  race::phase_object(state, false, where);
  if (b.missing == 0) fail("mbarrier.arrive: more threads than the phase expects", where);
  if (b.bytes + std::int64_t{expected_bytes} > most_expected_bytes) fail("mbarrier.arrive: more than 2^20 - 1 bytes under way", where);
  race::phase_arrive(state);
  b.bytes += expected_bytes;
  --b.missing;
  end_phase_if_complete(state, b);
  preempt();
}

void barrier_wait(std::uint64_t* state, unsigned parity, site where) {
  preempt();
  for (;;) {
    barrier_state& b = barrier_at(state, "mbarrier.try_wait", where);
    race::phase_object(state, false, where);
    if (b.phase % 2 != parity % 2) {
      b.waited = b.phase;
      race::phase_wait(state);
      finish([&](const copy& c) { return c.barrier == state && c.group < b.phase; });
      return;
    }
    b.sleepers.push_back(running());
    a_.sleeping[running()] = {state, parity % 2};
    sleep(where);
    a_.sleeping.erase(running());
  }
}

void bulk_copy(void* to, const void* from, unsigned bytes, std::uint64_t* state, site where) {
  barrier_state& b = barrier_at(state, "cp.async.bulk", where);
  if (!b.fenced) fail("cp.async.bulk: no fence_barrier_init() by the thread that initialised the mbarrier at " + text_of(b.where), where);
  if (bytes == 0 || bytes % 16 != 0) fail("cp.async.bulk: the size is not a multiple of 16, or 0", where);
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) fail("cp.async.bulk: the source is not a multiple of 16", where);
  check_shared(to, bytes, 16, "cp.async.bulk", where);
  race::phase_object(state, false, where);
  start({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, bytes, where, state, running(), b.phase}, "a bulk copy");
}

void copy_async(void* to, const void* from, unsigned bytes, unsigned source_bytes, site where) {
  require_kernel("cp.async", where);
  check_shared(to, bytes, bytes, "cp.async", where);
  if (source_bytes != 0 && reinterpret_cast<std::uintptr_t>(from) % bytes != 0) fail("cp.async: the source is not a multiple of " + std::to_string(bytes), where);
  thread_copies& t = a_.threads[running()];
  t.open = true;
  start({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, source_bytes, where, nullptr, running(), t.committed}, "cp.async");
}

void commit_copies(site where) {
  require_kernel("cp.async.commit_group", where);
  thread_copies& t = a_.threads[running()];
  ++t.committed;
  t.open = false;
}

void wait_copies(unsigned pending, site where) {
  require_kernel("cp.async.wait_group", where);
  preempt();
  thread_copies& t = a_.threads[running()];
  if (t.committed <= pending) return;
  const std::uint64_t end = t.committed - pending;
  if (end <= t.waited) return;
  t.waited = end;
  const int self = running();
  finish([&](const copy& c) { return c.barrier == nullptr && c.thread == self && c.group < end; });
  race::copies_waited(end);
}

namespace async {

void begin_block() {
  a_.barriers.clear();
  a_.threads.clear();
  a_.copies.clear();
  a_.sleeping.clear();
}

bool land_one() {
  std::vector<std::size_t> under_way;
  for (std::size_t i = 0; i < a_.copies.size(); ++i)
    if (!a_.copies[i].landed) under_way.push_back(i);
  if (under_way.empty()) return false;
  std::size_t which = 0;
  if (get_schedule().kind == order::ahead) which = under_way.size() - 1;
  if (get_schedule().kind == order::random) which = draw() % under_way.size();
  land(a_.copies[under_way[which]]);
  return true;
}

void perhaps_land() {
  if (get_schedule().kind == order::random && !a_.copies.empty() && draw() % 4 == 0) land_one();
}

void end_thread() {
  const int self = running();
  for (const copy& c : a_.copies)
    if (c.barrier == nullptr && c.thread == self) fail("a thread ends without having waited for its cp.async", c.where);
}

std::string end_block() {
  for (const copy& c : a_.copies) {
    // A copy leaves the list when somebody waits for its phase.
    return "a block ends and nobody has waited for " + std::string(c.barrier != nullptr ? "the bulk copy" : "the cp.async") + " of thread " +
           std::to_string(c.thread) + ", at " + text_of(c.where);
  }
  return "";
}

std::string describe(int thread) {
  const auto found = a_.sleeping.find(thread);
  if (found == a_.sleeping.end()) return "";
  const barrier_state& b = a_.barriers.at(found->second.first);
  return "phase of parity " + std::to_string(found->second.second) + " of the mbarrier initialised at " + text_of(b.where) + ", which is in phase " +
         std::to_string(b.phase) + ": " + std::to_string(b.missing) + " arrivals and " + std::to_string(b.bytes) + " bytes are missing";
}

}  // namespace async
}  // namespace packkv_simt::detail

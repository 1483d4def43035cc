// Reading ahead into the CPU's caches: while the GPU works the host's memory is idle, and what a coming layer will
// probably ask for can be in cache, in part, when it rings.
//
// Each worker reads the rows that it will itself compute first, so they land in its own L2 and the L3 next to it. The
// doorbell is looked at after every row (some 3 KB): a ring is answered a fraction of a microsecond later. A wrong
// guess costs reads that nobody else wanted. Only what the table has is read: nothing that is still coming.
#include <vector>

#include "bell.h"

namespace coldstream {
namespace {

constexpr int64_t kWorthARound = 256 << 10;

int32_t advice(const Bell& bell, int64_t index) { return __atomic_load_n(bell.hint + index, __ATOMIC_RELAXED); }

bool changed(const Bell& bell) {
  for (int64_t i = 0; i < bell.guesses; ++i)
    if (advice(bell, i) != bell.prefetched[kKept + i]) return true;
  return false;
}

bool wanted_elsewhere(const void* context) {
  const Bell& bell = *static_cast<const Bell*>(context);
  const int32_t* control = bell.control;
  return __atomic_load_n(control + kRung, __ATOMIC_RELAXED) != __atomic_load_n(control + kAnswered, __ATOMIC_RELAXED) ||
         __atomic_load_n(control + kStop, __ATOMIC_RELAXED) != 0 || changed(bell);
}

Weight cut(const Weight& whole, int64_t base, const int64_t* offsets, int64_t row, int64_t column) {
  Weight weight = whole;
  weight.packed = reinterpret_cast<const uint8_t*>(base + offsets[0]) + row * whole.stride() + whole.bytes(column);
  weight.scale =
      reinterpret_cast<const uint16_t*>(base + offsets[1]) + row * whole.scale_stride() + column / whole.group;
  weight.n -= row;
  weight.k -= column;
  weight.pitch = whole.k;
  return weight;
}

}  // namespace

Part part_of(const BellLayer& stored, int64_t base, int64_t first) {
  return {cut(stored.gate, base, stored.offsets, first, 0), cut(stored.up, base, stored.offsets + 2, first, 0),
          cut(stored.down, base, stored.offsets + 4, 0, first)};
}

bool prefetch(const Bell& bell) {
  if (!changed(bell)) return false;
  std::vector<Product> first, then;
  for (int64_t i = 0; i < bell.guesses; ++i) {
    const int64_t word = advice(bell, i), index = word - 1;
    bell.prefetched[kKept + i] = word;
    if (index < 0 || index >= bell.layers * bell.experts) continue;
    // Once: whoever owns the table may take the expert out meanwhile. Its slot stays memory of ours.
    const int64_t base = __atomic_load_n(bell.addresses + index, __ATOMIC_RELAXED);
    if (!base) continue;
    const BellLayer& stored = bell.stored[index / bell.experts];
    if (bell.gpu_rows >= stored.gate.n) continue;
    const Part part = part_of(stored, base, bell.gpu_rows);
    for (const Weight& weight : {part.gate, part.up}) first.push_back({weight, nullptr, 0, 1, nullptr, 0, {}});
    then.push_back({part.down, nullptr, 0, 1, nullptr, 0, {}});
  }
  if (first.empty()) return false;
  const bool exact = bell.exact != 0;
  int64_t bytes = touch(first.data(), int(first.size()), exact, bell.prefetch_bytes, wanted_elsewhere, &bell);
  const int64_t left = bell.prefetch_bytes - bytes;
  if (left >= kWorthARound && !wanted_elsewhere(&bell))
    bytes += touch(then.data(), int(then.size()), exact, left, wanted_elsewhere, &bell);
  bell.prefetched[kHints] += 1;
  bell.prefetched[kBytes] += bytes;
  return true;
}

void count_foreseen(const Bell& bell) {
  const int32_t* request = bell.request;
  const int64_t pairs = int64_t(request[1]) * request[2], layer = request[0];
  for (int64_t pair = 0; pair < pairs; ++pair) {
    if (request[4 + pairs + pair] >= bell.stored[layer].gate.n) continue;
    const int64_t word = 1 + layer * bell.experts + request[4 + pair];
    bool foreseen = false;
    for (int64_t i = 0; i < bell.guesses; ++i) foreseen |= bell.prefetched[kKept + i] == word;
    bell.prefetched[kAsked] += 1;
    bell.prefetched[kForeseen] += foreseen;
  }
}

}  // namespace coldstream

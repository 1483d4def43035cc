// The doorbell between a decode step on a GPU and the CPU; see bell.cpp.
#pragma once
#include "mlp.h"

namespace coldstream {

constexpr int64_t kRung = 0, kAnswered = 32, kStop = 64;  // words of Bell::control, a cache line of each side apart

enum BellState : int32_t { kIdle = 0, kMissing = 1, kStopped = 2 };

// How the experts of one layer are stored: their shapes, and where from an expert's first byte on the packed words and
// scales of gate, up and down lie.
struct BellLayer {
  Weight gate, up, down;
  int64_t offsets[6];
};

// request: layer, tokens, k, 0, then for every (token, rank) the expert, then the first intermediate feature of it that
// is the host's (all of them and none: 0 and `inter`).
struct Bell {
  int32_t* control;
  const int32_t* request;
  const float* scores;  // [T, k]
  const float* x;       // [T, H]
  float* result;        // [T, H]
  const int64_t* addresses;  // [layers, experts]: where an expert's first byte lies in host memory, or 0
  int64_t layers, experts, pairs;  // pairs: room for T * k
  const BellLayer* stored;         // [layers]
  int32_t scales_input, exact;
  int32_t keep_awake;  // microseconds that the workers stay awake beyond a call: waking them costs as much as a bell

  // Reading ahead into the CPU's caches while the GPU works. `hint`: 1 + layer * experts + expert for each of the
  // `guesses` experts of a coming layer that are probably chosen and not the GPU's, 0 for none. The step rewrites it
  // at will: it is advice.
  const int32_t* hint;
  int64_t guesses;
  int64_t prefetch_bytes;  // per hint, 0: none
  int64_t gpu_rows;        // from which intermediate feature on an expert is the host's, most likely
  int64_t* prefetched;     // [kKept + guesses], the host's own: the words below, then the hint that was last followed
};

enum Prefetched : int64_t { kHints = 0, kBytes = 1, kAsked = 2, kForeseen = 3, kKept = 4 };

// While nothing is asked: follows a hint that is new, until the doorbell rings or another hint comes. False if there
// was nothing to do.
bool prefetch(const Bell& bell);

// An expert of one layer that lies at `base`: its weights from intermediate feature `first` on.
struct Part {
  Weight gate, up, down;
};
Part part_of(const BellLayer& stored, int64_t base, int64_t first);

// Counts which of the open request's experts had been foreseen.
void count_foreseen(const Bell& bell);

}  // namespace coldstream

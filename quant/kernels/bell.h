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
};

}  // namespace coldstream

// XXH64 of many pieces of memory, by its specification (seed 0): reads as fast as memory gives on any processor.
#include <cstring>

#include "kernels.h"
#include "product.h"

namespace coldstream {
namespace {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87u, kPrime2 = 0xC2B2AE3D27D4EB4Fu, kPrime3 = 0x165667B19E3779F9u,
                   kPrime4 = 0x85EBCA77C2B2AE63u, kPrime5 = 0x27D4EB2F165667C5u;

uint64_t rotated(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

template <typename T>
T little(const uint8_t* at) {  // every processor that is supported is little-endian
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

uint64_t mixed(uint64_t lane, uint64_t input) { return rotated(lane + input * kPrime2, 31) * kPrime1; }

uint64_t merged(uint64_t sum, uint64_t lane) { return (sum ^ mixed(0, lane)) * kPrime1 + kPrime4; }

uint64_t xxh64(const uint8_t* at, int64_t size) {
  const uint8_t* const end = at + size;
  uint64_t sum = kPrime5;
  if (size >= 32) {
    uint64_t lane[4] = {kPrime1 + kPrime2, kPrime2, 0, 0 - kPrime1};
    for (; end - at >= 32; at += 32)
      for (int i = 0; i < 4; ++i) lane[i] = mixed(lane[i], little<uint64_t>(at + 8 * i));
    sum = rotated(lane[0], 1) + rotated(lane[1], 7) + rotated(lane[2], 12) + rotated(lane[3], 18);
    for (uint64_t one : lane) sum = merged(sum, one);
  }
  sum += uint64_t(size);
  for (; end - at >= 8; at += 8) sum = rotated(sum ^ mixed(0, little<uint64_t>(at)), 27) * kPrime1 + kPrime4;
  if (end - at >= 4) {
    sum = rotated(sum ^ little<uint32_t>(at) * kPrime1, 23) * kPrime2 + kPrime3;
    at += 4;
  }
  for (; at < end; ++at) sum = rotated(sum ^ *at * kPrime5, 11) * kPrime1;
  sum = (sum ^ (sum >> 33)) * kPrime2;
  sum = (sum ^ (sum >> 29)) * kPrime3;
  return sum ^ (sum >> 32);
}

}  // namespace
}  // namespace coldstream

// One sum for each of `count` pieces, by the calling thread alone.
COLDSTREAM_API int32_t cs_checksums(const uint8_t* const* pieces, const int64_t* sizes, int64_t count, uint64_t* sums) {
  for (int64_t i = 0; i < count; ++i) {
    if (sizes[i] < 0) return coldstream::kBadArgument;
    sums[i] = coldstream::xxh64(pieces[i], sizes[i]);
  }
  return coldstream::kOk;
}

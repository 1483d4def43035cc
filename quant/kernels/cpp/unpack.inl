// Packed values as vectors of kBytes: every width below 8 bits comes out as 4 bits do, so that one product serves all.
// A `byte` is one of two values, wherever they lie; packed_bytes says how many of them there are in memory.

INLINE vb low_nibbles(vb packed) { return packed & 0x0f; }
INLINE vb high_nibbles(vb packed) { return (vb)((vu)packed >> 4) & 0x0f; }

template <int kBits>
INLINE int64_t packed_bytes(int64_t bytes) {
  return kBits == 8 ? bytes : bytes * kBits / 4;
}

// The even and the odd values of kBytes bytes, or of the `count` that are left.
template <int kBits>
INLINE void even_and_odd(const uint8_t* from, int64_t count, vb& even, vb& odd) {
  if constexpr (kBits == 4) {
    const vb packed = kept(count < kBytes ? load_part(from, count) : load<vb>(from));
    even = low_nibbles(packed), odd = high_nibbles(packed);
  } else {
    const vb spread = spread_pairs<kBits>(from, count < kBytes ? count : kBytes);
    even = even_of<kBits>(spread), odd = odd_of<kBits>(spread);
  }
}

// The same as one vector, packed as 4 bits are; of 8 bits, the bytes themselves.
template <int kBits>
INLINE vb as_stored(const uint8_t* from, int64_t count) {
  if constexpr (kBits >= 4) {
    return count < kBytes ? load_part(from, count) : load<vb>(from);
  } else {
    vb even, odd;
    even_and_odd<kBits>(from, count, even, odd);
    return even | (vb)((vu)odd << 4);
  }
}

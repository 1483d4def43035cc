// One token against rows in 2 bits where vectors have 64 bytes: nothing is spread out.
//
// A byte holds four values, four planes of a vector: masked where they are they count for 1, 4, 16 or 64 times as much. One
// shift by 4 brings two planes to the places of the other two, and what lies at the upper places is summed up first and its
// sum shifted back, which is exact. Activations lie in the same planes. Sums are those of gemv_across in its order: a vector
// here is two of its steps.

// Sums of the 256 values at `from`, or of the `count` bytes that are left, over what shares a lane: 16 each.
INLINE vi plane_dots(const uint8_t* from, int64_t count, const int8_t* x) {
  const vb low = kept(count < kBytes ? load_part(from, count) : load<vb>(from)), high = (vb)((vu)low >> 4);
  const vi upper = dot4(dot4(vi{}, low & 0x0c, load<vb>(x + 64)), high & 0x0c, load<vb>(x + 192));
  return dot4(dot4(upper >> 2, low & 0x03, load<vb>(x)), high & 0x03, load<vb>(x + 128));
}

// What four_steps and join_quads are to gemv_across: the sums of a run, a lane for each of kLanes steps.
template <int kGroup, int kSums, int kSpans>
INLINE void join_planes(const vi (&sums)[kSums], vi (&dots)[kSpans]);

template <int kGroup>
static void gemv_planes(const Weight& w, int64_t row0, int64_t row1, const Activations& a, float* y) {
  constexpr int kSpans = Form<2, kGroup>::kSpans, kRun = kLanes * kSpans;  // as gemv_across has them
  constexpr int kSums = kGroup == 32 ? 2 : 1;                               // of four vectors
  constexpr int kFours = kRun * kGroup / (4 * 256);
  const int64_t here = prefetch_ahead[0], groups = w.groups(), bytes = w.row_bytes();
  for (int64_t row = row0; row < row1; ++row) {
    const uint8_t* from = w.packed + row * w.stride();
    const uint16_t* scale = w.scale + row * w.scale_stride();
    float total = 0;
    vi sums[kFours * kSums];
    auto take = [&](int i, const vi (&dots)[4]) __attribute__((always_inline)) {
      const vi first = add_pairs<true>(dots[0], dots[1]), second = add_pairs<true>(dots[2], dots[3]);
      if constexpr (kSums == 2) sums[2 * i] = first, sums[2 * i + 1] = second;
      else sums[i] = add_pairs<true>(first, second);
    };
    auto finish = [&](int64_t g, const uint16_t* its_scale) __attribute__((always_inline)) {
      vi dots[kSpans];
      join_planes<kGroup>(sums, dots);
      vf weights[kSpans];
      scales_by_step<kSpans>(its_scale, weights);
      total += scaled_sum<2>(dots, weights, a.sum + g, a.scale + g);
    };
    int64_t g = 0, byte = 0;
    const int8_t* x = a.q;
    for (; g + kRun <= groups; g += kRun) {
#pragma GCC unroll 1
      for (int i = 0; i < kFours; ++i, byte += 4 * kBytes, x += 16 * kBytes) {
        vi dots[4];
        for (int v = 0; v < 4; ++v) {
          __builtin_prefetch(from + byte + v * kBytes + here, 0, 2);
          dots[v] = plane_dots(from + byte + v * kBytes, kBytes, x + v * 4 * kBytes);
        }
        take(i, dots);
      }
      finish(g, scale + g);
    }
    if (g < groups) {
      for (int i = 0; i < kFours; ++i) {
        vi dots[4] = {};
        for (int v = 0; v < 4 && byte < bytes; ++v, byte += kBytes, x += 4 * kBytes)
          dots[v] = plane_dots(from + byte, bytes - byte, x);
        take(i, dots);
      }
      uint16_t some[kRun] = {};
      __builtin_memcpy(some, scale + g, size_t(groups - g) * 2);
      finish(g, some);
    }
    y[row] = total;
  }
}

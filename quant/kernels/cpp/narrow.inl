// What 128-bit vectors need beyond vector.inl: a vector never spans two groups, so nothing is picked.

INLINE vf pick_float(const float* one, vi) { return splat(*one); }
INLINE vf pick_bf16(uint64_t one, vi) { return splat(bf16_to_float(uint16_t(one))); }

INLINE void transpose(vi (&m)[kLanes]) {
  vi old[kLanes];
  for (int i = 0; i < kLanes; ++i) old[i] = m[i];
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) m[i][j] = old[j][i];
}

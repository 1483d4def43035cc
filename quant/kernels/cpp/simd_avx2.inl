// What 256-bit vectors need beyond vector.inl, shared by avx2 and avxvnni.

// Lane i of the result is element lanes[i] of four floats, or of four bf16.
INLINE vf pick(__m128 four, vi lanes) {
  return (vf)_mm256_permutevar8x32_ps(_mm256_set_m128(four, four), (__m256i)lanes);
}
INLINE vf pick_float(const float* four, vi lanes) { return pick(_mm_loadu_ps(four), lanes); }
INLINE vf pick_bf16(uint64_t four, vi lanes) {
  __m128i wide = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(int64_t(four))), 16);
  return pick(_mm_castsi128_ps(wide), lanes);
}

INLINE void transpose(vi (&m)[kLanes]) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32((__m256i)m[i], (__m256i)m[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32((__m256i)m[i], (__m256i)m[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    m[i] = (vi)_mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
    m[i + 4] = (vi)_mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
  }
}

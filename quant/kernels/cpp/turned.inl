// A weight of 4 or 8 bits the other way round, with the processor's int8 dot products: four rows of a span of columns are
// interleaved, and rows of x, times the scales of the group, become whole numbers of 16 bits. What is rounded is finer than
// bf16, and sums are exact, in any order.

// Rows [row, row + 4) of one span, column by column; rows from `last` on are zero.
static void pack_span(const Weight& w, int64_t row, int64_t last, int64_t column, uint32_t* to) {
  __m512i rows[4];
  for (int i = 0; i < 4; ++i) {
    if (row + i >= last) {
      rows[i] = _mm512_setzero_si512();
      continue;
    }
    const uint8_t* from = w.packed + (row + i) * w.stride() + w.bytes(column);
    if (w.kind == kInt8) {
      rows[i] = _mm512_loadu_si512(from);
    } else {
      const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
      rows[i] = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi16(0x0f0f));
    }
  }
  interleave_rows(rows, to);
}

static void turned(const Weight& w, int64_t row0, int64_t row1, const float* x, int64_t ldx, int tokens, float* y,
                   int64_t ldy) {
  constexpr int kTokens = 32;
  const int64_t rows = row1 - row0;
  if ((w.kind != kInt4 && w.kind != kInt8) || w.group < kSpan || rows > kMostWidth)
    return dense_turned(w, row0, row1, x, ldx, tokens, y, ldy);
  alignas(64) uint32_t panel[kMostWidth / 4 * kSpan];
  alignas(64) Halves<kMostWidth> factors[kTokens];
  alignas(64) float sums[kTokens][kSpan], row[kMostWidth];
  float scale[kMostWidth], worth[kTokens];
  int32_t less[kTokens];
  const int words = int((rows + 3) / 4);
  for (; tokens > 0; tokens -= kTokens, x += kTokens * ldx, y += kTokens * ldy) {
    const int count = tokens < kTokens ? tokens : kTokens;
    for (int64_t column = 0; column < w.k; column += kSpan) {
      if (column % w.group == 0) {
        for (int64_t r = 0; r < rows; ++r)
          scale[r] = bf16_to_float(w.scale[(row0 + r) * w.scale_stride() + column / w.group]);
        for (int t = 0; t < count; ++t) {
          for (int64_t r = 0; r < rows; ++r) row[r] = x[t * ldx + r] * scale[r];
          worth[t] = split_query(row, rows, factors[t], less[t]);
          if (w.kind == kInt4) less[t] /= 16;  // it is of numbers from -128, and these are from -8
        }
      }
      for (int64_t r = 0; r < words; ++r) pack_span(w, row0 + 4 * r, row1, column, panel + r * kSpan);
      byte_rows<kByteRows, false>(panel, kSpan, factors, words, count, less, worth, (const char*)panel, sums[0], kSpan);
      for (int t = 0; t < count; ++t) {
        order_span(sums[t]);
        __builtin_memcpy(y + t * ldy + column, sums[t], sizeof sums[t]);
      }
    }
  }
}

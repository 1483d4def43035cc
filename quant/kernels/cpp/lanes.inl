// What the instruction sets' own shuffles add up to: sums in a fixed order, spread tuples, whole transpositions.

// Vectors that come one by one, added up in runs of kLanes: neighbours first, then neighbouring pairs, as
// sum_neighbours adds up the lanes of one vector. Runs follow each other.
template <int kCount>
struct RunSums {
  static constexpr int kLevels = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;
  vf pending[kLevels][kCount];
  vf total[kCount] = {};
  int count = 0;

  INLINE_MEMBER void add(vf (&value)[kCount]) {
    int level = 0;
    for (int bits = count; bits & 1; bits >>= 1, ++level)
      for (int i = 0; i < kCount; ++i) value[i] = pending[level][i] + value[i];
    if (level < kLevels) {
      for (int i = 0; i < kCount; ++i) pending[level][i] = value[i];
      ++count;
    } else {
      for (int i = 0; i < kCount; ++i) total[i] += value[i];
      count = 0;
    }
  }

  // After the last one: a run that is not full.
  INLINE_MEMBER void finish() {
    if (!count) return;
    vf rest[kCount] = {};
    for (int level = 0; level < kLevels; ++level)
      if (count >> level & 1)
        for (int i = 0; i < kCount; ++i) rest[i] = pending[level][i] + rest[i];
    for (int i = 0; i < kCount; ++i) total[i] += rest[i];
  }
};

// Element `part` of each of kLanes adjacent tuples of kSpans.
template <int kSpans, class V, class Element>
INLINE void by_step(const Element* from, int part, V& to) {
  if constexpr (kSpans == 1) to = load<V>(from);
  else to = (V)every<kSpans>((const char*)from, part);
}

// The same of bf16 scales, all parts, as floats.
template <int kSpans>
INLINE void scales_by_step(const uint16_t* from, vf (&to)[kSpans]) {
  if constexpr (kSpans == 1) {
    to[0] = widen(load<vhalf>(from));
  } else {
    for (int part = 0; part < kSpans; part += 2) {
      vi pairs;
      by_step<kSpans / 2>((const int32_t*)from, part / 2, pairs);
      to[part] = (vf)(pairs << 16);
      to[part + 1] = (vf)((vu)pairs & 0xffff0000u);
    }
  }
}

// kLanes rows of kLanes words to kLanes words of kLanes rows.
INLINE void transpose(vi (&m)[kLanes]) {
  constexpr int kQuarters = kLanes / 4;
  vi quarters[kQuarters][4];
  for (int part = 0; part < 4; ++part) {
    vi rows[kQuarters], parts[kQuarters];
    for (int i = 0; i < kQuarters; ++i) rows[i] = m[part + 4 * i];
    part_rows(rows, parts);
    for (int i = 0; i < kQuarters; ++i) quarters[i][part] = parts[i];
  }
  for (int s = 0; s < kQuarters; ++s) {
    transpose_four(quarters[s]);
    for (int i = 0; i < 4; ++i) m[4 * s + i] = quarters[s][i];
  }
}

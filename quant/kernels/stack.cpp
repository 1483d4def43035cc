// A run of decoder layers for one token, attention and MoE in turn, without Python between them.
#include <cstring>

#include "attention.h"
#include "moe.h"
#include "product.h"

COLDSTREAM_API int32_t cs_attention(const coldstream::AttentionBlock* block, const float* x, int64_t ldx,
                                    int64_t tokens, int64_t position, const float* cosine, const float* sine,
                                    const coldstream::KvCache* cache, float* out, int64_t ldout, int32_t exact);
COLDSTREAM_API int32_t cs_moe(const coldstream::MoeBlock* block, const float* x, int64_t ldx, int64_t tokens,
                              float* out, int64_t ldout, const coldstream::Routing* routing, int32_t exact,
                              int32_t* complete);

namespace coldstream {

// One decoder layer, and where what its router finds goes.
struct Layer {
  const AttentionBlock* attention;
  const MoeBlock* moe;
  KvCache cache;
  Routing routing;
};

}  // namespace coldstream

// x [H] through layers [first, count), in place. Stops where a chosen expert is not resident: x is then that layer's
// input to the MoE block, and *stopped the layer; otherwise *stopped is count.
COLDSTREAM_API int32_t cs_stack(const coldstream::Layer* layers, int64_t first, int64_t count, float* x,
                                int64_t position, const float* cosine, const float* sine, int32_t exact,
                                int64_t* stopped) {
  using namespace coldstream;
  return guarded([&]() {
    std::vector<float> attended(size_t(count > first ? layers[first].attention->q.k : 0));
    const int64_t hidden = int64_t(attended.size());
    for (int64_t i = first; i < count; ++i) {
      const Layer& layer = layers[i];
      int32_t complete = 0;
      if (cs_attention(layer.attention, x, hidden, 1, position, cosine, sine, &layer.cache, attended.data(), hidden,
                       exact) != kOk)
        throw std::bad_alloc();
      if (cs_moe(layer.moe, attended.data(), hidden, 1, x, hidden, &layer.routing, exact, &complete) != kOk)
        throw std::bad_alloc();
      if (!complete) {
        std::memcpy(x, attended.data(), size_t(hidden) * 4);
        *stopped = i;
        return;
      }
    }
    *stopped = count;
  });
}

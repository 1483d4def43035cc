// A run of decoder layers for one token, attention and MoE in turn, without Python between them. Where an expert is
// not there yet the run looks ahead, computes what it can and waits; it returns only for what the caller must decide.
#include <algorithm>
#include <cstring>

#include "attention.h"
#include "lookahead.h"
#include "moe.h"
#include "product.h"

namespace coldstream {

// One decoder layer, where what its router finds goes, and its place among the MoE layers (-1: it is none).
struct Layer {
  const AttentionBlock* attention;
  const MoeBlock* moe;
  Routing routing;
  int64_t moe_index;
};

// Where in a token a run goes on: before its first guess, at a layer's start, or at its chosen experts.
enum Stage : int32_t { kToken = 0, kLayer = 1, kExperts = 2 };

// Why a run returned: bits.
enum Reason : int32_t { kMissing = 1, kWanted = 2, kStillWaiting = 4 };

struct Run {
  float* x;  // [H], in place; at kExperts the block's sum so far
  const float *cosine, *sine;
  const KvPool* pool;
  const int32_t* pages;  // [count, blocks]: the sequence's tables, layer by layer
  int64_t blocks, position, count;
  int64_t layer;    // in and out: where to go on
  int32_t stage;    // in and out
  int32_t exact;
  int32_t reason;   // out
  int32_t wanted_count;      // out
  int32_t* wanted;           // out: [layer, expert, 1 if it is for the next token], room for `wanted_room` of them
  const int64_t* layer_of;   // [L]: decoder layer of each MoE layer
  const Lookahead* lookahead;  // or null
  uint64_t* late;            // [count]: ranks of chosen experts that were not ready when their layer asked
  uint64_t done;             // ranks of the current layer's experts that are in x
  double patience;           // seconds to wait for an expert before returning
  int32_t wanted_room;
  float eps;
  const float* norm;  // [H] of the model's last norm, or null: then x is all there is at the end
  Weight head;        // [V, H]
  float* normed;      // [H]
  float* logits;      // [V]
  Weight embeddings;  // [V, H] plain, or k = 0
  int64_t guess_token_from;  // the first layer that guesses the next token while it waits; `count` for none
  int32_t guessed_token;     // in and out: whether the last call has
};

namespace {

class Token {
 public:
  Token(const Layer* layers, Run& run) : layers_(layers), run_(run) {}

  void go() {
    run_.reason = 0;
    if (run_.stage == kToken) {
      run_.stage = kLayer;
      bool news = look_ahead(kFromEmbedding, -1);
      if (run_.guessed_token) {  // what was expected then is not all that is now
        run_.guessed_token = 0;
        run_.reason |= kWanted;
        news = true;
      }
      if (news) return;
    }
    while (run_.layer < run_.count) {
      const Layer& layer = layers_[run_.layer];
      if (run_.stage == kLayer) {
        if (!begin(layer)) return;
        if (run_.stage == kLayer) {  // the whole layer is done
          if (++run_.layer, after(layer)) return;
          continue;
        }
      }
      if (!experts(layer)) return;
      run_.stage = kLayer;
      if (++run_.layer, after(layer)) return;
    }
    if (run_.norm) compute_head();
  }

 private:
  // Attention, routing, and the whole block if all is there; else what can be computed now, and stage kExperts.
  // False: return to the caller.
  bool begin(const Layer& layer) {
    const MoeBlock& moe = *layer.moe;
    const int64_t hidden = layer.attention->q.k;
    attended_.resize(size_t(hidden));
    const KvSegment segment{run_.pages + run_.layer * run_.blocks, run_.position, 1};
    attend_segments(*layer.attention, run_.x, hidden, &segment, 1, run_.cosine, run_.sine, *run_.pool,
                    attended_.data(), hidden, run_.exact != 0);
    route(moe, attended_.data(), hidden, 1, layer.routing);
    if (layer.moe_index >= 0 && run_.lookahead) learn(*run_.lookahead, int32_t(layer.moe_index), layer.routing.chosen);
    uint64_t late = 0;
    for (int rank = 0; rank < moe.top_k; ++rank)
      if (state_of(moe, layer.routing.chosen[rank]) != kReady) late |= uint64_t(1) << rank;
    run_.late[run_.layer] = late;
    if (!late) {
      compute_block(moe, attended_.data(), hidden, 1, layer.routing, run_.x, hidden, run_.exact != 0);
      return true;
    }
    run_.stage = kExperts;
    run_.done = 0;
    if (!layer.moe->shared || !absent(layer)) {
      compute_shared(moe, attended_.data(), layer.routing, run_.x, run_.exact != 0);
    } else {
      // The read must begin before anything is computed: x is complete once the caller is back.
      run_.reason |= kMissing;
      std::memcpy(run_.x, attended_.data(), size_t(hidden) * 4);
      run_.done = kSharedPending;
      return false;
    }
    return !pause(layer);
  }

  // The chosen experts, in the order of their indices so that a sum never depends on which came first.
  bool experts(const Layer& layer) {
    const MoeBlock& moe = *layer.moe;
    if (run_.done == kSharedPending) {
      run_.done = 0;
      const int64_t hidden = layer.attention->q.k;
      attended_.assign(run_.x, run_.x + hidden);
      compute_shared(moe, attended_.data(), layer.routing, run_.x, run_.exact != 0);
      if (pause(layer)) return false;
    }
    std::vector<int> order;
    for (int rank = 0; rank < moe.top_k; ++rank)
      if (!(run_.done >> rank & 1)) order.push_back(rank);
    const int32_t* chosen = layer.routing.chosen;
    std::sort(order.begin(), order.end(), [&](int a, int b) { return chosen[a] < chosen[b]; });
    for (int rank : order) {
      if (state_of(moe, chosen[rank]) == kComing && guess_next_token()) return false;
      const ExpertState state = await_expert(moe, chosen[rank], run_.patience);
      if (state != kReady) {
        run_.reason |= state == kComing ? kStillWaiting : kMissing;
        return false;
      }
      compute_routed(moe, layer.routing, rank, run_.x, run_.exact != 0);
      run_.done |= uint64_t(1) << rank;
    }
    return true;
  }

  bool absent(const Layer& layer) const {
    const int32_t* chosen = layer.routing.chosen;
    return std::any_of(chosen, chosen + layer.moe->top_k, [&](int32_t expert) {
      const ExpertState state = state_of(*layer.moe, expert);
      return state == kAbsent || state == kFailed;
    });
  }

  // Whether the caller must begin a read: of a chosen expert, or of one that a coming layer will want.
  bool pause(const Layer& layer) {
    if (absent(layer)) run_.reason |= kMissing;
    look_ahead(kFromPartial, int32_t(layer.moe_index));
    return run_.reason != 0;
  }

  bool after(const Layer& layer) {
    return layer.moe_index >= 0 && look_ahead(kFromOutput, int32_t(layer.moe_index));
  }

  bool look_ahead(GuessKind kind, int32_t here) {
    if (!run_.lookahead) return false;
    expected_.clear();
    guess(*run_.lookahead, kind, here, run_.x, expected_);
    run_.wanted_count = 0;
    return note_expected(0);
  }

  // All that is expected, not what is new alone: the caller protects it and drops what is expected no more.
  bool note_expected(int32_t next_token) {
    bool news = false;
    for (const Expected& e : expected_) {
      const int64_t layer = run_.layer_of[e.index];
      news |= state_of(*layers_[layer].moe, e.expert) == kAbsent;
      if (run_.wanted_count >= run_.wanted_room) break;
      int32_t* row = run_.wanted + 3 * run_.wanted_count++;
      row[0] = int32_t(layer);
      row[1] = e.expert;
      row[2] = next_token;
    }
    if (news) run_.reason |= kWanted;
    return news;
  }

  // While one of the last layers waits, the head's choice for what is there of its output is often the token that
  // comes next, and its embedding tells what its first layers will want: the disk would be idle until then.
  bool guess_next_token() {
    if (!run_.lookahead || run_.guessed_token || run_.layer < run_.guess_token_from) return false;
    run_.guessed_token = 1;
    compute_head();
    const int64_t token = std::max_element(run_.logits, run_.logits + run_.head.n) - run_.logits;
    const uint8_t* row = run_.embeddings.packed + token * run_.embeddings.row_bytes();
    attended_.resize(size_t(run_.embeddings.k));
    for (int64_t i = 0; i < run_.embeddings.k; ++i) {
      uint32_t bits = 0;
      if (run_.embeddings.kind == kF32) {
        std::memcpy(&bits, row + 4 * i, 4);
      } else {
        uint16_t half;
        std::memcpy(&half, row + 2 * i, 2);
        bits = uint32_t(half) << 16;
      }
      std::memcpy(&attended_[size_t(i)], &bits, 4);
    }
    expected_.clear();
    guess(*run_.lookahead, kFromGuessedToken, -1, attended_.data(), expected_);
    return note_expected(1);
  }

  void compute_head() {
    kernels().rms_norm(run_.x, run_.norm, run_.head.k, run_.eps, run_.normed);
    Scratch scratch;
    Product product{run_.head, run_.normed, run_.head.k, 1, run_.logits, run_.head.n, {}};
    if (!run_.exact) quantize_inputs(&product, 1, scratch);
    multiply(&product, 1, run_.exact != 0, scratch);
  }

  static constexpr uint64_t kSharedPending = ~uint64_t(0);
  const Layer* layers_;
  Run& run_;
  std::vector<float> attended_;
  std::vector<Expected> expected_;
};

}  // namespace
}  // namespace coldstream

// run->x through the layers from run->layer on. Returns with run->layer == run->count when the token is through, and
// else with a reason: kMissing, a chosen expert of the layer is absent or failed; kWanted, reads would help that only
// the caller can begin; kStillWaiting, patience is over. The caller acts and calls again with the same run.
COLDSTREAM_API int32_t cs_stack(const coldstream::Layer* layers, coldstream::Run* run) {
  using namespace coldstream;
  return guarded([&] { Token(layers, *run).go(); });
}

// A run of decoder layers for a few rows, one token each of as many sequences or some of one, attention and MoE in turn,
// without Python between them. Each weight is read once for all rows. Where an expert is not there yet the run looks
// ahead, computes what it can and waits; it returns only for what the caller must decide.
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

// Where in a step a run goes on: before its first guess, at a layer's start, or at its chosen experts.
enum Stage : int32_t { kToken = 0, kLayer = 1, kExperts = 2 };

// Why a run returned: bits.
enum Reason : int32_t { kMissing = 1, kWanted = 2, kStillWaiting = 4 };

struct Run {
  float* x;  // [rows, H], in place; at kExperts the block's sum so far
  const float *cosine, *sine;  // [rows, r/2]
  const KvPool* pool;
  const KvSegment* segments;  // with the table of the first layer; that of layer i is i * blocks further on
  int64_t segment_count, rows, blocks, count;
  int64_t layer;    // in and out: where to go on
  int32_t stage;    // in and out
  int32_t exact;
  int32_t reason;   // out
  int32_t wanted_count;      // out
  int32_t* wanted;           // out: [layer, expert, 1 if it is for the next token], room for `wanted_room` of them
  const int64_t* layer_of;   // [L]: decoder layer of each MoE layer
  const Lookahead* lookahead;  // or null
  int64_t* late;             // [count]: how many chosen experts were not ready when their layer asked
  uint8_t* computed;         // [E]: which of the current layer's experts are in `parts`
  float* parts;              // [rows * k, H]
  double patience;           // seconds to wait for an expert before returning
  int32_t shared_pending;    // of the current layer not even the shared expert is computed
  int32_t wanted_room;
  float eps;
  const float* norm;  // [H] of the model's last norm, or null: then x is all there is at the end
  Weight head;        // [V, H]
  float* normed;      // [rows, H]
  float* logits;      // [rows, V]
  Weight embeddings;  // [V, H] plain, or k = 0
  int64_t guess_token_from;  // the first layer that guesses the next token while it waits; `count` for none
  int32_t guessed_token;     // in and out: whether the last call has
};

namespace {

class Rows {
 public:
  Rows(const Layer* layers, Run& run) : layers_(layers), run_(run) {}

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
    const int64_t hidden = layer.attention->o.n, rows = run_.rows;
    attended_.resize(size_t(rows * hidden));
    std::vector<KvSegment> segments(run_.segments, run_.segments + run_.segment_count);
    for (KvSegment& segment : segments) segment.pages += run_.layer * run_.blocks;
    attend_segments(*layer.attention, run_.x, hidden, segments.data(), run_.segment_count, run_.cosine, run_.sine,
                    *run_.pool, attended_.data(), hidden, run_.exact != 0);
    route(moe, attended_.data(), hidden, rows, layer.routing);
    if (layer.moe_index >= 0 && run_.lookahead)
      learn(*run_.lookahead, int32_t(layer.moe_index), layer.routing.chosen, rows);
    if (moe.experts) std::memset(run_.computed, 0, size_t(moe.experts));
    const std::vector<int32_t> all = chosen(layer, [](int32_t) { return true; });
    run_.late[run_.layer] =
        std::count_if(all.begin(), all.end(), [&](int32_t expert) { return state_of(moe, expert) != kReady; });
    if (!run_.late[run_.layer]) {
      compute_block(moe, attended_.data(), hidden, rows, layer.routing, run_.x, hidden, run_.exact != 0);
      return true;
    }
    run_.stage = kExperts;
    run_.shared_pending = moe.shared && absent(layer);
    if (!run_.shared_pending) {
      compute_shared(moe, attended_.data(), rows, layer.routing, run_.x, run_.exact != 0);
    } else {
      // The read must begin before anything is computed: x is complete once the caller is back.
      run_.reason |= kMissing;
      std::memcpy(run_.x, attended_.data(), size_t(rows * hidden) * 4);
      return false;
    }
    return !pause(layer);
  }

  // The experts that rows have chosen, each once: whatever is there is computed while the others are read. The sums are
  // taken at the end in the order of the experts' indices, so that they never depend on which came first.
  bool experts(const Layer& layer) {
    const MoeBlock& moe = *layer.moe;
    if (run_.shared_pending) {
      run_.shared_pending = 0;
      attended_.assign(run_.x, run_.x + run_.rows * layer.attention->o.n);
      compute_shared(moe, attended_.data(), run_.rows, layer.routing, run_.x, run_.exact != 0);
      if (pause(layer)) return false;
    }
    for (bool slots_freed = false;;) {
      std::vector<int32_t> ready, coming, missing;
      for (int32_t expert : open(layer, [](ExpertState) { return true; })) {
        const ExpertState state = state_of(moe, expert);
        (state == kReady ? ready : state == kComing ? coming : missing).push_back(expert);
      }
      if (!ready.empty()) {
        compute_routed(moe, run_.rows, layer.routing, ready, run_.parts, run_.exact != 0);
        for (int32_t expert : ready) run_.computed[expert] = 1;
        slots_freed = true;
      } else if (!missing.empty() && (slots_freed || coming.empty())) {
        run_.reason |= kMissing;
        return false;
      } else if (coming.empty()) {
        break;
      } else if (guess_next_token()) {
        return false;
      } else if (!await_experts(moe, coming, run_.patience)) {
        run_.reason |= kStillWaiting;
        return false;
      }
    }
    add_routed(moe, run_.rows, layer.routing, run_.parts, run_.x);
    return true;
  }

  // Those of the chosen experts that `wanted` accepts, each once, ascending.
  template <class Wanted>
  std::vector<int32_t> chosen(const Layer& layer, Wanted&& wanted) const {
    std::vector<int32_t> found;
    for (int64_t i = 0; i < run_.rows * layer.moe->top_k; ++i)
      if (wanted(layer.routing.chosen[i])) found.push_back(layer.routing.chosen[i]);
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    return found;
  }

  // Those that are still to be computed and whose state `wanted` accepts.
  template <class Wanted>
  std::vector<int32_t> open(const Layer& layer, Wanted&& wanted) const {
    return chosen(layer, [&](int32_t e) { return !run_.computed[e] && wanted(state_of(*layer.moe, e)); });
  }

  bool absent(const Layer& layer) const {
    return !open(layer, [](ExpertState state) { return state == kAbsent || state == kFailed; }).empty();
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
    guess(*run_.lookahead, kind, here, run_.x, run_.rows, expected_);
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
    const int64_t width = run_.embeddings.k, vocabulary = run_.head.n;
    attended_.resize(size_t(run_.rows * width));
    for (int64_t row = 0; row < run_.rows; ++row) {
      const float* logits = run_.logits + row * vocabulary;
      const int64_t token = std::max_element(logits, logits + vocabulary) - logits;
      widen(run_.embeddings.packed + token * run_.embeddings.row_bytes(), attended_.data() + row * width);
    }
    expected_.clear();
    guess(*run_.lookahead, kFromGuessedToken, -1, attended_.data(), run_.rows, expected_);
    return note_expected(1);
  }

  // A row of the embeddings as f32.
  void widen(const uint8_t* row, float* to) const {
    for (int64_t i = 0; i < run_.embeddings.k; ++i) {
      uint16_t half;
      if (run_.embeddings.kind == kF32) {
        std::memcpy(to + i, row + 4 * i, 4);
      } else {
        std::memcpy(&half, row + 2 * i, 2);
        to[i] = bf16_to_float(half);
      }
    }
  }

  void compute_head() {
    const int64_t hidden = run_.head.k;
    for (int64_t row = 0; row < run_.rows; ++row)
      kernels().rms_norm(run_.x + row * hidden, run_.norm, hidden, run_.eps, run_.normed + row * hidden);
    Scratch scratch;
    Product product{run_.head, run_.normed, hidden, run_.rows, run_.logits, run_.head.n, {}};
    if (!run_.exact) quantize_inputs(&product, 1, scratch);
    multiply(&product, 1, run_.exact != 0, scratch);
  }

  const Layer* layers_;
  Run& run_;
  std::vector<float> attended_;
  std::vector<Expected> expected_;
};

}  // namespace
}  // namespace coldstream

// run->x through the layers from run->layer on. Returns with run->layer == run->count when the rows are through, and
// else with a reason: kMissing, a chosen expert of the layer is absent or failed; kWanted, reads would help that only
// the caller can begin; kStillWaiting, patience is over. The caller acts and calls again with the same run.
COLDSTREAM_API int32_t cs_stack(const coldstream::Layer* layers, coldstream::Run* run) {
  using namespace coldstream;
  return guarded([&] { Rows(layers, *run).go(); });
}

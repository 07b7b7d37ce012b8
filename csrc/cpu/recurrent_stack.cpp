// lmfast::recurrent_forward_stack and recurrent_backward_stack on the CPU: all layers of a stack in
// one call, as a wavefront. While one thread works on some steps of a layer, another works on the
// steps before them of the layer above; backward, below. No thread waits within a step, so that few
// rows keep two threads busy which one layer cannot: two layers of H = 128, one row of 256 steps,
// on two cores of Zen 4 against one after the other, forward Elman 0.63 -> 0.45 ms, GRU 1.61 ->
// 1.08; with gradients, of which those of the weights stay as they are, Elman 1.95 -> 1.60. Each
// piece of steps begins with its own input products, which stay in L2. What is computed does not
// depend on who runs what: one thread runs the same pieces.
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <deque>

#include "product_operand.h"
#include "recurrent_layer.h"

namespace lmfast {
namespace {

// Calls task(layer, piece) for every pair, after (layer, piece - 1) and (layer - 1, piece). Nobody
// is waited for by name: whoever is there takes what is ready, its last layer first, whose weights
// it has in its cache.
template <class Task>
void run_wavefront(int64_t layers, int64_t pieces, const Task& task) {
  constexpr int kPatience = 1024;  // pauses: 20 to 50 us
  struct alignas(64) Layer {
    std::atomic<int64_t> taken{0}, done{0};
  };
  std::vector<Layer> state(layers);
  const auto run_next = [&](int64_t i) {
    Layer& layer = state[i];
    int64_t piece = layer.taken.load(std::memory_order_relaxed);
    if (piece == pieces || layer.done.load(std::memory_order_acquire) != piece) return false;
    if (i > 0 && state[i - 1].done.load(std::memory_order_acquire) <= piece) return false;
    if (!layer.taken.compare_exchange_strong(piece, piece + 1)) return false;
    task(i, piece);
    layer.done.store(piece + 1, std::memory_order_release);
    return true;
  };
  const int64_t threads = std::min<int64_t>(layers, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int waits = 0; state[layers - 1].taken.load(std::memory_order_relaxed) < pieces;) {
      bool ran = false;
      for (int64_t i = 0; i < layers; ++i) {
        while (run_next(i)) ran = true;
      }
      if (ran) {
        waits = 0;
      } else if (++waits < kPatience) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  });
}

// The pieces of the steps: enough for the layers to overlap, and of enough rows for a product.
struct Pieces {
  int64_t steps, length, count;

  explicit Pieces(int64_t all)
      : steps(all),
        length(std::clamp<int64_t>(all / 16, 8, 32)),
        count((all + length - 1) / length) {}

  int64_t past(int64_t piece) const { return std::min(steps, (piece + 1) * length); }
  // Rows of the steps [first, past), the loop running forward in time.
  static RecurrentPart part(const RecurrentShape& s, int64_t first, int64_t past) {
    return {first, past, s.offsets[first]};
  }
  static int64_t rows(const RecurrentShape& s, int64_t first, int64_t past) {
    return s.offsets[past - 1] + s.sizes[past - 1] - s.offsets[first];
  }
  int64_t most_rows(const RecurrentShape& s) const { return length * s.batch; }
};

// Products of the rows of a piece with weights that are packed once, by whoever comes first.
class PieceProduct {
 public:
  // b: (columns, depth); chunk: the longest chain of additions.
  PieceProduct(const Tensor& b, const char* name, const Given& bias, int64_t columns, int64_t depth,
               int64_t chunk, int64_t most_rows)
      : packed_(allocate_scratch((columns + kProductLanes - 1) / kProductLanes * depth *
                                 kProductLanes * 4)),
        out_(allocate_scratch(most_rows * columns * 4)) {
    p_.b = product_operand(b, name);
    LMFAST_CHECK(b.size(0) == columns && b.size(1) == depth, name, " has a wrong shape");
    LMFAST_CHECK(chunk >= 1, "chunk must be at least 1, got ", chunk);
    p_.columns = columns;
    p_.depth = depth;
    p_.bias = floats(bias, "bias", {columns});
    p_.chunk = std::min(chunk, depth);
    p_.packing = ProductPacking::kBefore;
    p_.packed_b = static_cast<float*>(packed_.get());
    p_.c = static_cast<float*>(out_.get());
    p_.group = (columns + kProductLanes - 1) / kProductLanes;
    p_.groups = 1;
    p_.block = kMostRows;
    scratch_ = allocate_scratch(4 * product_scratch_floats(p_));
    p_.scratch = static_cast<float*>(scratch_.get());
  }

  const float* run(const float* a, int64_t stride, int64_t rows) {
    if (!is_packed_) product_pack_kernel()(p_, 0, p_.group);
    is_packed_ = true;
    p_.a = {a, stride, false};
    p_.rows = rows;
    divide_product_rows(p_, (rows + kMostRows - 1) / kMostRows);
    product_multiply_kernel()(p_, 0, p_.blocks);
    return p_.c;
  }

 private:
  static constexpr int64_t kMostRows = 48;  // of a block, as in whole products
  ProductArgs p_{};
  bool is_packed_ = false;
  ScratchMemory packed_, out_, scratch_{nullptr, &std::free};
};

// Layers, bottom first; weights may be right-multiplied ones seen through t(). chunks: the longest
// chain of additions in the input products of the lowest layer and of all others.
Tensors recurrent_forward_stack(Tensor x, Tensors w_ih, Tensors w_hh, Tensors bias,
                                Tensors hidden_bias, Tensors h0, Tensors c0, Given batch_sizes,
                                int64_t batch, int64_t cell, bool keep,
                                std::vector<int64_t> chunks) {
  const size_t layers = w_hh.size();
  LMFAST_CHECK(layers >= 1 && chunks.size() == 2, "layers or chunks out of range");
  check_lists(layers, {{&w_ih, "w_ih"}, {&w_hh, "w_hh"}},
              {{&bias, "bias"}, {&hidden_bias, "hidden_bias"}, {&h0, "h0"}, {&c0, "c0"}});
  LMFAST_CHECK(x.dim() == 2, "x must be a matrix");
  const float* rows_of_x = floats(x, "x", {x.size(0), x.size(1)});
  std::deque<Forward> all;
  for (size_t i = 0; i < layers; ++i) {
    all.emplace_back(x, w_hh[i], at(hidden_bias, i), at(h0, i), at(c0, i), batch_sizes, batch, cell,
                     false, keep);
    LMFAST_CHECK(all[i].a.shape.hidden == all[0].a.shape.hidden, "layers must have one width");
  }
  const RecurrentShape& s = all[0].a.shape;
  if (s.steps > 0) {
    const Pieces pieces(s.steps);
    std::deque<PieceProduct> products;
    for (size_t i = 0; i < layers; ++i) {
      products.emplace_back(w_ih[i], "w_ih", at(bias, i), gates_of(s.cell) * s.hidden,
                            i == 0 ? x.size(1) : s.hidden, chunks[i == 0 ? 0 : 1],
                            pieces.most_rows(s));
    }
    const auto kernel = recurrent_fwd_rows_kernel();
    run_wavefront(static_cast<int64_t>(layers), pieces.count, [&](int64_t i, int64_t piece) {
      RecurrentFwdArgs a = all[i].a;
      const int64_t first = piece * pieces.length, past = pieces.past(piece);
      a.part = Pieces::part(s, first, past);
      const int64_t width = i == 0 ? x.size(1) : s.hidden;
      const float* from = (i == 0 ? rows_of_x : all[i - 1].a.y) + a.part.row * width;
      a.projected = products[i].run(from, width, Pieces::rows(s, first, past));
      kernel(a, 0, s.batch);
    });
  }
  Tensors found;
  for (Forward& f : all) {
    f.finish();
    for (const Tensor& t : {f.y, f.h_n, f.c_n, f.gates, f.cells}) found.push_back(t);
  }
  return found;
}

// dy: the gradient of the highest layer's rows. w_ih: of all layers but the lowest. chunk: as in
// the forward, for the products that lead to the layer below.
Tensors recurrent_backward_stack(Given dy, Tensors dh_n, Tensors dc_n, Tensors y, Tensors gates,
                                 Tensors cells, Tensors w_ih, Tensors w_hh, Tensors h0, Tensors c0,
                                 Given batch_sizes, int64_t batch, int64_t cell, int64_t chunk) {
  const size_t layers = w_hh.size();
  LMFAST_CHECK(layers >= 1, "layers out of range");
  check_lists(layers, {{&y, "y"}, {&gates, "gates"}, {&cells, "cells"}, {&w_hh, "w_hh"}},
              {{&dh_n, "dh_n"}, {&dc_n, "dc_n"}, {&h0, "h0"}, {&c0, "c0"}});
  check_lists(layers - 1, {{&w_ih, "w_ih"}}, {});
  std::deque<Backward> all;
  for (size_t i = 0; i < layers; ++i) {
    all.emplace_back(i + 1 == layers ? dy : Given(), at(dh_n, i), at(dc_n, i), y[i], gates[i],
                     cells[i], w_hh[i], at(h0, i), at(c0, i), batch_sizes, batch, cell, false);
    LMFAST_CHECK(all[i].a.shape.hidden == all[0].a.shape.hidden, "layers must have one width");
  }
  const RecurrentShape& s = all[0].a.shape;
  if (s.steps > 0) {
    const Pieces pieces(s.steps);
    const int64_t from_gates = gates_of(s.cell) * s.hidden;
    const int64_t width = gate_gradients_of(s.cell) * s.hidden;
    std::deque<PieceProduct> products;  // from layer i + 1 to layer i
    for (size_t i = 0; i + 1 < layers; ++i) {
      products.emplace_back(torch::stable::transpose(w_ih[i], 0, 1), "w_ih", Given(), s.hidden,
                            from_gates, chunk, pieces.most_rows(s));
    }
    const auto kernel = recurrent_bwd_rows_kernel();
    const int64_t top = static_cast<int64_t>(layers) - 1;
    run_wavefront(top + 1, pieces.count, [&](int64_t number, int64_t piece) {
      const int64_t i = top - number;
      RecurrentBwdArgs a = all[i].a;
      // Counted from the end: the loop's first step is the last in time.
      const int64_t first = s.steps - pieces.past(piece), past = s.steps - piece * pieces.length;
      a.part = {s.steps - past, s.steps - first, 0};
      if (i < top) {
        a.part.row = s.offsets[first];
        // The gradients that meet the input's weights are the last ones of each row.
        const float* from = all[i + 1].a.dgates + a.part.row * width + width - from_gates;
        a.dy = products[i].run(from, width, Pieces::rows(s, first, past));
      }
      kernel(a, 0, s.batch);
    });
  }
  Tensors found;
  for (Backward& b : all) {
    found.push_back(b.dgates);
    found.push_back(b.carry);
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfast, CPU, m) {
  m.impl("recurrent_forward_stack", TORCH_BOX(&recurrent_forward_stack));
  m.impl("recurrent_backward_stack", TORCH_BOX(&recurrent_backward_stack));
}

}  // namespace lmfast

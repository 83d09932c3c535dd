// The fused margin head: the logits exist only as class-major tiles that stay in a core's cache.
//
// Each worker (thread) owns a contiguous range of classes and runs single-threaded products on
// tiles of them, so that threads meet only between the passes:
//   pass 1  tile = W_c x_hat^T; each row's running max and sum over all classes but its own
//           (Euclidean margin: its hinges above a threshold, which the target alone decides)
//   rows    the worker's sums merged in a fixed order; loss, weighting, factor
//   pass 2  tile again, from the last to the first (as many as were kept are still there, never
//   more
//           than half of them); D = p * inverse class norm (p is 1 for an active class of the
//           Euclidean margin), the target's element set apart in fp32;
//           dX += D^T W_c; dW_c = D (f x_hat); the backward of the weights' normalisation and the
//           SGD update while W_c and dW_c are in cache.
// What multiplies a whole row (scale, weighting, 1 / N) is folded into x_hat for dW and applied to
// dX at the end, so hard mining costs nothing per logit.
//
// Shapes: N rows padded with zeros to R = a multiple of kRowMultiple; x_hat [R, dim]; tile [c, R].
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <vector>

#include "cpu/head_base.h"

namespace hardmine {
namespace {

using onednn::memory;

constexpr auto kF32 = memory::data_type::f32;
constexpr auto kBf16 = memory::data_type::bf16;

// Bytes of the second-level cache of a core; 1 MiB (a common size) where the system does not say.
int64_t cache_bytes() {
  const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return found > 0 ? found : int64_t{1} << 20;
}

double rounded_to_bf16(double value) {
  const auto bits = std::bit_cast<uint32_t>(static_cast<float>(value));
  return double{std::bit_cast<float>((bits + 0x7FFFU + ((bits >> 16) & 1U)) & 0xFFFF0000U)};
}

// The three products of tiles of one height.
struct TileProducts {
  Product logits;      // tile [c, R] = W_c [c, dim] x_hat^T [dim, R]
  Product embeddings;  // dX [R, dim] += D^T [R, c] W_c [c, dim]
  Product weights;     // dW_c [c, dim] = D [c, R] (f x_hat) [R, dim]

  // The formats of x_hat^T and of (f x_hat) must be the same for tiles of every height.
  TileProducts(const onednn::engine& engine, int64_t classes, int64_t rows, int64_t dim,
               memory::data_type type, const memory::desc& x_hat, const memory::desc& x_weighted)
      : logits(engine, matrix_desc(classes, dim, type), x_hat, matrix_desc(classes, rows, kF32),
               false),
        embeddings(engine, matrix_desc(rows, classes, type, true), matrix_desc(classes, dim, type),
                   matrix_desc(rows, dim, kF32), true),
        weights(engine, matrix_desc(classes, rows, type), x_weighted,
                matrix_desc(classes, dim, kF32), false) {}

  size_t scratch_bytes() const {
    return std::max({logits.scratch_bytes(), embeddings.scratch_bytes(), weights.scratch_bytes()});
  }
  void bind(const onednn::engine& engine, void* scratch) {
    for (Product* product : {&logits, &embeddings, &weights}) product->bind(engine, scratch);
  }
};

// A product's weights operand brought into the format that oneDNN wants.
struct Packed {
  memory source, packed;
  dnnl::reorder reorder;
  Buffer<std::byte> bytes;

  Packed(const onednn::engine& engine, MemoryMeter& meter, const memory::desc& from, void* data,
         const memory::desc& to)
      : source(from, engine, data), bytes(meter, static_cast<int64_t>(to.get_size())) {
    packed = memory(to, engine, bytes.data());
    reorder = onednn::checked("to pack a product's operand",
                              [&] { return dnnl::reorder(source, packed); });
  }
  void run(onednn::stream& stream) {
    onednn::checked("to pack a product's operand", [&] {
      reorder.execute(stream, source, packed);
      stream.wait();
    });
  }
};

// What one thread works with.
struct Worker {
  Worker(TileProducts whole_products, TileProducts last_products, const onednn::engine& engine)
      : whole(std::move(whole_products)), last(std::move(last_products)), stream(engine) {}

  TileProducts whole, last;  // tiles of the common height; the last tile of all
  onednn::stream stream;
  Buffer<std::byte> scratch;
  Buffer<float> tiles;            // [kept, c, R] dots, then D in fp32; tile t is at t modulo kept
  Buffer<uint16_t> tile_bf16;     // [c, R] D in bf16
  Buffer<uint16_t> weights_bf16;  // [c, dim]
  Buffer<float> gradient;         // [c, dim] dW_c
  Buffer<float> grad_x;           // [R, dim] this worker's classes' share
  Buffer<float> max, sum;         // [R] of base-2 logits; Euclidean margin: of logits and hinges
  Buffer<int32_t> active;         // [R] Euclidean margin: hinges above 0
};

// Everything that depends on the number of rows.
struct Plan {
  int64_t rows, padded;
  int64_t tile_classes, tiles, kept;
  Buffer<float> x_hat;       // [R, dim]
  Buffer<float> x_weighted;  // [R, dim] times the row's factor
  Buffer<float> row_scale;   // [R] base 2 (Euclidean margin: as it is)
  Buffer<float> row_weight;  // [R] what multiplies the row's gradient by the weights
  Buffer<float> level;       // [R] the softmax's log-sum in base 2; Euclidean margin: the threshold
  std::unique_ptr<Packed> x_packed, x_weighted_packed;
  std::vector<std::unique_ptr<Worker>> workers;
};

class FusedHead : public HeadBase {
 public:
  using HeadBase::HeadBase;

 private:
  void run(const Request& request) override;

  Plan& plan_for(int64_t rows);
  void prepare_operands(const Request& request, Plan& plan, Range rows);
  void forward_pass(Plan& plan, int w);
  void gradient_pass(const Request& request, Plan& plan, int w);
  void finish_rows(const Request& request, Plan& plan);
  void finish_biases(const Request& request, const Plan& plan, const void* d, Range classes);
  float* dots_of(const Plan& plan, const Worker& worker, int64_t t) const {
    return worker.tiles.data() + t % plan.kept * plan.tile_classes * plan.padded;
  }
  const void* operand_weights(const Worker& worker, Range classes) const;
  void load_weights(const Worker& worker, Range classes) const;
  void compute_dots(Plan& plan, Worker& worker, int64_t t);
  LogitTile tile_of(const Plan& plan, const Worker& worker, int64_t t) const;

  bool bf16() const { return precision_ == Precision::bf16; }
  Range tile_range(const Plan& plan, int64_t t) const {
    return {t * plan.tile_classes, std::min(spec_.classes, (t + 1) * plan.tile_classes)};
  }
  TileProducts& products(const Plan& plan, Worker& worker, int64_t t) const {
    return t == plan.tiles - 1 ? worker.last : worker.whole;
  }
  // Calls use(row) for each row whose label is in `classes`.
  template <typename Use>
  void for_targets(Range classes, const Use& use) const {
    const std::span<const int64_t> order = by_label_.span();
    auto i = std::lower_bound(order.begin(), order.end(), classes.from,
                              [&](int64_t row, int64_t label) { return rows_[row].label < label; });
    for (; i != order.end() && rows_[*i].label < classes.to; ++i) use(*i);
  }

  std::unique_ptr<Plan> plan_;
};

Plan& FusedHead::plan_for(int64_t rows) {
  if (plan_ != nullptr && plan_->rows == rows) return *plan_;
  plan_ = nullptr;
  const int64_t dim = spec_.dim;
  auto plan = std::make_unique<Plan>();
  plan->rows = rows;
  plan->padded = (rows + kRowMultiple - 1) / kRowMultiple * kRowMultiple;

  // A tile, its weights and their gradient fill half of the cache; the rest is for x_hat and dX.
  const int64_t class_bytes = (bf16() ? 6 : 4) * plan->padded + (bf16() ? 10 : 8) * dim;
  const int64_t fitting = std::max<int64_t>(kRowMultiple, cache_bytes() / 2 / class_bytes);
  const int64_t rounds = (spec_.classes + threads_ * fitting - 1) / (threads_ * fitting);
  const int64_t even = (spec_.classes + threads_ * rounds - 1) / (threads_ * rounds);
  plan->tile_classes =
      std::min(spec_.classes, (even + kRowMultiple - 1) / kRowMultiple * kRowMultiple);
  plan->tiles = (spec_.classes + plan->tile_classes - 1) / plan->tile_classes;
  const int64_t last_classes = spec_.classes - (plan->tiles - 1) * plan->tile_classes;

  // Logits that need not be computed again: as many as the caches could hold, a bounded number of
  // bytes over all workers, and never more than half of them.
  constexpr int64_t kKeptBytes = int64_t{8} << 20;
  const int64_t tile_bytes = plan->tile_classes * plan->padded * int64_t{sizeof(float)};
  plan->kept =
      std::max<int64_t>(1, std::min({plan->tiles / threads_ / 2, cache_bytes() / tile_bytes,
                                     kKeptBytes / threads_ / tile_bytes}));

  const auto type = bf16() ? kBf16 : kF32;
  const ThreadsGuard one_thread(1);  // products run inside a team
  for (int w = 0; w < threads_; ++w) {
    TileProducts whole(engine_, plan->tile_classes, plan->padded, dim, type,
                       memory::desc({dim, plan->padded}, type, memory::format_tag::any),
                       memory::desc({plan->padded, dim}, type, memory::format_tag::any));
    TileProducts last(engine_, last_classes, plan->padded, dim, type, whole.logits.weights_desc(),
                      whole.weights.weights_desc());
    auto worker = std::make_unique<Worker>(std::move(whole), std::move(last), engine_);
    const size_t scratch = std::max(worker->whole.scratch_bytes(), worker->last.scratch_bytes());
    worker->scratch = Buffer<std::byte>(meter_, static_cast<int64_t>(scratch));
    worker->whole.bind(engine_, worker->scratch.data());
    worker->last.bind(engine_, worker->scratch.data());
    worker->tiles = Buffer<float>(meter_, plan->kept * plan->tile_classes * plan->padded);
    if (bf16()) {
      worker->tile_bf16 = Buffer<uint16_t>(meter_, plan->tile_classes * plan->padded);
      worker->weights_bf16 = Buffer<uint16_t>(meter_, plan->tile_classes * dim);
    }
    worker->gradient = Buffer<float>(meter_, plan->tile_classes * dim);
    worker->grad_x = Buffer<float>(meter_, plan->padded * dim);
    worker->max = Buffer<float>(meter_, plan->padded);
    worker->sum = Buffer<float>(meter_, plan->padded);
    if (is_euclidean()) worker->active = Buffer<int32_t>(meter_, plan->padded);
    plan->workers.push_back(std::move(worker));
  }
  plan->x_hat = Buffer<float>(meter_, plan->padded * dim);
  plan->x_weighted = Buffer<float>(meter_, plan->padded * dim);
  plan->row_scale = Buffer<float>(meter_, plan->padded);
  plan->row_weight = Buffer<float>(meter_, plan->padded);
  plan->level = Buffer<float>(meter_, plan->padded);
  // Rows of the padding have no probability of any class, whatever its bias, and no hinge.
  std::fill_n(plan->level.data(), plan->padded, std::numeric_limits<float>::max());
  const TileProducts& products = plan->workers.front()->whole;
  plan->x_packed =
      std::make_unique<Packed>(engine_, meter_, matrix_desc(dim, plan->padded, kF32, true),
                               plan->x_hat.data(), products.logits.weights_desc());
  plan->x_weighted_packed =
      std::make_unique<Packed>(engine_, meter_, matrix_desc(plan->padded, dim, kF32),
                               plan->x_weighted.data(), products.weights.weights_desc());
  plan_ = std::move(plan);
  return *plan_;
}

void FusedHead::run(const Request& request) {
  require_finite_classes();
  Plan& plan = plan_for(request.rows());
  run_team(threads_, [&](int w) { prepare_operands(request, plan, part(plan.rows, w, threads_)); });
  plan.x_packed->run(stream_);
  run_team(threads_, [&](int w) { forward_pass(plan, w); });
  finish_rows(request, plan);
  plan.x_weighted_packed->run(stream_);
  run_team(threads_, [&](int w) { gradient_pass(request, plan, w); });
  if (request.grad_embeddings.empty()) return;
  run_team(threads_, [&](int w) {
    const Range rows = part(plan.rows, w, threads_);
    for (int64_t i = rows.from; i < rows.to; ++i) {
      float* sum = plan.workers.front()->grad_x.data() + i * spec_.dim;
      for (size_t other = 1; other < plan.workers.size(); ++other) {
        loops_.add_scaled(sum, plan.workers[other]->grad_x.data() + i * spec_.dim, 1.0F, sum,
                          spec_.dim);
      }
      embedding_gradient(i, sum, plan.x_hat.data() + i * spec_.dim,
                         request.grad_embeddings.data() + i * spec_.dim);
    }
  });
}

// x_hat, and the target's cosine in double from the very operands that the products see.
void FusedHead::prepare_operands(const Request& request, Plan& plan, Range rows) {
  for (int64_t i = rows.from; i < rows.to; ++i) {
    HeadRow& row = rows_[i];
    const float* x = request.input.embeddings.data() + i * spec_.dim;
    const float* w = weights_.data() + int64_t{row.label} * spec_.dim;
    float* x_hat = plan.x_hat.data() + i * spec_.dim;
    double dot = 0;
    double squares = 0;
    for (int64_t k = 0; k < spec_.dim; ++k) {
      const double value = x[k] * row.inverse_norm;
      x_hat[k] = static_cast<float>(value);
      dot += bf16() ? rounded_to_bf16(value) * rounded_to_bf16(double{w[k]}) : value * double{w[k]};
      squares += double{w[k]} * double{w[k]};
    }
    // fp32: the class norm in double too, since acos near 1 multiplies the cosine's error.
    const double class_scale = bf16() ? double{class_scale_[row.label]} : class_scale_of(squares);
    place_target(row, dot * class_scale, request);
    plan.row_scale[i] = static_cast<float>(row.scale) * (is_euclidean() ? 1.0F : kLog2E);
    if (is_euclidean()) plan.level[i] = static_cast<float>(row.threshold);
  }
}

// The weights of a tile as the products take them; in bf16 after load_weights().
const void* FusedHead::operand_weights(const Worker& worker, Range classes) const {
  if (bf16()) return worker.weights_bf16.data();
  return weights_.data() + classes.from * spec_.dim;
}

void FusedHead::load_weights(const Worker& worker, Range classes) const {
  if (!bf16()) return;
  loops_.to_bf16(weights_.data() + classes.from * spec_.dim, worker.weights_bf16.data(),
                 (classes.to - classes.from) * spec_.dim);
}

void FusedHead::compute_dots(Plan& plan, Worker& worker, int64_t t) {
  products(plan, worker, t)
      .logits.run(worker.stream, operand_weights(worker, tile_range(plan, t)),
                  plan.x_packed->bytes.data(), dots_of(plan, worker, t));
}

LogitTile FusedHead::tile_of(const Plan& plan, const Worker& worker, int64_t t) const {
  const Range classes = tile_range(plan, t);
  return {.dots = dots_of(plan, worker, t),
          .classes = classes.to - classes.from,
          .rows = plan.padded,
          .class_scale = class_scale_.data() + classes.from,
          .bias = is_softmax() ? bias_.data() + classes.from : nullptr,
          .row_scale = plan.row_scale.data()};
}

void FusedHead::forward_pass(Plan& plan, int w) {
  Worker& worker = *plan.workers[w];
  std::fill_n(worker.max.data(), plan.padded, std::numeric_limits<float>::lowest());
  std::fill_n(worker.sum.data(), plan.padded, 0.0F);
  std::fill_n(worker.active.data(), worker.active.size(), 0);
  const Range tiles = part(plan.tiles, w, threads_);
  for (int64_t t = tiles.from; t < tiles.to; ++t) {
    const Range classes = tile_range(plan, t);
    load_weights(worker, classes);
    compute_dots(plan, worker, t);
    float* dots = dots_of(plan, worker, t);
    for_targets(classes, [&](int64_t i) {
      dots[(rows_[i].label - classes.from) * plan.padded + i] =
          -std::numeric_limits<float>::infinity();
    });
    const LogitTile tile = tile_of(plan, worker, t);
    if (is_euclidean()) {
      loops_.hinge_tile(
          tile, {plan.level.data(), worker.sum.data(), worker.max.data(), worker.active.data()});
    } else {
      loops_.softmax_tile(tile, worker.max.data(), worker.sum.data());
    }
  }
}

void FusedHead::finish_rows(const Request& request, Plan& plan) {
  constexpr double kLn2 = 0.69314718055994530942;
  run_team(threads_, [&](int w) {
    const Range rows = part(plan.rows, w, threads_);
    for (int64_t i = rows.from; i < rows.to; ++i) {
      if (is_euclidean()) {
        HingeSum<double> others;
        for (const auto& worker : plan.workers) {
          others =
              merge(others, {double{worker->sum[i]}, double{worker->max[i]}, worker->active[i]});
        }
        finish_row(request, i, others);
        continue;
      }
      SoftmaxSum<double> others;
      for (const auto& worker : plan.workers) {
        others = merge(others, {double{worker->max[i]} * kLn2, double{worker->sum[i]}});
      }
      finish_row(i, others);
      plan.level[i] = static_cast<float>(rows_[i].log_sum / kLn2);
    }
  });
  weigh_rows(request);
  run_team(threads_, [&](int w) {
    const Range rows = part(plan.rows, w, threads_);
    for (int64_t i = rows.from; i < rows.to; ++i) {
      plan.row_weight[i] = static_cast<float>(row_factor(i));
      loops_.scale(plan.x_hat.data() + i * spec_.dim, plan.row_weight[i],
                   plan.x_weighted.data() + i * spec_.dim, spec_.dim);
    }
  });
}

void FusedHead::gradient_pass(const Request& request, Plan& plan, int w) {
  Worker& worker = *plan.workers[w];
  const bool step = request.settings != nullptr;
  std::memset(worker.grad_x.data(), 0, worker.grad_x.bytes());
  const Range tiles = part(plan.tiles, w, threads_);
  for (int64_t t = tiles.to - 1; t >= tiles.from; --t) {
    const Range classes = tile_range(plan, t);
    if (t < tiles.to - 1) load_weights(worker, classes);
    if (t < tiles.to - plan.kept) compute_dots(plan, worker, t);
    const LogitTile tile = tile_of(plan, worker, t);
    float* dots = dots_of(plan, worker, t);
    const void* d = dots;
    if (bf16()) {
      const auto fill =
          is_euclidean() ? loops_.hinge_gradient_tile_bf16 : loops_.gradient_tile_bf16;
      fill(tile, plan.level.data(), worker.tile_bf16.data());
      d = worker.tile_bf16.data();
    } else {
      const auto fill = is_euclidean() ? loops_.hinge_gradient_tile : loops_.gradient_tile;
      fill(tile, plan.level.data(), dots);
    }
    for_targets(classes, [&](int64_t i) {
      const int64_t at = (rows_[i].label - classes.from) * plan.padded + i;
      const auto value = static_cast<float>(rows_[i].residual * rows_[i].psi_derivative *
                                            double{class_scale_[rows_[i].label]});
      if (bf16()) {
        loops_.to_bf16(&value, worker.tile_bf16.data() + at, 1);
      } else {
        dots[at] = value;
      }
    });

    TileProducts& multiply = products(plan, worker, t);
    if (!request.grad_embeddings.empty()) {
      multiply.embeddings.run(worker.stream, d, operand_weights(worker, classes),
                              worker.grad_x.data());
    }
    if (is_softmax()) finish_biases(request, plan, d, classes);
    if (!step && request.grad_weights.empty()) continue;
    // First into memory that is in the cache; then the result is written once, in order.
    const float* gradient = worker.gradient.data();
    multiply.weights.run(worker.stream, d, plan.x_weighted_packed->bytes.data(),
                         worker.gradient.data());
    for (int64_t j = classes.from; j < classes.to; ++j, gradient += spec_.dim) {
      const float along = along_weights(j, gradient);
      if (step) {
        update_class(*request.settings, j, gradient, along + request.settings->weight_decay);
      } else {
        loops_.add_scaled(gradient, weights_.data() + j * spec_.dim, along,
                          request.grad_weights.data() + j * spec_.dim, spec_.dim);
      }
    }
  }
}

void FusedHead::finish_biases(const Request& request, const Plan& plan, const void* d,
                              Range classes) {
  if (request.settings == nullptr && request.grad_bias.empty()) return;
  const float* weight = plan.row_weight.data();
  for (int64_t j = classes.from; j < classes.to; ++j) {
    const int64_t at = (j - classes.from) * plan.padded;
    const float gradient =
        bf16() ? loops_.dot_bf16(static_cast<const uint16_t*>(d) + at, weight, plan.padded)
               : loops_.dot(static_cast<const float*>(d) + at, weight, plan.padded);
    finish_bias(request, j, gradient);
  }
}

}  // namespace

std::unique_ptr<CpuMarginHead> make_fused_head(const HeadSpec& spec, const Execution& execution) {
  return std::make_unique<FusedHead>(spec, execution);
}

}  // namespace hardmine

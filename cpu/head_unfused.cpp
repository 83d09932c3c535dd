// The unfused margin head: the textbook chain, each operation a pass of its own over a buffer of
// its own, as an eager framework runs it. It is the rival that the fused head is measured against,
// so its products come from the same library and its passes are vectorised and parallel too.
//
//   forward   x_hat, w_hat; cosines = x_hat w_hat^T [N, C]; margined; logits = scale * margined;
//             log-probabilities; loss; weighting
//   backward  d logits; d margined (scale); d cosines (margin); d x_hat and d w_hat (products); d x
//   and
//             d w (normalisations); SGD
// Softmax leaves out normalisation, margin and scale, and adds the bias. The Euclidean margin
// leaves out the margin, and has hinges in place of log-probabilities.
#include <cmath>
#include <limits>

#include "cpu/head_base.h"

namespace hardmine {
namespace {

using onednn::memory;

// Everything that depends on the number of rows. Operands of products are fp32 or copied to bf16.
struct Buffers {
  int64_t rows = 0;
  Buffer<float> x_hat;                                     // [N, dim]
  Buffer<float> cosines, margined, logits;                 // [N, C]
  Buffer<float> log_probabilities;                         // [N, C]
  Buffer<float> grad_logits, grad_margined, grad_cosines;  // [N, C]
  Buffer<float> grad_x_hat;                                // [N, dim]
  Buffer<uint16_t> x_bf16, grad_bf16;                      // [N, dim], [N, C]
  std::unique_ptr<Product> product, product_x, product_w;
  Buffer<std::byte> scratch;
};

class UnfusedHead : public HeadBase {
 public:
  UnfusedHead(const HeadSpec& spec, const Execution& execution) : HeadBase(spec, execution) {
    const int64_t size = spec.classes * spec.dim;
    if (!is_softmax()) w_hat_ = Buffer<float>(meter_, size);
    if (bf16()) w_bf16_ = Buffer<uint16_t>(meter_, size);
  }

 private:
  void run(const Request& request) override;

  Buffers& buffers_for(int64_t rows);
  void forward(const Request& request, Buffers& b);
  void backward(const Request& request, Buffers& b, float* grad_w);
  double target_cosine(const Request& request, const Buffers& b, int64_t i) const;
  void embedding_backward(const Request& request, Buffers& b, int64_t i) const;

  bool bf16() const { return precision_ == Precision::bf16; }
  const float* w_hat() const { return is_softmax() ? weights_.data() : w_hat_.data(); }
  // Calls use(from, count) for each thread's part of `count` elements, classes or rows.
  template <typename Use>
  void each_part(int64_t count, const Use& use) const {
    run_team(threads_, [&](int w) {
      const Range range = part(count, w, threads_);
      if (range.to > range.from) use(range.from, range.to - range.from);
    });
  }
  template <typename Use>
  void each(int64_t count, const Use& use) const {
    each_part(count, [&](int64_t from, int64_t n) {
      for (int64_t i = from; i < from + n; ++i) use(i);
    });
  }

  Buffer<float> w_hat_;      // [C, dim]
  Buffer<uint16_t> w_bf16_;  // [C, dim]
  Buffer<float> grad_w_;     // [C, dim], made at the first step
  std::unique_ptr<Buffers> buffers_;
};

Buffers& UnfusedHead::buffers_for(int64_t rows) {
  if (buffers_ != nullptr && buffers_->rows == rows) return *buffers_;
  buffers_ = nullptr;
  auto b = std::make_unique<Buffers>();
  const int64_t classes = spec_.classes, dim = spec_.dim, all = rows * classes;
  b->rows = rows;
  b->cosines = Buffer<float>(meter_, all);
  b->logits = Buffer<float>(meter_, all);
  if (!is_euclidean()) b->log_probabilities = Buffer<float>(meter_, all);
  b->grad_logits = Buffer<float>(meter_, all);
  b->grad_x_hat = Buffer<float>(meter_, rows * dim);
  if (!is_softmax()) {
    b->x_hat = Buffer<float>(meter_, rows * dim);
    b->grad_cosines = Buffer<float>(meter_, all);
  }
  if (spec_.loss.base == BaseKind::margin) {
    b->margined = Buffer<float>(meter_, all);
    b->grad_margined = Buffer<float>(meter_, all);
  }
  if (bf16()) {
    b->x_bf16 = Buffer<uint16_t>(meter_, rows * dim);
    b->grad_bf16 = Buffer<uint16_t>(meter_, all);
  }
  const auto f32 = memory::data_type::f32;
  const auto type = bf16() ? memory::data_type::bf16 : f32;
  const ThreadsGuard all_threads(threads_);
  b->product = std::make_unique<Product>(engine_, matrix_desc(rows, dim, type),
                                         matrix_desc(dim, classes, type, true),
                                         matrix_desc(rows, classes, f32), false);
  b->product_x = std::make_unique<Product>(engine_, matrix_desc(rows, classes, type),
                                           matrix_desc(classes, dim, type),
                                           matrix_desc(rows, dim, f32), false);
  b->product_w = std::make_unique<Product>(engine_, matrix_desc(classes, rows, type, true),
                                           matrix_desc(rows, dim, type),
                                           matrix_desc(classes, dim, f32), false);
  const size_t scratch = std::max(
      {b->product->scratch_bytes(), b->product_x->scratch_bytes(), b->product_w->scratch_bytes()});
  b->scratch = Buffer<std::byte>(meter_, static_cast<int64_t>(scratch));
  for (Product* product : {b->product.get(), b->product_x.get(), b->product_w.get()}) {
    product->bind(engine_, b->scratch.data());
  }
  buffers_ = std::move(b);
  return *buffers_;
}

void UnfusedHead::run(const Request& request) {
  require_finite_classes();
  Buffers& b = buffers_for(request.rows());
  forward(request, b);
  float* grad_w = request.grad_weights.data();
  if (request.grad_weights.empty()) {
    if (grad_w_.empty()) grad_w_ = Buffer<float>(meter_, weights_.size());
    grad_w = grad_w_.data();
  }
  backward(request, b, grad_w);
}

void UnfusedHead::forward(const Request& request, Buffers& b) {
  const int64_t rows = b.rows, classes = spec_.classes, dim = spec_.dim, all = rows * classes;
  const float* x = request.input.embeddings.data();
  if (!is_softmax()) {
    each(rows, [&](int64_t i) {
      loops_.scale(x + i * dim, static_cast<float>(rows_[i].inverse_norm), b.x_hat.data() + i * dim,
                   dim);
    });
    x = b.x_hat.data();
    each(classes, [&](int64_t j) {
      const float* w = weights_.data() + j * dim;
      class_scale_[j] = static_cast<float>(class_scale_of(double{loops_.dot(w, w, dim)}));
      loops_.scale(w, class_scale_[j], w_hat_.data() + j * dim, dim);
    });
  }
  if (bf16()) {
    each_part(rows * dim, [&](int64_t from, int64_t n) {
      loops_.to_bf16(x + from, b.x_bf16.data() + from, n);
    });
    each_part(classes * dim, [&](int64_t from, int64_t n) {
      loops_.to_bf16(w_hat() + from, w_bf16_.data() + from, n);
    });
    b.product->run(stream_, b.x_bf16.data(), w_bf16_.data(), b.cosines.data());
  } else {
    b.product->run(stream_, x, w_hat(), b.cosines.data());
  }
  each(rows, [&](int64_t i) { place_target(rows_[i], target_cosine(request, b, i), request); });
  if (is_softmax()) {
    each(rows, [&](int64_t i) {
      loops_.add_scaled(b.cosines.data() + i * classes, bias_.data(), 1.0F,
                        b.logits.data() + i * classes, classes);
    });
  } else if (is_euclidean()) {
    each(rows, [&](int64_t i) {
      loops_.scale(b.cosines.data() + i * classes, static_cast<float>(rows_[i].scale),
                   b.logits.data() + i * classes, classes);
    });
  } else {
    each_part(all, [&](int64_t from, int64_t n) {
      loops_.scale(b.cosines.data() + from, 1.0F, b.margined.data() + from, n);
    });
    each(rows, [&](int64_t i) {
      b.margined[i * classes + rows_[i].label] =
          static_cast<float>(rows_[i].logit / rows_[i].scale);
    });
    each(rows, [&](int64_t i) {
      loops_.scale(b.margined.data() + i * classes, static_cast<float>(rows_[i].scale),
                   b.logits.data() + i * classes, classes);
    });
  }
  // The target is left out of the row's sum and joined in double, so that a loss near 0 keeps its
  // digits.
  each(rows, [&](int64_t i) {
    float* logits = b.logits.data() + i * classes;
    logits[rows_[i].label] = std::numeric_limits<float>::lowest();
    float max = 0, sum = 0;
    if (is_euclidean()) {
      int32_t active = 0;
      loops_.hinge_row(logits, static_cast<float>(rows_[i].threshold), classes, &sum, &max,
                       &active);
      finish_row(request, i, {double{sum}, double{max}, active});
      return;
    }
    loops_.softmax_row(logits, classes, &max, &sum);
    finish_row(i, {double{max}, double{sum}});
    loops_.log_softmax_row(logits, static_cast<float>(rows_[i].log_sum),
                           b.log_probabilities.data() + i * classes, classes);
    b.log_probabilities[i * classes + rows_[i].label] = static_cast<float>(-losses_[i]);
  });
  weigh_rows(request);
}

// In double from the operands of the product: acos near 1 multiplies the cosine's error.
double UnfusedHead::target_cosine(const Request& request, const Buffers& b, int64_t i) const {
  const int64_t dim = spec_.dim, label = rows_[i].label;
  if (bf16()) return double{b.cosines[i * spec_.classes + label]};
  const float* x = request.input.embeddings.data() + i * dim;
  const float* w = weights_.data() + label * dim;
  double dot = 0, squares = 0;
  for (int64_t k = 0; k < dim; ++k) {
    dot += double{x[k]} * double{w[k]};
    squares += double{w[k]} * double{w[k]};
  }
  return dot * rows_[i].inverse_norm * class_scale_of(squares);
}

void UnfusedHead::backward(const Request& request, Buffers& b, float* grad_w) {
  const int64_t rows = b.rows, classes = spec_.classes, dim = spec_.dim, all = rows * classes;
  const auto at_target = [&](const Buffer<float>& values, int64_t i) -> float& {
    return values[i * classes + rows_[i].label];
  };
  each(rows, [&](int64_t i) {
    const double factor = factors_[i] / static_cast<double>(rows) * rows_[i].unit;
    if (is_euclidean()) {
      loops_.hinge_gradient_row(b.logits.data() + i * classes,
                                static_cast<float>(rows_[i].threshold), static_cast<float>(factor),
                                b.grad_logits.data() + i * classes, classes);
    } else {
      loops_.softmax_gradient_row(b.log_probabilities.data() + i * classes,
                                  static_cast<float>(factor), b.grad_logits.data() + i * classes,
                                  classes);
    }
    at_target(b.grad_logits, i) = static_cast<float>(factor * rows_[i].residual);
  });
  const float* gradient = b.grad_logits.data();
  if (is_euclidean()) {
    each(rows, [&](int64_t i) {
      loops_.scale(b.grad_logits.data() + i * classes, static_cast<float>(rows_[i].scale),
                   b.grad_cosines.data() + i * classes, classes);
    });
    gradient = b.grad_cosines.data();
  } else if (!is_softmax()) {
    each(rows, [&](int64_t i) {
      loops_.scale(b.grad_logits.data() + i * classes, static_cast<float>(rows_[i].scale),
                   b.grad_margined.data() + i * classes, classes);
    });
    each_part(all, [&](int64_t from, int64_t n) {
      loops_.scale(b.grad_margined.data() + from, 1.0F, b.grad_cosines.data() + from, n);
    });
    each(rows, [&](int64_t i) {
      at_target(b.grad_cosines, i) *= static_cast<float>(rows_[i].psi_derivative);
    });
    gradient = b.grad_cosines.data();
  } else if (request.settings != nullptr || !request.grad_bias.empty()) {
    each_part(classes, [&](int64_t from, int64_t n) {
      for (int64_t j = from; j < from + n; ++j) {
        float sum = 0;
        for (int64_t i = 0; i < rows; ++i) sum += gradient[i * classes + j];
        finish_bias(request, j, sum);
      }
    });
  }

  const float* x = is_softmax() ? request.input.embeddings.data() : b.x_hat.data();
  if (bf16()) {
    each_part(all, [&](int64_t from, int64_t n) {
      loops_.to_bf16(gradient + from, b.grad_bf16.data() + from, n);
    });
    b.product_x->run(stream_, b.grad_bf16.data(), w_bf16_.data(), b.grad_x_hat.data());
    b.product_w->run(stream_, b.grad_bf16.data(), b.x_bf16.data(), grad_w);
  } else {
    b.product_x->run(stream_, gradient, w_hat(), b.grad_x_hat.data());
    b.product_w->run(stream_, gradient, x, grad_w);
  }
  if (!request.grad_embeddings.empty()) {
    each(rows, [&](int64_t i) { embedding_backward(request, b, i); });
  }
  if (!is_softmax()) {
    each(classes, [&](int64_t j) {
      float* g = grad_w + j * dim;
      loops_.scale(g, class_scale_[j], g, dim);
      loops_.add_scaled(g, weights_.data() + j * dim, along_weights(j, g), g, dim);
    });
  }
  if (request.settings != nullptr) {
    each(classes, [&](int64_t j) {
      update_class(*request.settings, j, grad_w + j * dim, request.settings->weight_decay);
    });
  }
}

// Of x_hat = x / ||x||, and of the norm where it is the scale.
void UnfusedHead::embedding_backward(const Request& request, Buffers& b, int64_t i) const {
  const int64_t dim = spec_.dim;
  float* gradient = b.grad_x_hat.data() + i * dim;
  float* out = request.grad_embeddings.data() + i * dim;
  if (is_softmax()) {
    loops_.scale(gradient, 1.0F, out, dim);
    return;
  }
  const float* x_hat = b.x_hat.data() + i * dim;
  loops_.add_scaled(gradient, x_hat, -loops_.dot(gradient, x_hat, dim), gradient, dim);
  loops_.scale(gradient, static_cast<float>(rows_[i].inverse_norm), out, dim);
  if (spec_.loss.scales_by_norm()) {
    const int64_t row = i * spec_.classes;
    const float grad_scale =
        loops_.dot(b.grad_logits.data() + row, b.margined.data() + row, spec_.classes);
    loops_.add_scaled(out, x_hat, grad_scale, out, dim);
  }
}

}  // namespace

std::unique_ptr<CpuMarginHead> make_unfused_head(const HeadSpec& spec, const Execution& execution) {
  return std::make_unique<UnfusedHead>(spec, execution);
}

}  // namespace hardmine

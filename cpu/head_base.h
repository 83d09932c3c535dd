// What the fused and the unfused head share: state, checks, everything that is done once a row, and
// the pieces they are built from (counted buffers, prepared products, a team of threads).
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/loss_maths.h"
#include "cpu/head.h"
#include "cpu/head_loops.h"
#include "cpu/memory.h"
#include "cpu/onednn.h"

namespace hardmine {

// Bytes held and their maximum, over the buffers that report to it.
struct MemoryMeter {
  size_t held = 0;
  size_t peak = 0;
};

// Zeroed memory on a cache line boundary, counted by a meter that outlives it.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(MemoryMeter& meter, int64_t count);
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    Buffer(std::move(other)).swap(*this);
    return *this;
  }
  ~Buffer() {
    if (meter_ != nullptr) meter_->held -= bytes();
    std::free(data_);
  }
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return count_; }
  size_t bytes() const { return static_cast<size_t>(count_) * sizeof(T); }
  bool empty() const { return count_ == 0; }
  std::span<T> span() const { return {data_, static_cast<size_t>(count_)}; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    std::swap(meter_, other.meter_);
  }
  T* data_ = nullptr;
  int64_t count_ = 0;
  MemoryMeter* meter_ = nullptr;
};

template <typename T>
Buffer<T>::Buffer(MemoryMeter& meter, int64_t count) {
  if (count == 0) return;
  data_ = static_cast<T*>(take_memory(static_cast<size_t>(count) * sizeof(T), "The margin head"));
  count_ = count;
  meter_ = &meter;
  meter.held += bytes();
  meter.peak = std::max(meter.peak, meter.held);
}

// A matrix product prepared once and run on any memory of its shapes: dst = src x weights, or
// dst += src x weights.
class Product {
 public:
  // Threads are those of OpenMP at this moment. Weights may be of any format: see weights_desc().
  Product(const onednn::engine& engine, const onednn::memory::desc& src,
          const onednn::memory::desc& weights, const onednn::memory::desc& dst, bool accumulate);
  onednn::memory::desc weights_desc() const { return desc_.weights_desc(); }
  size_t scratch_bytes() const { return desc_.scratchpad_desc().get_size(); }
  // scratch: scratch_bytes() bytes, used by one run at a time.
  void bind(const onednn::engine& engine, void* scratch);
  void run(onednn::stream& stream, const void* src, const void* weights, void* dst);

 private:
  dnnl::matmul::primitive_desc desc_;
  dnnl::matmul primitive_;
  std::unordered_map<int, onednn::memory> arguments_;
};

// A row-major (or, with `transposed`, column-major) matrix.
onednn::memory::desc matrix_desc(int64_t rows, int64_t columns, onednn::memory::data_type type,
                                 bool transposed = false);

// Sets the number of OpenMP threads of the calling thread while it lives.
class ThreadsGuard {
 public:
  explicit ThreadsGuard(int threads) : before_(omp_get_max_threads()) {
    omp_set_num_threads(threads);
  }
  ~ThreadsGuard() { omp_set_num_threads(before_); }
  ThreadsGuard(const ThreadsGuard&) = delete;
  ThreadsGuard& operator=(const ThreadsGuard&) = delete;

 private:
  int before_;
};

// Calls work(w) once for every w in [0, workers), on as many threads as OpenMP gives; the first
// exception is thrown on after all have ended.
template <typename Work>
void run_team(int workers, const Work& work) {
  std::exception_ptr failure;
#pragma omp parallel num_threads(workers)
  for (int w = omp_get_thread_num(); w < workers; w += omp_get_num_threads()) {
    try {
      work(w);
    } catch (...) {
#pragma omp critical(hardmine_head_failure)
      if (failure == nullptr) failure = std::current_exception();
    }
  }
  if (failure != nullptr) std::rethrow_exception(failure);
}

// The part of [0, count) that worker w of `workers` does.
struct Range {
  int64_t from, to;
};
inline Range part(int64_t count, int w, int workers) {
  return {count * w / workers, count * (w + 1) / workers};
}

// Everything about a row of a batch that is not a vector.
struct HeadRow {
  int32_t label = 0;
  double norm = 0;            // ||x||
  double inverse_norm = 1;    // 1 / max(||x||, 1e-12): of the product's operand; 1 for softmax
  double scale = 1;           // of the logits
  double psi_derivative = 1;  // d psi / d cos at the target
  double radial = 0;          // psi - psi' cos, the target's share in d L / d ||x|| (A-Softmax)
  double plain_logit = 0;     // the target's before the margin
  double logit = 0;           // and after it
  double unit = 1;            // what dL/dlogit is given in: 1; Euclidean margin: 1 / active classes
  double residual = 0;        // dL/dlogit of the target, p - 1
  double log_sum = 0;         // ln of the softmax's denominator, so that p_j = e^(z_j - log_sum)
  double threshold = 0;       // Euclidean margin: of the logits of active classes
  bool correct = false;       // no other class has as large a logit as the target before the margin
};

class HeadBase : public CpuMarginHead {
 public:
  HeadBase(const HeadSpec& spec, const Execution& execution);

  void set_weights(std::span<const float> weights, std::span<const float> bias) override;
  void read_weights(std::span<float> weights, std::span<float> bias) const override;
  void set_centers(std::span<const float> centers) override;
  void read_centers(std::span<float> centers) const override;
  void forward_backward(const HeadInput& input, HeadOutput& output) override;
  StepStats step(const HeadInput& input, const StepSettings& settings,
                 std::span<float> grad_embeddings) override;
  size_t peak_extra_bytes() const override { return meter_.peak; }
  void time(HeadWork work, const HeadInput& input, std::span<double> ms,
            const std::atomic<bool>& cancelled) override;

  std::span<float> weights() override { return weights_.span(); }
  std::span<float> bias() override { return bias_.span(); }
  std::span<float> weight_momentum() override;
  std::span<float> bias_momentum() override;
  std::span<float> centers() override { return centers_.span(); }
  void state_changed() override;

 protected:
  double products_ms(int64_t rows);  // of one run of the bare products

  // What one pass is to leave behind. Exactly one of the two: gradients of the weights written
  // where they are wanted, or (settings != null) an SGD step made with them.
  struct Request {
    const HeadInput& input;
    LossSpec loss;  // as it is in force
    const StepSettings* settings = nullptr;
    std::span<float> grad_embeddings;
    std::span<float> grad_weights;
    std::span<float> grad_bias;
    int64_t rows() const { return static_cast<int64_t>(input.labels.size()); }
  };
  // Forward and backward of the weighted base loss. Calls place_target() and finish_row() for every
  // row and weigh_rows() when all are finished.
  virtual void run(const Request& request) = 0;

  bool is_softmax() const { return spec_.loss.base == BaseKind::softmax; }
  bool is_euclidean() const { return spec_.loss.base == BaseKind::euclidean_margin; }
  // The target's logits from its cosine (softmax: its logit).
  void place_target(HeadRow& row, double cosine, const Request& request) const;
  // The loss from the softmax, or the hinges, over all other classes.
  void finish_row(int64_t i, const SoftmaxSum<double>& others);
  void finish_row(const Request& request, int64_t i, const HingeSum<double>& others);
  // Weighting and checks, once every row has its loss.
  void weigh_rows(const Request& request);
  // d loss / d x_i from `gradient` = sum_j dL/dz_j (psi' at the target) w_hat_j, which it may
  // overwrite; `operand` is x_i times its inverse norm.
  void embedding_gradient(int64_t i, float* gradient, const float* operand, float* out) const;
  // What rows' gradients are multiplied by for the class weights' gradient: factor / N * unit *
  // scale.
  double row_factor(int64_t i) const;
  // 1 / max(norm, 1e-12) of a class (softmax: 1) from its sum of squares; NaN when that is not
  // finite.
  double class_scale_of(double sum_of_squares) const;
  // The backward of w_hat = w / ||w|| is g - (g.w_hat) w_hat with g = dL/dw_hat / ||w||: the
  // multiple of w to add to g. 0 for softmax.
  float along_weights(int64_t j, const float* gradient) const;
  // SGD of class j; `pull` times its weights is added to the gradient (decay included).
  void update_class(const StepSettings& settings, int64_t j, const float* gradient, float pull);
  void finish_bias(const Request& request, int64_t j, float gradient);
  void require_finite_classes() const;

  const HeadSpec spec_;
  const Precision precision_;
  const int threads_;
  const HeadLoops& loops_;
  onednn::engine engine_;
  onednn::stream stream_;
  MemoryMeter meter_;        // beyond weights, momentum and gradients
  MemoryMeter state_meter_;  // those

  Buffer<float> weights_, weight_momentum_;     // [classes, dim]
  Buffer<float> bias_, bias_momentum_;          // [classes] or empty
  Buffer<float> centers_;                       // [classes, dim] or empty
  Buffer<float> class_scale_;                   // [classes]
  Buffer<HeadRow> rows_;                        // of the present batch
  Buffer<double> losses_, weighted_, factors_;  // [rows]
  Buffer<int64_t> by_label_;                    // rows in the order of (label, row)

 private:
  struct WholeProducts;

  void prepare_rows(const Request& request);
  void need_momentum();
  double mean_cosine(const HeadInput& input) const;
  // The center loss, 0 where there is none.
  double center_loss(const HeadInput& input) const;
  // Adds its gradient where those of the embeddings are wanted.
  void add_center_gradient(const Request& request) const;
  void move_centers(const HeadInput& input) const;

  Buffer<double> sums_;  // [2, dim]: of all normalised embeddings, of one identity's
  std::shared_ptr<WholeProducts> whole_products_;
};

std::unique_ptr<CpuMarginHead> make_fused_head(const HeadSpec& spec, const Execution& execution);
std::unique_ptr<CpuMarginHead> make_unfused_head(const HeadSpec& spec, const Execution& execution);

}  // namespace hardmine

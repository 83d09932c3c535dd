#include "cuda/head.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "core/head_checks.h"
#include "cuda/device.h"
#include "cuda/head_unfused_pipeline.h"

namespace hardmine::cuda {
namespace {

// Classes of a chunk are a multiple of a product's tile.
constexpr int64_t kWidthTile = 128;

int chunk_width(int64_t rows, int64_t dim, int64_t classes, int64_t operand_bytes,
                int64_t chunk_bytes) {
  // Of a class: its probabilities, its weights as an operand, its gradient in fp32.
  const int64_t class_bytes = operand_bytes * (rows + dim) + int64_t{sizeof(float)} * dim;
  if (classes * class_bytes <= 2 * chunk_bytes) return static_cast<int>(HeadShape::padded(classes));
  const int64_t most = std::max<int64_t>(kWidthTile, chunk_bytes / class_bytes);
  const int64_t chunks = (classes + most - 1) / most;
  const int64_t even = (classes + chunks - 1) / chunks;
  return static_cast<int>((even + kWidthTile - 1) / kWidthTile * kWidthTile);
}

void fill_zero(void* memory, size_t bytes, const Stream& stream, const char* what) {
  check(cudaMemsetAsync(memory, 0, bytes, stream.get()), what);
}

template <typename T>
void copy_async(T* to, const T* from, size_t count, cudaMemcpyKind kind, const Stream& stream,
                const char* what) {
  if (count == 0) return;
  check(cudaMemcpyAsync(to, from, count * sizeof(T), kind, stream.get()),
        "the copy of " + std::string(what));
}

void copy_to_host(std::span<float> to, const float* from, const Stream& stream, const char* what) {
  copy_async(to.data(), from, to.size(), cudaMemcpyDeviceToHost, stream, what);
  stream.synchronize();
}

struct StateTensor {
  const char* name;  // as messages call it
  float* data;
  int64_t count;
};

// What the two implementations share. T is the type of the products' operands.
template <typename T>
class HeadBase : public CudaHead {
 public:
  explicit HeadBase(const HeadSpec& spec) : spec_(spec) {}

  void layout_state(Arena& arena) override {
    const int64_t size = spec_.classes * spec_.dim;
    const int64_t biases = is_softmax() ? spec_.classes : 0;
    state_.weights = arena.take<float>(size);
    state_.velocity = arena.take<float>(size);
    state_.norms = arena.take<float>(spec_.classes);
    state_.class_weights = arena.take<T>(HeadShape::padded(spec_.classes) * spec_.dim);
    state_.bias = arena.take<float>(biases);
    state_.bias_velocity = arena.take<float>(biases);
    state_.centers = arena.take<float>(spec_.loss.has_centers() ? size : 0);
    state_.class_rows = arena.take<int>(spec_.classes);
  }

  void initialise(const Stream& stream) override {
    for (const HeadTensor tensor :
         {HeadTensor::weights, HeadTensor::bias, HeadTensor::weight_momentum,
          HeadTensor::bias_momentum, HeadTensor::centers}) {
      const StateTensor t = tensor_of(tensor);
      if (t.count > 0)
        fill_zero(t.data, static_cast<size_t>(t.count) * sizeof(float), stream, t.name);
    }
    const int64_t size = HeadShape::padded(spec_.classes) * spec_.dim;
    fill_zero(state_.class_weights, static_cast<size_t>(size) * sizeof(T), stream, "class weights");
    static_assert(kNoRow == -1);  // all bits set
    check(cudaMemsetAsync(state_.class_rows, 0xFF, static_cast<size_t>(spec_.classes) * sizeof(int),
                          stream.get()),
          "cudaMemsetAsync of the classes' rows");
    weights_changed(stream);
  }

  void read(HeadTensor tensor, std::span<float> values, const Stream& stream) const override {
    const StateTensor t = tensor_of(tensor);
    require_size(t.name, values.size(), t.count);
    copy_to_host(values, t.data, stream, t.name);
  }

  void write(HeadTensor tensor, std::span<const float> values, const Stream& stream) override {
    const StateTensor t = tensor_of(tensor);
    require_size(t.name, values.size(), t.count);
    copy_async(t.data, values.data(), values.size(), cudaMemcpyHostToDevice, stream, t.name);
    if (tensor == HeadTensor::weights) weights_changed(stream);
    stream.synchronize();
  }

  void join(const Stream& stream) override { side_.join(stream); }

  const float* base_loss() const override { return rows_.base_loss; }
  const float* weighted_loss() const override { return rows_.weighted_loss; }

  [[noreturn]] void throw_non_finite(const float* embeddings, const Stream& stream) const override {
    const auto on_host = [&](const float* from, int64_t count, const char* what) {
      std::vector<float> values(static_cast<size_t>(count));
      copy_to_host(values, from, stream, what);
      return values;
    };
    const auto dim = static_cast<size_t>(spec_.dim);
    const std::vector<float> x = on_host(embeddings, shape_.rows * spec_.dim, "embeddings");
    for (int row = 0; row < shape_.rows; ++row)
      require_embedding(row, std::span(x).subspan(static_cast<size_t>(row) * dim, dim));
    const int64_t j = first_non_finite(on_host(state_.norms, spec_.classes, "class norms"));
    if (j >= 0)
      throw_bad_class(j, on_host(state_.weights + j * spec_.dim, spec_.dim, "class weights"));
    if (is_softmax()) {
      const std::vector<float> bias = on_host(state_.bias, spec_.classes, "biases");
      if (const int64_t b = first_non_finite(bias); b >= 0)
        throw_bad_bias(b, bias[static_cast<size_t>(b)]);
    }
    const std::vector<float> centers =
        on_host(state_.centers, tensor_of(HeadTensor::centers).count, "centers");
    if (const int64_t at = first_non_finite(centers); at >= 0) {
      const int64_t c = at / spec_.dim;
      throw_bad_center(c, std::span(centers).subspan(static_cast<size_t>(c) * dim, dim));
    }
    const std::vector<float> losses = on_host(rows_.base_loss, shape_.rows, "losses");
    const int64_t row = std::max<int64_t>(first_non_finite(losses), 0);
    throw_bad_loss(row, losses[static_cast<size_t>(row)]);
  }

 protected:
  bool is_softmax() const { return spec_.loss.base == BaseKind::softmax; }

  void layout_common(Arena& arena, int rows, int width) {
    const int64_t size = rows * spec_.dim;
    shape_ = {rows, static_cast<int>(spec_.dim), spec_.classes, width};
    rows_.normalised = arena.take<T>(size);
    rows_.next_row = arena.take<int>(rows);
    rows_.targets = arena.take<RowTarget>(rows);
    const bool euclidean = spec_.loss.base == BaseKind::euclidean_margin;
    rows_.sums = arena.take<SoftmaxSum<float>>(euclidean ? 0 : rows);
    rows_.hinges = arena.take<HingeSum<float>>(euclidean ? rows : 0);
    rows_.center_distances = arena.take<double>(spec_.loss.has_centers() ? rows : 0);
    rows_.gradients = arena.take<RowGradient>(rows);
    rows_.base_loss = arena.take<float>(rows);
    rows_.weighted_loss = arena.take<float>(rows);
    rows_.similarity = arena.take<SimilarityPart>(shape_.similarity_parts());
    rows_.row_scale = arena.take<float>(1);
    rows_.non_finite = arena.take<int>(1);
    rows_.embedding_products = arena.take<float>(size);
  }

  StateTensor tensor_of(HeadTensor tensor) const {
    const int64_t size = spec_.classes * spec_.dim;
    const int64_t biases = is_softmax() ? spec_.classes : 0;
    switch (tensor) {
      case HeadTensor::weights:
        return {"class weights", state_.weights, size};
      case HeadTensor::bias:
        return {"biases", state_.bias, biases};
      case HeadTensor::weight_momentum:
        return {"momenta of the class weights", state_.velocity, size};
      case HeadTensor::centers:
        return {"centers", state_.centers, spec_.loss.has_centers() ? size : 0};
      default:
        return {"momenta of the biases", state_.bias_velocity, biases};
    }
  }

  void weights_changed(const Stream& stream) const {
    normalise(state_.weights, spec_.classes, static_cast<int>(spec_.dim), !is_softmax(),
              state_.norms, state_.class_weights, stream);
  }

  const HeadSpec spec_;
  HeadShape shape_{};
  HeadState<T> state_{};
  HeadRows<T> rows_{};
  HeadSide side_;
};

template <typename T>
class FusedHead : public HeadBase<T> {
 public:
  FusedHead(const HeadSpec& spec, int64_t chunk_bytes)
      : HeadBase<T>(spec), chunk_bytes_(chunk_bytes) {}

  void layout_rows(Arena& arena, int rows) override {
    const int64_t dim = this->spec_.dim;
    const int width = chunk_width(rows, dim, this->spec_.classes, sizeof(T), chunk_bytes_);
    this->layout_common(arena, rows, width);
    chunks_.scaled = arena.take<T>(rows * dim);
    chunks_.logits = arena.take<float>(int64_t{rows} * width);
    chunks_.probabilities = arena.take<T>(int64_t{rows} * width);
    for (float*& products : chunks_.weight_products) products = nullptr;
    for (int i = 0; i < std::min(2, this->shape_.chunks()); ++i)
      chunks_.weight_products[i] = arena.take<float>(width * dim);
  }

  void enqueue(const HeadPass& pass, Products& products, const Stream& stream) override {
    HeadProducts<T> of_head{products, this->shape_.rows, this->shape_.dim};
    run_head(this->state_, this->rows_, chunks_, this->shape_, this->spec_.loss, pass, of_head,
             stream, this->side_);
  }

  void enqueue_products(Products& products, const Stream&) override {
    HeadProducts<T> of_head{products, this->shape_.rows, this->shape_.dim};
    for (int index = 0; index < this->shape_.chunks(); ++index) {
      const Chunk chunk = this->shape_.chunk(index);
      const T* weights = this->state_.class_weights + chunk.first_class * this->shape_.dim;
      of_head.logits(this->rows_.normalised, weights, chunk.padded, chunks_.logits);
      of_head.embedding_gradient(chunks_.probabilities, weights, chunk.padded,
                                 this->rows_.embedding_products);
      of_head.weight_gradient(chunks_.probabilities, chunks_.scaled, chunk.padded,
                              chunks_.weight_products[0]);
    }
  }

 private:
  const int64_t chunk_bytes_;
  HeadChunks<T> chunks_{};
};

template <typename T>
class UnfusedHead : public HeadBase<T> {
 public:
  using HeadBase<T>::HeadBase;

  void layout_rows(Arena& arena, int rows) override {
    const int64_t padded = HeadShape::padded(this->spec_.classes);
    const bool cosines = !this->is_softmax();
    const bool margin = this->spec_.loss.base == BaseKind::margin;
    const bool euclidean = this->spec_.loss.base == BaseKind::euclidean_margin;
    this->layout_common(arena, rows, static_cast<int>(padded));
    const auto matrix = [&](bool used) {
      return arena.take<float>(used ? int64_t{rows} * padded : int64_t{0});
    };
    buffers_.norms = arena.take<float>(rows);
    buffers_.cosines = matrix(true);
    buffers_.margined = matrix(margin);
    buffers_.logits = matrix(true);
    buffers_.log_probabilities = matrix(!euclidean);
    buffers_.grad_logits = matrix(true);
    buffers_.grad_margined = matrix(margin);
    buffers_.grad_cosines = matrix(cosines);
    buffers_.operand =
        arena.take<T>(std::is_same_v<T, float> ? int64_t{0} : int64_t{rows} * padded);
    buffers_.grad_scale = arena.take<float>(rows);
    buffers_.grad_weights = arena.take<float>(padded * this->spec_.dim);
    buffers_.grad_bias = arena.take<float>(cosines ? 0 : padded);
  }

  void enqueue(const HeadPass& pass, Products& products, const Stream& stream) override {
    WholeProducts of_head{{products, this->shape_.rows, this->shape_.dim}};
    run_unfused_head(this->state_, this->rows_, buffers_, this->shape_, this->spec_.loss, pass,
                     of_head, stream, this->side_);
  }

  void enqueue_products(Products& products, const Stream&) override {
    WholeProducts of_head{{products, this->shape_.rows, this->shape_.dim}};
    const int padded = this->shape_.width;
    const T* operand = buffers_.operand;
    if constexpr (std::is_same_v<T, float>) operand = buffers_.grad_logits;
    of_head.logits(this->rows_.normalised, this->state_.class_weights, padded, buffers_.cosines);
    of_head.embedding_gradient(operand, this->state_.class_weights, padded,
                               this->rows_.embedding_products);
    of_head.weight_gradient(operand, this->rows_.normalised, padded, buffers_.grad_weights);
  }

 private:
  // All classes are one chunk: the gradient of the embeddings is a product, not a sum of products.
  struct WholeProducts : HeadProducts<T> {
    void embedding_gradient(const T* gradient, const T* class_weights, int64_t width, float* out) {
      const ProductShape shape{
          .m = this->rows, .n = this->dim, .k = width, .operands = number_type<T>()};
      this->products.multiply(shape, 1, gradient, class_weights, 0, out);
    }
  };

  UnfusedBuffers<T> buffers_{};
};

template <typename T>
std::unique_ptr<CudaHead> make_head(const HeadSpec& spec, int64_t chunk_bytes) {
  if (spec.implementation == Implementation::fused)
    return std::make_unique<FusedHead<T>>(spec, chunk_bytes);
  return std::make_unique<UnfusedHead<T>>(spec);
}

// ---- The seam's head ----

class CudaMarginHead : public MarginHead {
 public:
  CudaMarginHead(const HeadSpec& spec, const Execution& execution, const CublasLt& library)
      : spec_(spec), device_(execution.device) {
    use_device(device_);
    host_settings_ = PinnedArray<StepParameters>(1);
    host_record_ = PinnedArray<StepRecord>(1);
    head_ = make_device_head(spec, execution.precision);
    stream_.emplace();
    const size_t workspace_bytes = product_workspace_bytes(compute_major());
    void* workspace = nullptr;
    const auto layout = [&](Arena arena) {
      head_->layout_state(arena);
      workspace = arena.take<char>(static_cast<int64_t>(workspace_bytes));
      return arena.bytes();
    };
    state_ = allocate_device(layout(Arena()), "a margin head of " + size_text());
    layout(Arena(state_));
    products_.emplace(library, stream_->get(), workspace, workspace_bytes);
    head_->initialise(*stream_);
    stream_->synchronize();
  }

  ~CudaMarginHead() override { use_device(device_, std::nothrow); }

  void set_weights(std::span<const float> weights, std::span<const float> bias) override {
    use_device(device_);
    require_size("class weights", weights.size(), spec_.classes * spec_.dim);
    require_size("biases", bias.size(), biases());
    head_->write(HeadTensor::weights, weights, *stream_);
    head_->write(HeadTensor::bias, bias, *stream_);
  }

  void read_weights(std::span<float> weights, std::span<float> bias) const override {
    use_device(device_);
    require_size("class weights", weights.size(), spec_.classes * spec_.dim);
    require_size("biases", bias.size(), biases());
    head_->read(HeadTensor::weights, weights, *stream_);
    head_->read(HeadTensor::bias, bias, *stream_);
  }

  void set_centers(std::span<const float> centers) override {
    use_device(device_);
    head_->write(HeadTensor::centers, centers, *stream_);
  }

  void read_centers(std::span<float> centers) const override {
    use_device(device_);
    head_->read(HeadTensor::centers, centers, *stream_);
  }

  void forward_backward(const HeadInput& input, HeadOutput& output) override;
  StepStats step(const HeadInput& input, const StepSettings& settings,
                 std::span<float> grad_embeddings) override;

  size_t peak_extra_bytes() const override { return peak_extra_; }
  void time(HeadWork work, const HeadInput& input, std::span<double> ms,
            const std::atomic<bool>& cancelled) override;

 private:
  // A batch's memory on the device.
  struct Inputs {
    float* embeddings;       // [rows, dim]
    int* labels;             // [rows]
    float* grad_embeddings;  // [rows, dim]
    StepParameters* settings;
    StepRecord* record;
    unsigned long long* steps;
  };

  int64_t biases() const { return spec_.loss.base == BaseKind::softmax ? spec_.classes : 0; }
  std::string size_text() const {
    return std::to_string(spec_.classes) + " classes and " + std::to_string(spec_.dim) +
           " dimensions";
  }
  void make_room(int64_t rows);
  void upload(const HeadInput& input);
  HeadPass pass() const {
    HeadPass pass;
    pass.embeddings = inputs_.embeddings;
    pass.labels = inputs_.labels;
    pass.ring = {inputs_.record, inputs_.steps, 1};
    pass.grad_embeddings = inputs_.grad_embeddings;
    return pass;
  }
  // Copies the record to the host, waits, and throws where a loss is not finite.
  const StepRecord& finish();
  HeadPass pass_with_gradients();  // of weights and biases, which stay on the device
  void enqueue(const HeadPass& pass) {
    head_->enqueue(pass, *products_, *stream_);
    head_->join(*stream_);
  }
  void enqueue_inputs();
  void enqueue_step();

  const HeadSpec spec_;
  const int device_;
  std::unique_ptr<CudaHead> head_;
  std::optional<Stream> stream_;
  DeviceBlock state_;      // and the products' workspace
  DeviceBlock batch_;      // for rows_ rows
  DeviceBlock gradients_;  // of the weights and biases, once they were wanted
  std::optional<Products> products_;
  int64_t rows_ = 0;
  Inputs inputs_{};
  PinnedArray<float> host_embeddings_;
  PinnedArray<int> host_labels_;
  PinnedArray<StepParameters> host_settings_;
  PinnedArray<StepRecord> host_record_;
  bool step_was_run_ = false;                // with rows_ rows: then it can be captured
  std::optional<CapturedGraph> step_graph_;  // of rows_ rows
  size_t peak_extra_ = 0;
};

void CudaMarginHead::make_room(int64_t rows) {
  if (rows == rows_) return;
  if (rows > std::numeric_limits<int>::max()) {
    throw Error(codes::kInput, "The batch has " + std::to_string(rows) +
                                   " rows; the CUDA head takes at most 2147483647.");
  }
  rows_ = 0;
  step_graph_.reset();
  step_was_run_ = false;
  size_t of_inputs = 0;
  const auto layout = [&](Arena arena) {
    inputs_.embeddings = arena.take<float>(rows * spec_.dim);
    inputs_.labels = arena.take<int>(rows);
    inputs_.grad_embeddings = arena.take<float>(rows * spec_.dim);
    of_inputs = arena.bytes();
    inputs_.settings = arena.take<StepParameters>(1);
    inputs_.record = arena.take<StepRecord>(1);
    inputs_.steps = arena.take<unsigned long long>(1);
    head_->layout_rows(arena, static_cast<int>(rows));
    return arena.bytes();
  };
  const size_t bytes = layout(Arena());
  batch_ = {};
  batch_ = allocate_device(bytes,
                           "a margin head of " + size_text() + " at batch " + std::to_string(rows));
  layout(Arena(batch_));
  fill_zero(inputs_.steps, sizeof *inputs_.steps, *stream_, "the step counter");
  host_embeddings_ = PinnedArray<float>(static_cast<size_t>(rows * spec_.dim));
  host_labels_ = PinnedArray<int>(static_cast<size_t>(rows));
  // Weights and biases with their momenta, and centers.
  const int64_t of_classes = (spec_.loss.has_centers() ? 3 : 2) * spec_.dim;
  const size_t of_state =
      static_cast<size_t>(spec_.classes * of_classes + 2 * biases()) * sizeof(float);
  peak_extra_ = std::max(peak_extra_, state_.bytes() - of_state + bytes - of_inputs);
  rows_ = rows;
}

void CudaMarginHead::upload(const HeadInput& input) {
  std::copy(input.embeddings.begin(), input.embeddings.end(), host_embeddings_.data());
  std::copy(input.labels.begin(), input.labels.end(), host_labels_.data());
}

HeadPass CudaMarginHead::pass_with_gradients() {
  HeadPass wanted = pass();
  const auto layout = [&](Arena arena) {
    wanted.grad_weights = arena.take<float>(spec_.classes * spec_.dim);
    wanted.grad_bias = arena.take<float>(biases() == 0 ? 0 : HeadShape::padded(biases()));
    return arena.bytes();
  };
  const size_t bytes = layout(Arena());
  if (gradients_.bytes() == 0)
    gradients_ = allocate_device(bytes, "the gradients of " + size_text());
  layout(Arena(gradients_));
  return wanted;
}

// The host's arrays are read when it runs.
void CudaMarginHead::enqueue_inputs() {
  copy_async(inputs_.embeddings, host_embeddings_.data(), host_embeddings_.size(),
             cudaMemcpyHostToDevice, *stream_, "embeddings");
  copy_async(inputs_.labels, host_labels_.data(), host_labels_.size(), cudaMemcpyHostToDevice,
             *stream_, "labels");
}

// The part of a step that is the same each time.
void CudaMarginHead::enqueue_step() {
  enqueue_inputs();
  copy_async(inputs_.settings, host_settings_.data(), 1, cudaMemcpyHostToDevice, *stream_,
             "step settings");
  HeadPass step = pass();
  step.settings = inputs_.settings;
  enqueue(step);
  copy_async(host_record_.data(), inputs_.record, 1, cudaMemcpyDeviceToHost, *stream_,
             "step figures");
}

const StepRecord& CudaMarginHead::finish() {
  stream_->synchronize();
  if (host_record_[0].non_finite > 0) head_->throw_non_finite(inputs_.embeddings, *stream_);
  return host_record_[0];
}

void CudaMarginHead::forward_backward(const HeadInput& input, HeadOutput& output) {
  require_head_input(input, spec_);
  const auto rows = static_cast<int64_t>(input.labels.size());
  const auto require_room = [](const char* what, std::span<float> span, int64_t expected) {
    if (!span.empty()) require_size(what, span.size(), expected);
  };
  require_room("base losses", output.base_loss, rows);
  require_room("weighted losses", output.weighted_loss, rows);
  require_room("gradients of the embeddings", output.grad_embeddings, rows * spec_.dim);
  require_room("gradients of the class weights", output.grad_weights, spec_.classes * spec_.dim);
  require_room("gradients of the biases", output.grad_bias, biases());
  require_embeddings(input, spec_);

  use_device(device_);
  make_room(rows);
  const bool of_weights = !output.grad_weights.empty() || !output.grad_bias.empty();
  const HeadPass wanted = of_weights ? pass_with_gradients() : pass();
  upload(input);
  enqueue_inputs();
  enqueue(wanted);
  copy_async(host_record_.data(), inputs_.record, 1, cudaMemcpyDeviceToHost, *stream_,
             "step figures");
  output.loss = finish().loss;
  copy_to_host(output.base_loss, head_->base_loss(), *stream_, "losses");
  copy_to_host(output.weighted_loss, head_->weighted_loss(), *stream_, "weighted losses");
  copy_to_host(output.grad_embeddings, inputs_.grad_embeddings, *stream_, "gradients");
  copy_to_host(output.grad_weights, wanted.grad_weights, *stream_, "gradients");
  copy_to_host(output.grad_bias, wanted.grad_bias, *stream_, "gradients");
}

StepStats CudaMarginHead::step(const HeadInput& input, const StepSettings& settings,
                               std::span<float> grad_embeddings) {
  require_head_input(input, spec_);
  const auto rows = static_cast<int64_t>(input.labels.size());
  if (!grad_embeddings.empty())
    require_size("gradients of the embeddings", grad_embeddings.size(), rows * spec_.dim);
  require_step_settings(spec_, settings);
  require_embeddings(input, spec_);

  use_device(device_);
  make_room(rows);
  upload(input);
  host_settings_[0] = parameters_of(settings);
  if (step_was_run_) {
    if (!step_graph_) step_graph_.emplace(*stream_, [this] { enqueue_step(); });
    step_graph_->launch(*stream_);
  } else {
    enqueue_step();
    step_was_run_ = true;
  }
  const StepStats stats = stats_of(finish(), rows);
  copy_to_host(grad_embeddings, inputs_.grad_embeddings, *stream_, "gradients");
  return stats;
}

void CudaMarginHead::time(HeadWork work, const HeadInput& input, std::span<double> ms,
                          const std::atomic<bool>& cancelled) {
  require_head_input(input, spec_);
  require_embeddings(input, spec_);
  use_device(device_);
  make_room(static_cast<int64_t>(input.labels.size()));
  upload(input);
  enqueue_inputs();
  HeadPass timed = work == HeadWork::forward_backward ? pass_with_gradients() : pass();
  if (work == HeadWork::step) {
    host_settings_[0] = parameters_of(StepSettings{});
    copy_async(inputs_.settings, host_settings_.data(), 1, cudaMemcpyHostToDevice, *stream_,
               "step settings");
    timed.settings = inputs_.settings;
  }
  enqueue(pass());  // products of what a step multiplies: zeros would take less power
  const TimedWork runs(*stream_, [&] {
    if (work == HeadWork::products) {
      head_->enqueue_products(*products_, *stream_);
    } else {
      enqueue(timed);
    }
  });
  for (double& run_ms : ms) {
    if (cancelled) return;
    run_ms = runs.milliseconds();
  }
}

}  // namespace

std::unique_ptr<CudaHead> make_device_head(const HeadSpec& spec, Precision precision,
                                           int64_t chunk_bytes) {
  require_head_spec(spec, kMaxHeadDim);
  switch (precision) {
    case Precision::fp16:
      return make_head<__half>(spec, chunk_bytes);
    case Precision::bf16:
      return make_head<__nv_bfloat16>(spec, chunk_bytes);
    default:
      return make_head<float>(spec, chunk_bytes);
  }
}

std::unique_ptr<MarginHead> make_cuda_head(const HeadSpec& spec, const Execution& execution,
                                           const CublasLt& library) {
  if (execution.topology.world != 1) {
    throw Error(codes::kConfig, "The CUDA backend runs in one process, not in " +
                                    std::to_string(execution.topology.world) +
                                    "; start it without a rendezvous.");
  }
  return std::make_unique<CudaMarginHead>(spec, execution, library);
}

void require_step_settings(const HeadSpec& spec, const StepSettings& settings) {
  require_base(in_force(spec.loss, settings));
}

StepParameters parameters_of(const StepSettings& settings) {
  return {settings.lr,
          settings.momentum,
          settings.weight_decay,
          settings.decay_all ? 1 : 0,
          settings.margin_factor,
          settings.lambda};
}

StepStats stats_of(const StepRecord& record, int64_t rows) {
  return {.loss = record.loss,
          .base_loss = record.base_loss,
          .rows = rows,
          .correct = record.correct,
          .silenced = record.silenced,
          .kept = record.kept,
          .amplified = record.amplified,
          .mean_cosine = record.mean_cosine,
          .embedding_norm = record.embedding_norm,
          .hardest = {.row = record.hardest_row,
                      .base_loss = record.hardest_loss,
                      .gradient_weight = record.hardest_weight}};
}

}  // namespace hardmine::cuda

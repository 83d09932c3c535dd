// The margin head's state, checks and per-row work, shared by its two implementations.
#include "cpu/head.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "core/head_checks.h"
#include "cpu/head_base.h"
#include "cpu/threads.h"

namespace hardmine {

using onednn::memory;

namespace {

constexpr double kNormFloor = 1e-12;  // torch.nn.functional.normalize's eps

HeadSpec checked(const HeadSpec& spec) {
  require_head_spec(spec, std::numeric_limits<int32_t>::max());
  return spec;
}

Precision checked_precision(const Execution& execution) {
  if (execution.precision == Precision::fp16) {
    throw Error(codes::kConfig, "The CPU has no fp16 products; use precision fp32 or bf16.");
  }
  if (execution.topology.world != 1) {
    throw Error(codes::kConfig, "The CPU backend runs in one process, not in " +
                                    std::to_string(execution.topology.world) +
                                    "; start it without a rendezvous.");
  }
  return execution.precision;
}

int checked_threads(const Execution& execution) {
  constexpr int kMostThreads = 4096;  // far above any machine: a wrong unit or sign, not a wish
  if (execution.threads < 0 || execution.threads > kMostThreads) {
    throw Error(codes::kConfig, "threads is " + std::to_string(execution.threads) +
                                    "; it must be 0 (all physical cores) to 4096.");
  }
  return execution.threads == 0 ? physical_cores() : execution.threads;
}

double now_ms() {
  return std::chrono::duration<double, std::milli>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

const HeadLoops& head_loops() {
#if defined(__x86_64__)
  // x86-64-v4 and x86-64-v3, which the two variants are compiled for.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512::kHeadLoops;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")) {
    return avx2::kHeadLoops;
  }
#endif
  return baseline::kHeadLoops;
}

// ---- Products ----

memory::desc matrix_desc(int64_t rows, int64_t columns, memory::data_type type, bool transposed) {
  return {{rows, columns}, type, transposed ? memory::dims{1, rows} : memory::dims{columns, 1}};
}

Product::Product(const onednn::engine& engine, const memory::desc& src, const memory::desc& weights,
                 const memory::desc& dst, bool accumulate) {
  onednn::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);  // oneDNN's own belongs to one thread
  if (accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0F);
    attr.set_post_ops(sum);
  }
  desc_ = onednn::matmul_desc(engine, src, weights, dst, attr);
  primitive_ = onednn::checked("a matrix product", [&] { return dnnl::matmul(desc_); });
}

void Product::bind(const onednn::engine& engine, void* scratch) {
  const auto on = [&](const memory::desc& desc, void* data) { return memory(desc, engine, data); };
  arguments_ = {{DNNL_ARG_SRC, on(desc_.src_desc(), nullptr)},
                {DNNL_ARG_WEIGHTS, on(desc_.weights_desc(), nullptr)},
                {DNNL_ARG_DST, on(desc_.dst_desc(), nullptr)},
                {DNNL_ARG_SCRATCHPAD, on(desc_.scratchpad_desc(), scratch)}};
}

void Product::run(onednn::stream& stream, const void* src, const void* weights, void* dst) {
  onednn::checked("to run a matrix product", [&] {
    arguments_.at(DNNL_ARG_SRC).set_data_handle(const_cast<void*>(src));
    arguments_.at(DNNL_ARG_WEIGHTS).set_data_handle(const_cast<void*>(weights));
    arguments_.at(DNNL_ARG_DST).set_data_handle(dst);
    primitive_.execute(stream, arguments_);
    stream.wait();
  });
}

// ---- State ----

HeadBase::HeadBase(const HeadSpec& spec, const Execution& execution)
    : spec_(checked(spec)),
      precision_(checked_precision(execution)),
      threads_(checked_threads(execution)),
      loops_(head_loops()),
      engine_(onednn::engine::kind::cpu, 0),
      stream_(engine_) {
  omp_set_num_threads(threads_);
  weights_ = Buffer<float>(state_meter_, spec_.classes * spec_.dim);
  if (is_softmax()) bias_ = Buffer<float>(state_meter_, spec_.classes);
  if (spec_.loss.has_centers()) centers_ = Buffer<float>(state_meter_, weights_.size());
  class_scale_ = Buffer<float>(meter_, spec_.classes);
  sums_ = Buffer<double>(meter_, 2 * spec_.dim);
  state_changed();
}

void HeadBase::set_weights(std::span<const float> weights, std::span<const float> bias) {
  require_size("class weights", weights.size(), weights_.size());
  require_size("biases", bias.size(), bias_.size());
  std::copy(weights.begin(), weights.end(), weights_.data());
  std::copy(bias.begin(), bias.end(), bias_.data());
  state_changed();
}

void HeadBase::read_weights(std::span<float> weights, std::span<float> bias) const {
  require_size("class weights", weights.size(), weights_.size());
  require_size("biases", bias.size(), bias_.size());
  std::copy_n(weights_.data(), weights_.size(), weights.begin());
  std::copy_n(bias_.data(), bias_.size(), bias.begin());
}

void HeadBase::set_centers(std::span<const float> centers) {
  require_size("centers", centers.size(), centers_.size());
  std::copy(centers.begin(), centers.end(), centers_.data());
}

void HeadBase::read_centers(std::span<float> centers) const {
  require_size("centers", centers.size(), centers_.size());
  std::copy_n(centers_.data(), centers_.size(), centers.begin());
}

void HeadBase::need_momentum() {
  if (weight_momentum_.empty()) weight_momentum_ = Buffer<float>(state_meter_, weights_.size());
  if (bias_momentum_.empty()) bias_momentum_ = Buffer<float>(state_meter_, bias_.size());
}

std::span<float> HeadBase::weight_momentum() {
  need_momentum();
  return weight_momentum_.span();
}

std::span<float> HeadBase::bias_momentum() {
  need_momentum();
  return bias_momentum_.span();
}

void HeadBase::state_changed() {
  run_team(threads_, [&](int w) {
    const Range classes = part(spec_.classes, w, threads_);
    for (int64_t j = classes.from; j < classes.to; ++j) {
      const float* weight = weights_.data() + j * spec_.dim;
      class_scale_[j] =
          static_cast<float>(class_scale_of(double{loops_.dot(weight, weight, spec_.dim)}));
    }
  });
}

double HeadBase::class_scale_of(double sum_of_squares) const {
  if (!std::isfinite(sum_of_squares)) return std::numeric_limits<double>::quiet_NaN();
  if (is_softmax()) return 1;
  return 1 / std::max(std::sqrt(sum_of_squares), kNormFloor);
}

// ---- Checks ----

void HeadBase::require_finite_classes() const {
  const int64_t j = first_non_finite(class_scale_.span());
  if (j >= 0) throw_bad_class(j, weights_.span().subspan(j * spec_.dim, spec_.dim));
  const int64_t b = first_non_finite(bias_.span());
  if (b >= 0) throw_bad_bias(b, bias_[b]);
}

// ---- Rows ----

void HeadBase::prepare_rows(const Request& request) {
  const int64_t rows = request.rows();
  if (rows_.size() != rows) {
    rows_ = {}, losses_ = {}, weighted_ = {}, factors_ = {}, by_label_ = {};
    rows_ = Buffer<HeadRow>(meter_, rows);
    losses_ = Buffer<double>(meter_, rows);
    weighted_ = Buffer<double>(meter_, rows);
    factors_ = Buffer<double>(meter_, rows);
    by_label_ = Buffer<int64_t>(meter_, rows);
  }
  for (int64_t i = 0; i < rows; ++i) {
    HeadRow& row = rows_[i];
    row = HeadRow{};
    row.label = request.input.labels[i];
    const float* x = request.input.embeddings.data() + i * spec_.dim;
    double squares = 0;
    for (int64_t k = 0; k < spec_.dim; ++k) squares += double{x[k]} * x[k];
    row.norm = std::sqrt(squares);
    require_embedding(i, {x, static_cast<size_t>(spec_.dim)});
    if (is_softmax()) continue;
    row.inverse_norm = 1 / std::max(row.norm, kNormFloor);
    row.scale = is_euclidean()                ? kEuclideanScale
                : spec_.loss.scales_by_norm() ? std::max(row.norm, kNormFloor)
                                              : request.loss.margin.scale;
  }
  int64_t* order = by_label_.data();
  std::iota(order, order + rows, int64_t{0});
  std::sort(order, order + rows, [&](int64_t a, int64_t b) {
    return std::pair(rows_[a].label, a) < std::pair(rows_[b].label, b);
  });
}

void HeadBase::place_target(HeadRow& row, double cosine, const Request& request) const {
  if (is_softmax()) {
    row.plain_logit = row.logit = cosine + double{bias_[row.label]};
    return;
  }
  if (is_euclidean()) {
    row.plain_logit = row.logit = row.scale * cosine;
    row.threshold = row.logit - request.loss.euclidean.margin;
    return;
  }
  const MarginValue<double> psi = margin_target(cosine, request.loss.margin);
  row.psi_derivative = psi.derivative;
  row.radial = psi.value - psi.derivative * cosine;
  row.plain_logit = row.scale * cosine;
  row.logit = row.scale * psi.value;
}

void HeadBase::finish_row(int64_t i, const SoftmaxSum<double>& others) {
  HeadRow& row = rows_[i];
  const TargetLoss<double> target = target_loss(row.logit, others);
  losses_[i] = target.loss;
  row.residual = target.derivative;
  row.log_sum = row.logit + target.loss;
  row.correct = row.plain_logit > others.max;
}

void HeadBase::finish_row(const Request& request, int64_t i, const HingeSum<double>& others) {
  HeadRow& row = rows_[i];
  const EuclideanLoss<double> loss = euclidean_loss(row.logit, others, request.loss.euclidean);
  losses_[i] = loss.loss;
  row.unit = loss.unit;
  row.residual = loss.target;
  row.correct = row.plain_logit > others.max;
}

void HeadBase::weigh_rows(const Request& request) {
  for (int64_t i = 0; i < request.rows(); ++i) {
    if (!std::isfinite(losses_[i])) throw_bad_loss(i, losses_[i]);
  }
  weight_losses(losses_.span(), spec_.loss.weighting, weighted_.span(), factors_.span());
}

double HeadBase::row_factor(int64_t i) const {
  return factors_[i] / static_cast<double>(rows_.size()) * rows_[i].unit * rows_[i].scale;
}

void HeadBase::embedding_gradient(int64_t i, float* gradient, const float* operand,
                                  float* out) const {
  const HeadRow& row = rows_[i];
  const double factor = row_factor(i) * row.inverse_norm;
  if (!is_softmax()) {
    // Only the part across x turns it; along x the cosines stay, and only A-Softmax's scale grows.
    const double along = spec_.loss.scales_by_norm()
                             ? row.residual * row.radial
                             : -double{loops_.dot(gradient, operand, spec_.dim)};
    loops_.add_scaled(gradient, operand, static_cast<float>(along), gradient, spec_.dim);
  }
  loops_.scale(gradient, static_cast<float>(factor), out, spec_.dim);
}

// ---- Classes ----

float HeadBase::along_weights(int64_t j, const float* gradient) const {
  if (is_softmax()) return 0;
  const float* w = weights_.data() + j * spec_.dim;
  return -loops_.dot(gradient, w, spec_.dim) * class_scale_[j] * class_scale_[j];
}

void HeadBase::update_class(const StepSettings& settings, int64_t j, const float* gradient,
                            float pull) {
  const float squares =
      loops_.sgd(gradient, pull, {settings.lr, settings.momentum}, weights_.data() + j * spec_.dim,
                 weight_momentum_.data() + j * spec_.dim, spec_.dim);
  class_scale_[j] = static_cast<float>(class_scale_of(double{squares}));
}

void HeadBase::finish_bias(const Request& request, int64_t j, float gradient) {
  if (request.settings == nullptr) {
    if (!request.grad_bias.empty()) request.grad_bias[j] = gradient;
    return;
  }
  const StepSettings& settings = *request.settings;
  const float decay = settings.decay_all ? settings.weight_decay : 0.0F;
  loops_.sgd(&gradient, decay, {settings.lr, settings.momentum}, bias_.data() + j,
             bias_momentum_.data() + j, 1);
}

// ---- Steps ----

void HeadBase::forward_backward(const HeadInput& input, HeadOutput& output) {
  require_head_input(input, spec_);
  const auto rows = static_cast<int64_t>(input.labels.size());
  const auto require_room = [](const char* what, std::span<float> span, int64_t expected) {
    if (!span.empty()) require_size(what, span.size(), expected);
  };
  require_room("base losses", output.base_loss, rows);
  require_room("weighted losses", output.weighted_loss, rows);
  require_room("gradients of the embeddings", output.grad_embeddings, rows * spec_.dim);
  require_room("gradients of the class weights", output.grad_weights, weights_.size());
  require_room("gradients of the biases", output.grad_bias, bias_.size());

  const Request request{.input = input,
                        .loss = spec_.loss,
                        .settings = nullptr,
                        .grad_embeddings = output.grad_embeddings,
                        .grad_weights = output.grad_weights,
                        .grad_bias = output.grad_bias};
  prepare_rows(request);
  const double center = center_loss(input);
  run(request);
  add_center_gradient(request);
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i) {
    sum += weighted_[i];
    if (!output.base_loss.empty()) output.base_loss[i] = static_cast<float>(losses_[i]);
    if (!output.weighted_loss.empty()) output.weighted_loss[i] = static_cast<float>(weighted_[i]);
  }
  output.loss = sum / static_cast<double>(rows) + center;
}

StepStats HeadBase::step(const HeadInput& input, const StepSettings& settings,
                         std::span<float> grad_embeddings) {
  require_head_input(input, spec_);
  const auto rows = static_cast<int64_t>(input.labels.size());
  if (!grad_embeddings.empty()) {
    require_size("gradients of the embeddings", grad_embeddings.size(), rows * spec_.dim);
  }
  const LossSpec loss = in_force(spec_.loss, settings);
  require_base(loss);
  need_momentum();

  const Request request{.input = input,
                        .loss = loss,
                        .settings = &settings,
                        .grad_embeddings = grad_embeddings,
                        .grad_weights = {},
                        .grad_bias = {}};
  prepare_rows(request);
  StepStats stats;
  stats.loss = center_loss(input);
  run(request);
  add_center_gradient(request);
  move_centers(input);

  stats.rows = rows;
  for (int64_t i = 0; i < rows; ++i) {
    stats.loss += weighted_[i] / static_cast<double>(rows);
    stats.base_loss += losses_[i] / static_cast<double>(rows);
    stats.embedding_norm += rows_[i].norm / static_cast<double>(rows);
    stats.correct += rows_[i].correct ? 1 : 0;
    if (i == 0 || losses_[i] > stats.hardest.base_loss) {
      stats.hardest = {.row = i, .base_loss = losses_[i], .gradient_weight = factors_[i]};
    }
    switch (gate_of(factors_[i])) {
      case Gate::silenced:
        ++stats.silenced;
        break;
      case Gate::kept:
        ++stats.kept;
        break;
      case Gate::amplified:
        ++stats.amplified;
        break;
    }
  }
  stats.mean_cosine = mean_cosine(input);
  return stats;
}

double HeadBase::center_loss(const HeadInput& input) const {
  if (!spec_.loss.has_centers()) return 0;
  double sum = 0;
  for (int64_t i = 0; i < rows_.size(); ++i) {
    const float* x = input.embeddings.data() + i * spec_.dim;
    const float* c = centers_.data() + int64_t{rows_[i].label} * spec_.dim;
    double squares = 0;
    for (int64_t k = 0; k < spec_.dim; ++k) {
      const double difference = double{x[k]} - double{c[k]};
      squares += difference * difference;
    }
    if (!std::isfinite(squares))
      throw_bad_center(rows_[i].label, {c, static_cast<size_t>(spec_.dim)});
    sum += squares;
  }
  return spec_.loss.center.weight / (2 * static_cast<double>(rows_.size())) * sum;
}

void HeadBase::add_center_gradient(const Request& request) const {
  if (!spec_.loss.has_centers() || request.grad_embeddings.empty()) return;
  const auto factor =
      static_cast<float>(spec_.loss.center.weight / static_cast<double>(rows_.size()));
  for (int64_t i = 0; i < rows_.size(); ++i) {
    const float* x = request.input.embeddings.data() + i * spec_.dim;
    const float* c = centers_.data() + int64_t{rows_[i].label} * spec_.dim;
    float* gradient = request.grad_embeddings.data() + i * spec_.dim;
    for (int64_t k = 0; k < spec_.dim; ++k) gradient[k] += factor * (x[k] - c[k]);
  }
}

// c -= rate sum (c - x) / (1 + n), the rows of a class in their order.
void HeadBase::move_centers(const HeadInput& input) const {
  if (!spec_.loss.has_centers()) return;
  const int64_t rows = rows_.size();
  double* sum = sums_.data();
  for (int64_t from = 0, to = 0; from < rows; from = to) {
    const int64_t label = rows_[by_label_[from]].label;
    float* c = centers_.data() + label * spec_.dim;
    std::fill_n(sum, spec_.dim, 0.0);
    for (to = from; to < rows && rows_[by_label_[to]].label == label; ++to) {
      const float* x = input.embeddings.data() + by_label_[to] * spec_.dim;
      for (int64_t k = 0; k < spec_.dim; ++k) sum[k] += double{c[k]} - double{x[k]};
    }
    const double step = spec_.loss.center.rate / static_cast<double>(1 + to - from);
    for (int64_t k = 0; k < spec_.dim; ++k) c[k] = static_cast<float>(double{c[k]} - step * sum[k]);
  }
}

// The sum of cosines over all pairs is the squared length of the sum of normalised embeddings;
// taking each identity's own sum away leaves the pairs of different identities.
double HeadBase::mean_cosine(const HeadInput& input) const {
  const int64_t rows = rows_.size();
  double* all = sums_.data();
  double* own = all + spec_.dim;
  std::fill_n(all, spec_.dim, 0.0);
  const auto squared = [&](const double* v) {
    return std::inner_product(v, v + spec_.dim, v, 0.0);
  };
  double same = 0;
  int64_t pairs = rows * rows;
  for (int64_t from = 0, to = 0; from < rows; from = to) {
    std::fill_n(own, spec_.dim, 0.0);
    for (to = from; to < rows && rows_[by_label_[to]].label == rows_[by_label_[from]].label; ++to) {
      const float* x = input.embeddings.data() + by_label_[to] * spec_.dim;
      const double inverse = 1 / std::max(rows_[by_label_[to]].norm, kNormFloor);
      for (int64_t k = 0; k < spec_.dim; ++k) own[k] += inverse * double{x[k]};
    }
    same += squared(own);
    pairs -= (to - from) * (to - from);
    for (int64_t k = 0; k < spec_.dim; ++k) all[k] += own[k];
  }
  return pairs == 0 ? 0.0 : (squared(all) - same) / static_cast<double>(pairs);
}

// ---- The bare products ----

// Whole matrices, logits row-major as PyTorch lays them out or class-major as the fused head does.
struct HeadBase::WholeProducts {
  struct Chain {
    Product logits, embeddings, weights;
    Buffer<std::byte> scratch;
  };
  MemoryMeter meter;
  int64_t rows = 0;
  size_t element = 0;
  Buffer<std::byte> x, w, gradient;  // of the precision's type; `gradient` has the logits' shape
  Buffer<float> logits, grad_x, grad_w;
  std::vector<Chain> chains;
};

double HeadBase::products_ms(int64_t rows) {
  if (whole_products_ == nullptr || whole_products_->rows != rows) {
    whole_products_ = nullptr;
    auto made = std::make_shared<WholeProducts>();
    const int64_t classes = spec_.classes, dim = spec_.dim;
    const auto type =
        precision_ == Precision::bf16 ? memory::data_type::bf16 : memory::data_type::f32;
    const auto f32 = memory::data_type::f32;
    made->rows = rows;
    made->element = precision_ == Precision::bf16 ? 2 : 4;
    const auto operand = [&](int64_t count) {
      return Buffer<std::byte>(made->meter, count * static_cast<int64_t>(made->element));
    };
    made->x = operand(rows * dim);
    made->w = operand(classes * dim);
    made->gradient = operand(rows * classes);
    made->logits = Buffer<float>(made->meter, rows * classes);
    made->grad_x = Buffer<float>(made->meter, rows * dim);
    made->grad_w = Buffer<float>(made->meter, classes * dim);
    for (const bool row_major : {true, false}) {
      WholeProducts::Chain chain{
          row_major
              ? Product(engine_, matrix_desc(rows, dim, type),
                        matrix_desc(dim, classes, type, true), matrix_desc(rows, classes, f32),
                        false)
              : Product(engine_, matrix_desc(classes, dim, type),
                        matrix_desc(dim, rows, type, true), matrix_desc(classes, rows, f32), false),
          Product(engine_, matrix_desc(rows, classes, type, !row_major),
                  matrix_desc(classes, dim, type), matrix_desc(rows, dim, f32), false),
          Product(engine_, matrix_desc(classes, rows, type, row_major),
                  matrix_desc(rows, dim, type), matrix_desc(classes, dim, f32), false),
          {}};
      const size_t scratch =
          std::max({chain.logits.scratch_bytes(), chain.embeddings.scratch_bytes(),
                    chain.weights.scratch_bytes()});
      chain.scratch = Buffer<std::byte>(made->meter, static_cast<int64_t>(scratch));
      for (Product* product : {&chain.logits, &chain.embeddings, &chain.weights}) {
        product->bind(engine_, chain.scratch.data());
      }
      made->chains.push_back(std::move(chain));
    }
    whole_products_ = std::move(made);
  }
  WholeProducts& whole = *whole_products_;
  double best = std::numeric_limits<double>::infinity();
  for (WholeProducts::Chain& chain : whole.chains) {
    const bool row_major = &chain == &whole.chains.front();
    const double start = now_ms();
    if (row_major) {
      chain.logits.run(stream_, whole.x.data(), whole.w.data(), whole.logits.data());
    } else {
      chain.logits.run(stream_, whole.w.data(), whole.x.data(), whole.logits.data());
    }
    chain.embeddings.run(stream_, whole.gradient.data(), whole.w.data(), whole.grad_x.data());
    chain.weights.run(stream_, whole.gradient.data(), whole.x.data(), whole.grad_w.data());
    best = std::min(best, now_ms() - start);
  }
  return best;
}

void HeadBase::time(HeadWork work, const HeadInput& input, std::span<double> ms,
                    const std::atomic<bool>& cancelled) {
  require_head_input(input, spec_);
  const bool gradients = work == HeadWork::forward_backward;
  const auto count = [](int64_t values) { return static_cast<size_t>(values); };
  std::vector<float> base_loss(input.labels.size()), weighted_loss(input.labels.size());
  std::vector<float> grad_embeddings(input.embeddings.size());
  std::vector<float> grad_weights(gradients ? count(spec_.classes * spec_.dim) : 0);
  std::vector<float> grad_bias(gradients ? bias_.span().size() : 0);
  HeadOutput output{0, base_loss, weighted_loss, grad_embeddings, grad_weights, grad_bias};
  for (double& run_ms : ms) {
    if (cancelled) return;
    const double start = now_ms();
    switch (work) {
      case HeadWork::forward_backward:
        forward_backward(input, output);
        break;
      case HeadWork::step:
        step(input, StepSettings{}, grad_embeddings);
        break;
      case HeadWork::products:
        run_ms = products_ms(static_cast<int64_t>(input.labels.size()));
        continue;
    }
    run_ms = now_ms() - start;
  }
}

std::unique_ptr<CpuMarginHead> make_cpu_head(const HeadSpec& spec, const Execution& execution) {
  return spec.implementation == Implementation::fused ? make_fused_head(spec, execution)
                                                      : make_unfused_head(spec, execution);
}

}  // namespace hardmine

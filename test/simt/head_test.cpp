// The CUDA head, fused and unfused, on the emulated device with the fake cuBLASLt, compared with a
// double reference that shares nothing with it but the data structures.
#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <numbers>
#include <numeric>
#include <random>
#include <string>

#include <device_under_test.h>
#include "core/head_checks.h"
#include "cuda/head.h"

namespace {

using hardmine::BaseKind;
using hardmine::EuclideanMargin;
using hardmine::Execution;
using hardmine::HardMiningForm;
using hardmine::HeadSpec;
using hardmine::HeadWork;
using hardmine::Implementation;
using hardmine::LossSpec;
using hardmine::MarginHead;
using hardmine::MarginLaw;
using hardmine::Precision;
using hardmine::Reduction;
using hardmine::StepSettings;
using hardmine::StepStats;
using hardmine::WeightingKind;
using hardmine::testing::Buffer;
using hardmine::testing::Gpu;
namespace codes = hardmine::codes;
namespace cuda = hardmine::cuda;

using Vector = std::vector<double>;
using Floats = std::vector<float>;

constexpr Implementation kBoth[] = {Implementation::fused, Implementation::unfused};
constexpr int64_t kSmallestChunks = 1;  // bytes: chunks of 128 classes
constexpr int64_t kOneChunk = int64_t{1} << 40;

// ---- The reference ----

struct Problem {
  int rows = 0, dim = 0;
  int64_t classes = 0;
  Vector x, w, bias;  // bias empty unless softmax
  std::vector<int> labels;
};

struct Reference {
  Vector base, weighted, factor, grad_x, grad_w, grad_bias;
  double loss = 0;
  int correct = 0;
};

double dot(const double* a, const double* b, int n) {
  double sum = 0;
  for (int k = 0; k < n; ++k) sum += a[k] * b[k];
  return sum;
}

double norm(const double* a, int n) {
  return std::max(std::sqrt(dot(a, a, n)), 1e-12);
}

double psi_value(double cosine, const MarginLaw& law) {
  const double phi = law.m1 * std::acos(std::clamp(cosine, -1.0, 1.0)) + law.m2;
  const double k = law.mirror ? std::floor(phi / std::numbers::pi) : 0;
  return (law.lambda * cosine + (std::fmod(k, 2) == 0 ? 1 : -1) * std::cos(phi) - 2 * k - law.m3) /
         (1 + law.lambda);
}

double psi_slope(double cosine, const MarginLaw& law) {
  const double theta = std::acos(std::clamp(cosine, -1 + 1e-7, 1 - 1e-7));
  const double phi = law.m1 * theta + law.m2;
  const double k = law.mirror ? std::floor(phi / std::numbers::pi) : 0;
  const double exact = (std::fmod(k, 2) == 0 ? 1 : -1) * law.m1 * std::sin(phi) / std::sin(theta);
  return (law.lambda + (law.detached ? 1 : exact)) / (1 + law.lambda);
}

double weighted_loss(double loss, const hardmine::Weighting& g) {
  if (g.kind == WeightingKind::none) return loss;
  if (g.kind == WeightingKind::knot_magnify)
    return loss * std::pow(1 + g.gamma * std::exp(-loss), -2);
  const double gate = 1 / (1 + std::exp(-g.A * (g.beta * loss - g.B)));
  return (g.form == HardMiningForm::equation ? g.alpha : g.alpha * g.beta) * loss * gate;
}

double loss_factor(double loss, const hardmine::Weighting& g) {
  if (g.kind == WeightingKind::none) return 1;
  if (g.kind == WeightingKind::knot_magnify) {
    const double knot = 1 + g.gamma * std::exp(-loss);
    return (1 + 2 * loss * (1 - 1 / knot)) / (knot * knot);
  }
  const double gate = 1 / (1 + std::exp(-g.A * (g.beta * loss - g.B)));
  const double c = g.form == HardMiningForm::equation ? g.alpha : g.alpha * g.beta;
  return c * (gate + g.beta * g.A * loss * gate * (1 - gate));
}

// Hinges of a row by its squared distances; its loss, and what the distances' slopes are.
struct Hinges {
  Vector slope;
  double loss = 0, nearest = 1e300;  // |hinge| of the class nearest to becoming active or not
};

Hinges hinges_of(const Vector& distance, size_t y, const EuclideanMargin& law) {
  Hinges h;
  h.slope.resize(distance.size());
  double active = 0;
  for (size_t j = 0; j < distance.size(); ++j) {
    if (j == y) continue;
    const double hinge = law.margin + distance[y] - distance[j];
    h.nearest = std::min(h.nearest, std::abs(hinge));
    if (hinge <= 0) continue;
    h.loss += hinge;
    h.slope[j] = -1;
    ++active;
  }
  for (double& slope : h.slope) slope /= std::max(active, 1.0);
  h.slope[y] = law.pull + (active > 0 ? 1 : 0);
  h.loss = h.loss / std::max(active, 1.0) + law.pull * distance[y];
  return h;
}

// The formulas as the papers print them, in double, every matrix whole.
Reference reference_head(const Problem& p, const LossSpec& spec) {
  const int n = p.rows, d = p.dim;
  const size_t classes = static_cast<size_t>(p.classes);
  const bool cosines = spec.base != BaseKind::softmax;
  const bool euclidean = spec.base == BaseKind::euclidean_margin;
  Reference r;
  r.grad_x.assign(p.x.size(), 0);
  r.grad_w.assign(p.w.size(), 0);
  r.grad_bias.assign(p.bias.size(), 0);
  const auto x = [&](size_t i) { return p.x.data() + i * static_cast<size_t>(d); };
  const auto w = [&](size_t j) { return p.w.data() + j * static_cast<size_t>(d); };
  Vector w_norm(classes);
  for (size_t j = 0; j < classes; ++j) w_norm[j] = norm(w(j), d);
  struct Row {
    Vector cosine, probability;  // Euclidean margin: probability - [j = y] is dL / d 2 cos_j
    double norm = 1, scale = 1, psi = 0, slope = 1;
  };
  std::vector<Row> rows(static_cast<size_t>(n));
  for (size_t i = 0; i < rows.size(); ++i) {
    Row& row = rows[i];
    const size_t y = static_cast<size_t>(p.labels[i]);
    row.norm = norm(x(i), d);
    row.scale = !cosines                 ? 1
                : euclidean              ? 2
                : spec.margin.norm_scale ? row.norm
                                         : spec.margin.scale;
    row.cosine.resize(classes);
    Vector z(classes);
    for (size_t j = 0; j < classes; ++j) {
      row.cosine[j] = dot(x(i), w(j), d) / (cosines ? row.norm * w_norm[j] : 1);
      z[j] = row.scale * row.cosine[j] + (cosines ? 0 : p.bias[j]);
    }
    r.correct += std::max_element(z.begin(), z.end()) - z.begin() == p.labels[i] ? 1 : 0;
    row.psi = row.cosine[y];
    if (euclidean) {
      Vector distance;
      for (const double c : row.cosine) distance.push_back(2 - 2 * c);
      const Hinges hinges = hinges_of(distance, y, spec.euclidean);
      r.base.push_back(hinges.loss);
      for (const double slope : hinges.slope) row.probability.push_back(-slope);
      row.probability[y] += 1;
      continue;
    }
    if (cosines) {
      row.psi = psi_value(row.cosine[y], spec.margin);
      row.slope = psi_slope(row.cosine[y], spec.margin);
      z[y] = row.scale * row.psi;
    }
    const double max = *std::max_element(z.begin(), z.end());
    double sum = 0;
    for (const double value : z) sum += std::exp(value - max);
    r.base.push_back(max + std::log(sum) - z[y]);
    for (double& value : z) value = std::exp(value - max) / sum;
    row.probability = std::move(z);
  }
  const hardmine::Weighting& g = spec.weighting;
  const double mean = std::accumulate(r.base.begin(), r.base.end(), 0.0) / n;
  const bool batch = g.reduction == Reduction::batch;
  for (const double loss : r.base) {
    r.weighted.push_back(batch ? loss * weighted_loss(mean, g) / mean : weighted_loss(loss, g));
    r.factor.push_back(loss_factor(batch ? mean : loss, g));
    r.loss += r.weighted.back() / n;
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    double* gx = r.grad_x.data() + i * static_cast<size_t>(d);
    double radial = 0;
    for (size_t j = 0; j < classes; ++j) {
      double* gw = r.grad_w.data() + j * static_cast<size_t>(d);
      const bool target = static_cast<int>(j) == p.labels[i];
      const double dz = r.factor[i] / n * (row.probability[j] - (target ? 1 : 0));
      if (!cosines) {
        r.grad_bias[j] += dz;
        for (int k = 0; k < d; ++k) {
          gx[k] += dz * w(j)[k];
          gw[k] += dz * x(i)[k];
        }
        continue;
      }
      const double c = row.cosine[j];
      radial += dz * (target ? row.psi : c);
      const double dc = dz * row.scale * (target ? row.slope : 1);
      for (int k = 0; k < d; ++k) {
        const double x_hat = x(i)[k] / row.norm, w_hat = w(j)[k] / w_norm[j];
        gx[k] += dc * (w_hat - c * x_hat) / row.norm;
        gw[k] += dc * (x_hat - c * w_hat) / w_norm[j];
      }
    }
    if (spec.scales_by_norm())
      for (int k = 0; k < d; ++k) gx[k] += radial * x(i)[k] / row.norm;
  }
  return r;
}

// Rounded to float, so that head and reference see the same numbers.
double rounded(double value) {
  return static_cast<double>(static_cast<float>(value));
}
Floats floats(const Vector& values) {
  return {values.begin(), values.end()};
}

// Embeddings pulled towards their class weight until the losses spread over the gate (0.55 to 0.85)
// and beyond: row i gets the loss it aims at by bisection on the pull. Every third row repeats the
// label before it.
Problem make_problem(int rows, int dim, int64_t classes, const LossSpec& spec, unsigned seed,
                     double least = 0.55, double spread = 0.3) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  const bool cosines = spec.base != BaseKind::softmax;
  Problem p{rows, dim, classes, {}, {}, {}, {}};
  p.w.resize(static_cast<size_t>(classes * dim));
  for (double& value : p.w) value = rounded(normal(random));
  Vector w_norm;
  for (int64_t j = 0; j < classes; ++j) {
    w_norm.push_back(norm(p.w.data() + j * dim, dim));
    if (!cosines) p.bias.push_back(rounded(0.1 * normal(random)));
  }
  for (int i = 0; i < rows; ++i) {
    const int label =
        i % 3 == 2 ? p.labels.back() : static_cast<int>(random() % static_cast<unsigned>(classes));
    p.labels.push_back(label);
    const double* own = p.w.data() + int64_t{label} * dim;
    Vector noise(static_cast<size_t>(dim));
    for (double& value : noise) value = normal(random);
    const double aim =
        i % 4 == 3 ? 3.0 : least + spread * (static_cast<double>(random() % 1000) / 1000);
    // x = noise + pull w_y: dot products are linear in the pull.
    Vector from, to;
    for (int64_t j = 0; j < classes; ++j) {
      from.push_back(dot(noise.data(), p.w.data() + j * dim, dim));
      to.push_back(dot(own, p.w.data() + j * dim, dim));
    }
    const double squares = dot(noise.data(), noise.data(), dim);
    const size_t y = static_cast<size_t>(label);
    const auto hinges_at = [&](double pull) {
      const double length = std::sqrt(squares + 2 * pull * from[y] + pull * pull * to[y]);
      Vector distance;
      for (size_t j = 0; j < from.size(); ++j)
        distance.push_back(2 - 2 * (from[j] + pull * to[j]) / (length * w_norm[j]));
      return hinges_of(distance, y, spec.euclidean);
    };
    const auto loss_at = [&](double pull) {
      if (spec.base == BaseKind::euclidean_margin) return hinges_at(pull).loss;
      const double length = std::sqrt(squares + 2 * pull * from[y] + pull * pull * to[y]);
      const double scale = spec.margin.norm_scale ? length : spec.margin.scale;
      const auto logit = [&](size_t j) {
        const double product = from[j] + pull * to[j];
        if (!cosines) return product + p.bias[j];
        const double cosine = product / (length * w_norm[j]);
        return scale * (j == y ? psi_value(cosine, spec.margin) : cosine);
      };
      const double target = logit(y);
      double others = 0;
      for (size_t j = 0; j < from.size(); ++j)
        if (j != y) others += std::exp(std::min(logit(j) - target, 700.0));
      return std::log1p(others);
    };
    double low = -4, high = 4;  // ||x|| stays small enough for A-Softmax's logits in fp32
    for (int step = 0; step < 40; ++step) {
      const double pull = (low + high) / 2;
      (loss_at(pull) > aim ? low : high) = pull;
    }
    // The Euclidean margin loss jumps where a hinge is 0: rows keep clear of it by far more than
    // what fp32 makes of a cosine.
    while (spec.base == BaseKind::euclidean_margin && hinges_at(low).nearest < 1e-5) low -= 1e-5;
    for (int k = 0; k < dim; ++k)
      p.x.push_back(rounded(noise[static_cast<size_t>(k)] + low * own[k]));
  }
  return p;
}

double relative_error(const Floats& mine, const Vector& gold) {
  double difference = 0, total = 0;
  REQUIRE(mine.size() == gold.size());
  for (size_t i = 0; i < gold.size(); ++i) {
    difference += (mine[i] - gold[i]) * (mine[i] - gold[i]);
    total += gold[i] * gold[i];
  }
  return std::sqrt(difference / std::max(total, 1e-300));
}

// ---- Losses ----

LossSpec margin_loss(double m1, double m2, double m3, double scale = 16) {
  LossSpec spec;
  spec.base = BaseKind::margin;
  spec.margin.m1 = m1;
  spec.margin.m2 = m2;
  spec.margin.m3 = m3;
  spec.margin.scale = scale;
  spec.weighting.kind = WeightingKind::hard_mining;
  return spec;
}

LossSpec a_softmax(double m, double lambda) {
  LossSpec spec = margin_loss(m, 0, 0);
  spec.margin.norm_scale = true;
  spec.margin.lambda = lambda;
  return spec;
}

LossSpec softmax() {
  LossSpec spec = margin_loss(1, 0, 0);
  spec.base = BaseKind::softmax;
  return spec;
}

LossSpec euclidean_margin(double margin = 0.4, double pull = 0.5) {
  LossSpec spec = margin_loss(1, 0, 0);
  spec.base = BaseKind::euclidean_margin;
  spec.euclidean = {margin, pull};
  return spec;
}

std::vector<LossSpec> every_base() {
  return {softmax(),
          margin_loss(1, 0, 0),
          margin_loss(1, 0.5, 0),
          margin_loss(1, 0, 0.35),
          margin_loss(1.2, 0.3, 0.2),
          a_softmax(4, 0),
          a_softmax(3, 5),
          euclidean_margin()};
}

std::vector<LossSpec> every_loss() {
  std::vector<LossSpec> specs;
  for (LossSpec spec : every_base()) {
    for (const auto form : {HardMiningForm::equation, HardMiningForm::algorithm})
      for (const auto reduction : {Reduction::sample, Reduction::batch}) {
        spec.weighting.form = form;
        spec.weighting.reduction = reduction;
        // Every second one, so that each base is seen both ways.
        spec.margin.detached =
            (form == HardMiningForm::equation) != (reduction == Reduction::batch);
        specs.push_back(spec);
      }
    spec.weighting.kind = WeightingKind::none;
    spec.weighting.reduction = Reduction::sample;
    spec.margin.detached = false;
    specs.push_back(spec);
    spec.weighting.kind = WeightingKind::knot_magnify;
    spec.weighting.gamma = 2;
    specs.push_back(spec);
  }
  return specs;
}

// ---- Heads on the emulated device ----

struct Result {
  Floats base, weighted, grad_x, grad_w, grad_bias;
  double loss = 0;
};

// The seam's head.
std::unique_ptr<MarginHead> make_head(const Gpu& gpu, const Problem& p, const LossSpec& loss,
                                      Implementation implementation,
                                      Precision precision = Precision::fp32) {
  Execution execution;
  execution.precision = precision;
  auto head = cuda::make_cuda_head({p.classes, p.dim, loss, implementation}, execution,
                                   gpu.libraries.cublas_lt);
  head->set_weights(floats(p.w), floats(p.bias));
  return head;
}

Result forward_backward(MarginHead& head, const Problem& p) {
  Result r;
  r.base.resize(p.labels.size());
  r.weighted.resize(p.labels.size());
  r.grad_x.resize(p.x.size());
  r.grad_w.resize(p.w.size());
  r.grad_bias.resize(p.bias.size());
  hardmine::HeadOutput output{0, r.base, r.weighted, r.grad_x, r.grad_w, r.grad_bias};
  const Floats x = floats(p.x);
  head.forward_backward({x, p.labels}, output);
  r.loss = output.loss;
  return r;
}

// The session's head with all its memory, each array behind a guard page.
class DeviceHead {
 public:
  static constexpr int kRing = 3;

  DeviceHead(const Gpu& gpu, const Problem& p, const LossSpec& loss, Implementation implementation,
             Precision precision, int64_t chunk_bytes)
      : head_(cuda::make_device_head({p.classes, p.dim, loss, implementation}, precision,
                                     chunk_bytes)) {
    constexpr int64_t kWorkspace = 4096;
    char* workspace = nullptr;
    const auto layout = [&](cuda::Arena arena) {
      head_->layout_state(arena);
      head_->layout_rows(arena, p.rows);
      embeddings_ = arena.take<float>(int64_t{p.rows} * p.dim);
      labels_ = arena.take<int>(p.rows);
      settings_ = arena.take<cuda::StepParameters>(1);
      grad_x_ = arena.take<float>(int64_t{p.rows} * p.dim);
      grad_w_ = arena.take<float>(p.classes * p.dim);
      grad_bias_ = arena.take<float>(cuda::HeadShape::padded(p.classes));
      records_ = arena.take<cuda::StepRecord>(kRing);
      steps_ = arena.take<unsigned long long>(1);
      workspace = arena.take<char>(kWorkspace);
      return arena.bytes();
    };
    memory_ = cuda::allocate_device(layout(cuda::Arena()), "a test");
    layout(cuda::Arena(memory_));
    products_.emplace(gpu.libraries.cublas_lt, stream_.get(), workspace, kWorkspace);
    head_->initialise(stream_);
    head_->write(cuda::HeadTensor::weights, floats(p.w), stream_);
    head_->write(cuda::HeadTensor::bias, floats(p.bias), stream_);
    cuda::check(cudaMemsetAsync(steps_, 0, sizeof *steps_, stream_.get()), "a test");
    set_input(p);
  }

  void set_input(const Problem& p) {
    put(embeddings_, floats(p.x));
    put(labels_, p.labels);
  }

  Result forward_backward(const Problem& p) {
    cuda::HeadPass wanted = pass();
    wanted.grad_weights = grad_w_;
    wanted.grad_bias = grad_bias_;
    head_->enqueue(wanted, *products_, stream_);
    head_->join(stream_);
    Result r;
    r.base = get(head_->base_loss(), p.labels.size());
    r.weighted = get(head_->weighted_loss(), p.labels.size());
    r.grad_x = get(grad_x_, p.x.size());
    r.grad_w = get(grad_w_, p.w.size());
    r.grad_bias = get(grad_bias_, p.bias.size());
    r.loss = records()[0].loss;
    return r;
  }

  // Enqueues only.
  void step() {
    cuda::HeadPass step = pass();
    step.settings = settings_;
    head_->enqueue(step, *products_, stream_);
    head_->join(stream_);
  }
  void set(const StepSettings& settings) {
    put(settings_, std::vector{cuda::parameters_of(settings)});
  }
  std::vector<cuda::StepRecord> records() { return get(records_, kRing); }
  Floats read(cuda::HeadTensor tensor, size_t count) {
    Floats values(count);
    head_->read(tensor, values, stream_);
    return values;
  }
  const cuda::Stream& stream() const { return stream_; }

 private:
  cuda::HeadPass pass() const {
    cuda::HeadPass pass;
    pass.embeddings = embeddings_;
    pass.labels = labels_;
    pass.ring = {records_, steps_, kRing};
    pass.grad_embeddings = grad_x_;
    return pass;
  }
  template <typename T>
  void put(T* to, const std::vector<T>& from) {
    cuda::check(cudaMemcpyAsync(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice,
                                stream_.get()),
                "a test");
  }
  template <typename T>
  std::vector<T> get(const T* from, size_t count) {
    std::vector<T> values(count);
    if (count > 0) {
      cuda::check(cudaMemcpyAsync(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost,
                                  stream_.get()),
                  "a test");
    }
    stream_.synchronize();
    return values;
  }

  std::unique_ptr<cuda::CudaHead> head_;
  cuda::Stream stream_;
  cuda::DeviceBlock memory_;
  std::optional<cuda::Products> products_;
  float *embeddings_ = nullptr, *grad_x_ = nullptr, *grad_w_ = nullptr, *grad_bias_ = nullptr;
  int* labels_ = nullptr;
  cuda::StepParameters* settings_ = nullptr;
  cuda::StepRecord* records_ = nullptr;
  unsigned long long* steps_ = nullptr;
};

// ---- Checks ----

// fp32: the contract's bounds for the CPU head.
void check_fp32(const Problem& p, const LossSpec& spec, const Result& found) {
  const Reference gold = reference_head(p, spec);
  double sum = 0;
  for (size_t i = 0; i < found.base.size(); ++i) {
    // The contract's bound, and what rounding x_hat and w_hat to float (2^-24) does to the target's
    // logit: times the scale and psi', which is m^2 for A-Softmax at theta = 0.
    const double length = norm(p.x.data() + i * static_cast<size_t>(p.dim), p.dim);
    const double scale = spec.margin.norm_scale ? length : spec.margin.scale;
    const double rounding = 0x1p-24 * scale * spec.margin.m1 * spec.margin.m1;
    CHECK(std::abs(found.base[i] - gold.base[i]) <= 2e-5 * std::max(1.0, gold.base[i]) + rounding);
    sum += found.weighted[i];
  }
  // The weighting by its formula at the head's own losses, in float.
  const double mean =
      std::accumulate(found.base.begin(), found.base.end(), 0.0) / static_cast<double>(p.rows);
  for (size_t i = 0; i < found.base.size(); ++i) {
    const double expected = spec.weighting.reduction == Reduction::batch
                                ? found.base[i] * weighted_loss(mean, spec.weighting) / mean
                                : weighted_loss(found.base[i], spec.weighting);
    CHECK(found.weighted[i] == doctest::Approx(expected).epsilon(1e-5));
  }
  CHECK(found.loss == doctest::Approx(sum / p.rows).epsilon(1e-6));
  // A loss within 2e-5 of the double one moves the factor by at most max |HM''| 2e-5 = 6e-3 (A =
  // 35), so 1e-3 in norm holds over a batch of mixed rows and is what the contract asks.
  CHECK(relative_error(found.grad_x, gold.grad_x) <= 1e-3);
  CHECK(relative_error(found.grad_w, gold.grad_w) <= 1e-3);
  CHECK(relative_error(found.grad_bias, gold.grad_bias) <= 1e-3);
}

std::string error_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const hardmine::Error& error) {
    return std::string(error.code()) + ": " + error.what();
  }
  return {};
}

}  // namespace

TEST_CASE("every loss, form and reduction in fp32 on ragged shapes") {
  Gpu gpu;
  int in_gate = 0, rows = 0;
  for (const LossSpec& spec : every_loss()) {
    for (const std::array<int, 3>& shape : {std::array{1, 3, 2}, std::array{7, 33, 129}}) {
      const Problem p = make_problem(shape[0], shape[1], shape[2], spec, 7);
      for (const double loss : reference_head(p, spec).base) {
        in_gate += loss > 0.55 && loss < 0.85 ? 1 : 0;
        ++rows;
      }
      for (const Implementation implementation : kBoth) {
        CAPTURE(implementation == Implementation::fused);
        DeviceHead head(gpu, p, spec, implementation, Precision::fp32, kSmallestChunks);
        check_fp32(p, spec, head.forward_backward(p));
      }
    }
  }
  CHECK(2 * in_gate >= rows);
}

TEST_CASE("a thousand classes of 512 numbers, in one chunk and in chunks that do not divide them") {
  Gpu gpu;
  const auto check = [&](const LossSpec& spec, Implementation implementation,
                         std::initializer_list<int64_t> sizes) {
    const Problem p = make_problem(8, 512, 1003, spec, 11);
    for (const int64_t chunk_bytes : sizes) {
      DeviceHead head(gpu, p, spec, implementation, Precision::fp32, chunk_bytes);
      check_fp32(p, spec, head.forward_backward(p));
    }
  };
  check(margin_loss(1, 0.5, 0, 64), Implementation::fused, {kSmallestChunks, kOneChunk});
  check(margin_loss(1, 0.5, 0, 64), Implementation::unfused, {kOneChunk});
  check(softmax(), Implementation::fused, {kSmallestChunks});
  check(euclidean_margin(), Implementation::fused, {kSmallestChunks, kOneChunk});
  check(euclidean_margin(), Implementation::unfused, {kOneChunk});
}

TEST_CASE("Euclidean margins from none active to all, and Knot Magnify around its critical point") {
  Gpu gpu;
  const auto check = [&](const LossSpec& spec) {
    const Problem p = make_problem(5, 17, 140, spec, 19);  // two chunks
    for (const Implementation implementation : kBoth) {
      CAPTURE(implementation == Implementation::fused);
      DeviceHead head(gpu, p, spec, implementation, Precision::fp32, kSmallestChunks);
      check_fp32(p, spec, head.forward_backward(p));
    }
  };
  for (const double margin : {0.0, 0.05, 1.2, 4.0})
    for (const double pull : {0.0, 3.0}) check(euclidean_margin(margin, pull));
  for (LossSpec spec : every_base()) {
    spec.weighting.kind = WeightingKind::knot_magnify;
    for (const double gamma : {0.1, 8.0, 1e6}) {
      spec.weighting.gamma = gamma;
      // Losses of 1.4 to 2.2, where the weight turns, for these gammas or somewhat beside.
      const Problem p = make_problem(8, 9, 20, spec, 19, 1.2, 1.2);
      int around = 0;
      for (const double loss : reference_head(p, spec).base)
        around += loss > 1.1 && loss < 2.5 ? 1 : 0;
      CHECK(2 * around >= 8);
      for (const Implementation implementation : kBoth) {
        DeviceHead head(gpu, p, spec, implementation, Precision::fp32, kSmallestChunks);
        check_fp32(p, spec, head.forward_backward(p));
      }
    }
  }
}

TEST_CASE("hinges just above 0, just below and exactly at 0, one class or all of them") {
  Gpu gpu;
  // Class weights along the axes: cosines are coordinates, and 128 classes a chunk leave 2 of 130
  // over.
  const auto on_axes = [&](const std::vector<Vector>& rows, int classes) {
    Problem p{static_cast<int>(rows.size()), classes + 1, classes, {}, {}, {}, {}};
    for (int j = 0; j < classes; ++j)
      for (int k = 0; k <= classes; ++k) p.w.push_back(j == k ? 2 : 0);
    for (Vector row : rows) {
      row.resize(static_cast<size_t>(classes));
      row.push_back(std::sqrt(1 - dot(row.data(), row.data(), classes)));
      for (const double value : row) p.x.push_back(rounded(value));
      p.labels.push_back(0);
    }
    return p;
  };
  const double edge = 0.3;  // of cos_j at cos_y = 0.5 and a margin of 0.4
  for (const double near : {1e-4, 1e-5}) {
    const Problem p = on_axes({{0.5, edge - near, edge - near},
                               {0.5, edge + near, edge - near},
                               {0.5, edge + near, edge + near},
                               {-0.9}},  // all 129 others are active
                              130);
    for (LossSpec spec : {euclidean_margin(), euclidean_margin(0.4, 0)}) {
      spec.weighting.kind = WeightingKind::none;
      for (const Implementation implementation : kBoth) {
        DeviceHead head(gpu, p, spec, implementation, Precision::fp32, kSmallestChunks);
        const Result found = head.forward_backward(p);
        check_fp32(p, spec, found);
        for (int k = 0; k < 131; ++k) {
          // What no row has active has no gradient but from the last row, whose share is 1 / 129.
          const double share = 2.0 / 129 / 4 / 2;  // d 2 cos, 4 rows, ||w|| = 2
          CHECK(std::abs(found.grad_w[static_cast<size_t>(129 * 131 + k)]) <= share * 1.0001);
        }
      }
    }
  }
  // 2 + d_y - d_j with d_y = 0 and d_j = 2 is 0 in any arithmetic: not active.
  // Beside a class at cos_j = 1/2, whose hinge of 1 it would halve.
  Problem exact = on_axes({{1}}, 3);
  std::fill_n(exact.w.begin() + 8, 4, 1.0);
  LossSpec spec = euclidean_margin(2, 0.5);
  spec.weighting.kind = WeightingKind::none;
  for (const Implementation implementation : kBoth) {
    for (const Precision precision : {Precision::fp32, Precision::bf16, Precision::fp16}) {
      DeviceHead head(gpu, exact, spec, implementation, precision, kOneChunk);
      const Result found = head.forward_backward(exact);
      CHECK(found.loss == 1);
      for (int k = 4; k < 8; ++k) CHECK(found.grad_w[static_cast<size_t>(k)] == 0);
      check_fp32(exact, spec, found);
    }
  }
}

namespace {

// The center loss of a batch at `centers`, its gradient added to `grad_x`, and the centers after.
double center_reference(const Problem& p, const hardmine::CenterLoss& law, Vector& centers,
                        Vector& grad_x) {
  double loss = 0;
  Vector moved = centers;
  for (size_t i = 0; i < p.labels.size(); ++i) {
    const auto n = static_cast<double>(std::count(p.labels.begin(), p.labels.end(), p.labels[i]));
    for (int k = 0; k < p.dim; ++k) {
      const size_t x = i * static_cast<size_t>(p.dim) + static_cast<size_t>(k);
      const size_t c = static_cast<size_t>(p.labels[i] * p.dim + k);
      const double difference = p.x[x] - centers[c];
      loss += law.weight / (2 * p.rows) * difference * difference;
      grad_x[x] += law.weight / p.rows * difference;
      moved[c] -= law.rate / (1 + n) * -difference;
    }
  }
  centers = moved;
  return loss;
}

}  // namespace

TEST_CASE("the center loss beside every base: loss, gradient and movement, repeated labels") {
  for (LossSpec spec : every_base()) {
    if (spec.base == BaseKind::euclidean_margin) {
      spec.weighting.kind = WeightingKind::knot_magnify;
      spec.weighting.gamma = 2;
    }
    LossSpec plain = spec;
    spec.center = {0.4, 0.7};
    Gpu gpu;
    Problem p = make_problem(6, 9, 20, spec, 43);
    for (const bool one_label : {false, true}) {
      if (one_label) p.labels.assign(p.labels.size(), 19);
      for (const Implementation implementation : kBoth) {
        for (const Precision precision : {Precision::fp32, Precision::bf16, Precision::fp16}) {
          CAPTURE(implementation == Implementation::fused);
          CAPTURE(static_cast<int>(precision));
          const auto head = make_head(gpu, p, spec, implementation, precision);
          const auto without = make_head(gpu, p, plain, implementation, precision);
          const Result base = forward_backward(*without, p);
          const Floats x = floats(p.x);
          StepSettings still;  // of the weights
          still.lr = 0;
          still.lambda = static_cast<float>(spec.margin.lambda);
          Vector centers(p.w.size());
          Floats at(p.w.size());
          for (int step = 0; step < 2; ++step) {
            head->read_centers(at);
            CHECK(relative_error(at, centers) <= 1e-6);
            centers.assign(at.begin(), at.end());
            Vector grad_x(base.grad_x.begin(), base.grad_x.end());
            const double term = center_reference(p, spec.center, centers, grad_x);
            const Result found = forward_backward(*head, p);
            CHECK(found.loss == doctest::Approx(base.loss + term).epsilon(1e-9));
            CHECK(found.base == base.base);
            CHECK(found.weighted == base.weighted);
            CHECK(found.grad_w == base.grad_w);
            CHECK(relative_error(found.grad_x, grad_x) <= 1e-6);
            Floats unmoved(p.w.size());
            head->read_centers(unmoved);
            CHECK(unmoved == at);
            Floats stepped(p.x.size());
            const StepStats stats = head->step({x, p.labels}, still, stepped);
            CHECK(stats.loss == doctest::Approx(found.loss).epsilon(1e-12));
            CHECK(stepped == found.grad_x);
          }
        }
      }
    }
  }
}

TEST_CASE("centers start at 0, are set and read, and are named where they are not finite") {
  Gpu gpu;
  LossSpec spec = euclidean_margin();
  const Problem p = make_problem(3, 4, 50, spec, 37);
  const Floats x = floats(p.x);
  const auto plain = make_head(gpu, p, spec, Implementation::fused);
  Floats none;
  plain->read_centers(none);
  CHECK(error_of([&] { plain->set_centers(Floats(200)); }) ==
        "ERR_INPUT: The centers have 200 numbers; 0 were expected.");
  spec.center.weight = 0.1;
  for (const Implementation implementation : kBoth) {
    const auto head = make_head(gpu, p, spec, implementation);
    CHECK(error_of([&] { head->set_centers(Floats(3)); }) ==
          "ERR_INPUT: The centers have 3 numbers; 200 were expected.");
    Floats centers(200);
    std::iota(centers.begin(), centers.end(), 0.0F);
    head->set_centers(centers);
    Floats found(200);
    head->read_centers(found);
    CHECK(found == centers);
    const auto y = static_cast<size_t>(p.labels[1]);
    centers[y * 4 + 2] = std::numeric_limits<float>::quiet_NaN();
    head->set_centers(centers);
    CHECK(error_of([&] {
            head->step({x, p.labels}, {}, {});
          })
              .find("ERR_NON_FINITE: The center of class " + std::to_string(y) +
                    " has nan at position 2") == 0);
    Floats w(p.w.size());
    head->read_weights(w, {});
    CHECK(w == floats(p.w));
    head->read_centers(found);
    CHECK(std::memcmp(found.data(), centers.data(), found.size() * sizeof(float)) == 0);
    head->set_centers(Floats(200));
    CHECK(error_of([&] { head->step({x, p.labels}, {}, {}); }).empty());
  }
}

TEST_CASE("every size of a class row that the kernels tell apart") {
  Gpu gpu;
  const LossSpec spec = margin_loss(1, 0.5, 0);
  for (const int dim : {4, 132, 514, 1024}) {
    CAPTURE(dim);
    const Problem p = make_problem(5, dim, 11, spec, 3);
    DeviceHead head(gpu, p, spec, Implementation::fused, Precision::fp32, kOneChunk);
    check_fp32(p, spec, head.forward_backward(p));
  }
}

#ifdef HARDMINE_SIMT  // needs the emulator
TEST_CASE("more rows than the kernels over all rows have threads, chained and summed") {
  constexpr int kRows = 1100, kClasses = 70;
  std::mt19937 random(5);
  Buffer<int> labels(kRows, "labels"), class_rows(kClasses, "class_rows"),
      next_row(kRows, "next_row");
  for (int i = 0; i < kRows; ++i) labels[static_cast<size_t>(i)] = static_cast<int>(random() % 60);
  class_rows.fill(cuda::kNoRow);
  const auto run = [](unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
    simt::launch(dim3(blocks), dim3(threads), 0, kernel);
  };
  run((kRows + cuda::kChainThreads - 1) / cuda::kChainThreads, cuda::kChainThreads,
      [&] { cuda::chain_rows(labels.data(), kRows, class_rows.data(), next_row.data()); });
  for (int c = 0; c < kClasses; ++c) {
    int row = class_rows[static_cast<size_t>(c)];
    for (int i = 0; i < kRows; ++i) {
      if (labels[static_cast<size_t>(i)] != c) continue;
      REQUIRE(row == i);
      row = next_row[static_cast<size_t>(row)];
    }
    CHECK(row == cuda::kNoRow);
  }

  Buffer<hardmine::SoftmaxSum<float>> sums(kRows, "sums");
  Buffer<cuda::RowTarget> targets(kRows, "targets");
  Buffer<cuda::SimilarityPart> similarity(1, "similarity");
  Buffer<float> base(kRows, "base_loss"), weighted(kRows, "weighted_loss"),
      row_scale(1, "row_scale");
  Buffer<cuda::RowGradient> gradients(kRows, "gradients");
  Buffer<int> non_finite(1, "non_finite");
  Buffer<cuda::StepRecord> record(1, "record");
  Buffer<unsigned long long> steps(1, "steps");
  const LossSpec loss_spec = margin_loss(1, 0, 0);
  const hardmine::Weighting& weighting = loss_spec.weighting;
  similarity[0] = {30, 60};
  steps[0] = 0;
  double loss = 0, base_sum = 0, norms = 0, largest = 0, highest = 0;
  int correct = 0, silenced = 0, amplified = 0, hardest = 0;
  for (size_t i = 0; i < kRows; ++i) {
    const double target = static_cast<double>(random() % 1000) / 500 - 1;
    const auto plain = static_cast<float>(target + 0.5);
    sums[i] = {0.25F, 1.5F};
    targets[i] = {target, static_cast<float>(i), 1.0F, plain, 0, 1, 0};
    const double l = std::log1p(1.5 * std::exp(0.25 - target));
    const double factor = loss_factor(l, weighting);
    loss += weighted_loss(l, weighting) / kRows;
    base_sum += l / kRows;
    if (l > highest) {
      highest = l;
      hardest = static_cast<int>(i);
    }
    norms += static_cast<double>(i) / kRows;
    largest = std::max(largest, factor / kRows);
    correct += plain > 0.25F ? 1 : 0;
    silenced += factor < 0.1 ? 1 : 0;
    amplified += factor > 1 ? 1 : 0;
  }
  run(1, cuda::kMostFinishThreads, [&] {
    cuda::finish_rows({kRows,
                       loss_spec,
                       sums.data(),
                       nullptr,
                       nullptr,
                       targets.data(),
                       similarity.data(),
                       1,
                       base.data(),
                       weighted.data(),
                       gradients.data(),
                       row_scale.data(),
                       non_finite.data(),
                       {record.data(), steps.data(), 1}});
  });
  CHECK(record[0].loss == doctest::Approx(loss).epsilon(1e-5));
  CHECK(record[0].base_loss == doctest::Approx(base_sum).epsilon(1e-6));
  CHECK(record[0].embedding_norm == doctest::Approx(norms).epsilon(1e-6));
  CHECK(record[0].mean_cosine == 0.5);
  CHECK(record[0].correct == correct);
  CHECK(record[0].silenced == silenced);
  CHECK(record[0].amplified == amplified);
  CHECK(record[0].silenced + record[0].kept + record[0].amplified == kRows);
  CHECK(non_finite[0] == 0);
  CHECK(record[0].hardest_row == hardest);  // the first of those that are equal
  CHECK(record[0].hardest_loss == doctest::Approx(highest).epsilon(1e-6));
  CHECK(record[0].hardest_weight == doctest::Approx(loss_factor(highest, weighting)).epsilon(1e-4));
  CHECK(steps[0] == 1);
  const double scaled = largest * row_scale[0];  // just below 2^10, by a power of two
  CHECK(scaled < 1024);
  CHECK(scaled >= 512);
  CHECK(std::exp2(std::round(std::log2(row_scale[0]))) == row_scale[0]);
}
#endif

TEST_CASE("16-bit operands stay close to the double reference") {
  Gpu gpu;
  // The operands' rounding decides: 2^-11 (fp16) and 2^-8 (bf16) relative, each cosine an average
  // of dim such errors; at s = 16 and inside the gate, whose factor moves by 300 a unit of loss,
  // this gives some 1e-2 and 1e-1 in the gradient. Without a gate it is ten times less.
  for (LossSpec spec : {margin_loss(1, 0.5, 0), softmax(), euclidean_margin()}) {
    spec.weighting.kind = WeightingKind::none;
    const Problem p = make_problem(18, 128, 150, spec, 3);
    const Reference gold = reference_head(p, spec);
    // Softmax's logits are dot products of ||x|| ||w|| = 100, not 16 cosines.
    const double by = spec.base == BaseKind::softmax ? 6 : 1;
    for (const Implementation implementation : kBoth) {
      for (const auto& [precision, bound] :
           {std::pair{Precision::fp16, 5e-3}, std::pair{Precision::bf16, 4e-2}}) {
        DeviceHead head(gpu, p, spec, implementation, precision, kSmallestChunks);
        const Result found = head.forward_backward(p);
        for (size_t i = 0; i < gold.base.size(); ++i)
          CHECK(std::abs(found.base[i] - gold.base[i]) <= by * bound);
        CHECK(relative_error(found.grad_x, gold.grad_x) <= by * bound);
        CHECK(relative_error(found.grad_w, gold.grad_w) <= by * bound);
        CHECK(relative_error(found.grad_bias, gold.grad_bias) <= by * bound);
      }
    }
  }
}

TEST_CASE("coefficients far outside fp16's range reach the weights all the same") {
  // One row: s f / N = 64 * 10.65; a thousand classes share p; a row of a tiny factor.
  Gpu gpu;
  LossSpec spec = margin_loss(1, 0.5, 0, 64);
  const Problem one = make_problem(1, 16, 40, spec, 23);
  LossSpec large = a_softmax(4, 0);
  large.weighting.kind = WeightingKind::none;
  Problem far = make_problem(4, 16, 40, large, 23);
  for (double& value : far.x) value *= 32;  // ||x|| of some 300
  // All 149 others active: the target's coefficient is 1.5 * 149 times theirs.
  LossSpec hinges = euclidean_margin(4, 0.5);
  hinges.weighting.kind = WeightingKind::none;
  const Problem crowd = make_problem(1, 16, 150, hinges, 23);
  for (const Implementation implementation : kBoth) {
    DeviceHead head(gpu, one, spec, implementation, Precision::fp16, kOneChunk);
    const Result found = head.forward_backward(one);
    // The gate moves by 2% with a loss that fp16's cosines of 16 terms move by 64 * 2^-12.
    const double loss = found.base[0];
    const Reference gold = reference_head(one, spec);
    const double factor = loss_factor(loss, spec.weighting) / gold.factor[0];
    Vector grad_w = gold.grad_w;
    for (double& value : grad_w) value *= factor;
    CHECK(relative_error(found.grad_w, grad_w) <= 3e-2);
    DeviceHead other(gpu, far, large, implementation, Precision::fp16, kOneChunk);
    for (const float value : other.forward_backward(far).grad_w) CHECK(std::isfinite(value));
    DeviceHead crowded(gpu, crowd, hinges, implementation, Precision::fp16, kOneChunk);
    const Result all = crowded.forward_backward(crowd);
    const Reference all_gold = reference_head(crowd, hinges);
    CHECK(relative_error(all.grad_w, all_gold.grad_w) <= 5e-3);
    CHECK(relative_error(all.grad_x, all_gold.grad_x) <= 5e-3);
  }
}

TEST_CASE("the cusps: theta + m around pi, cosines at one, all-easy and all-hard batches") {
  Gpu gpu;
  LossSpec spec = margin_loss(1, 0.5, 0, 8);
  Problem p = make_problem(8, 16, 20, spec, 5);
  for (int i = 0; i < 8; ++i) {
    for (int k = 0; k < 16; ++k) {
      // Rows 0-3 lie on their class weight (cos = 1), rows 4-7 opposite (theta + m beyond pi).
      const double w = p.w[static_cast<size_t>(p.labels[static_cast<size_t>(i)] * 16 + k)];
      p.x[static_cast<size_t>(i * 16 + k)] = i < 4 ? w : -w * (1 + (i == 4 ? 0.0 : 1e-3));
    }
  }
  std::fill_n(p.x.begin() + 16, 16, 0.0);  // row 1: an embedding of zeros
  for (const bool mirror : {true, false}) {
    spec.margin.mirror = mirror;
    for (const Implementation implementation : kBoth) {
      DeviceHead head(gpu, p, spec, implementation, Precision::fp32, kOneChunk);
      const Result found = head.forward_backward(p);
      for (const float value : found.grad_x) REQUIRE(std::isfinite(value));
      for (const float value : found.grad_w) REQUIRE(std::isfinite(value));
      const Reference gold = reference_head(p, spec);
      for (size_t i = 0; i < gold.base.size(); ++i)
        CHECK(std::abs(found.base[i] - gold.base[i]) <= 1e-3 * std::max(1.0, gold.base[i]));
    }
  }
}

TEST_CASE("a loss of 1e-7 keeps its digits") {
  Gpu gpu;
  LossSpec spec = margin_loss(1, 0, 0, 16);
  spec.weighting.kind = WeightingKind::none;
  Problem p = make_problem(2, 4, 3, spec, 5);
  p.labels = {0, 1};
  p.w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0};
  p.x = {1, 0.0625, 0, 0, 0, 2, 0.25, 0};
  const Reference gold = reference_head(p, spec);
  REQUIRE(gold.base[0] < 1e-6);
  for (const Implementation implementation : kBoth) {
    DeviceHead head(gpu, p, spec, implementation, Precision::fp32, kOneChunk);
    const Result found = head.forward_backward(p);
    for (size_t i = 0; i < 2; ++i)
      CHECK(found.base[i] == doctest::Approx(gold.base[i]).epsilon(1e-4));
    CHECK(relative_error(found.grad_w, gold.grad_w) <= 1e-4);
  }
}

TEST_CASE("the argmax of the Euclidean margin, before it") {
  Gpu gpu;
  const LossSpec spec = euclidean_margin();
  Problem p = make_problem(40, 40, 90, spec, 9);
  // Some rows that are hard without any margin: pulled to another class.
  for (int i = 0; i < 40; i += 5)
    p.labels[static_cast<size_t>(i)] = 89 - p.labels[static_cast<size_t>(i)];
  const Reference gold = reference_head(p, spec);
  REQUIRE(gold.correct > 0);
  REQUIRE(gold.correct < 40);
  for (const Implementation implementation : kBoth) {
    const auto head = make_head(gpu, p, spec, implementation);
    const Floats x = floats(p.x);
    CHECK(head->step({x, p.labels}, {}, {}).correct == gold.correct);
  }
}

TEST_CASE("the statistics of a step: gates, argmax, mean cosine and norm") {
  Gpu gpu;
  const LossSpec spec = margin_loss(1, 0.2, 0, 32);
  const Problem p = make_problem(40, 40, 90, spec, 9);
  const Reference gold = reference_head(p, spec);
  int silenced = 0, amplified = 0;
  for (const double factor : gold.factor) {
    silenced += factor < 0.1 ? 1 : 0;
    amplified += factor > 1 ? 1 : 0;
  }
  double cosines = 0, pairs = 0, norms = 0;
  for (int i = 0; i < p.rows; ++i) {
    const double* a = p.x.data() + i * p.dim;
    norms += norm(a, p.dim) / p.rows;
    for (int j = 0; j < p.rows; ++j) {
      if (p.labels[static_cast<size_t>(i)] == p.labels[static_cast<size_t>(j)]) continue;
      const double* b = p.x.data() + j * p.dim;
      cosines += dot(a, b, p.dim) / (norm(a, p.dim) * norm(b, p.dim));
      ++pairs;
    }
  }
  for (const Implementation implementation : kBoth) {
    const auto head = make_head(gpu, p, spec, implementation);
    const Floats x = floats(p.x);
    const StepStats s = head->step({x, p.labels}, {}, {});
    CHECK(s.rows == 40);
    CHECK(s.silenced == silenced);
    CHECK(s.amplified == amplified);
    CHECK(s.silenced + s.kept + s.amplified == 40);
    CHECK(s.correct == gold.correct);
    CHECK(s.loss == doctest::Approx(gold.loss).epsilon(1e-4));
    CHECK(s.mean_cosine == doctest::Approx(cosines / pairs).epsilon(1e-5));
    CHECK(s.embedding_norm == doctest::Approx(norms).epsilon(1e-6));
    const auto hardest = std::max_element(gold.base.begin(), gold.base.end()) - gold.base.begin();
    // Rows were made for equal losses: which of them is highest is rounding's to say.
    CHECK(gold.base[static_cast<size_t>(s.hardest.row)] ==
          doctest::Approx(gold.base[static_cast<size_t>(hardest)]).epsilon(1e-4));
    CHECK(s.hardest.base_loss ==
          doctest::Approx(gold.base[static_cast<size_t>(hardest)]).epsilon(1e-4));
    // At so high a loss the gate is open and its factor is alpha: no slope that magnifies errors.
    CHECK(s.hardest.gradient_weight ==
          doctest::Approx(gold.factor[static_cast<size_t>(hardest)]).epsilon(1e-4));
  }
  // One identity: no pairs.
  Problem same = p;
  same.labels.assign(same.labels.size(), 3);
  const auto head = make_head(gpu, same, spec, Implementation::fused);
  const Floats x = floats(same.x);
  CHECK(head->step({x, same.labels}, {}, {}).mean_cosine == 0);
}

namespace {

// What a step does, in double: weights, momenta and embeddings' gradient.
struct Trainer {
  Problem p;
  LossSpec spec;
  Vector velocity = Vector(p.w.size()), bias_velocity = Vector(p.bias.size());
  Vector centers = Vector(p.w.size());
  Reference gold = {};

  void step(const StepSettings& s) {
    LossSpec now = spec;
    const double f = s.margin_factor;
    now.margin.m1 = 1 + (spec.margin.m1 - 1) * f;
    now.margin.m2 *= f;
    now.margin.m3 *= f;
    now.margin.lambda = s.lambda;
    now.euclidean.margin *= f;
    gold = reference_head(p, now);
    if (spec.center.weight > 0) gold.loss += center_reference(p, spec.center, centers, gold.grad_x);
    const auto update = [&](Vector& w, Vector& v, const Vector& g, double decay) {
      for (size_t k = 0; k < w.size(); ++k) {
        v[k] = s.momentum * v[k] + g[k] + decay * w[k];
        w[k] -= s.lr * v[k];
      }
    };
    update(p.w, velocity, gold.grad_w, s.weight_decay);
    update(p.bias, bias_velocity, gold.grad_bias, s.decay_all ? s.weight_decay : 0.0);
  }
};

LossSpec with_centers(LossSpec spec) {
  spec.center = {0.3, 0.6};
  return spec;
}

// The batches of a run: each its own rows and labels over the same classes.
std::vector<Problem> batches_of(const Problem& p, int count) {
  std::vector<Problem> batches;
  for (int b = 0; b < count; ++b) {
    batches.push_back(p);
    Problem& batch = batches.back();
    std::mt19937 random(static_cast<unsigned>(b));
    std::normal_distribution<double> normal;
    for (double& value : batch.x) value = rounded(value + 0.1 * normal(random));
    // Other classes from batch to batch, and sometimes the same.
    for (int& label : batch.labels) label = (label + b % 2) % static_cast<int>(p.classes);
  }
  return batches;
}

std::vector<StepSettings> varied_settings(const LossSpec& spec, int count) {
  std::vector<StepSettings> settings;
  for (int step = 0; step < count; ++step) {
    StepSettings s;
    s.lr = 0.1F / static_cast<float>(step + 1);
    s.momentum = step == 2 ? 0.5F : 0.9F;
    s.weight_decay = 5e-3F;
    s.decay_all = step % 2 == 1;
    s.margin_factor = std::min(1.0F, 0.4F * static_cast<float>(step + 1));
    s.lambda = spec.margin.norm_scale ? 10.0F / static_cast<float>(step + 1) : 0.0F;
    settings.push_back(s);
  }
  return settings;
}

}  // namespace

TEST_CASE("steps with momentum, decay, warm-up and annealing follow the reference") {
  constexpr int kSteps = 4;
  for (const LossSpec& spec : {margin_loss(1, 0.5, 0), margin_loss(1.2, 0.3, 0.2), a_softmax(4, 0),
                               softmax(), with_centers(euclidean_margin())}) {
    Gpu gpu;
    const Problem p = make_problem(12, 20, 60, spec, 13);
    const std::vector<Problem> batches = batches_of(p, kSteps);
    const std::vector<StepSettings> settings = varied_settings(spec, kSteps);
    for (const Implementation implementation : kBoth) {
      CAPTURE(implementation == Implementation::fused);
      Trainer trainer{p, spec};
      const auto head = make_head(gpu, p, spec, implementation);
      for (size_t step = 0; step < kSteps; ++step) {
        trainer.p.x = batches[step].x;
        trainer.p.labels = batches[step].labels;
        trainer.step(settings[step]);
        const Floats x = floats(batches[step].x);
        Floats grad_x(x.size());
        const StepStats stats = head->step({x, batches[step].labels}, settings[step], grad_x);
        CHECK(stats.loss == doctest::Approx(trainer.gold.loss).epsilon(1e-3));
        CHECK(stats.base_loss ==
              doctest::Approx(
                  std::accumulate(trainer.gold.base.begin(), trainer.gold.base.end(), 0.0) / p.rows)
                  .epsilon(1e-4));
        CHECK(relative_error(grad_x, trainer.gold.grad_x) <= 1e-3);
      }
      Floats w(p.w.size()), bias(p.bias.size());
      head->read_weights(w, bias);
      CHECK(relative_error(w, trainer.p.w) <= 1e-5);
      CHECK(relative_error(bias, trainer.p.bias) <= 1e-5);
      if (spec.has_centers()) {
        Floats centers(p.w.size());
        head->read_centers(centers);
        CHECK(relative_error(centers, trainer.centers) <= 1e-6);
      }
      // The weights that the next pass works with are the new ones.
      const Result after = forward_backward(*head, trainer.p);
      const Reference gold = reference_head(trainer.p, spec);
      for (size_t i = 0; i < gold.base.size(); ++i)
        CHECK(std::abs(after.base[i] - gold.base[i]) <= 1e-4 * std::max(1.0, gold.base[i]));
    }
  }
}

TEST_CASE("a captured run of steps over chunks: figures in the ring, the same bits in any order") {
  constexpr int kSteps = 4;
  for (const LossSpec& spec :
       {margin_loss(1, 0.5, 0), softmax(), with_centers(euclidean_margin())}) {
    const Problem p = make_problem(5, 20, 300, spec, 17);  // three chunks
    Trainer trainer{p, spec};
    const StepSettings settings{.lr = 0.05F, .weight_decay = 1e-3F};
    Vector losses;
    for (int step = 0; step < kSteps; ++step) {
      trainer.step(settings);
      losses.push_back(trainer.gold.loss);
    }
    Floats first;
    // Streams that nothing orders run in an order that the seed draws.
    for (const uint64_t seed : {1, 2, 3}) {
      Gpu gpu(seed);
      DeviceHead head(gpu, p, spec, Implementation::fused, Precision::fp32, kSmallestChunks);
      head.set(settings);
      head.step();
      const cuda::CapturedGraph graph(head.stream(), [&] { head.step(); });
      for (int step = 1; step < kSteps; ++step) graph.launch(head.stream());
      Floats w = head.read(cuda::HeadTensor::weights, p.w.size());
      CHECK(relative_error(w, trainer.p.w) <= 1e-5);
      CHECK(relative_error(head.read(cuda::HeadTensor::bias, p.bias.size()), trainer.p.bias) <=
            1e-5);
      CHECK(relative_error(head.read(cuda::HeadTensor::weight_momentum, p.w.size()),
                           trainer.velocity) <= 1e-3);
      CHECK(relative_error(head.read(cuda::HeadTensor::bias_momentum, p.bias.size()),
                           trainer.bias_velocity) <= 1e-3);
      const std::vector<cuda::StepRecord> records = head.records();
      for (int step = kSteps - DeviceHead::kRing; step < kSteps; ++step) {
        CHECK(records[static_cast<size_t>(step % DeviceHead::kRing)].loss ==
              doctest::Approx(losses[static_cast<size_t>(step)]).epsilon(1e-3));
      }
      if (spec.has_centers()) {
        const Floats centers = head.read(cuda::HeadTensor::centers, p.w.size());
        CHECK(relative_error(centers, trainer.centers) <= 1e-6);
        w.insert(w.end(), centers.begin(), centers.end());
      }
      if (first.empty()) first = w;
      CHECK(std::memcmp(first.data(), w.data(), w.size() * sizeof(float)) == 0);
    }
  }
}

TEST_CASE("forward_backward leaves the weights, takes any number of rows and any wish") {
  Gpu gpu;
  const LossSpec spec = softmax();
  const Problem p = make_problem(7, 12, 30, spec, 29);
  for (const Implementation implementation : kBoth) {
    const auto head = make_head(gpu, p, spec, implementation);
    size_t peak = head->peak_extra_bytes();
    CHECK(peak == 0);
    for (const int rows : {7, 2, 5}) {
      Problem part = p;
      part.rows = rows;
      part.x.resize(static_cast<size_t>(rows * p.dim));
      part.labels.resize(static_cast<size_t>(rows));
      check_fp32(part, spec, forward_backward(*head, part));
      CHECK(head->peak_extra_bytes() >= peak);
      peak = head->peak_extra_bytes();
      const Floats x = floats(part.x);
      hardmine::HeadOutput nothing;
      head->forward_backward({x, part.labels}, nothing);
      CHECK(nothing.loss == doctest::Approx(reference_head(part, spec).loss).epsilon(1e-4));
    }
    CHECK(peak > 0);
    Floats w(p.w.size()), bias(p.bias.size());
    head->read_weights(w, bias);
    CHECK(w == floats(p.w));
    CHECK(bias == floats(p.bias));
    for (const HeadWork work : {HeadWork::forward_backward, HeadWork::step, HeadWork::products}) {
      std::vector<double> ms(2);
      const Floats x = floats(p.x);
      head->time(work, {x, p.labels}, ms, std::atomic<bool>(false));
      for (const double run_ms : ms) CHECK(run_ms > 0);
    }
  }
}

TEST_CASE("wrong input and settings are refused with the CPU head's sentences") {
  Gpu gpu;
  const LossSpec spec = margin_loss(1, 0.5, 0);
  const Problem p = make_problem(3, 4, 5, spec, 31);
  const auto head = make_head(gpu, p, spec, Implementation::fused);
  const Floats x = floats(p.x);
  const auto step = [&](const Floats& rows, std::vector<int> labels, const StepSettings& s = {}) {
    return error_of([&] { head->step({rows, labels}, s, {}); });
  };
  CHECK(step({}, {}) == "ERR_INPUT: The batch is empty; at least one row is needed.");
  CHECK(step(x, {0, 1}) == "ERR_INPUT: The embeddings have 12 numbers; 8 were expected.");
  CHECK(step(x, {0, 5, 1}) ==
        "ERR_INPUT: The label of row 1 is 5; the head has 5 classes, so labels must be from 0 to "
        "4.");
  CHECK(step(x, {0, -1, 1}).find("row 1 is -1") != std::string::npos);
  CHECK(step(x, {0, 1, 2}, {.lambda = -1}).find("lambda is -1") != std::string::npos);
  CHECK(error_of([&] { head->set_weights(Floats(19), {}); }) ==
        "ERR_INPUT: The class weights have 19 numbers; 20 were expected.");
  CHECK(error_of([&] { head->set_weights(floats(p.w), Floats(5)); }) ==
        "ERR_INPUT: The biases have 5 numbers; 0 were expected.");
  CHECK(error_of([&] {
          head->time(HeadWork::products, {}, {}, std::atomic<bool>(false));
        }).find("ERR_INPUT") == 0);
  hardmine::HeadOutput output;
  Floats small(2);
  output.base_loss = small;
  CHECK(error_of([&] {
          head->forward_backward({x, p.labels}, output);
        }) == "ERR_INPUT: The base losses have 2 numbers; 3 were expected.");
  for (const HeadSpec& wrong : {HeadSpec{0, 4, spec, Implementation::fused},
                                HeadSpec{5, 1025, spec, Implementation::fused}})
    CHECK(error_of([&] { cuda::make_device_head(wrong, Precision::fp32); }).find("ERR_CONFIG") ==
          0);
  Execution two;
  two.topology.world = 2;
  CHECK(error_of([&] {
          cuda::make_cuda_head({5, 4, spec, Implementation::fused}, two, gpu.libraries.cublas_lt);
        }).find("in one process, not in 2") != std::string::npos);
}

TEST_CASE("what is not finite is named, and the weights stay") {
  Gpu gpu;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const LossSpec& spec : {margin_loss(1, 0.5, 0), softmax()}) {
    const Problem p = make_problem(3, 4, 50, spec, 37);
    for (const Implementation implementation : kBoth) {
      const auto head = make_head(gpu, p, spec, implementation);
      Floats x = floats(p.x), w = floats(p.w);
      const auto step = [&] { return error_of([&] { head->step({x, p.labels}, {}, {}); }); };
      x[6] = nan;
      CHECK(step().find("ERR_NON_FINITE: The embedding of row 1 has nan at position 2") == 0);
      x[6] = 3e38F;
      x[7] = 3e38F;
      CHECK(step().find("ERR_NON_FINITE: The embedding of row 1 is too large for its norm") == 0);
      x = floats(p.x);
      w[47 * 4 + 1] = nan;
      head->set_weights(w, floats(p.bias));
      CHECK(step().find("ERR_NON_FINITE: The class weights of class 47 have nan at position 1") ==
            0);
      Floats kept(w.size()), bias(p.bias.size());
      head->read_weights(kept, bias);
      w[47 * 4 + 1] = kept[47 * 4 + 1] = 0;
      CHECK(kept == w);
      CHECK(bias == floats(p.bias));
      w[47 * 4] = w[47 * 4 + 1] = 3e38F;
      head->set_weights(w, floats(p.bias));
      if (spec.base == BaseKind::margin)
        CHECK(step().find("ERR_NON_FINITE: The class weights of class 47 are too large") == 0);
      if (spec.base == BaseKind::softmax) {
        bias[7] = nan;
        head->set_weights(floats(p.w), bias);
        CHECK(step().find("ERR_NON_FINITE: The bias of class 7 is nan") == 0);
      }
      head->set_weights(floats(p.w), floats(p.bias));
      CHECK(step().empty());
    }
  }
}

#ifdef HARDMINE_SIMT  // needs the emulator
TEST_CASE("a head that does not fit says how much it wanted, and a smaller batch still runs") {
  Gpu gpu;
  const LossSpec spec = margin_loss(1, 0.5, 0);
  const Problem p = make_problem(3, 8, 50, spec, 41);
  const auto head = make_head(gpu, p, spec, Implementation::unfused);
  check_fp32(p, spec, forward_backward(*head, p));
  gpu.device.set_memory_bytes(gpu.device.used_bytes() + (size_t{1} << 20));
  const Floats x(size_t{8} * 20000);
  const std::vector<int> labels(20000);
  const std::string error = error_of([&] { head->step({x, labels}, {}, {}); });
  CHECK(error.find("ERR_DEVICE_OOM") == 0);
  CHECK(error.find("at batch 20000") != std::string::npos);
  check_fp32(p, spec, forward_backward(*head, p));
}
#endif

// The CUDA head's kernels and their order, run on the emulator with plain loops for the products,
// and compared with a double reference that shares nothing with them but the data structures.
#include <doctest/doctest.h>

#include <array>
#include <numbers>
#include <random>

#include "cuda/head_pipeline.h"

namespace {

using hardmine::BaseKind;
using hardmine::HardMiningForm;
using hardmine::LossSpec;
using hardmine::MarginLaw;
using hardmine::Reduction;
using hardmine::WeightingKind;
namespace cuda = hardmine::cuda;

using Vector = std::vector<double>;

struct Problem {
  int rows = 0, dim = 0;
  int64_t classes = 0;
  Vector x, w, bias;
  std::vector<int> labels;
};

struct Reference {
  Vector base, weighted, factor, grad_x, grad_w, grad_bias;
  double loss = 0;
};

// The formulas as the papers print them, in double, every matrix whole.
Reference reference_head(const Problem& p, const LossSpec& spec) {
  const int n = p.rows, d = p.dim;
  const int64_t classes = p.classes;
  const bool cosines = spec.base == BaseKind::margin;
  Reference r;
  r.grad_x.assign(p.x.size(), 0);
  r.grad_w.assign(p.w.size(), 0);
  r.grad_bias.assign(static_cast<size_t>(classes), 0);
  std::vector<Vector> probability(static_cast<size_t>(n));
  Vector derivative(static_cast<size_t>(n), 1), scale(static_cast<size_t>(n), 1),
      psi(static_cast<size_t>(n), 0);
  const auto dot = [&](const double* a, const double* b) {
    double sum = 0;
    for (int k = 0; k < d; ++k) sum += a[k] * b[k];
    return sum;
  };
  const auto norm = [&](const double* a) { return std::max(std::sqrt(dot(a, a)), 1e-12); };
  const auto x = [&](int i) { return p.x.data() + i * d; };
  const auto w = [&](int64_t j) { return p.w.data() + j * d; };
  std::vector<Vector> cosine(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) {
    const size_t row = static_cast<size_t>(i);
    Vector z(static_cast<size_t>(classes));
    cosine[row].resize(static_cast<size_t>(classes));
    for (int64_t j = 0; j < classes; ++j) {
      const size_t column = static_cast<size_t>(j);
      cosine[row][column] = cosines ? dot(x(i), w(j)) / norm(x(i)) / norm(w(j)) : dot(x(i), w(j));
      scale[row] = !cosines ? 1 : spec.margin.norm_scale ? norm(x(i)) : spec.margin.scale;
      z[column] = scale[row] * cosine[row][column] + (cosines ? 0 : p.bias[column]);
    }
    const size_t y = static_cast<size_t>(p.labels[row]);
    if (cosines) {
      const MarginLaw& law = spec.margin;
      const auto value = [&](double c) {
        const double phi = law.m1 * std::acos(std::clamp(c, -1.0, 1.0)) + law.m2;
        const double k = law.mirror ? std::floor(phi / std::numbers::pi) : 0;
        return (law.lambda * c + (std::fmod(k, 2) == 0 ? 1 : -1) * std::cos(phi) - 2 * k - law.m3) /
               (1 + law.lambda);
      };
      const double c = cosine[row][y];
      const double theta = std::acos(std::clamp(c, -1 + 1e-7, 1 - 1e-7));
      const double phi = law.m1 * theta + law.m2;
      const double k = law.mirror ? std::floor(phi / std::numbers::pi) : 0;
      const double exact =
          (std::fmod(k, 2) == 0 ? 1 : -1) * law.m1 * std::sin(phi) / std::sin(theta);
      psi[row] = value(c);
      derivative[row] = (law.lambda + (law.detached ? 1 : exact)) / (1 + law.lambda);
      z[y] = scale[row] * psi[row];
    } else {
      psi[row] = cosine[row][y];
    }
    double max = z[0], sum = 0;
    for (const double value : z) max = std::max(max, value);
    for (const double value : z) sum += std::exp(value - max);
    r.base.push_back(max + std::log(sum) - z[y]);
    for (double& value : z) value = std::exp(value - max) / sum;
    probability[row] = z;
  }
  const hardmine::Weighting& g = spec.weighting;
  const auto hm = [&](double loss) {
    if (g.kind == WeightingKind::none) return std::array<double, 2>{loss, 1};
    const double gate = 1 / (1 + std::exp(-g.A * (g.beta * loss - g.B)));
    const double c = g.form == HardMiningForm::equation ? g.alpha : g.alpha * g.beta;
    return std::array<double, 2>{c * loss * gate,
                                 c * (gate + g.beta * g.A * loss * gate * (1 - gate))};
  };
  double mean = 0;
  for (const double loss : r.base) mean += loss / n;
  for (const double loss : r.base) {
    const bool batch = g.reduction == Reduction::batch;
    r.weighted.push_back(batch ? loss * hm(mean)[0] / mean : hm(loss)[0]);
    r.factor.push_back(hm(batch ? mean : loss)[1]);
    r.loss += r.weighted.back() / n;
  }
  for (int i = 0; i < n; ++i) {
    const size_t row = static_cast<size_t>(i);
    const double f = r.factor[row] / n;
    double radial = 0;
    for (int64_t j = 0; j < classes; ++j) {
      const size_t column = static_cast<size_t>(j);
      const bool target = j == p.labels[row];
      const double dz = f * (probability[row][column] - (target ? 1 : 0));
      r.grad_bias[column] += dz;
      if (!cosines) {
        for (int k = 0; k < d; ++k) {
          r.grad_x[row * d + k] += dz * w(j)[k];
          r.grad_w[column * d + k] += dz * x(i)[k];
        }
        continue;
      }
      radial += dz * (target ? psi[row] : cosine[row][column]);
      const double dc = dz * scale[row] * (target ? derivative[row] : 1);
      const double nx = norm(x(i)), nw = norm(w(j)), c = cosine[row][column];
      for (int k = 0; k < d; ++k) {
        r.grad_x[row * d + k] += dc * (w(j)[k] / nw - c * x(i)[k] / nx) / nx;
        r.grad_w[column * d + k] += dc * (x(i)[k] / nx - c * w(j)[k] / nw) / nw;
      }
    }
    if (cosines && spec.margin.norm_scale)
      for (int k = 0; k < d; ++k) r.grad_x[row * d + k] += radial * x(i)[k] / norm(x(i));
  }
  return r;
}

// Twins of the tensor-core products: the same operands. Cosines are summed in double, because one
// long chain of float additions, which no library does, would lose more than the bound allows.
template <typename T>
struct PlainProducts {
  static void logits(const T* a, const T* b, int rows, int width, int dim, float* out) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < width; ++j) {
        double sum = 0;
        for (int k = 0; k < dim; ++k)
          sum += static_cast<double>(cuda::to_float(a[int64_t{i} * dim + k])) *
                 cuda::to_float(b[int64_t{j} * dim + k]);
        out[int64_t{i} * width + j] = static_cast<float>(sum);
      }
  }
  static void embedding_gradient(const T* p, const T* w, int rows, int width, int dim, float* out) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < width; ++j) {
        const float value = cuda::to_float(p[int64_t{i} * width + j]);
        for (int k = 0; k < dim; ++k)
          out[int64_t{i} * dim + k] += value * cuda::to_float(w[int64_t{j} * dim + k]);
      }
  }
  static void weight_gradient(const T* p, const T* x, int rows, int width, int dim, float* out) {
    std::fill(out, out + int64_t{width} * dim, 0.0F);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < width; ++j) {
        const float value = cuda::to_float(p[int64_t{i} * width + j]);
        for (int k = 0; k < dim; ++k)
          out[int64_t{j} * dim + k] += value * cuda::to_float(x[int64_t{i} * dim + k]);
      }
  }
};

// Every buffer of a head on the emulator, each guarded.
template <typename T>
class EmulatedHead {
 public:
  EmulatedHead(const Problem& p, int width)
      : shape_{p.rows, p.dim, p.classes, width},
        weights_(floats(p.w), "weights"),
        velocity_(p.w.size(), "velocity"),
        norms_(classes(), "norms"),
        class_weights_(p.w.size(), "class_weights"),
        bias_(floats(p.bias), "bias"),
        bias_velocity_(p.bias.size(), "bias_velocity"),
        class_rows_(classes(), "class_rows"),
        embeddings_(floats(p.x), "embeddings"),
        labels_(p.labels, "labels"),
        normalised_(p.x.size(), "normalised"),
        scaled_(p.x.size(), "scaled"),
        next_row_(rows(), "next_row"),
        targets_(rows(), "targets"),
        parts_(rows() * static_cast<size_t>(shape_.chunks()), "parts"),
        gradients_(rows(), "gradients"),
        base_loss_(rows(), "base_loss"),
        weighted_loss_(rows(), "weighted_loss"),
        statistics_(1, "statistics"),
        logits_(rows() * static_cast<size_t>(width), "logits"),
        probabilities_(rows() * static_cast<size_t>(width), "probabilities"),
        embedding_products_(p.x.size(), "embedding_products"),
        weight_products_(static_cast<size_t>(width) * static_cast<size_t>(p.dim),
                         "weight_products"),
        embedding_gradients_(p.x.size(), "embedding_gradients"),
        weight_gradients_(p.w.size(), "weight_gradients"),
        bias_gradients_(p.bias.size(), "bias_gradients") {
    velocity_.fill(0);
    bias_velocity_.fill(0);
    class_rows_.fill(cuda::kNoRow);
  }

  void run(const LossSpec& loss, bool update) {
    const bool cosines = loss.base == BaseKind::margin;
    const cuda::HeadMemory<T> memory{weights_.data(),
                                     velocity_.data(),
                                     norms_.data(),
                                     class_weights_.data(),
                                     cosines ? nullptr : bias_.data(),
                                     bias_velocity_.data(),
                                     class_rows_.data(),
                                     embeddings_.data(),
                                     labels_.data(),
                                     normalised_.data(),
                                     scaled_.data(),
                                     next_row_.data(),
                                     targets_.data(),
                                     parts_.data(),
                                     gradients_.data(),
                                     base_loss_.data(),
                                     weighted_loss_.data(),
                                     statistics_.data(),
                                     logits_.data(),
                                     probabilities_.data(),
                                     embedding_products_.data(),
                                     weight_products_.data(),
                                     embedding_gradients_.data()};
    cuda::set_class_weights(memory, shape_, cosines, nullptr);
    const cuda::HeadGradients wanted =
        update ? cuda::HeadGradients{}
               : cuda::HeadGradients{weight_gradients_.data(), bias_gradients_.data()};
    const cuda::SgdArguments sgd{0.1F, 0.9F, 5e-4F, false, cosines, shape_.dim};
    PlainProducts<T> products;
    cuda::run_head(memory, shape_, loss, sgd, wanted, products, nullptr);
    for (const auto* buffer :
         {&weights_, &velocity_, &norms_, &bias_, &bias_velocity_, &embeddings_, &base_loss_,
          &weighted_loss_, &logits_, &embedding_products_, &weight_products_, &embedding_gradients_,
          &weight_gradients_, &bias_gradients_})
      buffer->check();
    class_weights_.check();
    normalised_.check();
    scaled_.check();
    probabilities_.check();
    class_rows_.check();
    next_row_.check();
    targets_.check();
    parts_.check();
    gradients_.check();
    for (const int row : class_rows_.values()) REQUIRE(row == cuda::kNoRow);  // the chain is undone
  }

  std::vector<float> base_loss() const { return base_loss_.values(); }
  std::vector<float> weighted_loss() const { return weighted_loss_.values(); }
  std::vector<float> grad_x() const { return embedding_gradients_.values(); }
  std::vector<float> grad_w() const { return weight_gradients_.values(); }
  std::vector<float> grad_bias() const { return bias_gradients_.values(); }
  std::vector<float> weights() const { return weights_.values(); }
  std::vector<float> bias() const { return bias_.values(); }
  cuda::HeadStatistics statistics() { return statistics_[0]; }

 private:
  static std::vector<float> floats(const Vector& values) { return {values.begin(), values.end()}; }
  size_t rows() const { return static_cast<size_t>(shape_.rows); }
  size_t classes() const { return static_cast<size_t>(shape_.classes); }

  cuda::HeadShape shape_;
  simt::Buffer<float> weights_, velocity_, norms_;
  simt::Buffer<T> class_weights_;
  simt::Buffer<float> bias_, bias_velocity_;
  simt::Buffer<int> class_rows_;
  simt::Buffer<float> embeddings_;
  simt::Buffer<int> labels_;
  simt::Buffer<T> normalised_, scaled_;
  simt::Buffer<int> next_row_;
  simt::Buffer<cuda::RowTarget> targets_;
  simt::Buffer<cuda::RowPart> parts_;
  simt::Buffer<cuda::RowGradient> gradients_;
  simt::Buffer<float> base_loss_, weighted_loss_;
  simt::Buffer<cuda::HeadStatistics> statistics_;
  simt::Buffer<float> logits_;
  simt::Buffer<T> probabilities_;
  simt::Buffer<float> embedding_products_, weight_products_, embedding_gradients_,
      weight_gradients_, bias_gradients_;
};

// Embeddings pulled towards their class weight until the losses spread over the gate (0.55 to 0.85)
// and beyond: row i aims at the loss `aims[i]` by bisection on the pull.
Problem make_problem(int rows, int dim, int64_t classes, const LossSpec& spec, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  // Rounded to float, so that kernel and reference see the same numbers.
  const auto rounded = [](double value) { return static_cast<double>(static_cast<float>(value)); };
  Problem p{rows, dim, classes, {}, {}, {}, {}};
  p.w.resize(static_cast<size_t>(classes * dim));
  for (double& value : p.w) value = rounded(normal(random));
  for (int64_t j = 0; j < classes; ++j) p.bias.push_back(rounded(0.1 * normal(random)));
  p.x.resize(static_cast<size_t>(rows * dim));
  for (int i = 0; i < rows; ++i) {
    // Every third row repeats the label before it.
    const int label =
        i % 3 == 2 ? p.labels.back() : static_cast<int>(random() % static_cast<unsigned>(classes));
    p.labels.push_back(label);
    Vector noise(static_cast<size_t>(dim));
    for (double& value : noise) value = normal(random);
    const double aim =
        i % 4 == 3 ? 3.0 : 0.55 + 0.3 * (static_cast<double>(random() % 1000) / 1000);
    Problem one{1, dim, classes, Vector(static_cast<size_t>(dim)), p.w, p.bias, {label}};
    double low = -4, high = 4;  // ||x|| stays small enough for A-Softmax's logits in fp32
    for (int step = 0; step < 30; ++step) {
      const double pull = (low + high) / 2;
      for (int k = 0; k < dim; ++k) {
        one.x[static_cast<size_t>(k)] =
            rounded(noise[static_cast<size_t>(k)] +
                    pull * p.w[static_cast<size_t>(int64_t{label} * dim + k)]);
      }
      LossSpec plain = spec;
      plain.weighting.kind = WeightingKind::none;
      (reference_head(one, plain).base[0] > aim ? low : high) = pull;
    }
    std::copy(one.x.begin(), one.x.end(), p.x.begin() + i * dim);
  }
  return p;
}

double relative_error(const std::vector<float>& mine, const Vector& gold) {
  double difference = 0, total = 0;
  for (size_t i = 0; i < gold.size(); ++i) {
    difference += (mine[i] - gold[i]) * (mine[i] - gold[i]);
    total += gold[i] * gold[i];
  }
  return std::sqrt(difference / std::max(total, 1e-300));
}

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

std::vector<LossSpec> every_loss() {
  std::vector<LossSpec> specs;
  for (LossSpec spec :
       {softmax(), margin_loss(1, 0, 0), margin_loss(1, 0.5, 0), margin_loss(1, 0, 0.35),
        margin_loss(1.2, 0.3, 0.2), a_softmax(4, 0), a_softmax(3, 5)}) {
    for (const auto form : {HardMiningForm::equation, HardMiningForm::algorithm})
      for (const auto reduction : {Reduction::sample, Reduction::batch})
        for (const bool detached : {false, true}) {
          spec.weighting.form = form;
          spec.weighting.reduction = reduction;
          spec.margin.detached = detached;
          specs.push_back(spec);
        }
    spec.weighting.kind = WeightingKind::none;
    spec.weighting.reduction = Reduction::sample;
    spec.margin.detached = false;
    specs.push_back(spec);
  }
  return specs;
}

// fp32: the contract's bounds for the CPU head.
void check_fp32(const Problem& p, const LossSpec& spec, int width) {
  EmulatedHead<float> head(p, width);
  head.run(spec, false);
  const Reference gold = reference_head(p, spec);
  const std::vector<float> base = head.base_loss(), weighted = head.weighted_loss();
  double sum = 0;
  for (size_t i = 0; i < base.size(); ++i) {
    // The contract's bound, and what rounding x_hat and w_hat to float (2^-24) does to the target's
    // logit: times the scale and psi', which is m^2 for A-Softmax at theta = 0.
    double norm = 0;
    for (int k = 0; k < p.dim; ++k) norm += std::pow(p.x[i * static_cast<size_t>(p.dim) + k], 2);
    const double scale = spec.margin.norm_scale ? std::sqrt(norm) : spec.margin.scale;
    const double rounding = 0x1p-24 * scale * spec.margin.m1 * spec.margin.m1;
    CHECK(std::abs(base[i] - gold.base[i]) <= 2e-5 * std::max(1.0, gold.base[i]) + rounding);
    sum += weighted[i];
  }
  CHECK(head.statistics().loss == doctest::Approx(sum / p.rows).epsilon(1e-5));
  // The weighted loss amplifies the base loss's error by up to 11.72, its steepest slope.
  CHECK(std::abs(head.statistics().loss - gold.loss) <= 12 * 2e-5 * std::max(1.0, gold.loss));
  // A loss within 2e-5 of the double one moves the factor by at most max |HM''| 2e-5 = 6e-3 (A =
  // 35), so 1e-3 in norm holds over a batch of mixed rows and is what the contract asks.
  CHECK(relative_error(head.grad_x(), gold.grad_x) <= 1e-3);
  CHECK(relative_error(head.grad_w(), gold.grad_w) <= 1e-3);
  if (spec.base == BaseKind::softmax)
    CHECK(relative_error(head.grad_bias(), gold.grad_bias) <= 1e-3);
}

}  // namespace

TEST_CASE("every loss, form and reduction in fp32 on ragged shapes") {
  int in_gate = 0, rows = 0;
  for (const LossSpec& spec : every_loss()) {
    for (const std::array<int, 4>& shape : {std::array{1, 3, 2, 2}, std::array{7, 33, 129, 50}}) {
      const Problem p = make_problem(shape[0], shape[1], shape[2], spec, 7);
      for (const double loss : reference_head(p, spec).base) {
        in_gate += loss > 0.55 && loss < 0.85 ? 1 : 0;
        ++rows;
      }
      check_fp32(p, spec, shape[3]);
    }
  }
  CHECK(2 * in_gate >= rows);
}

TEST_CASE("a thousand classes in chunks that do not divide them") {
  for (const LossSpec& spec : {margin_loss(1, 0.5, 0, 64), a_softmax(4, 0), softmax()})
    check_fp32(make_problem(20, 64, 1003, spec, 11), spec, 300);
}

TEST_CASE("16-bit operands stay close to the double reference") {
  // The operands' rounding decides: 2^-11 (fp16) and 2^-8 (bf16) relative, each cosine an average
  // of dim such errors; at s = 16 and inside the gate, whose factor moves by 300 a unit of loss,
  // this gives some 1e-2 and 1e-1 in the gradient. Without a gate it is ten times less.
  LossSpec spec = margin_loss(1, 0.5, 0);
  spec.weighting.kind = WeightingKind::none;
  const Problem p = make_problem(33, 128, 257, spec, 3);
  const Reference gold = reference_head(p, spec);
  const auto check = [&](auto& head, double loss_bound, double gradient_bound) {
    head.run(spec, false);
    const std::vector<float> base = head.base_loss();
    for (size_t i = 0; i < base.size(); ++i) CHECK(std::abs(base[i] - gold.base[i]) <= loss_bound);
    CHECK(relative_error(head.grad_x(), gold.grad_x) <= gradient_bound);
    CHECK(relative_error(head.grad_w(), gold.grad_w) <= gradient_bound);
  };
  EmulatedHead<__half> fp16(p, 100);
  check(fp16, 5e-3, 5e-3);
  EmulatedHead<__nv_bfloat16> bf16(p, 100);
  check(bf16, 4e-2, 4e-2);
}

TEST_CASE("the cusps: theta + m around pi, cosines at one, all-easy and all-hard batches") {
  LossSpec spec = margin_loss(1, 0.5, 0, 8);
  Problem p = make_problem(8, 16, 20, spec, 5);
  for (int i = 0; i < 8; ++i) {
    for (int k = 0; k < 16; ++k) {
      // Rows 0-3 lie on their class weight (cos = 1), rows 4-7 opposite (theta + m beyond pi).
      const double w = p.w[static_cast<size_t>(p.labels[static_cast<size_t>(i)] * 16 + k)];
      p.x[static_cast<size_t>(i * 16 + k)] = i < 4 ? w : -w * (1 + (i == 4 ? 0.0 : 1e-3));
    }
  }
  for (const bool mirror : {true, false}) {
    spec.margin.mirror = mirror;
    EmulatedHead<float> head(p, 7);
    head.run(spec, false);
    for (const float value : head.grad_x()) REQUIRE(std::isfinite(value));
    for (const float value : head.grad_w()) REQUIRE(std::isfinite(value));
    const Reference gold = reference_head(p, spec);
    const std::vector<float> base = head.base_loss();
    for (size_t i = 0; i < base.size(); ++i)
      CHECK(std::abs(base[i] - gold.base[i]) <= 1e-3 * std::max(1.0, gold.base[i]));
  }
}

TEST_CASE("the statistics count gates and argmax") {
  const LossSpec spec = margin_loss(1, 0.2, 0, 32);
  const Problem p = make_problem(40, 24, 90, spec, 9);
  EmulatedHead<float> head(p, 32);
  head.run(spec, false);
  const Reference gold = reference_head(p, spec);
  int silenced = 0, amplified = 0;
  for (const double factor : gold.factor) {
    silenced += factor < 0.1 ? 1 : 0;
    amplified += factor > 1 ? 1 : 0;
  }
  const cuda::HeadStatistics s = head.statistics();
  CHECK(s.silenced == silenced);
  CHECK(s.amplified == amplified);
  CHECK(s.silenced + s.kept + s.amplified == 40);
  CHECK(s.non_finite == 0);
  int correct = 0;
  for (int i = 0; i < 40; ++i) {
    double best = -2;
    int64_t arg = -1;
    for (int64_t j = 0; j < 90; ++j) {
      double dot = 0, norm = 0;
      for (int k = 0; k < 24; ++k) {
        const double w = p.w[static_cast<size_t>(j * 24 + k)];
        dot += w * p.x[static_cast<size_t>(i * 24 + k)];
        norm += w * w;
      }
      if (dot / std::sqrt(norm) > best) {
        best = dot / std::sqrt(norm);
        arg = j;
      }
    }
    correct += arg == p.labels[static_cast<size_t>(i)] ? 1 : 0;
  }
  CHECK(s.correct == correct);
}

TEST_CASE("three SGD steps with momentum and decay follow the reference") {
  for (const LossSpec& spec : {margin_loss(1, 0.5, 0), softmax()}) {
    Problem p = make_problem(12, 20, 45, spec, 13);
    EmulatedHead<float> head(p, 16);
    Vector velocity(p.w.size(), 0), bias_velocity(p.bias.size(), 0);
    for (int step = 0; step < 3; ++step) {
      head.run(spec, true);
      const Reference gold = reference_head(p, spec);
      for (size_t k = 0; k < p.w.size(); ++k) {
        velocity[k] = 0.9 * velocity[k] + gold.grad_w[k] + 5e-4 * p.w[k];
        p.w[k] -= 0.1 * velocity[k];
      }
      if (spec.base == BaseKind::softmax) {
        for (size_t j = 0; j < p.bias.size(); ++j) {
          bias_velocity[j] = 0.9 * bias_velocity[j] + gold.grad_bias[j];
          p.bias[j] -= 0.1 * bias_velocity[j];
        }
      }
    }
    CHECK(relative_error(head.weights(), p.w) <= 1e-5);
    if (spec.base == BaseKind::softmax) CHECK(relative_error(head.bias(), p.bias) <= 1e-5);
  }
}

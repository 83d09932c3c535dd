// The kernels between the network's convolutions on the emulator, against double references that
// share nothing with them but their arguments. Every device array is a guarded buffer.
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <device_under_test.h>
#include "cuda/kernels/batch_norm.cuh"
#include "cuda/kernels/input.cuh"
#include "cuda/kernels/linear.cuh"
#include "cuda/kernels/pooling.cuh"
#include "cuda/kernels/sgd.cuh"

namespace {

namespace cuda = hardmine::cuda;
using hardmine::Augmentation;
using hardmine::testing::Buffer;
using Vector = std::vector<double>;

#define OPERAND_TYPES float, __half, __nv_bfloat16

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Half a unit in the last place, relative: what one rounding to T may cost.
template <typename T>
constexpr double kRounding = 0x1p-24;
template <>
constexpr double kRounding<__half> = 0x1p-11;
template <>
constexpr double kRounding<__nv_bfloat16> = 0x1p-8;
// fp32 sums of a few hundred terms of order one.
constexpr double kSumError = 2e-6;

double value_of(float x) {
  return x;
}
double value_of(__half x) {
  return __half2float(x);
}
double value_of(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
Vector values_of(const Buffer<T>& buffer) {
  Vector values;
  for (const T& x : buffer.values()) values.push_back(value_of(x));
  return values;
}

template <typename T>
std::vector<T> rounded(const Vector& values) {
  std::vector<T> result;
  for (const double x : values) result.push_back(cuda::from_float<T>(static_cast<float>(x)));
  return result;
}

// A guarded device array.
template <typename T>
struct Array : Buffer<T> {
  Array(const Vector& values, const char* name) : Buffer<T>(rounded<T>(values), name) {}
  Array(size_t count, const char* name) : Buffer<T>(count, name) {}
};

Vector normal(size_t count, uint64_t seed, double mean = 0, double deviation = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> law(mean, deviation);
  Vector values(count);
  for (double& x : values) x = law(random);
  return values;
}

// Every element within relative * |expected| + absolute.
void check_close(const Vector& got, const Vector& expected, double relative, double absolute,
                 const std::string& what) {
  CAPTURE(what);
  REQUIRE(got.size() == expected.size());
  size_t wrong = 0, first = 0;
  for (size_t i = got.size(); i-- > 0;) {
    const double allowed = relative * std::abs(expected[i]) + absolute;
    if (std::abs(got[i] - expected[i]) <= allowed) continue;
    ++wrong;
    first = i;
  }
  CAPTURE(first);
  CAPTURE(got[first]);
  CAPTURE(expected[first]);
  CHECK(wrong == 0);
}

template <typename... Buffers>
void check_guards(const Buffers&... buffers) {
  (buffers.check(), ...);
}

struct Shape {
  int64_t rows, channels;
  size_t count() const { return static_cast<size_t>(rows * channels); }
  size_t width() const { return static_cast<size_t>(channels); }
};

// One row block and several, one column block and several, vector loads and none, ragged ends.
constexpr Shape kShapes[] = {{2, 3}, {7, 8}, {130, 10}, {700, 3}, {130, 64}, {333, 100}};

// ---- Batch-norm ----

struct NormReference {
  Vector mean, variance, y;  // variance: biased
};

// y before the activation if relu is false.
NormReference reference_norm(const Shape& s, const Vector& x, const Vector* gamma,
                             const Vector& beta, const Vector* residual, bool relu) {
  NormReference r{Vector(s.width()), Vector(s.width()), Vector(s.count())};
  for (size_t c = 0; c < s.width(); ++c) {
    for (size_t i = c; i < s.count(); i += s.width())
      r.mean[c] += x[i] / static_cast<double>(s.rows);
    for (size_t i = c; i < s.count(); i += s.width())
      r.variance[c] += std::pow(x[i] - r.mean[c], 2) / static_cast<double>(s.rows);
    for (size_t i = c; i < s.count(); i += s.width()) {
      const double normalised = (x[i] - r.mean[c]) / std::sqrt(r.variance[c] + 1e-5);
      r.y[i] = (gamma != nullptr ? (*gamma)[c] : 1) * normalised + beta[c];
      if (residual != nullptr) r.y[i] += (*residual)[i];
      if (relu) r.y[i] = std::max(r.y[i], 0.0);
    }
  }
  return r;
}

// A batch-norm with its memory.
template <typename T>
struct NormFixture {
  Shape shape;
  bool fixed_scale;
  Vector gamma_values, beta_values;
  Array<float> gamma, beta, running_mean, running_variance, mean, inverse, scale;
  Array<float> gamma_gradient, beta_gradient;
  cuda::BatchNormScratchSize size;
  Buffer<float> scratch_values;
  Buffer<unsigned> arrivals;

  NormFixture(const Shape& s, bool fixed)
      : shape(s),
        fixed_scale(fixed),
        gamma_values(values_of(Array<float>(normal(s.width(), 11, 1, 0.3), "gamma"))),
        beta_values(values_of(Array<float>(normal(s.width(), 12, 0, 0.3), "beta"))),
        gamma(gamma_values, "gamma"),
        beta(beta_values, "beta"),
        running_mean(Vector(s.width(), 0), "running mean"),
        running_variance(Vector(s.width(), 1), "running variance"),
        mean(s.width(), "mean"),
        inverse(s.width(), "inverse deviation"),
        scale(s.width(), "scale"),
        gamma_gradient(s.width(), "gamma gradient"),
        beta_gradient(s.width(), "beta gradient"),
        size(cuda::batch_norm_scratch_size<T>(s.rows, s.channels)),
        scratch_values(static_cast<size_t>(size.values), "scratch values"),
        arrivals(std::vector<unsigned>(static_cast<size_t>(size.arrivals), 0), "arrivals") {}

  cuda::BatchNorm norm() {
    return {shape.rows,  shape.channels,      fixed_scale ? nullptr : gamma.data(),
            beta.data(), running_mean.data(), running_variance.data(),
            mean.data(), inverse.data(),      scale.data()};
  }
  cuda::BatchNormGradient gradient() {
    return {fixed_scale ? nullptr : gamma_gradient.data(), beta_gradient.data()};
  }
  cuda::BatchNormScratch scratch() { return {scratch_values.data(), arrivals.data()}; }
  const Vector* gamma_or_null() const { return fixed_scale ? nullptr : &gamma_values; }

  void check() const {
    check_guards(gamma, beta, running_mean, running_variance, mean, inverse, scale, gamma_gradient,
                 beta_gradient, scratch_values, arrivals);
    for (const unsigned arrived : arrivals.values()) CHECK(arrived == 0);
  }
};

// Which of the arguments a batch-norm has.
struct NormCase {
  bool relu, residual, second_gradient, fixed_scale;
};
constexpr NormCase kNormCases[] = {{false, false, false, false}, {true, false, false, false},
                                   {true, true, false, false},   {true, true, true, false},
                                   {true, false, true, false},   {false, false, false, true}};

// Of how many rows the one kernel each way keeps what it loads.
struct RowsKept {
  int forward, backward;
};

// Every byte that a batch-norm leaves behind, by the name of its array.
using Bytes = std::vector<std::pair<std::string, std::string>>;

// Two steps on the same scratch, by two kernels each way, or by one where `kept` is given.
template <typename T>
Bytes run_norm(const Shape& s, const NormCase& c, int64_t blocks, std::optional<RowsKept> kept) {
  NormFixture<T> f(s, c.fixed_scale);
  cuda::BatchNormScratch scratch = f.scratch();
  scratch.blocks = blocks;
  Bytes bytes;
  const auto add = [&](const char* name, const auto& buffer) {
    const auto values = buffer.values();
    bytes.emplace_back(name, std::string(reinterpret_cast<const char*>(values.data()),
                                         values.size() * sizeof(values[0])));
  };
  for (uint64_t step = 0; step < 2; ++step) {
    Array<T> x(normal(s.count(), 10 + step, 0.5, 2), "x"), y(s.count(), "y");
    Array<T> residual(normal(s.count(), 20 + step), "residual");
    Vector gradient = normal(s.count(), 30 + step);
    for (size_t i = 0; i < s.count(); i += s.width()) gradient[i] = -0.0;
    Array<T> dy(gradient, "dy"), other(normal(s.count(), 40 + step), "dy2");
    // y may take the place of the residual; dx that of x, or of dy where no residual wants that.
    const bool in_place = s.rows % 2 == 0;
    const T* const added = c.residual ? residual.data() : nullptr;
    const T* const second = c.second_gradient ? other.data() : nullptr;
    T* const out = c.residual && in_place ? residual.data() : y.data();
    const T* const masks = c.residual && c.relu ? out : nullptr;
    T* const dx = in_place && !c.residual ? dy.data() : x.data();
    if (kept.has_value()) {
      cuda::batch_norm_forward_whole<T>(f.norm(), kept->forward, x.data(), added, out, c.relu,
                                        scratch, nullptr);
    } else {
      cuda::batch_statistics<T>(f.norm(), x.data(), scratch, nullptr);
      cuda::batch_norm_forward<T>(f.norm(), x.data(), added, out, c.relu, nullptr);
    }
    add("y", y);
    add("residual", residual);
    if (kept.has_value()) {
      cuda::batch_norm_backward_whole<T>(f.norm(), f.gradient(), kept->backward, x.data(), masks,
                                         c.relu, dy.data(), second, dx, scratch, nullptr);
    } else {
      cuda::batch_norm_backward<T>(f.norm(), f.gradient(), x.data(), masks, c.relu, dy.data(),
                                   second, dx, scratch, nullptr);
    }
    add("x or dx", x);
    add("dy or dx", dy);
    add("mean", f.mean);
    add("inverse deviation", f.inverse);
    add("scale", f.scale);
    add("running mean", f.running_mean);
    add("running variance", f.running_variance);
    add("gamma's gradient", f.gamma_gradient);
    add("beta's gradient", f.beta_gradient);
    f.check();
    check_guards(x, y, residual, dy, other);
  }
  return bytes;
}

}  // namespace

TEST_CASE_TEMPLATE("batch-norm: forward, running statistics and backward", T, OPERAND_TYPES) {
  for (const Shape& s : kShapes) {
    for (const NormCase& c : kNormCases) {
      // The emulator is slow: the large shapes with ReLU, alone and with a residual.
      if (s.rows > 200 && (!c.relu || c.second_gradient)) continue;
      CAPTURE(s.rows);
      CAPTURE(s.channels);
      CAPTURE(c.relu);
      CAPTURE(c.residual);
      CAPTURE(c.second_gradient);
      NormFixture<T> f(s, c.fixed_scale);
      Array<T> x(normal(s.count(), 1, 0.5, 2), "x"), residual(normal(s.count(), 2), "residual");
      Array<T> y(s.count(), "y"), dy(normal(s.count(), 3), "dy"),
          other(normal(s.count(), 4), "dy2");
      const Vector x_values = values_of(x), residual_values = values_of(residual);
      const auto n = static_cast<double>(s.rows);

      // Twice: the counters of the first launch must serve the second, and running statistics move
      // on.
      for (int pass = 0; pass < 2; ++pass) {
        cuda::batch_statistics<T>(f.norm(), x.data(), f.scratch(), nullptr);
        cuda::batch_norm_forward<T>(f.norm(), x.data(), c.residual ? residual.data() : nullptr,
                                    y.data(), c.relu, nullptr);
      }
      const NormReference r = reference_norm(s, x_values, f.gamma_or_null(), f.beta_values,
                                             c.residual ? &residual_values : nullptr, c.relu);
      check_close(values_of(f.mean), r.mean, kSumError, kSumError, "mean");
      Vector inverse, running_mean, running_variance;
      for (size_t i = 0; i < s.width(); ++i) {
        inverse.push_back(1 / std::sqrt(r.variance[i] + 1e-5));
        running_mean.push_back(0.19 * r.mean[i]);  // 0.9 (0.1 m) + 0.1 m
        running_variance.push_back(0.81 + 0.19 * r.variance[i] * n / (n - 1));
      }
      check_close(values_of(f.inverse), inverse, kSumError, 0, "inverse deviation");
      check_close(values_of(f.running_mean), running_mean, kSumError, kSumError, "running mean");
      check_close(values_of(f.running_variance), running_variance, kSumError, kSumError,
                  "running variance");
      // Two rows of two near numbers have 1 / deviation far above 1, which magnifies fp32's errors.
      double largest_scale = 1;
      for (const double value : values_of(f.scale)) largest_scale = std::max(largest_scale, value);
      const double arithmetic = 4 * kSumError * largest_scale;
      check_close(values_of(y), r.y, kRounding<T>, arithmetic, "y");
      CHECK(values_of(x) == x_values);

      // Masks are taken from y, which was just found right: near 0 the reference could differ.
      const Vector y_values = values_of(y), dy_values = values_of(dy),
                   other_values = values_of(other);
      Vector g(s.count()), dx(s.count()), dgamma(s.width()), dbeta(s.width());
      for (size_t i = 0; i < s.count(); ++i) {
        g[i] = dy_values[i] + (c.second_gradient ? other_values[i] : 0);
        if (c.relu && y_values[i] <= 0) g[i] = 0;
        dbeta[i % s.width()] += g[i];
        dgamma[i % s.width()] +=
            g[i] * (x_values[i] - r.mean[i % s.width()]) * inverse[i % s.width()];
      }
      // The gradient of the formula itself, by hand: through y, the mean and the variance.
      for (size_t k = 0; k < s.width(); ++k) {
        const double weight = c.fixed_scale ? 1 : f.gamma_values[k];
        double through_variance = 0, through_mean = 0;
        for (size_t i = k; i < s.count(); i += s.width()) {
          through_variance +=
              g[i] * weight * (x_values[i] - r.mean[k]) * -0.5 * std::pow(inverse[k], 3);
          through_mean += -g[i] * weight * inverse[k];
        }
        for (size_t i = k; i < s.count(); i += s.width())
          dx[i] = g[i] * weight * inverse[k] +
                  through_variance * 2 * (x_values[i] - r.mean[k]) / n + through_mean / n;
      }
      // dx may take the place of x, or of dy where no residual wants that.
      const bool over_dy = s.rows % 2 == 0 && !c.residual;
      cuda::batch_norm_backward<T>(f.norm(), f.gradient(), x.data(),
                                   c.residual && c.relu ? y.data() : nullptr, c.relu, dy.data(),
                                   c.second_gradient ? other.data() : nullptr,
                                   over_dy ? dy.data() : x.data(), f.scratch(), nullptr);
      const double sums = kSumError * std::sqrt(n) * 4;
      check_close(values_of(f.beta_gradient), dbeta, kSumError, sums, "dbeta");
      if (!c.fixed_scale)
        check_close(values_of(f.gamma_gradient), dgamma, kSumError, sums, "dgamma");
      // The sum of two gradients is rounded once more on its way.
      const double extra = c.second_gradient ? 6 * kRounding<T> * largest_scale : 0;
      check_close(over_dy ? values_of(dy) : values_of(x), dx, 2 * kRounding<T>, arithmetic + extra,
                  "dx");
      if (c.residual) check_close(values_of(dy), g, kRounding<T>, 0, "gradient of the residual");
      CHECK(values_of(other) == other_values);
      f.check();
      check_guards(x, residual, y, dy, other);
    }
  }
}

TEST_CASE_TEMPLATE("batch-norm in one kernel each way: the bits of two", T, OPERAND_TYPES) {
  const cuda::CooperativeLimits device = hardmine::testing::cooperative_limits();
  if (device.multiprocessors == 0) return;  // a device without cooperative launches
  // Few blocks have many rows each, of which a part is kept.
  for (const int64_t blocks : {cuda::kReductionBlocks, int64_t{3}}) {
    for (const Shape& s : {Shape{2, 3}, {7, 8}, {130, 10}, {700, 3}, {66, 45}, {300, 72}}) {
      for (const NormCase& c : kNormCases) {
        // The emulator is slow: the large shapes with ReLU, alone and with a residual.
        if (s.count() > 2000 && (!c.relu || c.second_gradient)) continue;
        const cuda::BatchNormScratch scratch{nullptr, nullptr, blocks};
        const std::optional<int> forward =
            cuda::forward_rows_to_keep<T>(device, s.rows, s.channels, scratch);
        const std::optional<int> backward =
            cuda::backward_rows_to_keep<T>(device, s.rows, s.channels, c.relu, c.residual, scratch);
        CAPTURE(blocks);
        CAPTURE(s.rows);
        CAPTURE(s.channels);
        CAPTURE(c.relu);
        CAPTURE(c.residual);
        CAPTURE(c.second_gradient);
        REQUIRE(forward.has_value());
        REQUIRE(backward.has_value());
        const Bytes expected = run_norm<T>(s, c, blocks, std::nullopt);
        for (const int most : {0, 2, 1000}) {
          const RowsKept kept{std::min(*forward, most), std::min(*backward, most)};
          CAPTURE(kept.forward);
          CAPTURE(kept.backward);
          const Bytes got = run_norm<T>(s, c, blocks, kept);
          REQUIRE(got.size() == expected.size());
          for (size_t i = 0; i < got.size(); ++i) {
            CAPTURE(got[i].first);
            const bool same = got[i] == expected[i];
            CHECK(same);
          }
        }
      }
    }
  }
}

#ifdef HARDMINE_SIMT  // a device as small as wanted
TEST_CASE("batch-norm in one kernel: how many rows fit, and whether the blocks do") {
  constexpr int64_t kRows = 4000, kChannels = 64;  // 32 threads side by side along the rows
  const auto kept = [&](int64_t blocks, const cuda::CooperativeLimits& limits) {
    const cuda::BatchNormScratch scratch{nullptr, nullptr, blocks};
    return std::pair(
        cuda::forward_rows_to_keep<__half>(limits, kRows, kChannels, scratch),
        cuda::backward_rows_to_keep<__half>(limits, kRows, kChannels, true, true, scratch));
  };
  const auto fitted = [](int forward, int backward) {
    return std::pair(std::optional(forward), std::optional(backward));
  };
  constexpr std::pair<std::optional<int>, std::optional<int>> kNone;
  const cuda::CooperativeLimits none;
  {
    // 4 multiprocessors of 100 KB, 1 KB of each block's share reserved; 4 or 8 KB for a row of each
    // thread.
    const simt::Device device;
    const cuda::CooperativeLimits limits = cuda::cooperative_limits();
    CHECK(kept(4, limits) == fitted(24, 12));
    CHECK(kept(8, limits) == fitted(12, 6));
    CHECK(kept(24, limits) == fitted(3, 1));
    CHECK(kept(25, limits) == kNone);
    CHECK(kept(4, none) == kNone);
  }
  {
    const simt::Device device({.shared_bytes = 1024 << 10});
    CHECK(kept(4, cuda::cooperative_limits()) == fitted(32, 32));  // all there are
    CHECK(kept(16, cuda::cooperative_limits()) == fitted(8, 8));
  }
  {
    const simt::Device device({.cooperative = false});
    CHECK(cuda::cooperative_limits().multiprocessors == 0);
  }
}
#endif

TEST_CASE_TEMPLATE("batch-norm: forward from sums over the map", T, OPERAND_TYPES) {
  for (const Shape& s : {Shape{2, 8}, Shape{7, 25}, Shape{100, 136}}) {
    for (const NormCase& c :
         {NormCase{true, true, false, false}, NormCase{false, false, false, true}}) {
      CAPTURE(s.rows);
      CAPTURE(s.channels);
      CAPTURE(c.relu);
      NormFixture<T> f(s, c.fixed_scale);
      Vector values = normal(s.count(), 13, 1, 2), sums(2 * s.width());
      for (size_t i = 0; i < s.count(); i += s.width()) values[i] = 0.25;  // one that does not vary
      Array<T> x(values, "x"), residual(normal(s.count(), 2), "residual"), y(s.count(), "y");
      const Vector x_values = values_of(x), residual_values = values_of(residual);
      for (size_t i = 0; i < s.count(); ++i) {
        sums[i % s.width()] += x_values[i];
        sums[s.width() + i % s.width()] += x_values[i] * x_values[i];
      }
      Array<float> given(sums, "sums");
      cuda::batch_norm_forward_from_sums<T>(f.norm(), given.data(), x.data(),
                                            c.residual ? residual.data() : nullptr, y.data(),
                                            c.relu, nullptr);
      const NormReference r = reference_norm(s, x_values, f.gamma_or_null(), f.beta_values,
                                             c.residual ? &residual_values : nullptr, c.relu);
      const auto n = static_cast<double>(s.rows);
      Vector inverse, scale, running_mean, running_variance;
      double largest_scale = 1;
      for (size_t k = 0; k < s.width(); ++k) {
        inverse.push_back(1 / std::sqrt(r.variance[k] + 1e-5));
        scale.push_back(inverse[k] * (c.fixed_scale ? 1 : f.gamma_values[k]));
        largest_scale = std::max(largest_scale, std::abs(scale[k]));
        running_mean.push_back(0.1 * r.mean[k]);
        running_variance.push_back(0.9 + 0.1 * r.variance[k] * n / (n - 1));
      }
      // Each sum is rounded to fp32: 6e-8 of mean^2, which is some ten times the least variance
      // that two rows have here, and half of that in 1 / deviation.
      const double of_scale = s.rows == 2 ? 1e-2 : 1e-6;
      check_close(values_of(f.mean), r.mean, 1e-6, 1e-6, "mean");
      check_close(values_of(f.inverse), inverse, of_scale, 0, "inverse deviation");
      check_close(values_of(f.scale), scale, of_scale, 0, "scale");
      check_close(values_of(f.running_mean), running_mean, 1e-6, 1e-6, "running mean");
      check_close(values_of(f.running_variance), running_variance, 1e-6, 0, "running variance");
      check_close(values_of(y), r.y, kRounding<T> + of_scale,
                  8 * kSumError * largest_scale + of_scale, "y");
      f.check();
      check_guards(given, x, residual, y);
      if (c.fixed_scale) continue;

      // The same statistics for whoever applies the batch-norm to x.
      NormFixture<T> g(s, false);
      Array<T> applied_scale(s.width(), "applied scale"), applied_bias(s.width(), "applied bias");
      cuda::batch_norm_to_apply<T>(g.norm(), given.data(), applied_scale.data(),
                                   applied_bias.data(), nullptr);
      CHECK(g.mean.values() == f.mean.values());
      CHECK(g.inverse.values() == f.inverse.values());
      CHECK(g.scale.values() == f.scale.values());
      CHECK(g.running_mean.values() == f.running_mean.values());
      CHECK(g.running_variance.values() == f.running_variance.values());
      const Vector scales = values_of(f.scale), means = values_of(f.mean);
      const Vector rounded = values_of(applied_scale);
      Vector bias;
      for (size_t k = 0; k < s.width(); ++k)
        bias.push_back(f.beta_values[k] - rounded[k] * means[k]);
      check_close(rounded, scales, kRounding<T>, 0, "applied scale");
      check_close(values_of(applied_bias), bias, kRounding<T>, kSumError * largest_scale,
                  "applied bias");
      g.check();
      check_guards(applied_scale, applied_bias);
    }
  }
}

TEST_CASE_TEMPLATE("batch-norm: backward by parameter gradients that are there", T, OPERAND_TYPES) {
  for (const Shape& s : {Shape{2, 8}, Shape{7, 25}, Shape{130, 10}, Shape{300, 72}}) {
    CAPTURE(s.rows);
    CAPTURE(s.channels);
    // What two kernels find of a dy that is masked already, and then the one by their sums.
    NormFixture<T> f(s, false);
    Array<T> x(normal(s.count(), 1, 0.5, 2), "x"), dy(normal(s.count(), 3), "dy");
    Array<T> wanted(s.count(), "wanted"), dx(s.count(), "dx");
    cuda::batch_statistics<T>(f.norm(), x.data(), f.scratch(), nullptr);
    cuda::batch_norm_backward<T>(f.norm(), f.gradient(), x.data(), nullptr, false, dy.data(),
                                 nullptr, wanted.data(), f.scratch(), nullptr);
    cuda::batch_norm_backward_from_gradient<T>(f.norm(), f.gradient(), x.data(), dy.data(),
                                               dx.data(), nullptr);
    CHECK(values_of(dx) == values_of(wanted));
    f.check();
    check_guards(x, dy, wanted, dx);
  }
}

TEST_CASE("batch-norm: from the mean and the deviation alone, all that the statistics leave") {
  for (const Shape& s : {Shape{2, 8}, Shape{50, 64}, Shape{33, 1100}, Shape{7, 5}}) {
    for (const bool fixed_scale : {false, true}) {
      NormFixture<float> f(s, fixed_scale);
      Vector mean = normal(s.width(), 1, 0.5, 2), inverse, scale, running_mean, running_variance;
      const auto n = static_cast<double>(s.rows);
      for (size_t k = 0; k < s.width(); ++k) {
        // Of a channel that does not vary, too.
        const double variance = static_cast<double>(k % 5) * static_cast<double>(k + 1);
        inverse.push_back(1 / std::sqrt(variance + 1e-5));
        scale.push_back(inverse[k] * (fixed_scale ? 1 : f.gamma_values[k]));
        running_mean.push_back(0.1 * mean[k]);
        running_variance.push_back(0.9 + 0.1 * variance * n / (n - 1));
      }
      std::copy(mean.begin(), mean.end(), f.mean.data());
      std::copy(inverse.begin(), inverse.end(), f.inverse.data());
      cuda::finish_batch_norm(f.norm(), nullptr);
      check_close(values_of(f.mean), mean, 1e-6, 1e-6, "mean");
      check_close(values_of(f.inverse), inverse, 1e-6, 0, "inverse deviation");
      check_close(values_of(f.scale), scale, 1e-6, 0, "scale");
      check_close(values_of(f.running_mean), running_mean, 1e-6, 1e-6, "running mean");
      check_close(values_of(f.running_variance), running_variance, 1e-6, 0, "running variance");
      f.check();
    }
  }
}

TEST_CASE("batch-norm: the variance of values far from zero does not cancel") {
  const Shape s{1000, 8};
  NormFixture<float> f(s, false);
  Vector values = normal(s.count(), 5, 1000, 1);
  for (size_t i = 0; i < s.count(); i += 8) values[i] = 1000.25;  // channel 0 does not vary at all
  Array<float> x(values, "x"), y(s.count(), "y");
  cuda::batch_statistics<float>(f.norm(), x.data(), f.scratch(), nullptr);
  cuda::batch_norm_forward<float>(f.norm(), x.data(), nullptr, y.data(), false, nullptr);
  const NormReference r =
      reference_norm(s, values_of(x), &f.gamma_values, f.beta_values, nullptr, false);
  Vector inverse;
  for (const double variance : r.variance) inverse.push_back(1 / std::sqrt(variance + 1e-5));
  // A mean of squares less the squared mean would be off by 1000^2 2^-24 = 6%.
  check_close(values_of(f.inverse), inverse, 1e-6, 0, "inverse deviation");
  // Floats near 1000 are 2^-14 apart; the blocks' means are rounded, and their mean again.
  check_close(values_of(f.mean), r.mean, 0, 0x1p-14, "mean");
  for (size_t i = 0; i < s.count(); i += 8) CHECK(y[i] == f.beta[0]);
  Vector got = values_of(y), expected = r.y;
  for (size_t i = 0; i < s.count(); i += 8) got[i] = expected[i] = 0;
  check_close(got, expected, 1e-6, 2 * 0x1p-14, "y");
  f.check();
}

#ifdef HARDMINE_SIMT  // needs the emulator
TEST_CASE("batch-norm: the same bits in whatever order the blocks run") {
  const Shape s{700, 100};
  Array<float> x(normal(s.count(), 6, 3, 2), "x");
  std::vector<std::vector<float>> seen;
  for (const uint64_t seed : {1, 2, 3}) {
    NormFixture<float> f(s, false);
    const cuda::Tiling t = cuda::tile<4>(s.rows, s.channels, cuda::kReductionBlocks);
    REQUIRE(t.row_blocks > 4);
    REQUIRE(t.column_blocks == 4);
    float* means = f.scratch_values.data();
    float* squares = means + s.channels * t.row_blocks;
    simt::launch(
        t.grid(), cuda::kTileThreads, 0,
        [&] {
          cuda::batch_statistics_kernel<float, 4>(f.norm(), t, x.data(), means, squares,
                                                  f.arrivals.data());
        },
        seed);
    seen.push_back(f.mean.values());
    for (const float value : f.scale.values()) seen.back().push_back(value);
    Buffer<float> y(s.count(), "y");
    simt::launch(
        t.grid(), cuda::kTileThreads, cuda::kKeptBytes<float, 4>,
        [&] {
          cuda::batch_norm_forward_whole_kernel<float, 4>(
              f.norm(), t, 1, x.data(), nullptr, y.data(), true, means, squares, f.arrivals.data());
        },
        seed, simt::Blocks::cooperative);
    for (const float value : y.values()) seen.back().push_back(value);
    f.check();
    y.check();
  }
  CHECK(seen[0] == seen[1]);
  CHECK(seen[0] == seen[2]);
}
#endif

TEST_CASE_TEMPLATE("affine: bias, residual and ReLU in place, NaN stays", T, OPERAND_TYPES) {
  for (const Shape& s : {Shape{1, 3}, Shape{1, 8}, Shape{7, 10}, Shape{130, 64}}) {
    Array<T> x(normal(s.count(), 1), "x"), residual(normal(s.count(), 2), "residual");
    Array<float> shift(normal(s.width(), 3), "shift");
    const Vector before = values_of(x), other = values_of(residual), shifts = values_of(shift);
    cuda::apply_affine<T>({nullptr, nullptr, shift.data()}, s.rows, s.channels, x.data(),
                          residual.data(), x.data(), true, nullptr);
    Vector expected;
    for (size_t i = 0; i < s.count(); ++i)
      expected.push_back(std::max(before[i] + shifts[i % s.width()] + other[i], 0.0));
    check_close(values_of(x), expected, kRounding<T>, kSumError, "y");
    check_guards(x, residual, shift);
  }
  Array<T> x({-1, 2, 3}, "x");
  x[1] = cuda::from_float<T>(kNan);
  Array<float> shift({0, 0, 0}, "shift");
  cuda::apply_affine<T>({nullptr, nullptr, shift.data()}, 1, 3, x.data(), nullptr, x.data(), true,
                        nullptr);
  CHECK(value_of(x[0]) == 0);
  CHECK(std::isnan(value_of(x[1])));
  CHECK(value_of(x[2]) == 3);
}

// ---- Input ----

TEST_CASE_TEMPLATE("images: mirrored, shifted, normalised, padded to four channels", T,
                   OPERAND_TYPES) {
  const std::vector<Augmentation> augmentations = {{0, 0, 0},  {1, 0, 0},     {0, 2, 0},
                                                   {0, 0, -3}, {1, -2, 3},    {1, 4, 4},
                                                   {0, -1, 1}, {1, 127, -128}};
  for (const int size : {5, 7, 130}) {
    CAPTURE(size);
    const size_t used = size > 100 ? 1 : augmentations.size();
    const auto pixels = static_cast<size_t>(size * size);
    std::mt19937 random(7);
    std::vector<uint8_t> bytes(used * pixels * 3);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    Buffer<uint8_t> images(bytes, "images");
    Buffer<Augmentation> device(
        std::vector<Augmentation>(augmentations.end() - static_cast<int>(used),
                                  augmentations.end()),
        "augmentations");
    Array<T> x(used * pixels * 4, "x");
    cuda::load_images<T>(images.data(), device.data(), {}, static_cast<int64_t>(used), size,
                         x.data(), nullptr);
    // Forwards: each source pixel is sent to where it comes to lie on a black canvas.
    std::vector<int> canvas(used * pixels * 3, 0);
    for (size_t n = 0; n < used; ++n) {
      const Augmentation a = device[n];
      for (int row = 0; row < size; ++row) {
        for (int column = 0; column < size; ++column) {
          const int to_row = row + a.dy;
          const int to_column = (a.mirror ? size - 1 - column : column) + a.dx;
          if (to_row < 0 || to_row >= size || to_column < 0 || to_column >= size) continue;
          for (size_t k = 0; k < 3; ++k)
            canvas[(n * pixels + static_cast<size_t>(to_row * size + to_column)) * 3 + k] =
                bytes[(n * pixels + static_cast<size_t>(row * size + column)) * 3 + k];
        }
      }
    }
    size_t wrong = 0;
    for (size_t i = 0; i < used * pixels; ++i) {
      for (size_t k = 0; k < 3; ++k) {
        // Exact in float, so T holds its nearest number.
        const float exact = (static_cast<float>(canvas[i * 3 + k]) - 127.5F) / 128;
        wrong += value_of(x[i * 4 + k]) != value_of(cuda::from_float<T>(exact));
      }
      wrong += value_of(x[i * 4 + 3]) != 0;
    }
    CHECK(wrong == 0);
    check_guards(images, device, x);
  }
  // Without a list all images are treated alike.
  Buffer<uint8_t> images(std::vector<uint8_t>{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, "images");
  Array<T> x(16, "x");
  cuda::load_images<T>(images.data(), nullptr, {.mirror = 1}, 1, 2, x.data(), nullptr);
  CHECK(value_of(x[0]) == value_of(cuda::from_float<T>((4 - 127.5F) / 128)));
  CHECK(value_of(x[14]) == value_of(cuda::from_float<T>((9 - 127.5F) / 128)));
}

// ---- Pooling ----

TEST_CASE_TEMPLATE("max-pool: values, winners and their gradients, with ties and NaN", T,
                   OPERAND_TYPES) {
  for (const int in : {1, 4, 5, 7}) {
    for (const int channels : {3, 8, 10, 64}) {
      CAPTURE(in);
      CAPTURE(channels);
      constexpr int kImages = 2;
      const int out = (in + 1) / 2;
      const cuda::PoolShape shape{kImages, channels, in, out};
      const auto at = [&](int side, int n, int r, int s, int c) {
        return static_cast<size_t>(((n * side + r) * side + s) * channels + c);
      };
      // Four different values: most windows have a tie.
      std::mt19937 random(static_cast<unsigned>(in * 100 + channels));
      Vector values(at(in, kImages, 0, 0, 0));
      for (double& value : values) value = static_cast<double>(random() % 4) - 2;
      if (in == 5) values[at(in, 1, 2, 2, 1)] = values[at(in, 1, 2, 3, 1)] = kNan;
      if (in == 7)
        for (int i = 0; i < 49; ++i) values[static_cast<size_t>(i * channels)] = -kInfinity;
      Array<T> x(values, "x"), y(at(out, kImages, 0, 0, 0), "y");
      Buffer<uint8_t> where(y.size(), "where");
      cuda::max_pool<T>(shape, x.data(), y.data(), where.data(), nullptr);

      Array<T> dy(normal(y.size(), 8), "dy"), other(normal(y.size(), 9), "dy2");
      const Vector dy_values = values_of(dy), other_values = values_of(other);
      size_t wrong = 0;
      Vector dx(x.size()), dx_two(x.size());
      for (int n = 0; n < kImages; ++n)
        for (int r = 0; r < out; ++r)
          for (int s = 0; s < out; ++s)
            for (int c = 0; c < channels; ++c) {
              size_t winner = x.size();
              int position = 0;
              for (int tap = 0; tap < 9; ++tap) {
                const int row = 2 * r - 1 + tap / 3, column = 2 * s - 1 + tap % 3;
                if (row < 0 || row >= in || column < 0 || column >= in) continue;
                const size_t from = at(in, n, row, column, c);
                const bool first = winner == x.size();
                if (first || values[from] > values[winner] || std::isnan(values[from])) {
                  winner = from;
                  position = tap;
                }
              }
              const size_t to = at(out, n, r, s, c);
              wrong += where[to] != position;
              const double got = value_of(y[to]);
              wrong += got != values[winner] && !(std::isnan(got) && std::isnan(values[winner]));
              dx[winner] += dy_values[to];
              dx_two[winner] += dy_values[to] + other_values[to];
            }
      CHECK(wrong == 0);
      Array<T> got(x.size(), "dx");
      cuda::max_pool_backward<T>(shape, dy.data(), nullptr, where.data(), got.data(), nullptr);
      check_close(values_of(got), dx, kRounding<T>, kSumError, "dx");
      cuda::max_pool_backward<T>(shape, dy.data(), other.data(), where.data(), got.data(), nullptr);
      check_close(values_of(got), dx_two, kRounding<T>, kSumError, "dx of two gradients");
      check_guards(x, y, where, dy, other, got);
    }
  }
}

TEST_CASE_TEMPLATE("max-pool after a batch-norm: the bits of the two one after the other", T,
                   OPERAND_TYPES) {
  for (const int channels : {3, 8, 64}) {
    CAPTURE(channels);
    constexpr int kImages = 2, kIn = 7, kOut = 4;
    const cuda::PoolShape shape{kImages, channels, kIn, kOut};
    NormFixture<T> f({kImages * kIn * kIn, channels}, false);
    Array<T> x(normal(f.shape.count(), 5), "x"), map(x.size(), "map");
    x[7] = cuda::from_float<T>(static_cast<float>(kNan));
    const auto count = static_cast<size_t>(kImages * kOut * kOut * channels);
    Array<T> y(count, "y"), fused(count, "fused");
    Buffer<uint8_t> where(count, "where"), fused_where(count, "fused where");
    cuda::batch_statistics<T>(f.norm(), x.data(), f.scratch(), nullptr);
    cuda::batch_norm_forward<T>(f.norm(), x.data(), nullptr, map.data(), true, nullptr);
    cuda::max_pool<T>(shape, map.data(), y.data(), where.data(), nullptr);
    cuda::batch_norm_max_pool<T>(f.norm(), shape, x.data(), fused.data(), fused_where.data(),
                                 nullptr);
    CHECK(where.values() == fused_where.values());
    size_t wrong = 0;
    for (size_t i = 0; i < count; ++i) wrong += std::memcmp(&y[i], &fused[i], sizeof(T)) != 0;
    CHECK(wrong == 0);
    check_guards(x, fused, fused_where);
  }
}

TEST_CASE_TEMPLATE("global average pool and its gradient", T, OPERAND_TYPES) {
  constexpr int kImages = 3;
  for (const int pixels : {1, 16, 49}) {
    for (const int channels : {3, 8, 10, 64}) {
      CAPTURE(pixels);
      CAPTURE(channels);
      const auto vectors = static_cast<size_t>(kImages * channels);
      Array<T> x(normal(vectors * static_cast<size_t>(pixels), 1), "x"),
          operand(vectors, "operand");
      Array<float> y(vectors, "y"), dy(normal(vectors, 2), "dy");
      cuda::average_pool<T>(kImages, pixels, channels, x.data(), y.data(), operand.data(), nullptr);
      Vector expected(vectors), dx(x.size());
      for (size_t i = 0; i < x.size(); ++i) {
        const size_t channel = i % static_cast<size_t>(channels);
        const size_t image = i / static_cast<size_t>(pixels * channels);
        const size_t to = image * static_cast<size_t>(channels) + channel;
        expected[to] += value_of(x[i]) / pixels;
        dx[i] = value_of(dy[to]) / pixels;
      }
      check_close(values_of(y), expected, kSumError, kSumError, "y");
      check_close(values_of(operand), expected, kRounding<T>, kSumError, "operand");
      cuda::average_pool_backward<T>(kImages, pixels, channels, dy.data(), x.data(), nullptr);
      // In fp16 a small share is subnormal, a multiple of 2^-24.
      check_close(values_of(x), dx, kRounding<T> + kSumError, 0x1p-25, "dx");
      check_guards(x, operand, y, dy);
      // Either output alone.
      Array<float> alone(vectors, "y");
      cuda::average_pool<T>(kImages, pixels, channels, x.data(), alone.data(), nullptr, nullptr);
      cuda::average_pool<T>(kImages, pixels, channels, x.data(), nullptr, operand.data(), nullptr);
      for (size_t i = 0; i < vectors; ++i)
        CHECK(value_of(operand[i]) == value_of(cuda::from_float<T>(alone[i])));
    }
  }
}

// ---- Linear ----

TEST_CASE("column sums") {
  for (const Shape& s : {Shape{1, 3}, Shape{7, 512}, Shape{64, 10}, Shape{130, 64}, {333, 100}}) {
    CAPTURE(s.rows);
    CAPTURE(s.channels);
    Array<float> x(normal(s.count(), 1), "x"), sums(s.width(), "sums");
    cuda::column_sums(x.data(), s.rows, s.channels, sums.data(), nullptr);
    Vector expected(s.width());
    for (size_t i = 0; i < s.count(); ++i) expected[i % s.width()] += value_of(x[i]);
    check_close(values_of(sums), expected, kSumError,
                kSumError * std::sqrt(static_cast<double>(s.rows)), "sums");
    check_guards(x, sums);
  }
}

TEST_CASE_TEMPLATE("conversion of fp32 with a factor", T, OPERAND_TYPES) {
  for (const size_t count : {1, 3, 4, 1023, 1024, 1029}) {
    Array<float> x(normal(count, 1), "x"), factor(Vector{8192}, "factor");
    Array<T> y(count, "y");
    Vector expected = values_of(x);
    cuda::convert<T>(x.data(), nullptr, static_cast<int64_t>(count), y.data(), nullptr);
    check_close(values_of(y), expected, kRounding<T>, 0x1p-25, "converted");
    for (double& value : expected) value *= 8192;
    cuda::convert<T>(x.data(), factor.data(), static_cast<int64_t>(count), y.data(), nullptr);
    check_close(values_of(y), expected, kRounding<T>, 0x1p-25, "scaled");
    check_guards(x, y);
  }
  Array<float> in_place({1, -2, 3, 0.5, 7}, "x"), factor(Vector{4}, "factor");
  cuda::convert<float>(in_place.data(), factor.data(), 5, in_place.data(), nullptr);
  CHECK(in_place.values() == std::vector<float>{4, -8, 12, 2, 28});
}

// ---- Parameters ----

namespace {

// Parameters of odd sizes with gradients in T and fp32, with and without a copy and decay.
template <typename T>
struct Parameters {
  struct Tensor {
    Array<float> weights, velocity, wide;
    Array<T> narrow, copy;
    bool is_float, decays, has_copy;
  };
  std::vector<std::unique_ptr<Tensor>> tensors;
  std::unique_ptr<Buffer<cuda::ParameterTensor<T>>> table;
  std::unique_ptr<Buffer<cuda::ParameterRange>> ranges;

  Parameters() {
    constexpr size_t kCounts[] = {1, 3, 64, 4095, 4096, 4097, 10'001};
    std::vector<int64_t> counts;
    std::vector<cuda::ParameterTensor<T>> rows;
    for (size_t i = 0; i < std::size(kCounts); ++i) {
      const size_t n = kCounts[i];
      // One element more than the tensor has: a NaN, which nothing may look at.
      Vector gradient = normal(n + 1, 100 + i);
      gradient.back() = kNan;
      tensors.emplace_back(new Tensor{{normal(n, 200 + i), "weights"},
                                      {normal(n, 300 + i), "velocity"},
                                      {gradient, "gradient"},
                                      {gradient, "gradient"},
                                      {n, "copy"},
                                      i % 2 == 0,
                                      i % 3 != 0,
                                      i != 2});
      Tensor& t = *tensors.back();
      counts.push_back(static_cast<int64_t>(n));
      rows.push_back({t.weights.data(), t.velocity.data(),
                      t.is_float ? static_cast<const void*>(t.wide.data()) : t.narrow.data(),
                      t.has_copy ? t.copy.data() : nullptr, counts.back(), t.is_float, t.decays});
    }
    table.reset(new Buffer<cuda::ParameterTensor<T>>(rows, "tensors"));
    ranges.reset(new Buffer<cuda::ParameterRange>(cuda::parameter_ranges(counts), "ranges"));
  }

  double gradient(const Tensor& t, size_t i) const {
    return t.is_float ? value_of(t.wide.values()[i]) : value_of(t.narrow.values()[i]);
  }
  void set_gradient(size_t tensor, size_t i, float value) {
    tensors[tensor]->wide[i] = value;
    tensors[tensor]->narrow[i] = cuda::from_float<T>(value);
  }
  void check(cuda::LossScale* scale) {
    cuda::check_gradients<T>(table->data(), ranges->data(), count(), scale, nullptr);
  }
  int64_t count() const { return static_cast<int64_t>(ranges->size()); }
  void check_guards_of_all() const {
    for (const auto& t : tensors)
      check_guards(t->weights, t->velocity, t->wide, t->narrow, t->copy);
    check_guards(*table, *ranges);
  }
};

}  // namespace

TEST_CASE_TEMPLATE("SGD over a table of tensors", T, OPERAND_TYPES) {
  for (const bool scaled : {false, true}) {
    for (const bool decay_all : {false, true}) {
      CAPTURE(scaled);
      CAPTURE(decay_all);
      Parameters<T> p;
      CHECK(p.count() == 1 + 1 + 1 + 1 + 1 + 2 + 3);
      const cuda::PendingUpdate step{
          0.1F, 0.9F, 5e-4F, decay_all ? 1 : 0, scaled ? 1.0F / 1024 : 1.0F, 1};
      Buffer<cuda::PendingUpdate> pending(std::vector{step}, "pending");
      std::vector<Vector> weights, velocity;
      for (const auto& t : p.tensors) {
        weights.push_back(values_of(t->weights));
        velocity.push_back(values_of(t->velocity));
        for (size_t i = 0; i < t->weights.size(); ++i) {
          const double decay = t->decays || decay_all ? value_of(step.weight_decay) : 0;
          const double g = p.gradient(*t, i) / (scaled ? 1024 : 1);
          double& w = weights.back()[i];
          double& v = velocity.back()[i];
          for (int pass = 0; pass < 2; ++pass) {
            v = value_of(step.momentum) * v + g + decay * w;
            w -= value_of(step.lr) * v;
          }
        }
      }
      for (int pass = 0; pass < 2; ++pass)
        cuda::sgd<T>(p.table->data(), p.ranges->data(), p.count(), pending.data(), nullptr);
      for (size_t i = 0; i < p.tensors.size(); ++i) {
        auto& t = *p.tensors[i];
        CAPTURE(t.weights.size());
        check_close(values_of(t.velocity), velocity[i], 1e-6, 1e-6, "velocity");
        check_close(values_of(t.weights), weights[i], 1e-6, 1e-6, "weights");
        size_t wrong = 0;
        for (size_t k = 0; t.has_copy && k < t.copy.size(); ++k)
          wrong += value_of(t.copy[k]) != value_of(cuda::from_float<T>(t.weights[k]));
        CHECK(wrong == 0);
      }
      p.check_guards_of_all();
    }
  }
}

TEST_CASE_TEMPLATE("one gradient that is not finite is found and skips the whole step", T,
                   OPERAND_TYPES) {
  Parameters<T> p;
  Buffer<cuda::PendingUpdate> pending(1, "pending");
  Buffer<cuda::LossScale> scale(std::vector{cuda::first_loss_scale()}, "scale");
  Buffer<cuda::StepParameters> settings(
      std::vector{cuda::StepParameters{0.1F, 0.9F, 5e-4F, 0, 1, 0}}, "settings");
  const auto update = [&] {
    cuda::conclude_step(settings.data(), scale.data(), pending.data(), false, nullptr);
    cuda::sgd<T>(p.table->data(), p.ranges->data(), p.count(), pending.data(), nullptr);
  };
  p.check(scale.data());
  CHECK(scale[0].non_finite == 0);  // the NaN past the end of each gradient is nobody's

  struct Place {
    size_t tensor, element;
    float value;
  };
  for (const Place at : {Place{0, 0, kNan},
                         {3, 4094, kInfinity},
                         {5, 4096, -kInfinity},
                         {6, 10'000, kNan},
                         {6, 5000, kInfinity}}) {
    CAPTURE(at.tensor);
    const float before = at.tensor % 2 == 0
                             ? p.tensors[at.tensor]->wide[at.element]
                             : cuda::to_float(p.tensors[at.tensor]->narrow[at.element]);
    p.set_gradient(at.tensor, at.element, at.value);
    scale[0] = cuda::first_loss_scale();
    p.check(scale.data());
    CHECK(scale[0].non_finite == 1);
    std::vector<Vector> weights, velocity;
    for (const auto& t : p.tensors) {
      weights.push_back(values_of(t->weights));
      velocity.push_back(values_of(t->velocity));
    }
    update();
    for (size_t i = 0; i < p.tensors.size(); ++i) {
      CHECK(values_of(p.tensors[i]->weights) == weights[i]);
      CHECK(values_of(p.tensors[i]->velocity) == velocity[i]);
    }
    p.set_gradient(at.tensor, at.element, before);
  }
  scale[0] = cuda::first_loss_scale();
  const float old = p.tensors[6]->weights[10'000];
  update();
  CHECK(p.tensors[6]->weights[10'000] != old);
  p.check_guards_of_all();
  check_guards(scale, settings, pending);
}

TEST_CASE("parts of parameters follow each other, each about four times the one before") {
  const auto parts_of = [](const std::vector<int64_t>& ranges) {
    std::vector<std::vector<int64_t>> parts;
    for (const cuda::ParameterPart& part : cuda::parameter_parts(ranges))
      parts.push_back({static_cast<int64_t>(part.node), part.first, part.count});
    return parts;
  };
  using Parts = std::vector<std::vector<int64_t>>;
  CHECK(parts_of({1, 0, 3, 12, 48, 0}) == Parts{{0, 0, 1}, {2, 1, 3}, {3, 4, 12}, {4, 16, 48}});
  CHECK(parts_of({4, 4, 4, 4, 16, 16, 16, 64, 64, 64}) ==
        Parts{{0, 0, 4}, {1, 4, 12}, {4, 16, 48}, {7, 64, 192}});
  CHECK(parts_of({100, 1}) == Parts{{0, 0, 100}, {1, 100, 1}});
  CHECK(parts_of({0, 7}) == Parts{{1, 0, 7}});
}

TEST_CASE("the loss scale follows torch's GradScaler within its bounds") {
  Buffer<cuda::LossScale> state(std::vector{cuda::first_loss_scale()}, "loss scale");
  Buffer<cuda::StepParameters> settings(
      std::vector{cuda::StepParameters{0.1F, 0.9F, 5e-4F, 1, 1, 0}}, "settings");
  Buffer<cuda::PendingUpdate> pending(1, "pending");
  cuda::LossScale& s = state[0];
  const auto step = [&](bool finite) {
    s.non_finite = finite ? 0 : 1;
    s.inverse = 1 / s.scale;
    const float inverse = s.inverse;
    cuda::conclude_step(settings.data(), state.data(), pending.data(), true, nullptr);
    CHECK(s.non_finite == 0);
    CHECK(s.inverse == 1 / s.scale);
    // The update undoes the scale of its own step, not that of the next one.
    CHECK(pending[0].inverse == inverse);
    CHECK(pending[0].valid == (finite ? 1 : 0));
  };
  CHECK(s.scale == 65536);
  step(false);
  CHECK(s.scale == 32768);
  CHECK(s.skipped == 1);
  for (int i = 0; i < 1999; ++i) step(true);
  CHECK(s.scale == 32768);
  CHECK(s.good_steps == 1999);
  step(false);  // the count starts again
  CHECK(s.scale == 16384);
  CHECK(s.skipped == 2);
  CHECK(s.good_steps == 0);
  for (int i = 0; i < 2000; ++i) step(true);
  CHECK(s.scale == 32768);
  CHECK(s.good_steps == 0);
  s.scale = 16777216;
  s.good_steps = 1999;
  step(true);
  CHECK(s.scale == 16777216);
  CHECK(s.good_steps == 0);
  s.scale = 1;
  step(false);
  CHECK(s.scale == 1);
  CHECK(pending[0].lr == 0.1F);
  CHECK(pending[0].momentum == 0.9F);
  CHECK(pending[0].weight_decay == 5e-4F);
  CHECK(pending[0].decay_all == 1);
  s.non_finite = 1;
  cuda::conclude_step(settings.data(), state.data(), pending.data(), false, nullptr);
  CHECK(s.non_finite == 1);  // until the host has seen it
  CHECK(pending[0].valid == 0);
  check_guards(state, settings, pending);
}

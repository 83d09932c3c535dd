// The network on the CPU against the double-precision reference (network_reference.h).
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/error.h"
#include "core/initialise.h"
#include "core/network.h"
#include "core/random.h"
#include "cpu/embedder.h"
#include "cpu/network_loops.h"
#include "cpu/onednn.h"
#include "cpu/training_network.h"
#include "test/native/network_reference.h"

using namespace hardmine;
using namespace hardmine::testing;

namespace {

// A network whose batch-norm parameters and statistics are not the trivial ones, and its reference.
struct Pair {
  Pair(const std::vector<Node>& nodes, int64_t batch, Precision precision, int threads = 2)
      : network(nodes, batch, precision, threads, 5), reference(nodes, batch) {
    uint64_t stream = 0;
    for (const TensorInfo& tensor : network.tensors()) {
      const size_t count = count_of(tensor);
      std::vector<float> values(count);
      ++stream;
      if (tensor.role == TensorRole::optimizer) {
        values = random_floats(count, stream, 0, 0.1);
      } else if (tensor.name.ends_with("running_var")) {
        for (size_t i = 0; i < count; ++i) {
          values[i] = static_cast<float>(0.5 + random_uniform(7, stream, i));
        }
      } else if (tensor.shape.size() == 1) {
        const bool scale = tensor.name.ends_with(".weight");
        values = random_floats(count, stream, scale ? 1 : 0, 0.3);
      } else {
        network.read(tensor.name, values);
      }
      network.write(tensor.name, values);
      reference.parameters[tensor.name] = Values(values.begin(), values.end());
    }
  }
  std::vector<float> read(const std::string& name) const {
    std::vector<float> values(reference.parameters.at(name).size());
    network.read(name, values);
    return values;
  }

  TrainingNetwork network;
  Reference reference;
};

bool has_bf16() {
  return onednn::bf16_support().possible;
}

std::string error_of(const std::function<void()>& f, const char* code) {
  try {
    f();
  } catch (const Error& e) {
    CHECK(std::string(e.code()) == code);
    return e.what();
  }
  return "no error";
}

// fp32 carries 6e-8 per operation, and a network this deep accumulates well below 1e-4. bf16
// carries 4e-3 in every map and operand of some ten layers, so embeddings agree to a few
// hundredths; of the ReLU and maximum decisions a few percent then fall otherwise, each of which
// replaces its share of a gradient: a fifth of the norm is measured, a quarter allowed. A wrong
// term is an error of about 1.
struct Tolerance {
  double forward, gradient;
};
constexpr Tolerance kFp32 = {1e-5, 1e-4};
constexpr Tolerance kBf16 = {0.03, 0.25};

void check_step(const std::vector<Node>& nodes, int64_t batch, Precision precision,
                Tolerance tolerance) {
  Pair pair(nodes, batch, precision);
  const int64_t size = nodes[0].in_size;
  const std::vector<uint8_t> images = random_images(batch, size, 1);
  std::vector<Augmentation> how(static_cast<size_t>(batch));
  for (size_t i = 0; i < how.size(); ++i) {
    how[i].mirror = i % 2;
    how[i].dx = static_cast<int8_t>(static_cast<int>(i) % 5 - 2);
    how[i].dy = static_cast<int8_t>(2 - static_cast<int>(i) % 4);
  }
  const auto embeddings = pair.network.forward(images.data(), how.data());
  const Values& expected = pair.reference.forward(images, how, true);
  CHECK(relative_error(embeddings, expected) < tolerance.forward);

  const std::vector<float> grad = random_floats(embeddings.size(), 99, 0, 1);
  pair.network.backward(grad);
  pair.reference.backward(Values(grad.begin(), grad.end()));
  size_t compared = 0;
  for (const auto& [name, gradient] : pair.reference.gradients) {
    std::vector<float> ours(gradient.size());
    pair.network.read_gradient(name, ours);
    double norm = 0;
    for (const double value : gradient) norm += value * value;
    // The batch-norm over the embedding removes every shift: fc.bias has no gradient but rounding.
    if (name == "fc.bias" && nodes.back().fixed_scale) {
      CHECK(norm < 1e-20);
    } else {
      INFO(name);
      CHECK(norm > 0);
      CHECK(relative_error(ours, gradient) < tolerance.gradient);
    }
    ++compared;
  }
  size_t parameters = 0;
  for (const TensorInfo& tensor : pair.network.tensors()) {
    parameters += tensor.role == TensorRole::parameter;
    if (tensor.role != TensorRole::statistic) continue;
    INFO(tensor.name);
    CHECK(relative_error(pair.read(tensor.name), pair.reference.parameters.at(tensor.name)) <
          tolerance.forward);
  }
  CHECK(compared == parameters);
}

}  // namespace

TEST_CASE("resnet18 has torchvision's names, shapes and sizes") {
  const std::vector<Node> nodes = build_network({});
  size_t convolutions = 0, norms = 0;
  int64_t parameters = 0;
  for (const Node& node : nodes) {
    convolutions += node.op == Op::convolution;
    norms += node.op == Op::batch_norm;
    if (node.op == Op::convolution) {
      parameters += node.out_channels * node.in_channels * node.kernel * node.kernel;
    } else if (node.op == Op::batch_norm && !node.fixed_scale) {
      parameters += 2 * node.out_channels;
    } else if (node.op == Op::linear) {
      parameters += node.out_channels * (node.in_channels + 1);
    }
  }
  CHECK(convolutions == 20);
  CHECK(norms == 21);
  // torchvision's resnet18(num_classes=512) has 11,439,168 parameters.
  CHECK(parameters == 11439168);
  CHECK(nodes.front().out_size == 56);
  CHECK(nodes[2].out_size == 28);
  const auto downsample = std::find_if(nodes.begin(), nodes.end(), [](const Node& node) {
    return node.name == "layer4.0.downsample.0";
  });
  REQUIRE(downsample != nodes.end());
  CHECK(downsample->in_channels == 256);
  CHECK(downsample->out_size == 4);
  CHECK(nodes.back().name == "embedding_bn");
  CHECK(build_network({"resnet18", 512, false}).back().name == "fc");
  CHECK(error_of(
            [] {
              build_network({"resnet50", 512, true});
            },
            codes::kConfig)
            .find("resnet50") != std::string::npos);
  CHECK(error_of(
            [] {
              build_network({"resnet18", 0, true});
            },
            codes::kConfig)
            .find("0") != std::string::npos);
}

TEST_CASE("initial values have the deviations that the contract states") {
  Node node;
  node.name = "x";
  node.in_channels = 40;
  node.out_channels = 50;
  node.kernel = 3;
  std::vector<float> weight(50 * 40 * 9), linear(50 * 40), bias(50), again(weight.size());
  initialise_convolution(node, 1, weight);
  initialise_convolution(node, 1, again);
  CHECK(weight == again);
  initialise_convolution(node, 2, again);
  CHECK(weight != again);
  const auto deviation = [](const std::vector<float>& values) {
    double sum = 0, square = 0;
    for (const float v : values) {
      sum += v;
      square += static_cast<double>(v) * v;
    }
    const auto n = static_cast<double>(values.size());
    return std::sqrt(square / n - (sum / n) * (sum / n));
  };
  // The deviation of a sample of n normal values is off by 1 / sqrt(2 n): 0.5% here; five of those.
  CHECK(deviation(weight) == doctest::Approx(std::sqrt(2.0 / (50 * 9))).epsilon(0.025));
  initialise_linear(node, 1, linear, bias);
  const double bound = 1 / std::sqrt(40.0);
  CHECK(*std::max_element(linear.begin(), linear.end()) <= bound);
  CHECK(*std::min_element(linear.begin(), linear.end()) >= -bound);
  CHECK(deviation(linear) == doctest::Approx(bound / std::sqrt(3.0)).epsilon(0.05));
  std::vector<float> classes(20000);
  initialise_class_weights(1, classes);
  CHECK(deviation(classes) == doctest::Approx(0.01).epsilon(0.025));
}

TEST_CASE("embeddings, gradients and running statistics equal the double reference, fp32") {
  check_step(small_network(16, 16, 32, 24, true), 3, Precision::fp32, kFp32);
  check_step(small_network(16, 16, 32, 24, true), 5, Precision::fp32, kFp32);
  check_step(small_network(19, 12, 20, 7, false), 5, Precision::fp32, kFp32);
  check_step(small_network(32, 64, 128, 16, true), 4, Precision::fp32, kFp32);
  check_step(small_network(32, 24, 40, 16, false), 1, Precision::fp32, kFp32);
}

TEST_CASE("embeddings and gradients are near the double reference, bf16" *
          doctest::skip(!has_bf16())) {
  check_step(small_network(32, 16, 32, 24, false), 5, Precision::bf16, kBf16);
  check_step(small_network(32, 64, 128, 16, true), 16, Precision::bf16, kBf16);
}

TEST_CASE("SGD steps equal the formula, with decay on weights alone or on everything") {
  for (const bool decay_all : {false, true}) {
    const std::vector<Node> nodes = small_network(16, 16, 32, 8, false);
    Pair pair(nodes, 3, Precision::fp32);
    StepSettings settings;
    settings.lr = 0.05F;
    settings.momentum = 0.8F;
    settings.weight_decay = 0.1F;
    settings.decay_all = decay_all;
    for (uint64_t step = 0; step < 2; ++step) {
      const std::vector<uint8_t> images = random_images(3, 16, 20 + step);
      const auto embeddings = pair.network.forward(images.data(), nullptr);
      pair.reference.forward(images, {}, true);
      const std::vector<float> grad = random_floats(embeddings.size(), 30 + step, 0, 0.3);
      pair.network.backward(grad);
      pair.network.update(settings);
      pair.reference.backward(Values(grad.begin(), grad.end()));
      for (const auto& [name, gradient] : pair.reference.gradients) {
        Values& w = pair.reference.parameters.at(name);
        Values& v = pair.reference.parameters.at("momentum/" + name);
        const bool decays = decay_all || name == "fc.weight" ||
                            name.find("conv") != std::string::npos ||
                            name == "b.downsample.0.weight";
        for (size_t i = 0; i < w.size(); ++i) {
          v[i] = settings.momentum * v[i] + gradient[i] +
                 (decays ? static_cast<double>(settings.weight_decay) * w[i] : 0.0);
          w[i] -= settings.lr * v[i];
        }
      }
    }
    for (const auto& [name, gradient] : pair.reference.gradients) {
      INFO(name);
      // Two fp32 steps: the second sees weights rounded by the first.
      CHECK(relative_error(pair.read(name), pair.reference.parameters.at(name)) < 1e-5);
      CHECK(relative_error(pair.read("momentum/" + name),
                           pair.reference.parameters.at("momentum/" + name)) < kFp32.gradient);
    }
  }
}

TEST_CASE("folded embeddings equal the reference by running statistics, any number of images") {
  for (const bool norm : {true, false}) {
    const std::vector<Node> nodes = small_network(16, 16, 32, 24, norm);
    const int64_t count = 75;  // a whole batch of 64, a small one of 8, and 3
    Pair pair(nodes, 3, Precision::fp32);
    Reference reference(nodes, count);
    reference.parameters = pair.reference.parameters;
    FoldedNetwork folded(nodes, Precision::fp32, 2);
    folded.fold(
        [&](const std::string& name, std::span<float> values) { pair.network.read(name, values); });
    const std::vector<uint8_t> images = random_images(count, 16, 4);
    for (const bool mirror : {false, true}) {
      std::vector<Augmentation> how(static_cast<size_t>(count));
      for (Augmentation& augmentation : how) augmentation.mirror = mirror ? 1 : 0;
      const Values& expected = reference.forward(images, how, false);
      std::vector<float> embeddings(expected.size());
      folded.embed(images, mirror, embeddings);
      CHECK(relative_error(embeddings, expected) < kFp32.forward);
    }
    // New weights are taken over.
    std::vector<float> bias(24, 3.0F);
    pair.network.write(norm ? "embedding_bn.bias" : "fc.bias", bias);
    reference.parameters[norm ? "embedding_bn.bias" : "fc.bias"] = Values(24, 3.0);
    folded.fold(
        [&](const std::string& name, std::span<float> values) { pair.network.read(name, values); });
    std::vector<float> embeddings(static_cast<size_t>(count) * 24);
    folded.embed(images, false, embeddings);
    CHECK(relative_error(embeddings, reference.forward(images, {}, false)) < kFp32.forward);
    std::vector<float> none;
    folded.embed({}, false, none);
    CHECK(error_of([&] { folded.embed(images, false, none); }, codes::kInput).find("room for 0") !=
          std::string::npos);
    if (!has_bf16()) continue;
    FoldedNetwork bf16(nodes, Precision::bf16, 2);
    bf16.fold(
        [&](const std::string& name, std::span<float> values) { pair.network.read(name, values); });
    bf16.embed(images, false, embeddings);
    CHECK(relative_error(embeddings, reference.forward(images, {}, false)) < kBf16.forward);
  }
}

TEST_CASE("every tensor is read back as it was written, and unknown ones are named") {
  for (const Precision precision : {Precision::fp32, Precision::bf16}) {
    if (precision == Precision::bf16 && !has_bf16()) continue;
    Pair pair(small_network(16, 12, 20, 24, true), 3, precision);
    for (const TensorInfo& tensor : pair.network.tensors()) {
      const Values& written = pair.reference.parameters.at(tensor.name);
      const std::vector<float> read = pair.read(tensor.name);
      INFO(tensor.name);
      CHECK(std::equal(read.begin(), read.end(), written.begin()));
    }
    std::vector<float> values(10);
    CHECK(error_of([&] { pair.network.read("layer9.weight", values); }, codes::kInput)
              .find("'layer9.weight'") != std::string::npos);
    CHECK(error_of([&] { pair.network.write("fc.bias", values); }, codes::kInput)
              .find("24 values, but 10") != std::string::npos);
    CHECK(error_of([&] { pair.network.read_gradient("bn1.running_mean", values); }, codes::kInput)
              .find("bn1.running_mean") != std::string::npos);
  }
}

namespace {

float to_float(float value) {
  return value;
}
float to_float(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
void from_float(float value, float& to) {
  to = value;
}
void from_float(float value, Bf16& to) {  // truncates: any bf16 will do as input
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to.bits = static_cast<uint16_t>(bits >> 16);
}

// Everything that the loops write for random input on a plane of 8x8 pixels, one after the other.
template <typename Element>
std::vector<float> run_loops(const NetworkLoops& table, int64_t channels) {
  const ElementLoops<Element>& loops = table.of<Element>();
  const Plane plane = {64, channels};
  const Window window = {8, 4, 3, 2, 1};
  const auto map = [&](int64_t pixels, uint64_t stream) {
    const auto values = random_floats(static_cast<size_t>(pixels * channels), stream, 0.2, 1);
    std::vector<Element> elements(values.size());
    for (size_t i = 0; i < values.size(); ++i) from_float(values[i], elements[i]);
    return elements;
  };
  const auto constants = [&](uint64_t stream) {
    return random_floats(static_cast<size_t>(channels), stream, 0.3, 0.5);
  };
  std::vector<float> written;
  const auto keep = [&](const auto& values) {
    for (const auto value : values) written.push_back(to_float(value));
  };
  const auto x = map(64, 1), residual = map(64, 2), d2 = map(64, 3);
  const auto mean = constants(4), scale = constants(5), shift = constants(6);
  const Affine affine = {mean.data(), scale.data(), shift.data()};
  std::vector<float> a(mean.size()), b(mean.size());
  std::vector<Element> y(x.size());
  loops.statistics(x.data(), plane, a.data(), b.data());
  keep(a), keep(b);
  for (const bool relu : {false, true}) {
    for (const Element* added : {static_cast<const Element*>(nullptr), residual.data()}) {
      loops.normalise(x.data(), added, y.data(), plane, affine, relu);
      keep(y);
    }
  }
  for (const Mask mask : {Mask::none, Mask::from_input, Mask::from_output}) {
    for (const Element* other : {static_cast<const Element*>(nullptr), d2.data()}) {
      auto d1 = map(64, 7);
      loops.backward_sums(x.data(), y.data(), d1.data(), other, plane, affine, mask, a.data(),
                          b.data());
      keep(d1), keep(a), keep(b);
    }
  }
  for (const bool mask : {false, true}) {
    auto dx = x;
    loops.backward_apply(dx.data(), d2.data(), dx.data(), plane, affine, mask, a.data(), b.data());
    keep(dx);
  }
  auto pooled = map(16, 8);
  std::vector<uint8_t> where(pooled.size());
  loops.max_pool(x.data(), pooled.data(), where.data(), channels, window);
  keep(pooled);
  keep(std::vector<float>(where.begin(), where.end()));
  loops.max_pool_backward(map(16, 9).data(), where.data(), y.data(), channels, window);
  keep(y);
  std::vector<Element> columns(static_cast<size_t>(16 * 9 * channels));
  loops.unfold(x.data(), columns.data(), channels, window);
  keep(columns);
  loops.fold(random_floats(columns.size(), 10, 0, 1).data(), y.data(), channels, window);
  keep(y);
  loops.average(x.data(), a.data(), plane);
  keep(a);
  loops.average_backward(mean.data(), y.data(), plane);
  keep(y);
  loops.add(y.data(), x.data(), static_cast<int64_t>(y.size()));
  keep(y);
  const std::vector<uint8_t> pixels = random_images(1, 8, 11);
  std::vector<Element> image(8 * 8 * 3);
  ImageLayout layout;
  layout.size = 8;
  layout.row = 24;
  layout.column = 3;
  for (int64_t c = 0; c < 3; ++c) layout.channel[c] = c;
  loops.image(pixels.data(), image.data(), layout, {1, -2, 3});
  keep(image);
  auto w = constants(12), v = constants(13);
  table.sgd(w.data(), v.data(), mean.data(), channels, 0.1F, 0.9F, 0.01F);
  keep(w), keep(v);
  return written;
}

}  // namespace

TEST_CASE("the loops of every instruction set agree with the baseline's") {
  std::vector<const NetworkLoops*> tables;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v3")) tables.push_back(&avx2::network_loops());
  if (__builtin_cpu_supports("x86-64-v4")) tables.push_back(&avx512::network_loops());
#endif
  for (const NetworkLoops* table : tables) {
    for (const int64_t channels : {1, 3, 8, 16, 27, 64, 100}) {
      INFO(table->isa << ", " << channels << " channels");
      const auto fp32 = run_loops<float>(*table, channels);
      const auto fp32_baseline = run_loops<float>(baseline::network_loops(), channels);
      const auto bf16 = run_loops<Bf16>(*table, channels);
      const auto bf16_baseline = run_loops<Bf16>(baseline::network_loops(), channels);
      // Fused multiply-adds round once where the baseline rounds twice; sums of 64 values of about
      // 1 come out at up to 100. A bf16 result then may fall to the neighbouring number, 2^-8 away.
      REQUIRE(fp32.size() == fp32_baseline.size());
      double worst = 0, worst_bf16 = 0;
      for (size_t i = 0; i < fp32.size(); ++i) {
        const auto error = [i](const auto& one, const auto& other) {
          return std::abs(one[i] - other[i]) / std::max(1.0F, std::abs(other[i]));
        };
        worst = std::max<double>(worst, error(fp32, fp32_baseline));
        worst_bf16 = std::max<double>(worst_bf16, error(bf16, bf16_baseline));
      }
      CHECK(worst < 1e-5);
      CHECK(worst_bf16 < 1.0 / 128);
    }
  }
}

TEST_CASE("what cannot be trained is refused with a sentence") {
  const std::vector<Node> nodes = small_network(16, 16, 32, 24, true);
  CHECK(error_of([&] { TrainingNetwork(nodes, 1, Precision::fp32, 1, 1); }, codes::kConfig)
            .find("embedding_bn") != std::string::npos);
  CHECK(error_of([&] { TrainingNetwork(nodes, 0, Precision::fp32, 1, 1); }, codes::kConfig)
            .find("batch") != std::string::npos);
  CHECK(error_of([&] { TrainingNetwork(nodes, 4, Precision::fp16, 1, 1); }, codes::kConfig)
            .find("fp16") != std::string::npos);
}

TEST_CASE("the first tensor that is not finite is named") {
  const std::vector<Node> nodes = small_network(16, 16, 32, 24, true);
  Pair pair(nodes, 3, Precision::fp32);
  const std::vector<uint8_t> images = random_images(3, 16, 1);
  pair.network.forward(images.data(), nullptr);
  CHECK(pair.network.first_non_finite().empty());
  std::vector<float> weight = pair.read("a.conv2.weight");
  weight[17] = std::numeric_limits<float>::quiet_NaN();
  pair.network.write("a.conv2.weight", weight);
  pair.network.forward(images.data(), nullptr);
  CHECK(pair.network.first_non_finite() == "a.conv2.weight");
  std::fill(weight.begin(), weight.end(), 3e38F);  // finite, but the products overflow
  pair.network.write("a.conv2.weight", weight);
  pair.network.forward(images.data(), nullptr);
  CHECK(pair.network.first_non_finite() == "output of a.conv2");
}

TEST_CASE("two runs give the same bits") {
  const std::vector<Node> nodes = small_network(16, 16, 32, 24, true);
  std::map<std::string, std::vector<float>> first;
  for (int run = 0; run < 2; ++run) {
    TrainingNetwork network(nodes, 5, Precision::fp32, 2, 11);
    for (uint64_t step = 0; step < 4; ++step) {
      const std::vector<uint8_t> images = random_images(5, 16, step);
      const auto embeddings = network.forward(images.data(), nullptr);
      network.backward(random_floats(embeddings.size(), 50 + step, 0, 1));
      network.update({});
    }
    for (const TensorInfo& tensor : network.tensors()) {
      std::vector<float> values(count_of(tensor));
      network.read(tensor.name, values);
      if (run == 0) {
        first[tensor.name] = values;
      } else {
        INFO(tensor.name);
        CHECK(std::memcmp(first[tensor.name].data(), values.data(), values.size() * 4) == 0);
      }
    }
  }
}

namespace {

// The same images every time.
class FixedBatch : public BatchSource {
 public:
  FixedBatch(int64_t size, int32_t classes)
      : images_(random_images(size, kImageSize, 77)), augmentations_(static_cast<size_t>(size)) {
    for (int32_t i = 0; i < size; ++i) labels.push_back(i % classes);
  }
  Batch next() override {
    ++given;
    return {images_.data(), labels.data(), augmentations_.data(),
            static_cast<int64_t>(labels.size()), sources.empty() ? nullptr : sources.data()};
  }
  const std::vector<uint8_t>& images() const { return images_; }
  std::vector<int32_t> labels;
  std::vector<int64_t> sources;
  int given = 0;

 private:
  std::vector<uint8_t> images_;
  std::vector<Augmentation> augmentations_;
};

SessionSpec session_spec(int64_t batch, int64_t classes) {
  SessionSpec spec;
  spec.network.embedding = 64;
  spec.batch = batch;
  spec.head.classes = classes;
  spec.head.dim = 64;
  spec.head.loss.margin.scale = 16;
  spec.head.loss.margin.m2 = 0.3;
  return spec;
}

Execution on(Precision precision) {
  Execution execution;
  execution.precision = precision;
  execution.threads = 2;
  return execution;
}

std::vector<float> read_tensor(const TrainingSession& session, const std::string& name) {
  for (const TensorInfo& tensor : session.tensors()) {
    if (tensor.name != name) continue;
    std::vector<float> values(count_of(tensor));
    session.read(name, values);
    return values;
  }
  FAIL("no tensor " << name);
  return {};
}

}  // namespace

TEST_CASE("a session drives the accuracy on ten images to 1, reproducibly, and embeds") {
  const auto backend = make_backend();
  FixedBatch batch(10, 10);
  std::vector<StepSettings> settings(8);
  for (StepSettings& step : settings) step.lr = 0.02F;
  const std::atomic<bool> cancelled{false};
  for (const Precision precision : {Precision::fp32, Precision::bf16}) {
    if (precision == Precision::bf16 && !has_bf16()) continue;
    std::map<std::string, std::vector<float>> first;
    std::unique_ptr<TrainingSession> session;
    for (int run = 0; run < 2; ++run) {
      session = backend->make_session(session_spec(10, 10), on(precision));
      std::vector<StepStats> stats(settings.size());
      CHECK(session->train(batch, settings, stats, cancelled) == 8);
      CHECK(stats.front().rows == 10);
      CHECK(stats.back().correct == 10);
      CHECK(stats.back().loss < stats.front().loss);
      for (const TensorInfo& tensor : session->tensors()) {
        const std::vector<float> values = read_tensor(*session, tensor.name);
        if (run == 0) {
          first[tensor.name] = values;
        } else {
          INFO(tensor.name);
          CHECK(std::memcmp(first[tensor.name].data(), values.data(), values.size() * 4) == 0);
        }
      }
    }
    // The embedder with the session's weights is the same folded network: the same bits.
    Execution execution = on(precision);
    const auto embedder = backend->make_embedder(session_spec(10, 10).network, execution);
    for (const TensorInfo& tensor : embedder->tensors()) {
      embedder->write(tensor.name, read_tensor(*session, tensor.name));
    }
    std::vector<float> ours(10 * 64), theirs(10 * 64);
    session->embed(batch.images(), true, ours);
    embedder->embed(batch.images(), true, theirs);
    CHECK(ours == theirs);
    // Another step, other weights, other embeddings.
    std::vector<StepStats> stats(1);
    session->train(batch, {settings.data(), 1}, stats, cancelled);
    CHECK(stats[0].hardest.source == -1);
    batch.sources = {70, 71, 72, 73, 74, 75, 76, 77, 78, 79};
    session->train(batch, {settings.data(), 1}, stats, cancelled);
    CHECK(stats[0].hardest.source == 70 + stats[0].hardest.row);
    batch.sources.clear();
    session->embed(batch.images(), true, theirs);
    CHECK(ours != theirs);
  }
}

TEST_CASE("a session's state moves to another one, which goes on with the same bits") {
  const auto backend = make_backend();
  SessionSpec spec = session_spec(4, 7);
  spec.head.loss.base = BaseKind::softmax;  // has head.bias
  spec.head.loss.center.weight = 0.01;      // and head.centers
  FixedBatch batch(4, 7);
  const std::vector<StepSettings> settings(2);
  std::vector<StepStats> stats(2);
  const std::atomic<bool> cancelled{false};
  const auto one = backend->make_session(spec, on(Precision::fp32));
  one->train(batch, settings, stats, cancelled);
  spec.seed = 2;
  const auto two = backend->make_session(spec, on(Precision::fp32));
  size_t head_tensors = 0;
  for (const TensorInfo& tensor : one->tensors()) {
    head_tensors += tensor.name.find("head.") != std::string::npos;
    two->write(tensor.name, read_tensor(*one, tensor.name));
  }
  CHECK(head_tensors == 5);
  const std::vector<float> centers = read_tensor(*one, "head.centers");
  // Four rows with four labels: three classes were never seen.
  CHECK(std::count(centers.begin(), centers.end(), 0.0F) * 7 ==
        3 * static_cast<int64_t>(centers.size()));
  one->train(batch, settings, stats, cancelled);
  two->train(batch, settings, stats, cancelled);
  for (const TensorInfo& tensor : one->tensors()) {
    INFO(tensor.name);
    CHECK(read_tensor(*one, tensor.name) == read_tensor(*two, tensor.name));
  }
}

TEST_CASE("a session stops, and says what is wrong with its input") {
  const auto backend = make_backend();
  const auto session = backend->make_session(session_spec(2, 5), on(Precision::fp32));
  FixedBatch batch(2, 5);
  const std::vector<StepSettings> settings(3);
  std::vector<StepStats> stats(3);
  std::atomic<bool> cancelled{true};
  CHECK(session->train(batch, settings, stats, cancelled) == 0);
  CHECK(batch.given == 0);
  cancelled = false;
  const auto train = [&] { session->train(batch, settings, stats, cancelled); };

  batch.labels = {1, 5};
  CHECK(error_of(train, codes::kInput).find("5 classes") != std::string::npos);
  batch.labels = {1};
  CHECK(error_of(train, codes::kInput).find("1 images") != std::string::npos);
  batch.labels = {1, 2};

  std::vector<float> weight = read_tensor(*session, "layer3.1.conv1.weight");
  weight[3] = std::numeric_limits<float>::quiet_NaN();
  session->write("layer3.1.conv1.weight", weight);
  CHECK(error_of(train, codes::kNonFinite).find("is layer3.1.conv1.weight") != std::string::npos);
  weight[3] = 0;
  session->write("layer3.1.conv1.weight", weight);
  std::vector<float> classes = read_tensor(*session, "head.weight");
  classes[1] = std::numeric_limits<float>::infinity();
  session->write("head.weight", classes);
  CHECK(error_of(train, codes::kNonFinite).find("class 0") != std::string::npos);
  CHECK(error_of([&] { session->write("head.bias", classes); }, codes::kInput).find("head.bias") !=
        std::string::npos);

  SessionSpec spec = session_spec(2, 5);
  spec.head.dim = 32;
  CHECK(error_of([&] { backend->make_session(spec, on(Precision::fp32)); }, codes::kConfig)
            .find("32 dimensions") != std::string::npos);
  Execution world = on(Precision::fp32);
  world.topology.world = 2;
  CHECK(error_of([&] { backend->make_session(session_spec(2, 5), world); }, codes::kConfig)
            .find("world of 2") != std::string::npos);
}

TEST_CASE("the backend describes the CPU") {
  const auto backend = make_backend();
  CHECK(std::string(backend->name()) == "cpu");
  REQUIRE(backend->device_count() == 1);
  const DeviceInfo device = backend->device(0);
  CHECK(device.threads >= 1);
  CHECK(device.memory_bytes > device.free_bytes);
  CHECK(device.precisions.back() == Precision::fp32);
  CHECK((device.precisions.size() == 2) == onednn::bf16_support().fast);
  const auto allocator = backend->host_allocator({});
  void* memory = allocator->allocate(1000);
  CHECK(reinterpret_cast<uintptr_t>(memory) % 64 == 0);
  std::memset(memory, 1, 1000);
  allocator->release(memory);
}

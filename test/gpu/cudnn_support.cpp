// Asks the cuDNN of this machine whether it has an engine, within a session's workspace, for every
// convolution of ResNet18 on the GPU whose properties are in a file of cuDNN's JSON. No GPU is
// needed: cuDNN's heuristics and support checks take the properties instead. Compiles against
// test/simt's stand-ins, as nothing here calls CUDA. Built and run by scripts/test-cudnn.mjs.
#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/network.h"
#include "cuda/convolution.h"
#include "cuda/libraries.h"
#include "cuda/maps.h"
#include "cuda/norm_graph.h"
#include "cuda/runtime.h"

namespace {

using namespace hardmine;
using cuda::convolution_graph;
using cuda::ConvolutionPass;

constexpr size_t kOldestCudnn = 91100;  // 9.11: the first that NVIDIA's own sample of this needs

struct Counts {
  int passed = 0, failed = 0;
};

// How many batch-norms on maps cuDNN has, each way: those whose output no max-pool makes, and those
// of a ReLU without a residual. They are compiled as they are looked for, which needs NVRTC and a
// driver; without, there are none.
std::string norms_of(cuda::Engines& engines, const std::vector<Node>& nodes, int64_t batch,
                     Precision precision) {
  size_t forward = 0, forward_found = 0, backward = 0, backward_found = 0;
  for (size_t i = 0; i < nodes.size(); ++i) {
    const Node& node = nodes[i];
    if (node.op != Op::batch_norm || nodes[static_cast<size_t>(node.input)].op != Op::convolution)
      continue;
    const cuda::NormShape shape{batch, node.out_channels, node.out_size, precision};
    const bool residual = node.residual >= 0, relu = node.activation == Activation::relu;
    if (nodes[i + 1].op != Op::max_pool) {
      ++forward;
      if (engines.find_plan(cuda::norm_forward_graph(shape, residual, relu)) != nullptr)
        ++forward_found;
    }
    if (relu && !residual) {
      ++backward;
      if (engines.find_plan(cuda::norm_backward_graph(shape)) != nullptr) ++backward_found;
    }
  }
  return "batch-norms: " + std::to_string(forward_found) + " of " + std::to_string(forward) +
         " forward, " + std::to_string(backward_found) + " of " + std::to_string(backward) +
         " backward";
}

// Every pass that the network trains with, at one batch size; and how many layers have one that does
// what a batch-norm beside them wants, and a batch-norm of cuDNN's, which may be none.
void ask(const cuda::Cudnn& library, const std::string& properties, const std::vector<Node>& nodes,
         int64_t batch, Precision precision, Counts& counts) {
  using Question = std::pair<cuda::ConvolutionShape, ConvolutionPass>;
  std::set<Question> questions;
  std::set<cuda::ConvolutionShape> behind_norms;
  for (const Node& node : nodes) {
    if (node.op != Op::convolution) continue;
    const cuda::ConvolutionShape shape = cuda::convolution_shape(node, batch, precision);
    if (node.input >= 0) {
      const Node& before = nodes[static_cast<size_t>(node.input)];
      if (before.op == Op::batch_norm && before.residual < 0) behind_norms.insert(shape);
    }
    questions.insert({shape, ConvolutionPass::forward});
    questions.insert({shape, ConvolutionPass::weight_gradient});
    if (node.input >= 0) questions.insert({shape, ConvolutionPass::data_gradient});
  }
  cuda::Engines engines(library, properties);
  const auto has = [&](const cuda::ConvolutionShape& shape, ConvolutionPass pass) {
    return engines.find_plan(convolution_graph(shape, pass)) != nullptr;
  };
  size_t workspace = 0, forward = 0, with_sums = 0;
  for (const auto& [shape, pass] : questions) {
    try {
      workspace =
          std::max(workspace, engines.plan(convolution_graph(shape, pass)).workspace_bytes());
      ++counts.passed;
    } catch (const Error& error) {
      std::cout << error.what() << '\n';
      ++counts.failed;
    }
    if (pass != ConvolutionPass::forward) continue;
    ++forward;
    if (has(shape, ConvolutionPass::forward_with_sums)) ++with_sums;
  }
  size_t apply = 0, give = 0;
  for (const cuda::ConvolutionShape& shape : behind_norms) {
    if (has(shape, ConvolutionPass::norm_forward_with_sums) &&
        has(shape, ConvolutionPass::norm_weight_gradient))
      ++apply;
    if (has(shape, ConvolutionPass::norm_data_gradient)) ++give;
  }
  std::cout << (precision == Precision::fp16   ? "fp16"
                : precision == Precision::bf16 ? "bf16"
                                               : "fp32")
            << ", batch " << batch << ": " << questions.size() << " passes, at most "
            << cuda::mebibytes(workspace) << " of workspace; sums come with " << with_sums << " of "
            << forward << " forward passes; of " << behind_norms.size() << " behind a batch-norm "
            << apply << " can apply it, " << give << " give its parameters' gradients; "
            << norms_of(engines, nodes, batch, precision) << '\n';
}

int run(const std::string& file) {
  std::ifstream in(file);
  std::string properties(std::istreambuf_iterator<char>(in), {});
  properties.resize(properties.find_last_of('}') + 1);  // nothing after the JSON
  if (properties.empty()) throw Error(codes::kInput, "No JSON of a GPU's properties in " + file);

  cuda::Cudnn library{};
  try {
    library = cuda::open_cudnn();
  } catch (const Error& error) {
    if (std::string(error.code()) != codes::kUnavailable) throw;
    std::cout << "skipped: " << error.what() << '\n';
    return 0;
  }
  const size_t version = library.get_version();
  if (version < kOldestCudnn) {
    std::cout << "skipped: cuDNN " << cuda::version_text(version)
              << " takes no properties of a GPU that is not here; "
              << cuda::version_text(kOldestCudnn) << " or later does.\n";
    return 0;
  }

  std::cout << "cuDNN " << cuda::version_text(version) << " on " << file << '\n';
  const std::vector<Node> nodes = build_network({});
  Counts counts;
  for (const Precision precision : {Precision::fp16, Precision::bf16, Precision::fp32})
    for (const int64_t batch : {1, 64, 512})
      ask(library, properties, nodes, batch, precision, counts);
  std::cout << counts.passed << " passed, " << counts.failed << " failed\n";
  return counts.failed == 0 && counts.passed > 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc != 2) throw Error(codes::kInput, "The file of a GPU's properties is wanted.");
    return run(argv[1]);
  } catch (const Error& error) {
    std::cout << error.code() << ": " << error.what() << '\n';
    return 1;
  }
}

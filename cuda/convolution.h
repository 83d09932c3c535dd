// Convolutions on cuDNN's graph API: activations NHWC, weights OHWI, operands and results in one
// 16- or 32-bit type, sums in fp32. fp32 is multiplied as TF32 unless NVIDIA_TF32_OVERRIDE=0 is in
// the environment.
//
// Each (shape, pass) is a graph of one operation, or two where a forward pass also sums what a
// batch-norm after it wants. The heuristic (mode A, then the fallback list)
// gives engine configurations. With `deterministic`, the first in the heuristic's order that has no
// nondeterministic note and fits the workspace limit runs; else the fastest of the first few, timed
// once on the session's own buffers and kept on disk under cuDNN's version, the GPU, the driver and
// the shape.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"
#include "cuda/libraries.h"
#include "cuda/runtime.h"

namespace hardmine::cuda {

struct ConvolutionShape {
  int64_t batch = 0;
  int64_t in_channels = 0, out_channels = 0;
  int64_t in_size = 0, out_size = 0;  // pixels, both sides
  int64_t kernel = 1, stride = 1, padding = 0;
  Precision precision = Precision::fp32;

  auto operator<=>(const ConvolutionShape&) const = default;
};

// y = x * w; the same with the sums of y and of y^2 of every channel over all pixels, in the same
// kernel (cuDNN has it for fp16 only on Hopper); dx from dy and w; dw from x and dy.
enum class ConvolutionPass : uint8_t {
  forward,
  forward_with_sums,
  data_gradient,
  weight_gradient,
};

// What a plan works on. x [batch, in, in, in_channels], w [out_channels, kernel, kernel,
// in_channels] and y [batch, out, out, out_channels], gradients in their places, all 16-byte
// aligned.
struct ConvolutionMaps {
  void *x, *w, *y, *workspace;
  float* sums = nullptr;  // [2, out_channels], sums and squares, of forward_with_sums alone

  bool operator==(const ConvolutionMaps&) const = default;
};

// How plans are picked.
struct ConvolutionChoice {
  bool deterministic = false;
  size_t workspace_limit = size_t{64} << 20;  // bytes; ResNet18's passes want 19 MB at most
  // GPU and driver, "NVIDIA H100 80GB HBM3, driver 13000": keys the cache.
  std::string device{};
};

class ConvolutionPlan;

// The convolutions of one session.
class Convolutions {
 public:
  Convolutions(const Cudnn& library, ConvolutionChoice choice);
  // Deterministic plans for a GPU that is not here, from cuDNN's JSON of its properties: to be
  // looked at, not run.
  Convolutions(const Cudnn& library, std::string device_properties);
  ~Convolutions();
  Convolutions(const Convolutions&) = delete;
  Convolutions& operator=(const Convolutions&) = delete;

  // The plan of a shape, the same object each time; it lives as long as this. Throws
  // codes::kBackend where cuDNN has no engine for it.
  ConvolutionPlan& plan(const ConvolutionShape& shape, ConvolutionPass pass);
  // Null where it has none.
  ConvolutionPlan* find_plan(const ConvolutionShape& shape, ConvolutionPass pass);
  // Every plan's shape and id, in a fixed order.
  std::string engines() const;
  // Makes what runs on `stream` need. The first run there does too, when memory may be short.
  void prepare(const Stream& stream);

  // What an earlier process, or session, has found to be the fastest way to do `what` on this GPU;
  // empty where nothing was kept on disk.
  std::string recall(const std::string& what) const;
  void remember(const std::string& what, const std::string& way) const;

 private:
  friend class ConvolutionPlan;
  struct Key {
    ConvolutionShape shape;
    ConvolutionPass pass;
    auto operator<=>(const Key&) const = default;
  };
  using Handle = std::unique_ptr<struct cudnn::Context, cudnn::Status (*)(cudnn::Handle)>;
  Handle make_handle() const;
  std::string cache_key(const std::string& what) const;

  Cudnn cudnn_;
  ConvolutionChoice choice_;
  std::string device_properties_;  // empty where the GPU is here
  bool tf32_;
  Handle handle_;  // that graphs and plans are made with; null where the GPU is not here
  // One for each stream that plans run on: a handle has streams of its own, with the priority of
  // the one that it was given last (documentation of cudnnSetStream), and a capture is no time to
  // change them.
  std::map<cudaStream_t, Handle> stream_handles_;
  std::map<Key, std::unique_ptr<ConvolutionPlan>> plans_;
};

class ConvolutionPlan {
 public:
  ~ConvolutionPlan();
  // Most that choose() and run() need; less after choose().
  size_t workspace_bytes() const;
  // Before the first run and outside a capture, once memory is there: settles which candidate runs.
  // Where that takes timing, it waits for the stream and overwrites the pass's result.
  void choose(const ConvolutionMaps& maps, const Stream& stream);
  // Enqueues. What was run on this stream and with these pointers before costs no allocation. Runs
  // on different streams need different workspaces.
  void run(const ConvolutionMaps& maps, const Stream& stream);
  // Engine and knobs of what runs, "eng34_k2=5_k24=1".
  const std::string& id() const;
  // Pass and shape, for messages and the cache.
  std::string describe() const;

 private:
  friend class Convolutions;
  class Descriptor;
  struct Candidate;
  struct Pack;
  ConvolutionPlan(Convolutions& owner, const Convolutions::Key& key);
  bool build_graph();
  void add_candidates(cudnn::HeuristicMode mode);
  void find_candidates();
  void run_candidate(Candidate& candidate, const ConvolutionMaps& maps, const Stream& stream);

  Convolutions& owner_;
  Convolutions::Key key_;
  std::string wanted_;                             // the candidate that the cache names
  std::unique_ptr<Descriptor> device_properties_;  // of a GPU that is not here
  std::vector<Descriptor> graph_;                  // the operation graph last
  std::vector<Candidate> candidates_;
};

}  // namespace hardmine::cuda

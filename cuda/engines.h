// cuDNN's graph API: a graph of operations on tensors, the engines that cuDNN's heuristic offers
// for it, and the one of them that runs.
//
// The heuristic (mode A, then the fallback list) gives engine configurations. With `deterministic`,
// the first in the heuristic's order that has no nondeterministic note and fits the workspace limit
// runs; else the fastest of the first few, timed once on the session's own buffers and kept on disk
// under cuDNN's version, the GPU, the driver and the graph.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/backend.h"
#include "cuda/libraries.h"
#include "cuda/runtime.h"

namespace hardmine::cuda {

// A backend descriptor: created, given its attributes, finalised, then used.
class CudnnDescriptor {
 public:
  CudnnDescriptor(const Cudnn& library, cudnn::DescriptorType type);
  cudnn::Descriptor get() const { return made_.get(); }

  template <typename T>
  void set(cudnn::Attribute attribute, cudnn::AttributeType type, const T* values, int64_t count) {
    set_raw(attribute, type, values, count);
  }
  template <typename T>
  void set(cudnn::Attribute attribute, cudnn::AttributeType type, const T& value) {
    set_raw(attribute, type, &value, 1);
  }
  void set(cudnn::Attribute attribute, const CudnnDescriptor& value) {
    set(attribute, cudnn::AttributeType::descriptor, value.get());
  }
  template <size_t count>
  void set(cudnn::Attribute attribute, const std::array<int64_t, count>& values) {
    set_raw(attribute, cudnn::AttributeType::int64, values.data(), count);
  }

  // Writes at most `count` values; gives how many the attribute has.
  template <typename T>
  int64_t get(cudnn::Attribute attribute, cudnn::AttributeType type, T* values,
              int64_t count) const {
    return get_raw(attribute, type, values, count);
  }
  int64_t get_int64(cudnn::Attribute attribute) const {
    int64_t value = 0;
    get(attribute, cudnn::AttributeType::int64, &value, 1);
    return value;
  }

  void finalise(std::string_view what);
  // False when there is no such thing here, an answer that asking is for.
  bool finalise_unless_refused(std::string_view what);

 private:
  void set_raw(cudnn::Attribute attribute, cudnn::AttributeType type, const void* values,
               int64_t count);
  int64_t get_raw(cudnn::Attribute attribute, cudnn::AttributeType type, void* values,
                  int64_t count) const;

  const Cudnn* library_;
  std::unique_ptr<void, cudnn::Status (*)(cudnn::Descriptor)> made_;
};

// Tensors of a graph have ids from 1 to this.
inline constexpr int64_t kMostTensors = 20;

// What a plan works on: the tensors by id, null where the graph has none, those on the device
// 16-byte aligned.
struct EnginePointers {
  std::array<void*, kMostTensors + 1> tensors{};
  void* workspace = nullptr;

  bool operator==(const EnginePointers&) const = default;
};

// A graph in the making. What it gives out lives as long as the graph.
class GraphBuilder {
 public:
  GraphBuilder(const Cudnn& library, std::string_view what) : library_(library), what_(what) {}

  // [n, size, size, c] in memory, of n images, or output channels of weights.
  const CudnnDescriptor& map(int64_t id, cudnn::DataType type, int64_t n, int64_t c, int64_t size);
  // The same between two operations, which is never in memory.
  const CudnnDescriptor& between(cudnn::DataType type, int64_t n, int64_t c, int64_t size);
  // A float in the host's memory, read when the plan is enqueued.
  const CudnnDescriptor& scalar(int64_t id);
  // To be given attributes, then finalised or added.
  CudnnDescriptor& part(cudnn::DescriptorType type);
  // The next operation. One that this cuDNN does not know, or not here, is no error: no engine is
  // found for the graph then.
  void add(CudnnDescriptor& operation);
  // y = mode(x, b), b null where the mode takes none; dx from dy and x.
  void add_pointwise(cudnn::PointwiseMode mode, const CudnnDescriptor& x, const CudnnDescriptor* b,
                     const CudnnDescriptor& y);
  void add_pointwise_backward(cudnn::PointwiseMode mode, const CudnnDescriptor& dy,
                              const CudnnDescriptor& x, const CudnnDescriptor& dx);

 private:
  friend class EnginePlan;
  CudnnDescriptor& tensor(int64_t id, cudnn::DataType type, int64_t n, int64_t c, int64_t size);
  CudnnDescriptor& pointwise(cudnn::PointwiseMode mode);
  const Cudnn& library_;
  std::string_view what_;
  std::vector<std::unique_ptr<CudnnDescriptor>> parts_;
  std::vector<cudnn::Descriptor> operations_;
  int64_t last_between_ = kMostTensors;  // ids behind those that have pointers
  bool refused_ = false;
};

// As cuDNN calls a precision, and as messages do.
cudnn::DataType data_type(Precision precision);
const char* name_of(Precision precision);

// How plans are picked.
struct EngineChoice {
  bool deterministic = false;
  size_t workspace_limit = size_t{64} << 20;  // bytes; ResNet18's passes want 19 MB at most
  // GPU and driver, "NVIDIA H100 80GB HBM3, driver 13000": keys the cache.
  std::string device{};
};

class EnginePlan;

// The plans of one session, and what it runs them with.
class Engines {
 public:
  Engines(const Cudnn& library, EngineChoice choice);
  // Deterministic plans for a GPU that is not here, from cuDNN's JSON of its properties: to be
  // looked at, not run.
  Engines(const Cudnn& library, std::string device_properties);
  ~Engines();
  Engines(const Engines&) = delete;
  Engines& operator=(const Engines&) = delete;

  // What a graph computes, and in which precision its operands are: fp32 is multiplied as TF32
  // unless NVIDIA_TF32_OVERRIDE=0 is in the environment.
  struct Graph {
    std::string what;  // with its shape; names the plan, the file in the cache and errors
    Precision precision = Precision::fp32;
    std::function<void(GraphBuilder&)> build;
    size_t candidates = 8;  // timed at most
  };
  // The plan of a graph, the same object each time; it lives as long as this. Throws
  // codes::kBackend where cuDNN has no engine for it.
  EnginePlan& plan(const Graph& graph);
  // Null where it has none, or refuses the graph: whoever asks has another way.
  EnginePlan* find_plan(const Graph& graph);
  // Gives back the plans that are not wanted.
  void keep(const std::function<bool(const EnginePlan&)>& wanted);
  // Every plan's graph and id, in a fixed order.
  std::string describe() const;
  // Makes what runs on `stream` need. The first run there does too, when memory may be short.
  void prepare(const Stream& stream);

  // One of several ways to the same result.
  struct Way {
    const char* name;  // on disk
    std::function<void()> take;
  };
  // What a way leaves behind, in groups of numbers that are compared by themselves.
  using Results = std::vector<std::vector<float>>;
  // Takes the way by which `run`, which enqueues on `stream` and does `what`, is the fastest. One
  // whose results, asked for after it has run, are not those of the first is passed over: cuDNN
  // offers engines that do something else than the graph says (norm_graph.h). What was found once
  // is kept on disk: a session that goes on is to compute as before.
  void take_fastest(const std::string& what, const std::vector<Way>& ways, const Stream& stream,
                    const std::function<void()>& run,
                    const std::function<Results()>& results) const;
  // The way to do `what` that was found the fastest on this GPU, by any session before; empty where
  // nothing is known.
  std::string recall(const std::string& what) const;

 private:
  friend class EnginePlan;
  using Handle =
      std::unique_ptr<struct cudnn::Context, HandleDestroyer<cudnn::Handle, cudnn::Status>>;
  Handle make_handle() const;
  void remember(const std::string& what, const std::string& way) const;
  std::string cache_key(const std::string& what) const;
  EnginePlan* make_plan(const Graph& graph);  // null where cuDNN has none

  Cudnn cudnn_;
  EngineChoice choice_;
  std::string device_properties_;  // empty where the GPU is here
  bool tf32_;
  Handle handle_;  // that graphs and plans are made with; null where the GPU is not here
  // One for each stream that plans run on: a handle has streams of its own, with the priority of
  // the one that it was given last (documentation of cudnnSetStream), and a capture is no time to
  // change them.
  std::map<cudaStream_t, Handle> stream_handles_;
  std::map<std::string, std::unique_ptr<EnginePlan>> plans_;  // by what they do
};

class EnginePlan {
 public:
  ~EnginePlan();
  // Most that choose() and run() need; less after choose().
  size_t workspace_bytes() const;
  // Before the first run and outside a capture, once memory is there: settles which candidate runs.
  // Where that takes timing, it waits for the stream and overwrites the graph's results.
  void choose(const EnginePointers& pointers, const Stream& stream);
  // Enqueues. What was run on this stream and with these pointers before costs no allocation. Runs
  // on different streams need different workspaces.
  void run(const EnginePointers& pointers, const Stream& stream);
  // Engine and knobs of what runs, "eng34_k2=5_k24=1".
  const std::string& id() const;
  // What it computes, with its shape.
  const std::string& describe() const { return what_; }

 private:
  friend class Engines;
  struct Candidate;
  struct Pack;
  EnginePlan(Engines& owner, const Engines::Graph& graph);
  bool build_graph(const Engines::Graph& graph);
  void find_candidates();
  void add_candidates(cudnn::HeuristicMode mode);
  void run_candidate(Candidate& candidate, const EnginePointers& pointers, const Stream& stream);

  Engines& owner_;
  std::string what_;
  size_t enough_;                                       // candidates
  bool exact_fp32_;                                     // no engine may round its operands
  std::string wanted_;                                  // the candidate that the cache names
  std::unique_ptr<CudnnDescriptor> device_properties_;  // of a GPU that is not here
  GraphBuilder builder_;
  CudnnDescriptor* graph_ = nullptr;
  std::vector<Candidate> candidates_;
};

}  // namespace hardmine::cuda

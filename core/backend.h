// The seam between the binding and a device. A backend owns networks, margin heads, optimisers and
// their state on one device. The CPU (cpu/) and CUDA (cuda/) backends implement exactly this; the
// binding sees nothing else. Every call may throw hardmine::Error and blocks until its result is on
// the host; an object is used from one thread at a time, its constructor's thread included.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/batch.h"
#include "core/loss.h"
#include "core/network.h"

namespace hardmine {

enum class Precision : uint8_t {
  fp32,
  bf16,
  fp16
};  // of products and activations; masters are fp32
enum class Implementation : uint8_t { fused, unfused };

// One process of a data-parallel run: every rank sees its own rows, the head's classes are sharded.
struct Topology {
  int rank = 0;
  int world = 1;
  std::string rendezvous;  // host:port of rank 0; empty in a world of one
};

struct Execution {
  int device = 0;  // ordinal among the backend's devices
  Precision precision = Precision::fp32;
  int threads = 0;  // CPU threads; 0: physical cores this process may use
  bool deterministic = false;
  Topology topology;
};

struct HeadSpec {
  int64_t classes = 0;
  int64_t dim = 0;
  LossSpec loss;
  Implementation implementation = Implementation::fused;
};

// What changes from step to step; everything else is fixed when the object is made.
struct StepSettings {
  float lr = 0.01F;
  float momentum = 0.9F;
  float weight_decay = 5e-4F;
  bool decay_all = false;  // also biases and batch-norm parameters
  float margin_factor =
      1;             // warm-up: m1 -> 1 + (m1 - 1) f, m2, m3 and the Euclidean margin times f
  float lambda = 0;  // A-Softmax annealing, replaces MarginLaw::lambda
};

// The row of a step with the highest base loss; of equal ones the first.
struct HardestRow {
  int64_t row = 0;
  int64_t source = -1;  // its Batch::sources; -1: not known
  double base_loss = 0;
  double gradient_weight = 0;  // dHM/dL
};

// Figures of one step, over the rows of this rank.
struct StepStats {
  double loss = 0;       // mean weighted loss plus the center loss: what the gradient is of
  double base_loss = 0;  // mean base loss
  int64_t rows = 0;
  int64_t correct = 0;                            // argmax before the margin is the label
  int64_t silenced = 0, kept = 0, amplified = 0;  // dHM/dL < 0.1, between, > 1
  double mean_cosine = 0;     // between embeddings of different identities; near 1 is collapse
  double embedding_norm = 0;  // mean ||x||
  HardestRow hardest;
};

// Rows of a margin head: embeddings [rows, dim] and labels [rows], on the host.
struct HeadInput {
  std::span<const float> embeddings;
  std::span<const int32_t> labels;
};

// Where forward_backward writes; an empty span is a result not wanted.
struct HeadOutput {
  double loss = 0;                   // mean of weighted_loss, plus the center loss
  std::span<float> base_loss;        // [rows]
  std::span<float> weighted_loss;    // [rows]
  std::span<float> grad_embeddings;  // [rows, dim] of `loss`
  std::span<float> grad_weights;     // [classes, dim]
  std::span<float> grad_bias;        // [classes], softmax only
};

// What `bench head` times: a pass with all gradients, a step, or the three bare matrix products of
// one pass.
enum class HeadWork : uint8_t { forward_backward, step, products };

// A margin-softmax head on its own, its class weights kept on the device.
class MarginHead {
 public:
  virtual ~MarginHead() = default;
  virtual void set_weights(std::span<const float> weights, std::span<const float> bias) = 0;
  virtual void read_weights(std::span<float> weights, std::span<float> bias) const = 0;
  // The centers of the center loss [classes, dim], 0 at first; empty where the loss has none.
  virtual void set_centers(std::span<const float> centers) = 0;
  virtual void read_centers(std::span<float> centers) const = 0;
  // Loss and gradients with the weights set before; weights and centers stay as they are.
  virtual void forward_backward(const HeadInput& input, HeadOutput& output) = 0;
  // One SGD step on the class weights, then the centers move; grad_embeddings is written when it is
  // not empty.
  virtual StepStats step(const HeadInput& input, const StepSettings& settings,
                         std::span<float> grad_embeddings) = 0;
  // Most bytes held beyond weights, momentum, inputs and gradients so far.
  virtual size_t peak_extra_bytes() const = 0;
  // Milliseconds of runs over `input`, one after the other, by the device's own clock: copies to
  // and from a device are not in them. Steps move the weights. Stops early when cancelled.
  virtual void time(HeadWork work, const HeadInput& input, std::span<double> ms,
                    const std::atomic<bool>& cancelled) = 0;
};

enum class TensorRole : uint8_t { parameter, statistic, optimizer };

// A named tensor of a session. Network tensors have torchvision's names, those of the batch-norm
// over the embedding start with "embedding_bn.", the head's are "head.weight", "head.bias" and, a
// statistic, "head.centers"; momentum is "momentum/" + the parameter's name. "loss_scale" [2], of
// fp16 alone, is the scale and the good steps since it last changed. Layout is torch's (OIHW,
// row-major), fp32.
struct TensorInfo {
  std::string name;
  std::vector<int64_t> shape;
  TensorRole role = TensorRole::parameter;
};

struct SessionSpec {
  NetworkSpec network;
  HeadSpec head;  // dim must be the network's embedding
  int64_t batch = 64;
  uint64_t seed = 1;  // of the initialisation (core/initialise.h)
};

// A network, its head and their optimiser, training together.
class TrainingSession {
 public:
  virtual ~TrainingSession() = default;
  // One step per element of settings, batches of exactly SessionSpec::batch rows from `source`.
  // Stops before a step when `cancelled` is set; returns the steps done, stats[i] written for each.
  // Throws codes::kNonFinite, naming the tensor, when the loss stops being finite.
  virtual int64_t train(BatchSource& source, std::span<const StepSettings> settings,
                        std::span<StepStats> stats, const std::atomic<bool>& cancelled) = 0;
  // Raw embeddings [n, embedding] of images [n, 112, 112, 3] by running statistics; `mirror` embeds
  // their mirror images.
  virtual void embed(std::span<const uint8_t> images, bool mirror, std::span<float> embeddings) = 0;
  virtual const std::vector<TensorInfo>& tensors() const = 0;
  virtual void read(const std::string& name, std::span<float> values) const = 0;
  virtual void write(const std::string& name, std::span<const float> values) = 0;
  // Which engines do the work, where device and settings do not decide it alone: with others, bits
  // differ.
  virtual std::string engines() const { return {}; }
};

// A network for inference alone, batch-norm folded into the convolutions.
class Embedder {
 public:
  virtual ~Embedder() = default;
  virtual const std::vector<TensorInfo>& tensors() const = 0;
  virtual void read(const std::string& name, std::span<float> values) const = 0;
  virtual void write(const std::string& name, std::span<const float> values) = 0;
  virtual void embed(std::span<const uint8_t> images, bool mirror, std::span<float> embeddings) = 0;
};

struct DeviceInfo {
  std::string name;  // "AMD EPYC ..." or "NVIDIA H100 80GB HBM3"
  int64_t memory_bytes = 0;
  int64_t free_bytes = 0;
  int threads = 0;                    // CPU: physical cores this process may use
  std::vector<Precision> precisions;  // fast ones, best first
  std::vector<std::pair<std::string, std::string>>
      details;  // "isa" -> "AVX512_BF16", "oneDNN" -> "2.6.3"
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const char* name() const = 0;  // "cpu" or "cuda"
  // Throws codes::kUnavailable where nothing can be asked.
  virtual int device_count() = 0;
  // Of one, 0 to device_count() - 1: asking a GPU takes some of its memory.
  virtual DeviceInfo device(int ordinal) = 0;
  virtual std::unique_ptr<HostAllocator> host_allocator(const Execution&) = 0;
  virtual std::unique_ptr<MarginHead> make_head(const HeadSpec&, const Execution&) = 0;
  virtual std::unique_ptr<TrainingSession> make_session(const SessionSpec&, const Execution&) = 0;
  virtual std::unique_ptr<Embedder> make_embedder(const NetworkSpec&, const Execution&) = 0;
};

// The backend this addon was built with: cpu/backend.cpp or cuda/backend.cpp defines it.
std::unique_ptr<Backend> make_backend();

}  // namespace hardmine

#include "cuda/session.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "core/head_checks.h"
#include "core/initialise.h"
#include "core/tensors.h"
#include "cuda/device.h"
#include "cuda/embedder.h"
#include "cuda/head.h"
#include "cuda/network.h"
#include "cuda/products.h"
#include "cuda/transfer.h"

namespace hardmine::cuda {
namespace {

// Steps whose figures wait on the device: the host looks at them this often at least.
constexpr size_t kRingSteps = 64;

// One batch on its way: copied while the step of the other one runs.
struct Slot {
  uint8_t* images = nullptr;  // [batch, size, size, 3]; on the device, as the three below
  int* labels = nullptr;
  Augmentation* augmentations = nullptr;
  StepParameters* parameters = nullptr;
  PinnedArray<int> host_labels;
  PinnedArray<Augmentation> host_augmentations;
  PinnedArray<StepParameters> host_parameters;
  Event copied;    // the host's memory may change
  Event consumed;  // the device's memory may change
  std::optional<CapturedGraph> step;
};

class CudaSession : public TrainingSession {
 public:
  CudaSession(const std::vector<Node>& nodes, const HeadSpec& head, int64_t batch, uint64_t seed,
              const Execution& execution, const Libraries& libraries)
      : execution_(execution), libraries_(libraries), head_spec_(head), batch_(batch) {
    if (execution.topology.world > 1) {
      throw Error(codes::kConfig, "The CUDA backend trains in one process, but a world of " +
                                      std::to_string(execution.topology.world) +
                                      " was asked for; use one rank.");
    }
    if (batch < 2) {
      throw Error(codes::kConfig, "A batch of " + std::to_string(batch) +
                                      " was asked for; batch-norm needs 2 images or more.");
    }
    use_device(execution.device);
    resources_.emplace();
    Resources& r = *resources_;
    r.network = make_training_network(nodes, batch, execution.precision, execution.deterministic,
                                      libraries, r.stream);
    if (head.dim != r.network->embedding()) {
      throw Error(codes::kConfig, "The head expects embeddings of " + std::to_string(head.dim) +
                                      " dimensions, but the network gives " +
                                      std::to_string(r.network->embedding()) + ".");
    }
    r.head = make_device_head(head, execution.precision);
    take_memory();
    sources_.resize(kRingSteps * static_cast<size_t>(batch_));
    prepare();
    initialise(seed);

    tensors_ = r.network->tensors();
    const auto add = [this](const std::string& name, std::vector<int64_t> shape) {
      tensors_.push_back({name, shape, TensorRole::parameter});
      tensors_.push_back({"momentum/" + name, std::move(shape), TensorRole::optimizer});
    };
    add("head.weight", {head.classes, head.dim});
    if (has_bias()) add("head.bias", {head.classes});
    if (head.loss.has_centers())
      tensors_.push_back({"head.centers", {head.classes, head.dim}, TensorRole::statistic});
  }

  ~CudaSession() override {
    use_device(execution_.device, std::nothrow);
    resources_.reset();
  }

  int64_t train(BatchSource& source, std::span<const StepSettings> settings,
                std::span<StepStats> stats, const std::atomic<bool>& cancelled) override {
    if (stats.size() < settings.size()) {
      throw Error(codes::kInput, "There is room for the figures of " +
                                     std::to_string(stats.size()) + " steps, but " +
                                     std::to_string(settings.size()) + " were asked for.");
    }
    use_device(execution_.device);
    Resources& r = *resources_;
    r.folded_stale = true;
    size_t done = 0;
    try {
      while (done < settings.size() && !cancelled.load(std::memory_order_relaxed)) {
        check(cudaMemsetAsync(r.steps, 0, sizeof *r.steps, r.stream.get()), "cudaMemsetAsync");
        const size_t most = std::min(settings.size() - done, kRingSteps);
        size_t enqueued = 0;
        while (enqueued < most && !cancelled.load(std::memory_order_relaxed)) {
          enqueue_step(r.slots[enqueued % r.slots.size()], source, settings[done + enqueued],
                       sources_of(enqueued));
          ++enqueued;
        }
        read_figures(enqueued, stats.subspan(done, enqueued));
        done += enqueued;
      }
    } catch (...) {
      try {
        r.copies.synchronize();  // the source may now give away what it gave
        r.network->apply_pending();
      } catch (...) {
        // The first error is the one to tell, and often the reason for this one.
      }
      throw;
    }
    r.network->apply_pending();
    return static_cast<int64_t>(done);
  }

  void embed(std::span<const uint8_t> images, bool mirror, std::span<float> embeddings) override {
    use_device(execution_.device);
    Resources& r = *resources_;
    if (r.folded == nullptr) {
      r.folded = make_folded_network(r.network->nodes(), batch_, execution_.precision,
                                     execution_.deterministic, libraries_, r.stream);
    }
    if (std::exchange(r.folded_stale, false)) {
      r.folded->fold([&r](const std::string& name, std::span<float> values) {
        r.network->read(name, values);
      });
    }
    r.folded->embed(images, mirror, embeddings);
  }

  const std::vector<TensorInfo>& tensors() const override { return tensors_; }

  std::string engines() const override { return resources_->network->engines(); }

  void read(const std::string& name, std::span<float> values) const override {
    use_device(execution_.device);
    find_tensor(tensors_, name, values.size());
    if (const auto tensor = head_tensor(name)) {
      resources_->head->read(*tensor, values, resources_->stream);
    } else {
      resources_->network->read(name, values);
    }
  }

  void write(const std::string& name, std::span<const float> values) override {
    use_device(execution_.device);
    find_tensor(tensors_, name, values.size());
    if (const auto tensor = head_tensor(name)) {
      resources_->head->write(*tensor, values, resources_->stream);
    } else {
      resources_->network->write(name, values);
      resources_->folded_stale = true;
    }
  }

 private:
  // What lives on the device, given back in the reverse of this order.
  struct Resources {
    ~Resources() {
      // Page-locked memory is not to be given back under a copy.
      for (const Stream* each : {&copies, &stream})
        static_cast<void>(cudaStreamSynchronize(each->get()));
    }
    Stream stream{Priority::high};  // of the steps
    Stream copies;
    std::unique_ptr<TrainingNetwork> network;
    std::unique_ptr<CudaHead> head;
    DeviceBlock memory;
    std::optional<Products> products;  // of the head
    std::array<Slot, 2> slots;
    float* grad_embeddings = nullptr;  // [batch, embedding]
    StepRecord* records = nullptr;     // [kRingSteps]
    unsigned long long* steps = nullptr;
    char* workspace = nullptr;
    PinnedArray<StepRecord> host_records{kRingSteps};
    std::unique_ptr<FoldedNetwork> folded;  // made by the first embed()
    bool folded_stale = true;
  };

  bool has_bias() const { return head_spec_.loss.base == BaseKind::softmax; }

  void layout_state(Arena& arena) {
    Resources& r = *resources_;
    r.network->layout_state(arena);
    r.head->layout_state(arena);
    r.records = arena.take<StepRecord>(kRingSteps);
    r.steps = arena.take<unsigned long long>(1);
    r.workspace = arena.take<char>(static_cast<int64_t>(product_workspace_bytes(compute_major())));
  }

  void layout_batch(Arena& arena) {
    Resources& r = *resources_;
    r.network->layout_batch(arena);
    r.head->layout_rows(arena, static_cast<int>(batch_));
    r.grad_embeddings = arena.take<float>(batch_ * r.network->embedding());
    for (Slot& slot : r.slots) {
      slot.images = arena.take<uint8_t>(batch_ * image_size());
      slot.labels = arena.take<int>(batch_);
      slot.augmentations = arena.take<Augmentation>(batch_);
      slot.parameters = arena.take<StepParameters>(1);
    }
  }

  void take_memory() {
    Resources& r = *resources_;
    Arena counting;
    layout_state(counting);
    const size_t fixed = counting.bytes();
    layout_batch(counting);
    const std::string purpose = "a training session at batch " + std::to_string(batch_) + " with " +
                                std::to_string(head_spec_.classes) + " classes";
    try {
      r.memory = allocate_device(counting.bytes(), purpose);
    } catch (const Error& error) {
      if (std::strcmp(error.code(), codes::kOutOfMemory) != 0) throw;
      size_t free = 0, total = 0;
      check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
      const size_t each = (counting.bytes() - fixed) / static_cast<size_t>(batch_);
      const size_t fits = free > fixed ? (free - fixed) / each : 0;
      throw Error(codes::kOutOfMemory,
                  error.what() + (fits < 2 ? std::string(" No batch fits beside what is fixed.")
                                           : " The largest batch that fits is about " +
                                                 std::to_string(fits) + "."));
    }
    // Zeros, as counters and paddings start; before the layout, which may guard what lies between.
    check(cudaMemsetAsync(r.memory.data(), 0, r.memory.bytes(), r.stream.get()), "cudaMemsetAsync");
    r.stream.synchronize();
    Arena arena(r.memory);
    layout_state(arena);
    layout_batch(arena);
    for (Slot& slot : r.slots) {
      slot.host_labels = PinnedArray<int>(static_cast<size_t>(batch_));
      slot.host_augmentations = PinnedArray<Augmentation>(static_cast<size_t>(batch_));
      slot.host_parameters = PinnedArray<StepParameters>(1);
    }
  }

  // Settles plans and algorithms by running everything once, on no batch; a capture takes them as
  // they are. initialise() cleans up after it.
  void prepare() {
    Resources& r = *resources_;
    r.products.emplace(libraries_.cublas_lt, r.stream.get(), r.workspace,
                       product_workspace_bytes(compute_major()));
    r.network->prepare();
    r.head->initialise(r.stream);
    enqueue_work(r.slots[0]);
    r.stream.synchronize();
    for (Slot& slot : r.slots) slot.step.emplace(r.stream, [&] { enqueue_work(slot); });
  }

  void initialise(uint64_t seed) {
    Resources& r = *resources_;
    r.network->initialise(seed);
    r.head->initialise(r.stream);
    std::vector<float> weights(static_cast<size_t>(head_spec_.classes * head_spec_.dim));
    initialise_class_weights(seed, weights);
    r.head->write(HeadTensor::weights, weights, r.stream);
  }

  // Everything of a step that a batch on the device goes through.
  void enqueue_work(const Slot& slot) {
    Resources& r = *resources_;
    HeadPass pass;
    pass.embeddings = r.network->forward(slot.images, slot.augmentations);
    pass.labels = slot.labels;
    pass.settings = slot.parameters;
    pass.ring = {r.records, r.steps, static_cast<int>(kRingSteps)};
    pass.grad_embeddings = r.grad_embeddings;
    r.head->enqueue(pass, *r.products, r.stream);
    r.network->backward(r.grad_embeddings);
    r.network->conclude(slot.parameters);
    r.head->join(r.stream);
  }

  // Batch::sources of a step that is under way, which the batch itself does not outlive.
  std::span<int64_t> sources_of(size_t step) {
    const auto rows = static_cast<size_t>(batch_);
    return std::span(sources_).subspan(step * rows, rows);
  }

  void enqueue_step(Slot& slot, BatchSource& source, const StepSettings& settings,
                    std::span<int64_t> sources) {
    Resources& r = *resources_;
    require_step_settings(head_spec_, settings);
    // The slot's last batch has been copied, so the source may give its memory away and ours may be
    // written.
    slot.copied.synchronize();
    const Batch batch = source.next();
    if (batch.size != batch_) {
      throw Error(codes::kInput, "A batch has " + std::to_string(batch.size) +
                                     " images, but this session was made for " +
                                     std::to_string(batch_) + ".");
    }
    const auto rows = static_cast<size_t>(batch_);
    require_labels({batch.labels, rows}, head_spec_.classes);
    std::copy_n(batch.labels, rows, slot.host_labels.data());
    if (batch.sources == nullptr) {
      std::fill(sources.begin(), sources.end(), -1);
    } else {
      std::copy_n(batch.sources, rows, sources.begin());
    }
    if (batch.augmentations == nullptr) {
      std::fill_n(slot.host_augmentations.data(), rows, Augmentation{});
    } else {
      std::copy_n(batch.augmentations, rows, slot.host_augmentations.data());
    }
    slot.host_parameters[0] = parameters_of(settings);

    r.copies.wait(slot.consumed);
    const auto copy = [&](void* to, const void* from, size_t bytes) {
      check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, r.copies.get()),
            "the copy of a batch of " + std::to_string(batch_) + " images");
    };
    copy(slot.images, batch.images, rows * static_cast<size_t>(image_size()));
    copy(slot.labels, slot.host_labels.data(), slot.host_labels.bytes());
    copy(slot.augmentations, slot.host_augmentations.data(), slot.host_augmentations.bytes());
    copy(slot.parameters, slot.host_parameters.data(), slot.host_parameters.bytes());
    slot.copied.record(r.copies.get());
    r.stream.wait(slot.copied);
    slot.step->launch(r.stream);
    slot.consumed.record(r.stream.get());
  }

  void read_figures(size_t steps, std::span<StepStats> stats) {
    Resources& r = *resources_;
    check(cudaMemcpyAsync(r.host_records.data(), r.records, r.host_records.bytes(),
                          cudaMemcpyDeviceToHost, r.stream.get()),
          "the copy of the figures of " + std::to_string(steps) + " steps");
    r.stream.synchronize();
    for (size_t i = 0; i < steps; ++i) {
      const StepRecord& record = r.host_records[i];
      if (record.non_finite > 0) throw_non_finite();
      stats[i] = stats_of(record, batch_);
      stats[i].hardest.source = sources_of(i)[static_cast<size_t>(record.hardest_row)];
    }
    const LossScale scale = r.network->loss_scale();
    if (scale.non_finite != 0) throw_non_finite();
    // fp16 skips a step that overflows; without any scale left it is training that has diverged.
    const int skipped = scale.skipped - std::exchange(skipped_, scale.skipped);
    if (steps > 0 && static_cast<size_t>(skipped) == steps && scale.scale <= kLeastLossScale)
      throw_non_finite();
  }

  [[noreturn]] void throw_non_finite() {
    TrainingNetwork& network = *resources_->network;
    network.apply_pending();
    std::string tensor = network.first_non_finite();
    if (tensor.empty()) tensor = "a gradient";
    // Whoever writes sound values back trains on: the flag would skip every step.
    LossScale scale = network.loss_scale();
    scale.non_finite = 0;
    network.write_loss_scale(scale);
    throw Error(codes::kNonFinite, non_finite_message(tensor));
  }

  int64_t image_size() const {
    return static_cast<int64_t>(image_bytes(resources_->network->nodes()));
  }

  static std::optional<HeadTensor> head_tensor(const std::string& name) {
    if (name == "head.weight") return HeadTensor::weights;
    if (name == "head.bias") return HeadTensor::bias;
    if (name == "momentum/head.weight") return HeadTensor::weight_momentum;
    if (name == "momentum/head.bias") return HeadTensor::bias_momentum;
    if (name == "head.centers") return HeadTensor::centers;
    return std::nullopt;
  }

  Execution execution_;
  Libraries libraries_;
  HeadSpec head_spec_;
  int64_t batch_;
  std::optional<Resources> resources_;
  int skipped_ = 0;               // steps that fp16 has skipped so far
  std::vector<int64_t> sources_;  // [kRingSteps, batch]
  std::vector<TensorInfo> tensors_;
};

}  // namespace

std::unique_ptr<TrainingSession> make_cuda_session(const std::vector<Node>& nodes,
                                                   const HeadSpec& head, int64_t batch,
                                                   uint64_t seed, const Execution& execution,
                                                   const Libraries& libraries) {
  return std::make_unique<CudaSession>(nodes, head, batch, seed, execution, libraries);
}

}  // namespace hardmine::cuda

#include "cpu/session.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "core/initialise.h"
#include "core/tensors.h"
#include "cpu/embedder.h"
#include "cpu/feature_maps.h"
#include "cpu/head.h"
#include "cpu/threads.h"
#include "cpu/training_network.h"

namespace hardmine {
namespace {

// The head's settings must be those of the session: same threads, same topology.
Execution with_threads(Execution execution) {
  if (execution.topology.world > 1) {
    throw Error(codes::kConfig, "The CPU backend trains in one process, but a world of " +
                                    std::to_string(execution.topology.world) +
                                    " was asked for; use one rank.");
  }
  if (execution.threads <= 0) execution.threads = physical_cores();
  return execution;
}

class CpuSession : public TrainingSession {
 public:
  CpuSession(const SessionSpec& spec, const Execution& execution)
      : execution_(with_threads(execution)),
        batch_(spec.batch),
        network_(build_network(spec.network), spec.batch, execution_.precision, execution_.threads,
                 spec.seed) {
    if (spec.head.dim != network_.embedding()) {
      throw Error(codes::kConfig, "The head expects embeddings of " +
                                      std::to_string(spec.head.dim) +
                                      " dimensions, but the network gives " +
                                      std::to_string(network_.embedding()) + ".");
    }
    head_ = make_cpu_head(spec.head, execution_);
    initialise_class_weights(spec.seed, head_->weights());
    head_->state_changed();
    grad_embeddings_.resize(static_cast<size_t>(batch_ * network_.embedding()));

    tensors_ = network_.tensors();
    const auto add = [this](const std::string& name, std::vector<int64_t> shape) {
      tensors_.push_back({name, shape, TensorRole::parameter});
      tensors_.push_back({"momentum/" + name, std::move(shape), TensorRole::optimizer});
    };
    add("head.weight", {spec.head.classes, spec.head.dim});
    if (!head_->bias().empty()) add("head.bias", {spec.head.classes});
    if (!head_->centers().empty()) {
      tensors_.push_back(
          {"head.centers", {spec.head.classes, spec.head.dim}, TensorRole::statistic});
    }
  }

  int64_t train(BatchSource& source, std::span<const StepSettings> settings,
                std::span<StepStats> stats, const std::atomic<bool>& cancelled) override {
    if (stats.size() < settings.size()) {
      throw Error(codes::kInput, "There is room for the figures of " +
                                     std::to_string(stats.size()) + " steps, but " +
                                     std::to_string(settings.size()) + " were asked for.");
    }
    size_t done = 0;
    for (; done < settings.size() && !cancelled.load(std::memory_order_relaxed); ++done) {
      stats[done] = step(source.next(), settings[done]);
    }
    return static_cast<int64_t>(done);
  }

  void embed(std::span<const uint8_t> images, bool mirror, std::span<float> embeddings) override {
    if (folded_ == nullptr) {
      folded_ = std::make_unique<FoldedNetwork>(network_.nodes(), execution_.precision,
                                                execution_.threads);
    }
    if (std::exchange(folded_stale_, false)) {
      folded_->fold([this](const std::string& name, std::span<float> values) {
        network_.read(name, values);
      });
    }
    folded_->embed(images, mirror, embeddings);
  }

  const std::vector<TensorInfo>& tensors() const override { return tensors_; }

  void read(const std::string& name, std::span<float> values) const override {
    find_tensor(tensors_, name, values.size());
    if (const std::span<float> state = head_state(name); !state.empty()) {
      std::copy(state.begin(), state.end(), values.begin());
    } else {
      network_.read(name, values);
    }
  }

  void write(const std::string& name, std::span<const float> values) override {
    find_tensor(tensors_, name, values.size());
    if (const std::span<float> state = head_state(name); !state.empty()) {
      std::copy(values.begin(), values.end(), state.begin());
      head_->state_changed();
    } else {
      network_.write(name, values);
      folded_stale_ = true;
    }
  }

 private:
  StepStats step(const Batch& batch, const StepSettings& settings) {
    if (batch.size != batch_) {
      throw Error(codes::kInput, "A batch has " + std::to_string(batch.size) +
                                     " images, but this session was made for " +
                                     std::to_string(batch_) + ".");
    }
    folded_stale_ = true;
    const std::span<const float> embeddings = network_.forward(batch.images, batch.augmentations);
    StepStats stats =
        head_step({embeddings, {batch.labels, static_cast<size_t>(batch.size)}}, settings);
    network_.backward(grad_embeddings_);
    network_.update(settings);
    if (batch.sources != nullptr) stats.hardest.source = batch.sources[stats.hardest.row];
    return stats;
  }

  StepStats head_step(const HeadInput& input, const StepSettings& settings) {
    StepStats stats;
    try {
      stats = head_->step(input, settings, grad_embeddings_);
    } catch (const Error& error) {
      // The head sees that its input is broken; where it broke first is in the network.
      if (std::strcmp(error.code(), codes::kNonFinite) != 0) throw;
      const std::string tensor = network_.first_non_finite();
      if (tensor.empty()) throw;
      throw Error(codes::kNonFinite, non_finite_message(tensor));
    }
    const bool finite = std::all_of(grad_embeddings_.begin(), grad_embeddings_.end(),
                                    [](float value) { return std::isfinite(value); });
    if (!finite) throw Error(codes::kNonFinite, non_finite_message("gradient of the embeddings"));
    return stats;
  }

  std::span<float> head_state(const std::string& name) const {
    if (name == "head.weight") return head_->weights();
    if (name == "head.bias") return head_->bias();
    if (name == "momentum/head.weight") return head_->weight_momentum();
    if (name == "momentum/head.bias") return head_->bias_momentum();
    if (name == "head.centers") return head_->centers();
    return {};
  }

  Execution execution_;
  int64_t batch_;
  TrainingNetwork network_;
  std::unique_ptr<CpuMarginHead> head_;
  std::unique_ptr<FoldedNetwork> folded_;  // made by the first embed()
  bool folded_stale_ = true;
  std::vector<float> grad_embeddings_;  // [batch, embedding]
  std::vector<TensorInfo> tensors_;
};

}  // namespace

std::unique_ptr<TrainingSession> make_cpu_session(const SessionSpec& spec,
                                                  const Execution& execution) {
  return std::make_unique<CpuSession>(spec, execution);
}

}  // namespace hardmine

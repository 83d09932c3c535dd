#include "cuda/convolution.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <compare>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string_view>
#include <system_error>

#include "core/error.h"

namespace hardmine::cuda {
namespace {

namespace fs = std::filesystem;

constexpr size_t kCandidates = 8;   // timed per shape
constexpr int64_t kAlignment = 16;  // bytes, promised for every tensor

enum Tensor : int64_t { kX = 1, kW = 2, kY = 3, kSum = 4, kSquares = 5 };

cudnn::DataType data_type(Precision precision) {
  switch (precision) {
    case Precision::fp16:
      return cudnn::DataType::fp16;
    case Precision::bf16:
      return cudnn::DataType::bf16;
    default:
      return cudnn::DataType::fp32;
  }
}
const char* name_of(Precision precision) {
  return precision == Precision::fp16 ? "fp16" : precision == Precision::bf16 ? "bf16" : "fp32";
}
const char* name_of(ConvolutionPass pass) {
  switch (pass) {
    case ConvolutionPass::forward:
      return "forward";
    case ConvolutionPass::forward_with_sums:
      return "forward with sums";
    case ConvolutionPass::data_gradient:
      return "data gradient";
    default:
      return "weight gradient";
  }
}

// How cuDNN calls a pass and what it is made of.
struct Operation {
  cudnn::DescriptorType type;
  cudnn::Attribute alpha, beta, convolution, x, w, y;
};
Operation operation_of(ConvolutionPass pass) {
  using cudnn::Attribute;
  switch (pass) {
    case ConvolutionPass::forward:
    case ConvolutionPass::forward_with_sums:
      return {cudnn::DescriptorType::operation_convolution_forward,
              Attribute::convolution_forward_alpha,
              Attribute::convolution_forward_beta,
              Attribute::convolution_forward_convolution,
              Attribute::convolution_forward_x,
              Attribute::convolution_forward_w,
              Attribute::convolution_forward_y};
    case ConvolutionPass::data_gradient:
      return {cudnn::DescriptorType::operation_convolution_backward_data,
              Attribute::convolution_backward_data_alpha,
              Attribute::convolution_backward_data_beta,
              Attribute::convolution_backward_data_convolution,
              Attribute::convolution_backward_data_dx,
              Attribute::convolution_backward_data_w,
              Attribute::convolution_backward_data_dy};
    default:
      return {cudnn::DescriptorType::operation_convolution_backward_filter,
              Attribute::convolution_backward_filter_alpha,
              Attribute::convolution_backward_filter_beta,
              Attribute::convolution_backward_filter_convolution,
              Attribute::convolution_backward_filter_x,
              Attribute::convolution_backward_filter_dw,
              Attribute::convolution_backward_filter_dy};
  }
}

std::string describe(const ConvolutionShape& s, ConvolutionPass pass) {
  const auto map = [&](int64_t size, int64_t channels) {
    return "[" + std::to_string(s.batch) + ", " + std::to_string(size) + ", " +
           std::to_string(size) + ", " + std::to_string(channels) + "]";
  };
  return std::string("the ") + name_of(pass) + " of a convolution " +
         map(s.in_size, s.in_channels) + " -> " + map(s.out_size, s.out_channels) + ", kernel " +
         std::to_string(s.kernel) + ", stride " + std::to_string(s.stride) + ", padding " +
         std::to_string(s.padding) + ", " + name_of(s.precision);
}

// cudnnStatus_t numbers from 3000 are kinds of "not supported"; from 4000 and 5000 on, what went
// wrong inside, which can be one engine's fault alone, as a compilation at run time that fails.
bool is_refusal(cudnn::Status status) {
  const int kind = static_cast<int>(status) / 1000;
  return kind == 3 ||
         ((kind == 4 || kind == 5) && status != cudnn::Status::device_allocation_failed);
}

// ---- The cache on disk: a file for each key, which holds the key and the winner ----

fs::path cache_folder() {
  if (const char* cache = std::getenv("XDG_CACHE_HOME"); cache != nullptr && *cache != '\0')
    return fs::path(cache) / "hardmine" / "convolutions";
  if (const char* home = std::getenv("HOME"); home != nullptr && *home != '\0')
    return fs::path(home) / ".cache" / "hardmine" / "convolutions";
  return {};
}

fs::path cache_file(const std::string& key) {
  uint64_t hash = 14695981039346656037ULL;  // FNV-1a
  for (const char c : key) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ULL;
  char name[32];
  std::snprintf(name, sizeof name, "%016llx.txt", static_cast<unsigned long long>(hash));
  const fs::path folder = cache_folder();
  return folder.empty() ? folder : folder / name;
}

// Empty when there is none: a cache that cannot be read costs the time of a new choice, no more.
std::string read_cache(const std::string& key) {
  std::ifstream file(cache_file(key));
  std::string stored_key, id;
  if (!std::getline(file, stored_key) || !std::getline(file, id) || stored_key != key) return {};
  return id;
}

void write_cache(const std::string& key, const std::string& id) {
  const fs::path file = cache_file(key);
  if (file.empty()) return;
  std::error_code error;
  fs::create_directories(file.parent_path(), error);
  fs::path written = file;  // renamed when whole; another process may write the same
  written += "." + std::to_string(getpid());
  bool complete = false;
  {
    std::ofstream out(written);
    complete = static_cast<bool>(out << key << '\n' << id << '\n' << std::flush);
  }
  if (complete) fs::rename(written, file, error);
  if (!complete || error) fs::remove(written, error);
}

}  // namespace

// A backend descriptor: created, given its attributes, finalised, then used.
class ConvolutionPlan::Descriptor {
 public:
  Descriptor(const Cudnn& library, cudnn::DescriptorType type)
      : library_(&library), made_(nullptr, library.destroy_descriptor) {
    cudnn::Descriptor made = nullptr;
    check(library, library.create_descriptor(type, &made), "cudnnBackendCreateDescriptor");
    made_.reset(made);
  }
  cudnn::Descriptor get() const { return made_.get(); }

  template <typename T>
  void set(cudnn::Attribute attribute, cudnn::AttributeType type, const T* values, int64_t count) {
    check(*library_, library_->set_attribute(get(), attribute, type, count, values),
          "cudnnBackendSetAttribute " + std::to_string(static_cast<int>(attribute)));
  }
  template <typename T>
  void set(cudnn::Attribute attribute, cudnn::AttributeType type, const T& value) {
    set(attribute, type, &value, 1);
  }
  void set(cudnn::Attribute attribute, const Descriptor& value) {
    set(attribute, cudnn::AttributeType::descriptor, value.get());
  }
  template <size_t count>
  void set(cudnn::Attribute attribute, const std::array<int64_t, count>& values) {
    set(attribute, cudnn::AttributeType::int64, values.data(), count);
  }

  // Writes at most `count` values; gives how many the attribute has.
  template <typename T>
  int64_t get(cudnn::Attribute attribute, cudnn::AttributeType type, T* values,
              int64_t count) const {
    int64_t present = 0;
    check(*library_, library_->get_attribute(get(), attribute, type, count, &present, values),
          "cudnnBackendGetAttribute " + std::to_string(static_cast<int>(attribute)));
    return present;
  }
  int64_t get_int64(cudnn::Attribute attribute) const {
    int64_t value = 0;
    get(attribute, cudnn::AttributeType::int64, &value, 1);
    return value;
  }

  // False when there is no such thing here, an answer that asking is for.
  bool finalise_unless_refused(std::string_view what) {
    const cudnn::Status status = library_->finalise(get());
    if (is_refusal(status)) return false;
    check(*library_, status, what);
    return true;
  }
  void finalise(std::string_view what) { check(*library_, library_->finalise(get()), what); }

 private:
  const Cudnn* library_;
  std::unique_ptr<void, cudnn::Status (*)(cudnn::Descriptor)> made_;
};

// The pointers of one use of a plan.
struct ConvolutionPlan::Pack {
  ConvolutionMaps maps;
  Descriptor descriptor;
};

struct ConvolutionPlan::Candidate {
  Descriptor config, plan;
  std::string id;
  size_t workspace_bytes = 0;
  std::vector<Pack> packs;
};

Convolutions::Convolutions(const Cudnn& library, ConvolutionChoice choice)
    : cudnn_(library), choice_(std::move(choice)), tf32_(tf32_allowed()), handle_(make_handle()) {}

Convolutions::Convolutions(const Cudnn& library, std::string device_properties)
    : cudnn_(library),
      choice_{.deterministic = true},
      device_properties_(std::move(device_properties)),
      tf32_(tf32_allowed()),
      handle_(nullptr, library.destroy) {}

Convolutions::~Convolutions() = default;

Convolutions::Handle Convolutions::make_handle() const {
  cudnn::Handle handle = nullptr;
  check(cudnn_, cudnn_.create(&handle), "cudnnCreate");
  return {handle, cudnn_.destroy};
}

void Convolutions::prepare(const Stream& stream) {
  if (stream_handles_.contains(stream.get())) return;
  Handle handle = make_handle();
  check(cudnn_, cudnn_.set_stream(handle.get(), stream.get()), "cudnnSetStream");
  stream_handles_.emplace(stream.get(), std::move(handle));
}

std::string Convolutions::cache_key(const std::string& what) const {
  return "cuDNN " + version_text(cudnn_.get_version()) + "; " + choice_.device + "; " +
         (tf32_ ? "" : "no TF32; ") + what;
}

std::string Convolutions::recall(const std::string& what) const {
  return read_cache(cache_key(what));
}

void Convolutions::remember(const std::string& what, const std::string& way) const {
  write_cache(cache_key(what), way);
}

ConvolutionPlan* Convolutions::find_plan(const ConvolutionShape& shape, ConvolutionPass pass) {
  const Key key{shape, pass};
  if (const auto found = plans_.find(key); found != plans_.end()) return found->second.get();
  std::unique_ptr<ConvolutionPlan> plan(new ConvolutionPlan(*this, key));
  if (plan->candidates_.empty()) return nullptr;
  return plans_.emplace(key, std::move(plan)).first->second.get();
}

ConvolutionPlan& Convolutions::plan(const ConvolutionShape& shape, ConvolutionPass pass) {
  if (ConvolutionPlan* found = find_plan(shape, pass); found != nullptr) return *found;
  throw Error(codes::kBackend, "cuDNN " + version_text(cudnn_.get_version()) + " has no " +
                                   (choice_.deterministic ? "deterministic " : "") + "engine for " +
                                   describe(shape, pass) + " within " +
                                   mebibytes(choice_.workspace_limit) +
                                   " of workspace; `npm run setup:cuda` brings a newer one.");
}

std::string Convolutions::engines() const {
  std::string text = "cuDNN " + version_text(cudnn_.get_version());
  for (const auto& [key, plan] : plans_) text += "; " + plan->describe() + ": " + plan->id();
  return text;
}

ConvolutionPlan::~ConvolutionPlan() = default;

std::string ConvolutionPlan::describe() const {
  return cuda::describe(key_.shape, key_.pass);
}

// Fills graph_ with the operations and all they are made of. False where this cuDNN knows no such
// graph, which only sums may come to.
bool ConvolutionPlan::build_graph() {
  using cudnn::Attribute;
  using cudnn::AttributeType;
  using cudnn::DescriptorType;
  const Cudnn& library = owner_.cudnn_;
  const ConvolutionShape& s = key_.shape;
  const std::string what = describe();

  // Dimensions are NCHW whatever the order in memory, which is NHWC (and OHWI).
  const auto tensor = [&](int64_t id, cudnn::DataType type, int64_t n, int64_t c, int64_t size) {
    Descriptor made(library, DescriptorType::tensor);
    made.set(Attribute::tensor_unique_id, AttributeType::int64, id);
    made.set(Attribute::tensor_data_type, AttributeType::data_type, type);
    made.set(Attribute::tensor_byte_alignment, AttributeType::int64, kAlignment);
    made.set(Attribute::tensor_dimensions, std::array<int64_t, 4>{n, c, size, size});
    made.set(Attribute::tensor_strides, std::array<int64_t, 4>{size * size * c, 1, size * c, c});
    made.finalise(what);
    return made;
  };
  graph_.reserve(9);  // references into it stay good
  const auto keep = [&](Descriptor descriptor) -> Descriptor& {
    graph_.push_back(std::move(descriptor));
    return graph_.back();
  };
  const cudnn::DataType type = data_type(s.precision);
  const Descriptor& x = keep(tensor(kX, type, s.batch, s.in_channels, s.in_size));
  const Descriptor& w = keep(tensor(kW, type, s.out_channels, s.in_channels, s.kernel));
  const Descriptor& y = keep(tensor(kY, type, s.batch, s.out_channels, s.out_size));

  Descriptor& convolution = keep(Descriptor(library, DescriptorType::convolution));
  convolution.set(Attribute::convolution_compute_type, AttributeType::data_type,
                  cudnn::DataType::fp32);
  convolution.set(Attribute::convolution_mode, AttributeType::convolution_mode,
                  cudnn::ConvolutionMode::cross_correlation);
  convolution.set(Attribute::convolution_spatial_dimensions, AttributeType::int64, int64_t{2});
  convolution.set(Attribute::convolution_filter_strides,
                  std::array<int64_t, 2>{s.stride, s.stride});
  convolution.set(Attribute::convolution_dilations, std::array<int64_t, 2>{1, 1});
  convolution.set(Attribute::convolution_pre_paddings,
                  std::array<int64_t, 2>{s.padding, s.padding});
  convolution.set(Attribute::convolution_post_paddings,
                  std::array<int64_t, 2>{s.padding, s.padding});
  convolution.finalise(what);

  const Operation pass = operation_of(key_.pass);
  Descriptor& operation = keep(Descriptor(library, pass.type));
  operation.set(pass.alpha, AttributeType::fp32, 1.0F);
  operation.set(pass.beta, AttributeType::fp32, 0.0F);
  operation.set(pass.convolution, convolution);
  operation.set(pass.x, x);
  operation.set(pass.w, w);
  operation.set(pass.y, y);
  operation.finalise(what);
  std::vector<cudnn::Descriptor> operations{operation.get()};

  if (key_.pass == ConvolutionPass::forward_with_sums) {
    const auto fp32 = cudnn::DataType::fp32;
    const Descriptor& sum = keep(tensor(kSum, fp32, 1, s.out_channels, 1));
    const Descriptor& squares = keep(tensor(kSquares, fp32, 1, s.out_channels, 1));
    Descriptor& sums = keep(Descriptor(library, DescriptorType::operation_statistics));
    sums.set(Attribute::statistics_mode, AttributeType::statistics_mode,
             cudnn::StatisticsMode::sum_and_squares);
    sums.set(Attribute::statistics_compute_type, AttributeType::data_type, fp32);
    sums.set(Attribute::statistics_x, y);
    sums.set(Attribute::statistics_sum, sum);
    sums.set(Attribute::statistics_squares, squares);
    if (!sums.finalise_unless_refused(what)) return false;
    operations.push_back(sums.get());
  }

  Descriptor& graph = keep(Descriptor(library, DescriptorType::operation_graph));
  if (owner_.handle_ != nullptr)
    graph.set(Attribute::operation_graph_handle, AttributeType::handle, owner_.handle_.get());
  graph.set(Attribute::operation_graph_operations, AttributeType::descriptor, operations.data(),
            static_cast<int64_t>(operations.size()));
  if (key_.pass == ConvolutionPass::forward_with_sums) return graph.finalise_unless_refused(what);
  graph.finalise(what);
  return true;
}

// Appends what the heuristic offers and this plan may use, until there is enough to choose from.
void ConvolutionPlan::add_candidates(cudnn::HeuristicMode mode) {
  using cudnn::Attribute;
  using cudnn::AttributeType;
  using cudnn::DescriptorType;
  const Cudnn& library = owner_.cudnn_;
  const size_t enough = owner_.choice_.deterministic || !wanted_.empty() ? 1 : kCandidates;
  Descriptor heuristic(library, DescriptorType::engine_heuristic);
  heuristic.set(Attribute::heuristic_operation_graph, graph_.back());
  heuristic.set(Attribute::heuristic_mode, AttributeType::heuristic_mode, mode);
  if (device_properties_ != nullptr)
    heuristic.set(Attribute::heuristic_device_properties, *device_properties_);
  if (!heuristic.finalise_unless_refused(describe())) return;
  int64_t count = 0;
  const cudnn::Status counted = library.get_attribute(
      heuristic.get(), Attribute::heuristic_results, AttributeType::descriptor, 0, &count, nullptr);
  if (is_refusal(counted)) return;
  check(library, counted, describe());
  std::vector<Descriptor> configs;
  std::vector<cudnn::Descriptor> pointers;
  for (int64_t i = 0; i < count; ++i) {
    configs.emplace_back(library, DescriptorType::engine_config);
    pointers.push_back(configs.back().get());
  }
  if (count > 0)
    count = std::min(count, heuristic.get(Attribute::heuristic_results, AttributeType::descriptor,
                                          pointers.data(), count));

  for (int64_t i = 0; i < count && candidates_.size() < enough; ++i) {
    Descriptor& config = configs[static_cast<size_t>(i)];
    Descriptor engine(library, DescriptorType::engine);
    cudnn::Descriptor engine_pointer = engine.get();
    config.get(Attribute::engine_config_engine, AttributeType::descriptor, &engine_pointer, 1);

    std::array<cudnn::NumericalNote, 9> notes{};  // as many as cuDNN 9.0 knows
    const int64_t present =
        engine.get(Attribute::engine_numerical_notes, AttributeType::numerical_note, notes.data(),
                   static_cast<int64_t>(notes.size()));
    const auto end = notes.begin() + std::min<int64_t>(present, notes.size());
    const auto has = [&](cudnn::NumericalNote note) {
      return std::find(notes.begin(), end, note) != end;
    };
    if (owner_.choice_.deterministic && has(cudnn::NumericalNote::nondeterministic)) continue;
    // Without TF32, fp32 operands are not rounded at all.
    if (key_.shape.precision == Precision::fp32 && !owner_.tf32_ &&
        (has(cudnn::NumericalNote::tensor_core) || has(cudnn::NumericalNote::down_convert_inputs)))
      continue;

    std::string id = "eng" + std::to_string(engine.get_int64(Attribute::engine_global_index));
    std::vector<Descriptor> knobs;
    std::array<cudnn::Descriptor, 32> knob_pointers{};  // an engine has about ten
    for (cudnn::Descriptor& pointer : knob_pointers) {
      knobs.emplace_back(library, DescriptorType::knob_choice);
      pointer = knobs.back().get();
    }
    const int64_t chosen =
        config.get(Attribute::engine_config_knob_choices, AttributeType::descriptor,
                   knob_pointers.data(), static_cast<int64_t>(knob_pointers.size()));
    for (size_t k = 0; k < knobs.size() && static_cast<int64_t>(k) < chosen; ++k) {
      int type = 0;  // cudnnBackendKnobType_t
      knobs[k].get(Attribute::knob_choice_type, AttributeType::knob_type, &type, 1);
      id += "_k" + std::to_string(type) + "=" +
            std::to_string(knobs[k].get_int64(Attribute::knob_choice_value));
    }
    if (!wanted_.empty() && id != wanted_) continue;
    if (std::any_of(candidates_.begin(), candidates_.end(),
                    [&](const Candidate& candidate) { return candidate.id == id; }))
      continue;

    Descriptor plan(library, DescriptorType::execution_plan);
    if (owner_.handle_ != nullptr)
      plan.set(Attribute::execution_plan_handle, AttributeType::handle, owner_.handle_.get());
    plan.set(Attribute::execution_plan_engine_config, config);
    if (!plan.finalise_unless_refused(describe())) continue;
    const auto bytes =
        static_cast<size_t>(plan.get_int64(Attribute::execution_plan_workspace_bytes));
    if (bytes > owner_.choice_.workspace_limit) continue;
    candidates_.push_back({std::move(config), std::move(plan), std::move(id), bytes, {}});
  }
}

ConvolutionPlan::ConvolutionPlan(Convolutions& owner, const Convolutions::Key& key)
    : owner_(owner), key_(key) {
  if (const std::string& json = owner.device_properties_; !json.empty()) {
    device_properties_ =
        std::make_unique<Descriptor>(owner.cudnn_, cudnn::DescriptorType::device_properties);
    device_properties_->set(cudnn::Attribute::device_properties_json,
                            cudnn::AttributeType::character, json.c_str(),
                            static_cast<int64_t>(json.size()));
    device_properties_->finalise("the properties of a GPU");
  }
  if (!build_graph()) return;
  if (!owner.choice_.deterministic) wanted_ = owner.recall(describe());
  find_candidates();
  if (candidates_.empty() && !wanted_.empty()) {  // the cache names what is no longer offered
    wanted_.clear();
    find_candidates();
  }
}

void ConvolutionPlan::find_candidates() {
  add_candidates(cudnn::HeuristicMode::a);
  add_candidates(cudnn::HeuristicMode::fallback);
}

size_t ConvolutionPlan::workspace_bytes() const {
  size_t most = 0;
  for (const Candidate& candidate : candidates_) most = std::max(most, candidate.workspace_bytes);
  return most;
}

const std::string& ConvolutionPlan::id() const {
  return candidates_.front().id;
}

void ConvolutionPlan::run_candidate(Candidate& candidate, const ConvolutionMaps& maps,
                                    const Stream& stream) {
  const Cudnn& library = owner_.cudnn_;
  auto pack = std::find_if(candidate.packs.begin(), candidate.packs.end(),
                           [&](const Pack& p) { return p.maps == maps; });
  if (pack == candidate.packs.end()) {
    using cudnn::Attribute;
    using cudnn::AttributeType;
    Descriptor made(library, cudnn::DescriptorType::variant_pack);
    std::vector<int64_t> ids{kX, kW, kY};
    std::vector<void*> pointers{maps.x, maps.w, maps.y};
    if (key_.pass == ConvolutionPass::forward_with_sums) {
      ids.insert(ids.end(), {kSum, kSquares});
      pointers.insert(pointers.end(), {maps.sums, maps.sums + key_.shape.out_channels});
    }
    const auto count = static_cast<int64_t>(ids.size());
    made.set(Attribute::variant_pack_unique_ids, AttributeType::int64, ids.data(), count);
    made.set(Attribute::variant_pack_data_pointers, AttributeType::void_pointer, pointers.data(),
             count);
    made.set(Attribute::variant_pack_workspace, AttributeType::void_pointer, maps.workspace);
    made.finalise("the pointers of a convolution");
    candidate.packs.push_back({maps, std::move(made)});
    pack = std::prev(candidate.packs.end());
  }
  owner_.prepare(stream);
  const cudnn::Status status = library.execute(owner_.stream_handles_.at(stream.get()).get(),
                                               candidate.plan.get(), pack->descriptor.get());
  if (status != cudnn::Status::success) check(library, status, describe());
}

void ConvolutionPlan::choose(const ConvolutionMaps& maps, const Stream& stream) {
  if (candidates_.size() == 1) return;
  std::optional<size_t> best;
  double best_time = 0;
  std::exception_ptr failure;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    try {
      const TimedWork work(stream, [&] { run_candidate(candidates_[i], maps, stream); });
      const double time = work.median_milliseconds();
      if (best && time >= best_time) continue;
      best = i;
      best_time = time;
    } catch (const Error& error) {
      // What an engine can do shows when it runs; with another the session goes on.
      if (std::string_view(error.code()) != codes::kBackend) throw;
      failure = std::current_exception();
    }
  }
  if (!best) std::rethrow_exception(failure);
  std::swap(candidates_[0], candidates_[*best]);
  candidates_.erase(candidates_.begin() + 1, candidates_.end());
  candidates_[0].packs.clear();
  owner_.remember(describe(), id());
}

void ConvolutionPlan::run(const ConvolutionMaps& maps, const Stream& stream) {
  run_candidate(candidates_.front(), maps, stream);
}

}  // namespace hardmine::cuda

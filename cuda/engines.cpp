#include "cuda/engines.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <optional>
#include <system_error>
#include <utility>

#include "core/error.h"

namespace hardmine::cuda {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kAlignment = 16;  // bytes, promised for every tensor

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

// 16-bit maps carry some thousandths of error, and of few rows' gradients a tenth may change with
// one decision of a ReLU (test/simt/session_test.cpp); a term that is wrong or missing changes them
// by about as much as there is.
constexpr double kAgreement = 0.4;

bool agree(const Engines::Results& expected, const Engines::Results& found) {
  return std::equal(expected.begin(), expected.end(), found.begin(), found.end(),
                    [](const std::vector<float>& wanted, const std::vector<float>& values) {
                      if (wanted.size() != values.size()) return false;
                      double difference = 0, size = 0;
                      for (size_t i = 0; i < wanted.size(); ++i) {
                        const double d = static_cast<double>(values[i]) - wanted[i];
                        difference += d * d;
                        size += static_cast<double>(wanted[i]) * wanted[i];
                      }
                      return std::sqrt(difference) <=
                             kAgreement * std::sqrt(size);  // NaN is no agreement
                    });
}

}  // namespace

// ---- Descriptors and graphs ----

CudnnDescriptor::CudnnDescriptor(const Cudnn& library, cudnn::DescriptorType type)
    : library_(&library), made_(nullptr, library.destroy_descriptor) {
  cudnn::Descriptor made = nullptr;
  check(library, library.create_descriptor(type, &made), "cudnnBackendCreateDescriptor");
  made_.reset(made);
}

void CudnnDescriptor::set_raw(cudnn::Attribute attribute, cudnn::AttributeType type,
                              const void* values, int64_t count) {
  check(*library_, library_->set_attribute(get(), attribute, type, count, values),
        "cudnnBackendSetAttribute " + std::to_string(static_cast<int>(attribute)));
}

int64_t CudnnDescriptor::get_raw(cudnn::Attribute attribute, cudnn::AttributeType type,
                                 void* values, int64_t count) const {
  int64_t present = 0;
  check(*library_, library_->get_attribute(get(), attribute, type, count, &present, values),
        "cudnnBackendGetAttribute " + std::to_string(static_cast<int>(attribute)));
  return present;
}

void CudnnDescriptor::finalise(std::string_view what) {
  check(*library_, library_->finalise(get()), what);
}

bool CudnnDescriptor::finalise_unless_refused(std::string_view what) {
  const cudnn::Status status = library_->finalise(get());
  if (is_refusal(status)) return false;
  check(*library_, status, what);
  return true;
}

CudnnDescriptor& GraphBuilder::part(cudnn::DescriptorType type) {
  return *parts_.emplace_back(std::make_unique<CudnnDescriptor>(library_, type));
}

CudnnDescriptor& GraphBuilder::tensor(int64_t id, cudnn::DataType type, int64_t n, int64_t c,
                                      int64_t size) {
  using cudnn::Attribute;
  using cudnn::AttributeType;
  CudnnDescriptor& made = part(cudnn::DescriptorType::tensor);
  made.set(Attribute::tensor_unique_id, AttributeType::int64, id);
  made.set(Attribute::tensor_data_type, AttributeType::data_type, type);
  made.set(Attribute::tensor_byte_alignment, AttributeType::int64, kAlignment);
  // Dimensions are NCHW whatever the order in memory, which is NHWC (and OHWI).
  made.set(Attribute::tensor_dimensions, std::array<int64_t, 4>{n, c, size, size});
  made.set(Attribute::tensor_strides, std::array<int64_t, 4>{size * size * c, 1, size * c, c});
  return made;
}

const CudnnDescriptor& GraphBuilder::map(int64_t id, cudnn::DataType type, int64_t n, int64_t c,
                                         int64_t size) {
  CudnnDescriptor& made = tensor(id, type, n, c, size);
  made.finalise(what_);
  return made;
}

const CudnnDescriptor& GraphBuilder::scalar(int64_t id) {
  CudnnDescriptor& made = tensor(id, cudnn::DataType::fp32, 1, 1, 1);
  made.set(cudnn::Attribute::tensor_is_by_value, cudnn::AttributeType::boolean, true);
  made.finalise(what_);
  return made;
}

const CudnnDescriptor& GraphBuilder::between(cudnn::DataType type, int64_t n, int64_t c,
                                             int64_t size) {
  CudnnDescriptor& made = tensor(++last_between_, type, n, c, size);
  made.set(cudnn::Attribute::tensor_is_virtual, cudnn::AttributeType::boolean, true);
  made.finalise(what_);
  return made;
}

CudnnDescriptor& GraphBuilder::pointwise(cudnn::PointwiseMode mode) {
  using cudnn::Attribute;
  using cudnn::AttributeType;
  CudnnDescriptor& how = part(cudnn::DescriptorType::pointwise);
  how.set(Attribute::pointwise_mode, AttributeType::pointwise_mode, mode);
  how.set(Attribute::pointwise_compute_type, AttributeType::data_type, cudnn::DataType::fp32);
  // A broken activation must not turn into a zero.
  if (mode == cudnn::PointwiseMode::relu_forward) {
    how.set(Attribute::pointwise_nan_propagation, AttributeType::nan_propagation,
            cudnn::NanPropagation::yes);
  }
  how.finalise(what_);
  CudnnDescriptor& operation = part(cudnn::DescriptorType::operation_pointwise);
  operation.set(Attribute::operation_pointwise_mode, how);
  return operation;
}

void GraphBuilder::add_pointwise(cudnn::PointwiseMode mode, const CudnnDescriptor& x,
                                 const CudnnDescriptor* b, const CudnnDescriptor& y) {
  CudnnDescriptor& operation = pointwise(mode);
  operation.set(cudnn::Attribute::operation_pointwise_x, x);
  if (b != nullptr) operation.set(cudnn::Attribute::operation_pointwise_b, *b);
  operation.set(cudnn::Attribute::operation_pointwise_y, y);
  add(operation);
}

void GraphBuilder::add_pointwise_backward(cudnn::PointwiseMode mode, const CudnnDescriptor& dy,
                                          const CudnnDescriptor& x, const CudnnDescriptor& dx) {
  CudnnDescriptor& operation = pointwise(mode);
  operation.set(cudnn::Attribute::operation_pointwise_x, x);
  operation.set(cudnn::Attribute::operation_pointwise_dy, dy);
  operation.set(cudnn::Attribute::operation_pointwise_dx, dx);
  add(operation);
}

void GraphBuilder::add(CudnnDescriptor& operation) {
  if (refused_) return;
  refused_ = !operation.finalise_unless_refused(what_);
  operations_.push_back(operation.get());
}

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

// ---- The plans of a session ----

// The pointers of one use of a plan.
struct EnginePlan::Pack {
  EnginePointers pointers;
  CudnnDescriptor descriptor;
};

struct EnginePlan::Candidate {
  CudnnDescriptor config, plan;
  std::string id;
  size_t workspace_bytes = 0;
  std::vector<Pack> packs;
};

Engines::Engines(const Cudnn& library, EngineChoice choice)
    : cudnn_(library), choice_(std::move(choice)), tf32_(tf32_allowed()), handle_(make_handle()) {}

Engines::Engines(const Cudnn& library, std::string device_properties)
    : cudnn_(library),
      choice_{.deterministic = true},
      device_properties_(std::move(device_properties)),
      tf32_(tf32_allowed()),
      handle_(nullptr, {library.destroy}) {}

Engines::~Engines() = default;

Engines::Handle Engines::make_handle() const {
  cudnn::Handle handle = nullptr;
  check(cudnn_, cudnn_.create(&handle), "cudnnCreate");
  return {handle, {cudnn_.destroy}};
}

void Engines::prepare(const Stream& stream) {
  if (stream_handles_.contains(stream.get())) return;
  Handle handle = make_handle();
  check(cudnn_, cudnn_.set_stream(handle.get(), stream.get()), "cudnnSetStream");
  stream_handles_.emplace(stream.get(), std::move(handle));
}

std::string Engines::cache_key(const std::string& what) const {
  // Ways have kernels of our own in them, which another version may have made faster.
  return "hardmine " HARDMINE_VERSION "; cuDNN " + version_text(cudnn_.get_version()) + "; " +
         choice_.device + "; " + (tf32_ ? "" : "no TF32; ") + what;
}

std::string Engines::recall(const std::string& what) const {
  return read_cache(cache_key(what));
}

void Engines::remember(const std::string& what, const std::string& way) const {
  write_cache(cache_key(what), way);
}

void Engines::take_fastest(const std::string& what, const std::vector<Way>& ways,
                           const Stream& stream, const std::function<void()>& run,
                           const std::function<Results()>& results) const {
  const std::string known = ways.size() == 1 ? ways.front().name : recall(what);
  for (const Way& way : ways)
    if (way.name == known) return way.take();
  const Way* best = nullptr;
  double best_time = 0;
  std::exception_ptr failure;
  std::optional<Results> expected;
  for (const Way& way : ways) {
    try {
      way.take();
      const double time = TimedWork(stream, run).median_milliseconds();
      if (&way == &ways.front()) expected = results();
      if (best != nullptr && time >= best_time) continue;
      if (&way != &ways.front() && expected && !agree(*expected, results())) continue;
      best = &way;
      best_time = time;
    } catch (const Error& error) {
      // As in EnginePlan::choose(): there is another way.
      if (std::string_view(error.code()) != codes::kBackend) throw;
      failure = std::current_exception();
    }
  }
  if (best == nullptr) std::rethrow_exception(failure);
  best->take();
  remember(what, best->name);
}

EnginePlan* Engines::make_plan(const Graph& graph) {
  if (const auto found = plans_.find(graph.what); found != plans_.end()) return found->second.get();
  std::unique_ptr<EnginePlan> plan(new EnginePlan(*this, graph));
  if (plan->candidates_.empty()) return nullptr;
  return plans_.emplace(graph.what, std::move(plan)).first->second.get();
}

EnginePlan* Engines::find_plan(const Graph& graph) {
  try {
    return make_plan(graph);
  } catch (const Error& error) {
    const std::string_view code = error.code();
    if (code != codes::kBackend && code != codes::kUnavailable) throw;
    return nullptr;
  }
}

EnginePlan& Engines::plan(const Graph& graph) {
  if (EnginePlan* found = make_plan(graph); found != nullptr) return *found;
  throw Error(codes::kBackend, "cuDNN " + version_text(cudnn_.get_version()) + " has no " +
                                   (choice_.deterministic ? "deterministic " : "") + "engine for " +
                                   graph.what + " within " + mebibytes(choice_.workspace_limit) +
                                   " of workspace; `npm run setup:cuda` brings a newer one.");
}

void Engines::keep(const std::function<bool(const EnginePlan&)>& wanted) {
  std::erase_if(plans_, [&](const auto& plan) { return !wanted(*plan.second); });
}

std::string Engines::describe() const {
  std::string text = "cuDNN " + version_text(cudnn_.get_version());
  for (const auto& [what, plan] : plans_) text += "; " + what + ": " + plan->id();
  return text;
}

// ---- A plan ----

EnginePlan::~EnginePlan() = default;

EnginePlan::EnginePlan(Engines& owner, const Engines::Graph& graph)
    : owner_(owner),
      what_(graph.what),
      enough_(owner.choice_.deterministic ? 1 : graph.candidates),
      exact_fp32_(graph.precision == Precision::fp32 && !owner.tf32_),
      builder_(owner.cudnn_, what_) {
  if (const std::string& json = owner.device_properties_; !json.empty()) {
    device_properties_ =
        std::make_unique<CudnnDescriptor>(owner.cudnn_, cudnn::DescriptorType::device_properties);
    device_properties_->set(cudnn::Attribute::device_properties_json,
                            cudnn::AttributeType::character, json.c_str(),
                            static_cast<int64_t>(json.size()));
    device_properties_->finalise("the properties of a GPU");
  }
  if (!build_graph(graph)) return;
  if (!owner.choice_.deterministic) wanted_ = owner.recall(what_);
  find_candidates();
  if (candidates_.empty() && !wanted_.empty()) {  // the cache names what is no longer offered
    wanted_.clear();
    find_candidates();
  }
}

bool EnginePlan::build_graph(const Engines::Graph& graph) {
  using cudnn::Attribute;
  using cudnn::AttributeType;
  graph.build(builder_);
  if (builder_.refused_) return false;
  graph_ = &builder_.part(cudnn::DescriptorType::operation_graph);
  if (owner_.handle_ != nullptr)
    graph_->set(Attribute::operation_graph_handle, AttributeType::handle, owner_.handle_.get());
  graph_->set(Attribute::operation_graph_operations, AttributeType::descriptor,
              builder_.operations_.data(), static_cast<int64_t>(builder_.operations_.size()));
  return graph_->finalise_unless_refused(what_);
}

void EnginePlan::find_candidates() {
  add_candidates(cudnn::HeuristicMode::a);
  add_candidates(cudnn::HeuristicMode::fallback);
}

// Appends what the heuristic offers and this plan may use, until there is enough to choose from.
void EnginePlan::add_candidates(cudnn::HeuristicMode mode) {
  using cudnn::Attribute;
  using cudnn::AttributeType;
  using cudnn::DescriptorType;
  const Cudnn& library = owner_.cudnn_;
  const size_t enough = wanted_.empty() ? enough_ : 1;
  CudnnDescriptor heuristic(library, DescriptorType::engine_heuristic);
  heuristic.set(Attribute::heuristic_operation_graph, *graph_);
  heuristic.set(Attribute::heuristic_mode, AttributeType::heuristic_mode, mode);
  if (device_properties_ != nullptr)
    heuristic.set(Attribute::heuristic_device_properties, *device_properties_);
  if (!heuristic.finalise_unless_refused(what_)) return;
  int64_t count = 0;
  const cudnn::Status counted = library.get_attribute(
      heuristic.get(), Attribute::heuristic_results, AttributeType::descriptor, 0, &count, nullptr);
  if (is_refusal(counted)) return;
  check(library, counted, what_);
  std::vector<CudnnDescriptor> configs;
  std::vector<cudnn::Descriptor> pointers;
  for (int64_t i = 0; i < count; ++i) {
    configs.emplace_back(library, DescriptorType::engine_config);
    pointers.push_back(configs.back().get());
  }
  if (count > 0)
    count = std::min(count, heuristic.get(Attribute::heuristic_results, AttributeType::descriptor,
                                          pointers.data(), count));

  for (int64_t i = 0; i < count && candidates_.size() < enough; ++i) {
    CudnnDescriptor& config = configs[static_cast<size_t>(i)];
    CudnnDescriptor engine(library, DescriptorType::engine);
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
    if (exact_fp32_ &&
        (has(cudnn::NumericalNote::tensor_core) || has(cudnn::NumericalNote::down_convert_inputs)))
      continue;

    std::string id = "eng" + std::to_string(engine.get_int64(Attribute::engine_global_index));
    std::vector<CudnnDescriptor> knobs;
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

    CudnnDescriptor plan(library, DescriptorType::execution_plan);
    if (owner_.handle_ != nullptr)
      plan.set(Attribute::execution_plan_handle, AttributeType::handle, owner_.handle_.get());
    plan.set(Attribute::execution_plan_engine_config, config);
    if (!plan.finalise_unless_refused(what_)) continue;
    const auto bytes =
        static_cast<size_t>(plan.get_int64(Attribute::execution_plan_workspace_bytes));
    if (bytes > owner_.choice_.workspace_limit) continue;
    candidates_.push_back({std::move(config), std::move(plan), std::move(id), bytes, {}});
  }
}

size_t EnginePlan::workspace_bytes() const {
  size_t most = 0;
  for (const Candidate& candidate : candidates_) most = std::max(most, candidate.workspace_bytes);
  return most;
}

const std::string& EnginePlan::id() const {
  return candidates_.front().id;
}

void EnginePlan::run_candidate(Candidate& candidate, const EnginePointers& pointers,
                               const Stream& stream) {
  const Cudnn& library = owner_.cudnn_;
  auto pack = std::find_if(candidate.packs.begin(), candidate.packs.end(),
                           [&](const Pack& p) { return p.pointers == pointers; });
  if (pack == candidate.packs.end()) {
    using cudnn::Attribute;
    using cudnn::AttributeType;
    CudnnDescriptor made(library, cudnn::DescriptorType::variant_pack);
    std::vector<int64_t> ids;
    std::vector<void*> present;
    for (size_t id = 1; id < pointers.tensors.size(); ++id) {
      if (pointers.tensors[id] == nullptr) continue;
      ids.push_back(static_cast<int64_t>(id));
      present.push_back(pointers.tensors[id]);
    }
    const auto count = static_cast<int64_t>(ids.size());
    made.set(Attribute::variant_pack_unique_ids, AttributeType::int64, ids.data(), count);
    made.set(Attribute::variant_pack_data_pointers, AttributeType::void_pointer, present.data(),
             count);
    made.set(Attribute::variant_pack_workspace, AttributeType::void_pointer, pointers.workspace);
    made.finalise("the pointers of " + what_);
    candidate.packs.push_back({pointers, std::move(made)});
    pack = std::prev(candidate.packs.end());
  }
  owner_.prepare(stream);
  const cudnn::Status status = library.execute(owner_.stream_handles_.at(stream.get()).get(),
                                               candidate.plan.get(), pack->descriptor.get());
  if (status != cudnn::Status::success) check(library, status, what_);
}

void EnginePlan::choose(const EnginePointers& pointers, const Stream& stream) {
  if (candidates_.size() == 1) return;
  std::optional<size_t> best;
  double best_time = 0;
  std::exception_ptr failure;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    try {
      const TimedWork work(stream, [&] { run_candidate(candidates_[i], pointers, stream); });
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
  owner_.remember(what_, id());
}

void EnginePlan::run(const EnginePointers& pointers, const Stream& stream) {
  run_candidate(candidates_.front(), pointers, stream);
}

}  // namespace hardmine::cuda

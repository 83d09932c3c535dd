#include "binding/handle.h"
#include "binding/handles.h"
#include "core/random.h"

namespace hardmine::binding {
namespace {

struct OwnedHead {
  std::unique_ptr<Backend> backend;  // outlives the head
  std::unique_ptr<MarginHead> head;
};

// Rows of one call, copied.
struct Rows {
  std::vector<float> embeddings;
  std::vector<int32_t> labels;
  HeadInput input() const { return {embeddings, labels}; }
};

// What forward_backward fills.
struct Gradients {
  Gradients(Napi::Env env, size_t rows, const HeadSpec& spec)
      : base_loss(env, rows, "baseLoss"),
        weighted_loss(env, rows, "weightedLoss"),
        grad_embeddings(env, rows * static_cast<size_t>(spec.dim), "gradEmbeddings"),
        grad_weights(env, static_cast<size_t>(spec.classes * spec.dim), "gradWeights"),
        grad_bias(env, spec.loss.base == BaseKind::softmax ? static_cast<size_t>(spec.classes) : 0,
                  "gradBias") {}
  HeadOutput output() const {
    return {0,
            base_loss.span(),
            weighted_loss.span(),
            grad_embeddings.span(),
            grad_weights.span(),
            grad_bias.span()};
  }

  double loss = 0;
  Output<float> base_loss, weighted_loss, grad_embeddings, grad_weights, grad_bias;
};

class Head : public Handle {
 public:
  static constexpr napi_type_tag kTag = {0x7A4C91E35D0B4F27, 0xB81E64D2F09A5C73};
  static constexpr const char* kKind = "head handle";

  Head(Napi::Env env, std::shared_ptr<Worker> worker, std::shared_ptr<Slot<OwnedHead>> slot,
       const HeadSpec& spec)
      // Weights and momentum, and centers.
      : Handle(
            env, std::move(worker),
            (spec.loss.has_centers() ? 3 : 2) * spec.classes * spec.dim * int64_t{sizeof(float)}),
        slot_(std::move(slot)),
        spec_(spec) {}

  Napi::Value set_weights(const Napi::CallbackInfo& info);
  Napi::Value read_weights(const Napi::CallbackInfo& info);
  Napi::Value set_centers(const Napi::CallbackInfo& info);
  Napi::Value read_centers(const Napi::CallbackInfo& info);
  Napi::Value forward_backward(const Napi::CallbackInfo& info);
  Napi::Value step(const Napi::CallbackInfo& info);
  Napi::Value peak_extra_bytes(const Napi::CallbackInfo& info);
  Napi::Value time(const Napi::CallbackInfo& info);

 private:
  bool has_bias() const { return spec_.loss.base == BaseKind::softmax; }
  size_t weight_count() const { return static_cast<size_t>(spec_.classes * spec_.dim); }
  size_t center_count() const { return spec_.loss.has_centers() ? weight_count() : 0; }
  size_t bias_count() const { return has_bias() ? static_cast<size_t>(spec_.classes) : 0; }
  std::shared_ptr<Rows> to_rows(const Napi::CallbackInfo& info) const;

  std::shared_ptr<Slot<OwnedHead>> slot_;
  HeadSpec spec_;
};

std::shared_ptr<Rows> Head::to_rows(const Napi::CallbackInfo& info) const {
  auto rows = std::make_shared<Rows>();
  rows->labels = to_vector<int32_t>(info[1], "labels");
  if (rows->labels.empty()) refuse("labels", "at least one row", info[1]);
  rows->embeddings =
      to_vector<float>(info[0], "embeddings", rows->labels.size() * static_cast<size_t>(spec_.dim));
  return rows;
}

Napi::Value Head::set_weights(const Napi::CallbackInfo& info) {
  auto weights = to_vector<float>(info[0], "weights", weight_count());
  std::vector<float> bias;
  if (has_bias()) {
    bias = to_vector<float>(info[1], "bias", bias_count());
  } else if (!info[1].IsNull()) {
    refuse("bias", "null (only softmax has one)", info[1]);
  }
  return submit(
      info, "head.setWeights",
      [slot = slot_, weights = std::move(weights), bias = std::move(bias)](
          const std::atomic<bool>&) { slot->object->head->set_weights(weights, bias); },
      no_result);
}

Napi::Value Head::read_weights(const Napi::CallbackInfo& info) {
  struct State {
    Output<float> weights, bias;
  };
  const Napi::Env env = info.Env();
  const auto state = std::shared_ptr<State>(new State{Output<float>(env, weight_count(), "weights"),
                                                      Output<float>(env, bias_count(), "bias")});
  return submit(
      info, "head.readWeights",
      [slot = slot_, state](const std::atomic<bool>&) {
        slot->object->head->read_weights(state->weights.span(), state->bias.span());
      },
      [state, has_bias = has_bias()](Napi::Env result_env) -> Napi::Value {
        const auto object = Napi::Object::New(result_env);
        object.Set("weights", state->weights.value());
        object.Set("bias", has_bias ? state->bias.value() : result_env.Null());
        return object;
      });
}

Napi::Value Head::set_centers(const Napi::CallbackInfo& info) {
  auto centers = to_vector<float>(info[0], "centers", center_count());
  return submit(
      info, "head.setCenters",
      [slot = slot_, centers = std::move(centers)](const std::atomic<bool>&) {
        slot->object->head->set_centers(centers);
      },
      no_result);
}

Napi::Value Head::read_centers(const Napi::CallbackInfo& info) {
  const auto centers = std::make_shared<Output<float>>(info.Env(), center_count(), "centers");
  return submit(
      info, "head.readCenters",
      [slot = slot_, centers](const std::atomic<bool>&) {
        slot->object->head->read_centers(centers->span());
      },
      [centers](Napi::Env) { return centers->value(); });
}

Napi::Value Head::forward_backward(const Napi::CallbackInfo& info) {
  const auto rows = to_rows(info);
  const auto gradients = std::make_shared<Gradients>(info.Env(), rows->labels.size(), spec_);
  return submit(
      info, "head.forwardBackward",
      [slot = slot_, rows, gradients](const std::atomic<bool>&) {
        HeadOutput output = gradients->output();
        slot->object->head->forward_backward(rows->input(), output);
        gradients->loss = output.loss;
      },
      [gradients, has_bias = has_bias()](Napi::Env env) -> Napi::Value {
        const auto object = Napi::Object::New(env);
        object.Set("loss", Napi::Number::New(env, gradients->loss));
        object.Set("baseLoss", gradients->base_loss.value());
        object.Set("weightedLoss", gradients->weighted_loss.value());
        object.Set("gradEmbeddings", gradients->grad_embeddings.value());
        object.Set("gradWeights", gradients->grad_weights.value());
        object.Set("gradBias", has_bias ? gradients->grad_bias.value() : env.Null());
        return object;
      });
}

Napi::Value Head::step(const Napi::CallbackInfo& info) {
  const auto rows = to_rows(info);
  const StepSettings settings = to_step_settings(info[2], "settings");
  const auto stats = std::make_shared<StepStats>();
  const auto grad_embeddings =
      std::make_shared<Output<float>>(info.Env(), rows->embeddings.size(), "gradEmbeddings");
  return submit(
      info, "head.step",
      [slot = slot_, rows, settings, stats, grad_embeddings](const std::atomic<bool>&) {
        *stats = slot->object->head->step(rows->input(), settings, grad_embeddings->span());
      },
      [stats, grad_embeddings](Napi::Env env) -> Napi::Value {
        const auto object = Napi::Object::New(env);
        object.Set("stats", from_stats(env, *stats));
        object.Set("gradEmbeddings", grad_embeddings->value());
        return object;
      });
}

Napi::Value Head::peak_extra_bytes(const Napi::CallbackInfo& info) {
  const auto bytes = std::make_shared<size_t>(0);
  return submit(
      info, "head.peakExtraBytes",
      [slot = slot_, bytes](const std::atomic<bool>&) {
        *bytes = slot->object->head->peak_extra_bytes();
      },
      [bytes](Napi::Env env) { return Napi::Number::New(env, static_cast<double>(*bytes)); });
}

// Normal deviates and uniform classes from a fixed seed: the same in every run.
Rows drawn_rows(const HeadSpec& spec, int64_t count) {
  constexpr uint64_t kSeed = 1;
  const auto rows = static_cast<size_t>(count);
  const auto classes = static_cast<uint64_t>(spec.classes);
  Rows data{std::vector<float>(rows * static_cast<size_t>(spec.dim)), std::vector<int32_t>(rows)};
  for (size_t i = 0; i < data.embeddings.size(); ++i)
    data.embeddings[i] = static_cast<float>(random_normal(kSeed, 0, i));
  for (size_t i = 0; i < rows; ++i)
    data.labels[i] = static_cast<int32_t>(random_below(random_bits(kSeed, 1, i), classes));
  return data;
}

Napi::Value Head::time(const Napi::CallbackInfo& info) {
  constexpr int64_t kMostRows = 1 << 20, kMostRepeats = 1 << 20;
  const auto what = to_choice<HeadWork>(info[0], "what",
                                        {{"forwardBackward", HeadWork::forward_backward},
                                         {"step", HeadWork::step},
                                         {"products", HeadWork::products}});
  const int64_t rows = to_integer(info[1], "rows", 1, kMostRows);
  const int64_t repeats = to_integer(info[2], "repeats", 1, kMostRepeats);
  const auto ms =
      std::make_shared<Output<double>>(info.Env(), static_cast<size_t>(repeats), "milliseconds");
  return submit(
      info, "head.time",
      [slot = slot_, spec = spec_, what, rows, ms](const std::atomic<bool>& cancelled) {
        const Rows data = drawn_rows(spec, rows);
        slot->object->head->time(what, data.input(), ms->span(), cancelled);
      },
      [ms](Napi::Env) { return ms->value(); });
}

}  // namespace

Napi::Value create_head(const Napi::CallbackInfo& info) {
  const Members members(info[0], "spec");
  HeadSpec spec;
  spec.classes = members.integer("classes", 1, kMostClasses);
  spec.dim = members.integer("dim", 1, kMostDim);
  spec.loss = to_loss(members.members("loss"));
  spec.implementation = to_implementation(members);
  const Execution execution = to_execution(info[1]);

  const auto make = [spec, execution] {
    auto owned = std::make_shared<OwnedHead>();
    owned->backend = make_backend();
    owned->head = owned->backend->make_head(spec, execution);
    return owned;
  };
  const auto present = [spec](Napi::Env env, std::shared_ptr<Worker> worker,
                              const std::shared_ptr<Slot<OwnedHead>>& slot) -> Napi::Value {
    const auto object = wrap(env, std::make_unique<Head>(env, std::move(worker), slot, spec));
    define_method<rejecting<method<Head, &Head::set_weights>>>(object, "setWeights");
    define_method<rejecting<method<Head, &Head::read_weights>>>(object, "readWeights");
    define_method<rejecting<method<Head, &Head::set_centers>>>(object, "setCenters");
    define_method<rejecting<method<Head, &Head::read_centers>>>(object, "readCenters");
    define_method<rejecting<method<Head, &Head::forward_backward>>>(object, "forwardBackward");
    define_method<rejecting<method<Head, &Head::step>>>(object, "step");
    define_method<rejecting<method<Head, &Head::peak_extra_bytes>>>(object, "peakExtraBytes");
    define_method<rejecting<method<Head, &Head::time>>>(object, "time");
    return object;
  };
  return create<OwnedHead>(info.Env(), "createHead", make, present);
}

}  // namespace hardmine::binding

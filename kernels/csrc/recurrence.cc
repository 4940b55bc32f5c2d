// DecoderRecurrence and DecoderConvolution: com.microsoft.LinearAttention and CausalConvWithState over rows of tokens.
// Here are the checks and how the work is divided; recurrence.inl has the sums.
#include "recurrence.h"

#include <cmath>
#include <cstdint>
#include <string>

#include "levels.h"
#include "operators.h"
#include "ort.h"

namespace pastkey {
namespace {

constexpr size_t kLanes = 16;      // channels of a convolution's call
constexpr size_t kTaskBlocks = 8;  // such calls of a task
constexpr int64_t kMostHeads = 1 << 16;

// A run writes the outputs while it reads the inputs; a state may be written over.
void require_apart(const Tensor& out, std::initializer_list<Tensor> inputs) {
  const auto begin = reinterpret_cast<uintptr_t>(out.raw), end = begin + out.size * sizeof(float);
  for (const Tensor& input : inputs) {
    const auto from = reinterpret_cast<uintptr_t>(input.raw);
    if (input && begin < from + input.size * sizeof(float) && from < end)
      refuse("%s shares memory with %s, expected a buffer of its own", out.label, input.label);
  }
}

class DecoderRecurrence {
 public:
  static constexpr const char* kName = "DecoderRecurrence";
  static constexpr Slot kInputs[] = {
      required(kFloat),  // query [B, S, Hq * D]
      required(kFloat),  // key [B, S, Hk * D]
      required(kFloat),  // value [B, S, H * Dv]
      required(kFloat),  // past_state [B, H, D, Dv]
      optional(kFloat),  // decay [B, S, H] or [B, S, H * D], its logarithm
      optional(kFloat),  // beta [B, S, H] or [B, S, 1]
  };
  static constexpr Slot kOutputs[] = {required(kFloat), required(kFloat)};  // y [B, S, H * Dv], present_state

  explicit DecoderRecurrence(const KernelInfo& info);
  void compute(const Context& context) const;

 private:
  int64_t query_heads_, heads_;
  float scale_;
  bool decays_, delta_;
};

DecoderRecurrence::DecoderRecurrence(const KernelInfo& info)
    : query_heads_(info.attribute("q_num_heads", int64_t{0})), heads_(info.attribute("kv_num_heads", int64_t{0})) {
  if (heads_ < 1 || heads_ > kMostHeads || query_heads_ < 1 || heads_ % query_heads_)
    refuse("q_num_heads is %lld and kv_num_heads %lld, expected positive numbers, the second a multiple of the first",
           static_cast<long long>(query_heads_), static_cast<long long>(heads_));
  scale_ = info.attribute("scale", 0.f);
  if (!std::isfinite(scale_)) refuse("scale is %g, expected a finite number", scale_);
  const std::string rule = info.attribute("update_rule", "gated_delta");
  decays_ = rule == "gated" || rule == "gated_delta", delta_ = rule == "delta" || rule == "gated_delta";
  if (!decays_ && !delta_ && rule != "linear")
    refuse("update_rule is %.20s, expected linear, gated, delta or gated_delta", rule.c_str());
  level();
}

void DecoderRecurrence::compute(const Context& context) const {
  const Tensor query = context.required_input(0, "query"), key = context.required_input(1, "key");
  const Tensor value = context.required_input(2, "value"), past = context.required_input(3, "past_state");
  const Tensor decay = context.input(4, "decay"), beta = context.input(5, "beta");
  const Shape& state = past.shape;
  if (state.size() != 4 || state[1] != heads_ || state[2] < 16 || state[2] % 16 || state[3] < 16 || state[3] % 16 ||
      state[2] > static_cast<int64_t>(kMaxKeySize) || state[3] > kMostHeads)
    refuse("past_state is %s, expected [B, %lld, D, Dv], multiples of 16, the first up to %zu",
           to_string(state).c_str(), static_cast<long long>(heads_), kMaxKeySize);
  const int64_t d = state[2], width = state[3];
  if (query.shape.size() != 3 || query.shape[0] != state[0] || query.shape[1] < 1 || query.shape[2] != query_heads_ * d)
    refuse("query is %s, expected [%lld, S, %lld]", to_string(query.shape).c_str(), static_cast<long long>(state[0]),
           static_cast<long long>(query_heads_ * d));
  const int64_t batch = state[0], tokens = query.shape[1];
  auto rows = [&](const Tensor& tensor, int64_t columns) { return tensor.shape == Shape{batch, tokens, columns}; };
  const int64_t key_heads = key.shape.size() == 3 ? key.shape[2] / d : 0;
  if (key_heads < 1 || heads_ % key_heads || !rows(key, key_heads * d))
    refuse("key is %s, expected [%lld, %lld, heads * %lld], which divide %lld", to_string(key.shape).c_str(),
           static_cast<long long>(batch), static_cast<long long>(tokens), static_cast<long long>(d),
           static_cast<long long>(heads_));
  if (!rows(value, heads_ * width))
    refuse("value is %s, expected [%lld, %lld, %lld]", to_string(value.shape).c_str(), static_cast<long long>(batch),
           static_cast<long long>(tokens), static_cast<long long>(heads_ * width));
  const bool per_key = decay && rows(decay, heads_ * d), one_beta = beta && rows(beta, 1) && heads_ > 1;
  if (static_cast<bool>(decay) != decays_ || (decay && !per_key && !rows(decay, heads_)))
    refuse("decay is %s, expected %s", to_string(decay.shape).c_str(),
           decays_ ? "a number for each head or channel of a key" : "none");
  if (static_cast<bool>(beta) != delta_ || (beta && !one_beta && !rows(beta, heads_)))
    refuse("beta is %s, expected %s", to_string(beta.shape).c_str(),
           delta_ ? "a number for each head, or one" : "none");

  const Tensor y = context.required_output(0, value.shape, "output");
  const Tensor present = context.required_output(1, state, "present_state");
  require_apart(y, {query, key, value, past, decay, beta, present});
  require_apart(present, {query, key, value, decay, beta});
  if (present.raw != past.raw) require_apart(present, {past});
  const float *q = query.data<float>(), *k = key.data<float>(), *v = value.data<float>(), *before = past.data<float>();
  const float *decays = decay.data<float>(), *betas = beta.data<float>();
  float *out = y.data<float>(), *after = present.data<float>();
  const float scale = scale_ == 0 ? 1 / std::sqrt(static_cast<float>(d)) : scale_;
  const AttentionKernels& kernel = level().attention;
  context.parallel_for(static_cast<size_t>(batch * heads_), [&](size_t task) {
    const int64_t b = static_cast<int64_t>(task) / heads_, h = static_cast<int64_t>(task) % heads_;
    // one head's part of the columns of tokens
    auto steps = [&](const float* data, int64_t columns, int64_t first) {
      return Steps{data ? data + b * tokens * columns + first : nullptr, static_cast<size_t>(columns)};
    };
    Recurrence a{};
    a.tokens = static_cast<size_t>(tokens), a.key_size = static_cast<size_t>(d);
    a.value_size = static_cast<size_t>(width);
    a.query = steps(q, query_heads_ * d, h * query_heads_ / heads_ * d);
    a.key = steps(k, key_heads * d, h * key_heads / heads_ * d);
    a.value = steps(v, heads_ * width, h * width);
    a.decay = per_key ? steps(decays, heads_ * d, h * d) : steps(decays, heads_, h);
    a.decay_per_key = per_key, a.delta = delta_;
    a.beta = one_beta ? steps(betas, 1, 0) : steps(betas, heads_, h);
    a.scale = scale;
    a.past = before + static_cast<int64_t>(task) * d * width, a.state = after + static_cast<int64_t>(task) * d * width;
    a.y = out + b * tokens * heads_ * width + h * width, a.y_stride = static_cast<size_t>(heads_ * width);
    kernel.recur(a);
  });
}

class DecoderConvolution {
 public:
  static constexpr const char* kName = "DecoderConvolution";
  static constexpr Slot kInputs[] = {
      required(kFloat),  // x [B, S, C], C a multiple of 16
      required(kFloat),  // weight [C, 1, taps]
      optional(kFloat),  // bias [C]
      required(kFloat),  // past_state [B, C, taps - 1]
  };
  static constexpr Slot kOutputs[] = {required(kFloat), required(kFloat)};  // y [B, S, C], present_state

  explicit DecoderConvolution(const KernelInfo& info);
  void compute(const Context& context) const;

 private:
  bool silu_;
};

DecoderConvolution::DecoderConvolution(const KernelInfo& info) {
  const std::string activation = info.attribute("activation", "none");
  silu_ = activation == "silu";
  if (!silu_ && activation != "none") refuse("activation is %.20s, expected none or silu", activation.c_str());
  level();
}

void DecoderConvolution::compute(const Context& context) const {
  const Tensor x = context.required_input(0, "x"), weight = context.required_input(1, "weight");
  const Tensor bias = context.input(2, "bias"), past = context.required_input(3, "past_state");
  if (x.shape.size() != 3 || x.shape[0] < 1 || x.shape[1] < 1 || x.shape[2] < 16 || x.shape[2] % 16)
    refuse("x is %s, expected [B, S, C], with C a multiple of 16", to_string(x.shape).c_str());
  const int64_t batch = x.shape[0], tokens = x.shape[1], channels = x.shape[2];
  const int64_t taps = weight.shape.size() == 3 ? weight.shape[2] : 0;
  if (taps < 1 || taps > static_cast<int64_t>(kMaxTaps) || weight.shape != Shape{channels, 1, taps})
    refuse("weight is %s, expected [%lld, 1, 1 to %zu]", to_string(weight.shape).c_str(),
           static_cast<long long>(channels), kMaxTaps);
  if (bias && bias.shape != Shape{channels})
    refuse("bias is %s, expected [%lld]", to_string(bias.shape).c_str(), static_cast<long long>(channels));
  if (past.shape != Shape{batch, channels, taps - 1})
    refuse("past_state is %s, expected [%lld, %lld, %lld]", to_string(past.shape).c_str(),
           static_cast<long long>(batch), static_cast<long long>(channels), static_cast<long long>(taps - 1));

  const Tensor y = context.required_output(0, x.shape, "output");
  const Tensor present = context.required_output(1, past.shape, "present_state");
  require_apart(y, {x, weight, bias, past, present});
  require_apart(present, {x, weight, bias});
  if (present.raw != past.raw) require_apart(present, {past});
  const float *from = x.data<float>(), *weights = weight.data<float>(), *added = bias.data<float>();
  const float* before = past.data<float>();
  float *out = y.data<float>(), *after = present.data<float>();
  const auto count = static_cast<size_t>(channels), length = static_cast<size_t>(tokens);
  const size_t width = static_cast<size_t>(taps), blocks = count / kLanes;
  const size_t tasks = (blocks + kTaskBlocks - 1) / kTaskBlocks;
  const AttentionKernels& kernel = level().attention;
  context.parallel_for(static_cast<size_t>(batch) * tasks, [&](size_t task) {
    const size_t b = task / tasks, first = task % tasks * kTaskBlocks;
    for (size_t block = first; block < first + kTaskBlocks && block < blocks; block++) {
      const size_t c = block * kLanes, row = b * length * count + c, kept = (b * count + c) * (width - 1);
      kernel.convolve({length,
                       width,
                       {from + row, count},
                       weights + c * width,
                       added ? added + c : nullptr,
                       silu_,
                       before + kept,
                       after + kept,
                       out + row,
                       count});
    }
  });
}

}  // namespace

const OrtCustomOp* decoder_recurrence() { return custom_op<DecoderRecurrence>(); }
const OrtCustomOp* decoder_convolution() { return custom_op<DecoderConvolution>(); }

}  // namespace pastkey

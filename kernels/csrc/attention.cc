// DecoderAttention: rotation, the write into the cache and attention, as com.microsoft.GroupQueryAttention over one
// buffer that is past and present. Here are the checks and how the work is divided; attention.inl has the sums.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <iterator>
#include <optional>

#include "levels.h"
#include "operators.h"
#include "ort.h"

namespace pastkey {
namespace {

constexpr size_t kFewTasks = 64;                   // fewer are divided into parts
constexpr size_t kMostScratch = size_t{32} << 20;  // bytes of divided tasks' sums
constexpr size_t kWriteTokens = 16;                // new tokens a task writes
constexpr size_t kFewRows = 16;                    // more read a copy of a part
constexpr int64_t kMostHeads = 1 << 16;

size_t row_bytes(CacheType type, size_t head_size) {
  return head_size * (type == CacheType::float32 ? sizeof(float) : sizeof(uint16_t));
}

uint16_t to_float16(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  uint32_t half;
  if (size > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (size >= 0x47800000) {
    half = 0x7c00;  // 2^16 and more
  } else if (size < 0x38800000) {
    const float shifted = std::fabs(x) + 0.5f;  // below 2^-14: the last bit of 0.5 is 2^-24, float16's smallest
    std::memcpy(&half, &shifted, sizeof half);
    half -= 0x3f000000;
  } else {
    half = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

// Writes one row of the cache.
void write_row(CacheType type, const float* x, size_t d, char* row) {
  if (type == CacheType::float32) {
    std::memcpy(row, x, d * sizeof(float));
    return;
  }
  for (size_t i = 0; i < d; i++) {
    const uint16_t half = to_float16(x[i]);
    std::memcpy(row + 2 * i, &half, sizeof half);
  }
}

// Tables of the angles' cosines and sines; without them nothing is rotated.
struct Rotary {
  const float* cos = nullptr;  // [positions, half]
  const float* sin = nullptr;
  size_t half = 0;
  bool interleaved = false;  // pairs are neighbours, not half a rotation apart

  void rotate(const float* x, size_t d, size_t position, float* __restrict y) const {
    const float *c = cos + position * half, *s = sin + position * half;
    if (interleaved) {
      for (size_t i = 0; i < half; i++) {
        y[2 * i] = x[2 * i] * c[i] - x[2 * i + 1] * s[i];
        y[2 * i + 1] = x[2 * i] * s[i] + x[2 * i + 1] * c[i];
      }
    } else {
      for (size_t i = 0; i < half; i++) {
        y[i] = x[i] * c[i] - x[half + i] * s[i];
        y[half + i] = x[i] * s[i] + x[half + i] * c[i];
      }
    }
    std::memcpy(y + 2 * half, x + 2 * half, (d - 2 * half) * sizeof(float));
  }
};

// The new tokens of all rows of the batch.
struct Rows {
  const float* data;  // token i of row b: data + (b * S + i) * width
  size_t width;
};

bool overlap(const Tensor& a, size_t a_bytes, const Tensor& b, size_t b_bytes) {
  const auto x = reinterpret_cast<uintptr_t>(a.raw), y = reinterpret_cast<uintptr_t>(b.raw);
  return x < y + b_bytes && y < x + a_bytes;
}

// Floats of a task, aligned to 64 bytes: few on the stack, which has 128 KB for threads of some systems.
class TaskFloats {
 public:
  TaskFloats(const Allocator& allocator, size_t count) noexcept {
    if (count > std::size(few_)) many_.emplace(allocator, count * sizeof(float));
  }
  float* data() noexcept { return many_ ? reinterpret_cast<float*>(many_->data()) : few_; }  // nullptr: no memory

 private:
  alignas(64) float few_[kFewRows * kAttentionMaxHeadSize];
  std::optional<Scratch> many_;
};

class DecoderAttention {
 public:
  static constexpr const char* kName = "DecoderAttention";
  static constexpr Slot kInputs[] = {
      required(kFloat),    // query [B, S, H * D], or query, key and value [B, S, (H + 2 * G) * D]
      optional(kFloat),    // key [B, S, G * D]
      optional(kFloat),    // value
      required(kAnyType),  // past_key [B, G, room, D]
      required(kAnyType),  // past_value
      required(kInt32),    // seqlens_k [B]: tokens of a row, new ones included, minus 1
      required(kInt32),    // total_sequence_length
      optional(kFloat),    // cos [positions, at most D / 2]
      optional(kFloat),    // sin
      optional(kFloat),    // head_sink [H]
      optional(kInt32),    // evicted [B]: first tokens of a row that are not in the cache, whose rows begin behind them
  };
  static constexpr Slot kOutputs[] = {required(kFloat), required(kAnyType), required(kAnyType)};

  explicit DecoderAttention(const KernelInfo& info);
  void compute(const Context& context) const;

 private:
  struct Call;
  Call checked(const Context& context) const;
  bool flag(const KernelInfo& info, const char* name) const;

  Allocator allocator_;
  size_t heads_ = 0, kv_heads_ = 0, window_ = 0;  // window 0: none
  float scale_ = 0, softcap_ = 0;
  bool do_rotary_ = false, interleaved_ = false, smooth_ = false;
};

bool DecoderAttention::flag(const KernelInfo& info, const char* name) const {
  const int64_t value = info.attribute(name, int64_t{0});
  if (value != 0 && value != 1) refuse("%s is %lld, expected 0 or 1", name, static_cast<long long>(value));
  return value == 1;
}

DecoderAttention::DecoderAttention(const KernelInfo& info) : allocator_(info.api(), info.raw()) {
  const int64_t heads = info.attribute("num_heads", int64_t{0}), kv_heads = info.attribute("kv_num_heads", int64_t{0});
  if (heads < 1 || heads > kMostHeads || kv_heads < 1 || heads % kv_heads)
    refuse("num_heads is %lld and kv_num_heads %lld, expected positive numbers, the first a multiple of the second",
           static_cast<long long>(heads), static_cast<long long>(kv_heads));
  const int64_t window = info.attribute("local_window_size", int64_t{-1});
  if (window != -1 && window < 1)
    refuse("local_window_size is %lld, expected -1 or a positive number", static_cast<long long>(window));
  scale_ = info.attribute("scale", 0.f);
  softcap_ = info.attribute("softcap", 0.f);
  // Within these bounds neither the cap's inverse nor a score times it is subnormal.
  if (!std::isfinite(scale_) || !(softcap_ == 0 || (softcap_ >= 1e-30f && softcap_ <= 1e30f)))
    refuse("scale is %g and softcap %g, expected finite numbers, the second 0 or 1e-30 to 1e30", scale_, softcap_);
  heads_ = static_cast<size_t>(heads), kv_heads_ = static_cast<size_t>(kv_heads);
  window_ = window == -1 ? 0 : static_cast<size_t>(window);
  do_rotary_ = flag(info, "do_rotary");
  interleaved_ = flag(info, "rotary_interleaved");
  smooth_ = flag(info, "smooth_softmax");
  level();
}

// A run whose inputs are all checked.
struct DecoderAttention::Call {
  size_t batch, tokens, d, room, total;  // tokens: new ones of each row, with padding
  Rows query, key, value;
  CacheType cache;
  char *keys, *values;
  Rotary rotary;
  const float* sinks;
  float* y;
  // Of each row of the batch: tokens before, those of them that are not in the cache, and new ones that are no padding.
  std::vector<size_t> past, evicted, real;
};

DecoderAttention::Call DecoderAttention::checked(const Context& context) const {
  const Tensor query = context.required_input(0, "query");
  const Tensor key = context.input(1, "key"), value = context.input(2, "value");
  const Tensor past_key = context.required_input(3, "past_key"), past_value = context.required_input(4, "past_value");
  const Tensor seqlens_k = context.required_input(5, "seqlens_k");
  const Tensor total = context.required_input(6, "total_sequence_length");
  const Tensor cos = context.input(7, "cos"), sin = context.input(8, "sin"), sinks = context.input(9, "head_sink");
  const Tensor evicted = context.input(10, "evicted");
  Call c{};

  switch (past_key.type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: c.cache = CacheType::float32; break;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: c.cache = CacheType::float16; break;
    default: refuse("past_key is of %s, expected float32 or float16", to_string(past_key.type));
  }
  if (past_value.type != past_key.type || past_value.shape != past_key.shape)
    refuse("past_value is %s of %s and past_key %s of %s, expected the same", to_string(past_value.shape).c_str(),
           to_string(past_value.type), to_string(past_key.shape).c_str(), to_string(past_key.type));
  for (const Tensor* tensor : {&past_key, &past_value})
    if (c.cache == CacheType::float32)
      tensor->data<float>();
    else
      tensor->data<uint16_t>();
  const Shape& cache = past_key.shape;
  const int64_t heads = static_cast<int64_t>(heads_), kv_heads = static_cast<int64_t>(kv_heads_);
  if (query.shape.size() != 3 || query.shape[0] < 1 || query.shape[1] < 1)
    refuse("query is %s, expected three dimensions, with at least one row and one token",
           to_string(query.shape).c_str());
  if (cache.size() != 4 || cache[0] != query.shape[0] || cache[1] != kv_heads)
    refuse("past_key is %s, expected [%lld, %lld, room, head size]", to_string(cache).c_str(),
           static_cast<long long>(query.shape[0]), static_cast<long long>(kv_heads));
  const int64_t d = cache[3];
  if (d < 32 || d > static_cast<int64_t>(kAttentionMaxHeadSize) || d % 16)
    refuse("past_key is %s of %s, a head size of %lld: expected 32 to 256, a multiple of 16", to_string(cache).c_str(),
           to_string(past_key.type), static_cast<long long>(d));
  c.batch = static_cast<size_t>(cache[0]), c.room = static_cast<size_t>(cache[2]);
  c.tokens = static_cast<size_t>(query.shape[1]), c.d = static_cast<size_t>(d);

  c.query = {query.data<float>(), static_cast<size_t>(query.shape[2])};
  if (static_cast<bool>(key) != static_cast<bool>(value))
    refuse("one of key and value is missing, expected both or none");
  if (key) {
    const Shape expected = {query.shape[0], query.shape[1], kv_heads * d};
    for (const Tensor* tensor : {&key, &value})
      if (tensor->shape != expected)
        refuse("%s is %s, expected %s", tensor->label, to_string(tensor->shape).c_str(), to_string(expected).c_str());
    c.key = {key.data<float>(), kv_heads_ * c.d}, c.value = {value.data<float>(), kv_heads_ * c.d};
  } else {
    c.key = {c.query.data + heads_ * c.d, c.query.width};
    c.value = {c.key.data + kv_heads_ * c.d, c.query.width};
  }
  const int64_t width = (heads + (key ? 0 : 2 * kv_heads)) * d;
  if (query.shape[2] != width)
    refuse("query is %s, expected a width of %lld: %lld heads%s of %lld", to_string(query.shape).c_str(),
           static_cast<long long>(width), static_cast<long long>(heads), key ? "" : ", with their keys and values,",
           static_cast<long long>(d));

  if (total.size != 1) refuse("total_sequence_length is %s, expected one element", to_string(total.shape).c_str());
  if (seqlens_k.shape != Shape{query.shape[0]})
    refuse("seqlens_k is %s, expected [%lld]", to_string(seqlens_k.shape).c_str(),
           static_cast<long long>(query.shape[0]));
  const int64_t longest = *total.data<int32_t>(), tokens = query.shape[1];
  if (longest < tokens || (longest > cache[2] && !evicted))
    refuse("total_sequence_length is %lld, expected %lld new tokens to %lld, the room of past_key",
           static_cast<long long>(longest), static_cast<long long>(tokens), static_cast<long long>(cache[2]));
  if (evicted && evicted.shape != seqlens_k.shape)
    refuse("evicted is %s, expected %s", to_string(evicted.shape).c_str(), to_string(seqlens_k.shape).c_str());
  c.total = static_cast<size_t>(longest);
  const bool first = longest == tokens;  // rows of a first prompt may end in padding
  int64_t most = 0;
  for (size_t b = 0; b < c.batch; b++) {
    const int64_t length = int64_t{seqlens_k.data<int32_t>()[b]} + 1;
    if (length < (first ? 1 : tokens) || length > longest)
      refuse("seqlens_k of row %zu is %lld, expected %lld to %lld, with %lld new tokens of %lld", b,
             static_cast<long long>(length - 1), static_cast<long long>(first ? 0 : tokens - 1),
             static_cast<long long>(longest - 1), static_cast<long long>(tokens), static_cast<long long>(longest));
    c.past.push_back(first ? 0 : static_cast<size_t>(length - tokens));
    c.real.push_back(static_cast<size_t>(first ? length : tokens));
    const int64_t gone = evicted ? evicted.data<int32_t>()[b] : 0, past = static_cast<int64_t>(c.past[b]);
    if (gone < 0 || gone > past || length - gone > cache[2])
      refuse("evicted of row %zu is %lld of %lld earlier tokens, expected to leave at most %lld with the new ones", b,
             static_cast<long long>(gone), static_cast<long long>(past), static_cast<long long>(cache[2]));
    c.evicted.push_back(static_cast<size_t>(gone));
    most = std::max(most, length);
  }

  if (static_cast<bool>(cos) != do_rotary_ || static_cast<bool>(sin) != do_rotary_)
    refuse("do_rotary is %d, cos is %s and sin is %s, expected both with do_rotary, else none", do_rotary_,
           cos ? "there" : "missing", sin ? "there" : "missing");
  if (do_rotary_) {
    if (cos.shape.size() != 2 || cos.shape != sin.shape || cos.shape[0] < most || cos.shape[1] < 1 ||
        cos.shape[1] > d / 2)
      refuse("cos is %s and sin %s, expected the same, with at least %lld positions and 1 to %lld angles",
             to_string(cos.shape).c_str(), to_string(sin.shape).c_str(), static_cast<long long>(most),
             static_cast<long long>(d / 2));
    c.rotary = {cos.data<float>(), sin.data<float>(), static_cast<size_t>(cos.shape[1]), interleaved_};
  }
  if (sinks && sinks.size != heads_)
    refuse("head_sink is %s, expected [%lld]", to_string(sinks.shape).c_str(), static_cast<long long>(heads));
  c.sinks = sinks.data<float>();

  const Tensor y = context.required_output(0, {query.shape[0], query.shape[1], heads * d}, "output");
  const Tensor present_key = context.required_output(1, cache, "present_key");
  const Tensor present_value = context.required_output(2, cache, "present_value");
  if (present_key.raw != past_key.raw || present_value.raw != past_value.raw || present_key.type != past_key.type ||
      present_value.type != past_value.type)
    refuse("present_key and present_value are other buffers than past_key and past_value, expected the same");
  const size_t bytes = c.batch * kv_heads_ * c.room * row_bytes(c.cache, c.d), y_bytes = y.size * sizeof(float);
  if (overlap(past_key, bytes, past_value, bytes) || overlap(past_key, bytes, y, y_bytes) ||
      overlap(past_value, bytes, y, y_bytes))
    refuse("past_key, past_value and the output share memory, expected buffers of their own");
  c.keys = static_cast<char*>(past_key.raw), c.values = static_cast<char*>(past_value.raw);
  c.y = y.data<float>();
  return c;
}

void DecoderAttention::compute(const Context& context) const {
  const Call c = checked(context);
  const AttentionKernels& kernel = level().attention;
  const AttentionTiles* with_tiles =
      c.cache == CacheType::float16 && c.tokens > kDecodeRows ? level().attention_tiles : nullptr;
  const size_t d = c.d, bytes = row_bytes(c.cache, d), shared = heads_ / kv_heads_;
  const float scale = scale_ == 0 ? 1 / std::sqrt(static_cast<float>(d)) : scale_;

  // The new tokens' keys and values; zeros as output of padding.
  const size_t writes = (c.tokens + kWriteTokens - 1) / kWriteTokens;
  context.parallel_for(c.batch * writes, [&](size_t task) {
    float rotated[kAttentionMaxHeadSize];
    const size_t b = task / writes, begin = task % writes * kWriteTokens;
    for (size_t i = begin; i < std::min(begin + kWriteTokens, c.tokens); i++) {
      if (i >= c.real[b]) {
        std::fill_n(c.y + (b * c.tokens + i) * heads_ * d, heads_ * d, 0.f);
        continue;
      }
      for (size_t g = 0; g < kv_heads_; g++) {
        const size_t place = ((b * kv_heads_ + g) * c.room + c.past[b] - c.evicted[b] + i) * bytes;
        const float* key = c.key.data + (b * c.tokens + i) * c.key.width + g * d;
        if (do_rotary_) c.rotary.rotate(key, d, c.past[b] + i, rotated), key = rotated;
        write_row(c.cache, key, d, c.keys + place);
        write_row(c.cache, c.value.data + (b * c.tokens + i) * c.value.width + g * d, d, c.values + place);
      }
    }
  });

  // A tile: up to kAttentionRows queries of one row b and one key head g, token by token, all heads of a token
  // together.
  struct Tile {
    size_t b, g, begin, count;  // queries [begin, begin + count)
    size_t part, parts;         // its keys' parts [part, part + parts)
  };
  const size_t tiles = (c.tokens * shared + kAttentionRows - 1) / kAttentionRows, tasks = c.batch * kv_heads_ * tiles;
  auto tile_of = [&](size_t task) {
    Tile tile{task / tiles / kv_heads_, task / tiles % kv_heads_, (tiles - 1 - task % tiles) * kAttentionRows, 0, 0, 0};
    const size_t queries = c.real[tile.b] * shared;
    if (tile.begin >= queries) return tile;
    tile.count = std::min(kAttentionRows, queries - tile.begin);
    const size_t first = c.past[tile.b] + tile.begin / shared + 1;
    const size_t last = c.past[tile.b] + (tile.begin + tile.count - 1) / shared + 1;
    tile.part = std::max(window_ && first > window_ ? first - window_ : 0, c.evicted[tile.b]) / kAttentionPart;
    tile.parts = (last + kAttentionPart - 1) / kAttentionPart - tile.part;
    return tile;
  };
  auto reset = [&](const AttentionSums& sums, size_t count) {
    std::fill_n(sums.top, kAttentionRows, -INFINITY);
    std::fill_n(sums.sum, kAttentionRows, 0.f);
    std::fill_n(sums.values, count * d, 0.f);
  };
  std::atomic<bool> out_of_memory{false};
  // Adds parts [begin, end) to `sums`.
  auto attend = [&](const Tile& tile, size_t begin, size_t end, const AttentionSums& sums) {
    // A copy of a part takes a store for each load: worth it where more than two passes read it.
    const size_t copied = with_tiles ? kAttentionRows : tile.count > kFewRows ? kAttentionPart : 0;
    const size_t floats = (tile.count + copied) * d;
    TaskFloats memory(allocator_, floats + (with_tiles ? with_tiles->size(d) / sizeof(float) : 0));
    float* query = memory.data();
    if (!query) {
      out_of_memory = true;
      return;
    }
    float* copy = copied ? query + tile.count * d : nullptr;
    uint8_t* packed = with_tiles ? reinterpret_cast<uint8_t*>(query + floats) : nullptr;
    size_t from[kAttentionRows], to[kAttentionRows];
    for (size_t r = 0; r < tile.count; r++) {
      const size_t i = (tile.begin + r) / shared, h = tile.g * shared + (tile.begin + r) % shared;
      const float* x = c.query.data + (tile.b * c.tokens + i) * c.query.width + h * d;
      float* q = query + r * d;
      if (do_rotary_) c.rotary.rotate(x, d, c.past[tile.b] + i, q), x = q;
      for (size_t e = 0; e < d; e++) q[e] = x[e] * scale;
      to[r] = c.past[tile.b] + i + 1;
      from[r] = std::max(window_ && to[r] > window_ ? to[r] - window_ : 0, c.evicted[tile.b]);
    }
    const size_t head = (tile.b * kv_heads_ + tile.g) * c.room;
    const ptrdiff_t start = (static_cast<ptrdiff_t>(head) - static_cast<ptrdiff_t>(c.evicted[tile.b])) *
                            static_cast<ptrdiff_t>(bytes);  // of token 0, which may not be there
    const AttentionRows rows = {tile.count,       d,       query,    from, to,         c.keys + start,
                                c.values + start, c.cache, softcap_, copy, with_tiles, packed};
    uint8_t saved[kTileConfig];
    if (with_tiles) with_tiles->begin(saved), with_tiles->pack_query(query, tile.count, d, packed);
    for (size_t part = begin; part < end; part++) kernel.attend(rows, part, sums);
    if (with_tiles) with_tiles->end(saved);
  };
  auto finish = [&](const Tile& tile, size_t r, const AttentionSums& sums) {
    const size_t i = (tile.begin + r) / shared, h = tile.g * shared + (tile.begin + r) % shared;
    const float zero = 0, *sink = c.sinks ? c.sinks + h : smooth_ ? &zero : nullptr;
    kernel.finish(d, sums, sink, c.y + ((tile.b * c.tokens + i) * heads_ + h) * d);
  };

  auto require_memory = [&] {
    if (out_of_memory) throw Error{ORT_FAIL, "no memory for intermediate results"};
  };

  size_t most_parts = 1;
  for (size_t task = 0; tasks < kFewTasks && task < tasks; task++)
    most_parts = std::max(most_parts, tile_of(task).parts);
  const size_t rows = std::min(kAttentionRows, c.tokens * shared), sums_size = 2 * kAttentionRows + rows * d;
  if (most_parts == 1 || tasks * most_parts > kMostScratch / (sums_size * sizeof(float))) {
    context.parallel_for(tasks, [&](size_t task) {
      const Tile tile = tile_of(task);
      TaskFloats memory(allocator_, tile.count * d);
      float top[kAttentionRows], sum[kAttentionRows], *values = memory.data();
      if (!values) {
        out_of_memory = true;
        return;
      }
      const AttentionSums sums = {top, sum, values};
      reset(sums, tile.count);
      attend(tile, tile.part, tile.part + tile.parts, sums);
      for (size_t r = 0; r < tile.count; r++) finish(tile, r, {top + r, sum + r, values + r * d});
    });
    return require_memory();
  }

  // A task for each part, for more of them than threads. The last of a tile merges the parts in their order.
  const Scratch scratch(allocator_, tasks * most_parts * sums_size * sizeof(float));
  float* store = reinterpret_cast<float*>(scratch.get());
  std::atomic<size_t> left[kFewTasks];
  for (size_t task = 0; task < tasks; task++) left[task] = tile_of(task).parts;
  context.parallel_for(tasks * most_parts, [&](size_t index) {
    const size_t task = index / most_parts, part = index % most_parts;
    const Tile tile = tile_of(task);
    if (part >= tile.parts) return;
    auto sums_of = [&](size_t p, size_t r) {
      float* top = store + (task * most_parts + p) * sums_size;
      return AttentionSums{top + r, top + kAttentionRows + r, top + 2 * kAttentionRows + r * d};
    };
    reset(sums_of(part, 0), tile.count);
    attend(tile, tile.part + part, tile.part + part + 1, sums_of(part, 0));
    if (left[task].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    for (size_t r = 0; r < tile.count; r++) {
      const AttentionSums sums = sums_of(0, r);
      for (size_t p = 1; p < tile.parts; p++) kernel.merge(d, sums_of(p, r), sums);
      finish(tile, r, sums);
    }
  });
  require_memory();
}

}  // namespace

const OrtCustomOp* decoder_attention() { return custom_op<DecoderAttention>(); }

}  // namespace pastkey

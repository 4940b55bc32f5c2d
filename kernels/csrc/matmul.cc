// MatMulInt8: Y = act(X W^T + bias), and NormMatMulInt8: the same of norm(X + skip). X is rounded to int8, W is stored
// in 8 or 4 bits.
#include <algorithm>
#include <cstring>

#include "levels.h"
#include "operators.h"
#include "ort.h"

namespace pastkey {
namespace {

constexpr size_t kTaskBytes = 96 * 1024;  // of weights that a task reads: some 10 us, a fraction of the L2 cache
constexpr size_t kColumns = 64;           // columns of both halves that wait for their activation

Activation parse_activation(const std::string& name) {
  if (name.empty()) return Activation::none;
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  refuse("activation is \"%.40s\", expected \"\", \"silu\", \"gelu\" or \"gelu_tanh\"", name.c_str());
}

// A float vector with an element per row of W or column of X; nullptr where it is absent.
const float* vector(const Tensor& tensor, size_t elements) {
  if (tensor && tensor.size != elements)
    refuse("%s has shape %s, expected %zu elements", tensor.label, to_string(tensor.shape).c_str(), elements);
  return tensor.data<float>();
}

// The even elements of each block before its odd ones, as the bytes of two weights are taken apart.
void split_pairs(int8_t* q, size_t blocks) {
  for (; blocks; blocks--, q += kBlock) {
    int8_t pairs[kBlock];
    std::memcpy(pairs, q, kBlock);
    for (size_t i = 0; i < kBlock / 2; i++) {
      q[i] = pairs[2 * i];
      q[kBlock / 2 + i] = pairs[2 * i + 1];
    }
  }
}

// What sums of 16 products start from, in place of those of 32.
void start_halves(const int8_t* q, size_t blocks, int32_t* start) {
  for (size_t h = 0; h < 2 * blocks; h++, q += kBlock / 2) {
    int32_t sum = 0;
    for (size_t i = 0; i < kBlock / 2; i++) sum += q[i];
    start[h] = -128 * sum;
  }
}

// What both operators share: W and its attributes.
class Product {
 public:
  // `input` is the place of W; scales, row_scales, bias, zero_points, offsets and offset_scales follow.
  Product(const KernelInfo& info, size_t input)
      : kernels_(level().matmul), tiles_(level().tiles), allocator_(info.api(), info.raw()) {
    const int64_t bits = info.attribute("bits", int64_t{8});
    if (bits != 8 && bits != 4) refuse("bits is %lld, expected 8 or 4", static_cast<long long>(bits));
    int4_ = bits == 4;
    const Tensor codes = info.required_constant(input, "W");
    w_.codes = codes.data<uint8_t>();
    const int64_t parts = codes.shape.size() == 3 && codes.shape[2] == 2 * bits && !int4_ ? 2 : 1;  // of 16 weights
    if (codes.shape.size() != 3 || codes.shape[0] < 1 || codes.shape[1] < parts || codes.shape[1] % parts ||
        codes.shape[2] != 4 * bits / parts)
      refuse("W has shape %s, expected [N, K / 32, %d]", to_string(codes.shape).c_str(), int(4 * bits));
    w_.n = static_cast<size_t>(codes.shape[0]);
    w_.blocks = static_cast<size_t>(codes.shape[1] / parts);

    const Tensor offsets = info.constant(input + 5, "offsets");
    read_scales(info.required_constant(input + 1, "scales"), info.constant(input + 2, "row_scales"), bool(offsets));
    read_offsets(offsets, info.constant(input + 6, "offset_scales"));
    multiply_ = (int4_ ? kernels_.multiply_int4 : kernels_.multiply)[static_cast<size_t>(w_.form)];
    w_.bias = vector(info.constant(input + 3, "bias"), w_.n);
    const Tensor zeros = info.constant(input + 4, "zero_points");
    if (zeros && (!int4_ || offsets)) refuse("zero_points is given, expected only with 4 bits and without offsets");
    if (zeros && zeros.size != w_.n * ((w_.blocks + 1) / 2))
      refuse("zero_points has shape %s, expected [%zu, %zu]", to_string(zeros.shape).c_str(), w_.n,
             (w_.blocks + 1) / 2);
    w_.zeros = zeros.data<uint8_t>();

    terms_ = static_cast<size_t>(range(info, "terms", 1, 1, 2));
    activation_ = parse_activation(info.attribute("activation", ""));
    gate_ = range(info, "gate", -1, -1, 1);
    if (gate_ >= 0 && w_.n % 2) refuse("gate is %d and W has %zu rows, expected an even number", int(gate_), w_.n);
  }

  size_t k() const { return w_.blocks * kBlock; }
  size_t columns() const { return gate_ >= 0 ? w_.n / 2 : w_.n; }
  const MatMulKernels& kernels() const { return kernels_; }
  const Allocator& allocator() const { return allocator_; }

  // The shape of X, [..., K]. Returns the rows.
  size_t rows(const Tensor& x) const {
    if (x.shape.empty() || x.shape.back() != static_cast<int64_t>(k()))
      refuse("X has shape %s, expected [..., %zu] as W has", to_string(x.shape).c_str(), k());
    return x.size / k();
  }

  Shape output_shape(Shape shape) const {
    shape.back() = static_cast<int64_t>(columns());
    return shape;
  }

  // x [m, k] -> y [m, columns]
  void run(const Context& context, const float* x, size_t m, float* y) const {
    if (m == 0) return;
    if (tiles_ && m > tiles_->few_rows) return run_tiles(context, x, m, y);
    const size_t rows = m * terms_, blocks = rows * w_.blocks, parts = w_.form == Form::halves ? 2 : 1;
    const Scratch scratch(allocator_, blocks * (kBlock + 4 * parts + 8) + (terms_ > 1 ? m * k() * sizeof(float) : 0));
    Rounded rounded;
    rounded.q = reinterpret_cast<int8_t*>(scratch.get());
    rounded.start = reinterpret_cast<int32_t*>(rounded.q + blocks * kBlock);
    rounded.scale = reinterpret_cast<float*>(rounded.start + blocks * parts);
    rounded.sums = w_.form == Form::offsets ? rounded.scale + blocks : nullptr;
    float* rest = terms_ > 1 ? rounded.scale + 2 * blocks : nullptr;
    for_rows(context, m, [&](size_t i) {
      const float* from = x + i * k();
      for (size_t t = 0; t < terms_; t++) {
        const size_t at = (i * terms_ + t) * w_.blocks;
        float* left = t + 1 < terms_ ? rest + i * k() : nullptr;
        int8_t* q = rounded.q + at * kBlock;
        int32_t* start = rounded.start + at * parts;
        kernels_.round(from, w_.blocks, q, start, rounded.scale + at, left);
        if (w_.form == Form::halves) start_halves(q, w_.blocks, start);
        if (w_.form == Form::offsets)
          for (size_t b = 0; b < w_.blocks; b++)
            rounded.sums[at + b] = static_cast<float>(start[b] / -128) * rounded.scale[at + b];
        if (int4_) split_pairs(q, w_.blocks);
        from = left;
      }
    });
    const size_t bytes = k() * (gate_ >= 0 ? 2 : 1) / (int4_ ? 2 : 1);
    const size_t step = std::max<size_t>(16, kTaskBytes / bytes / 16 * 16);
    context.parallel_for((columns() + step - 1) / step, [&](size_t task) {
      const size_t first = task * step, count = std::min(step, columns() - first);
      for (size_t i = 0; i < m; i += kMaxRows / terms_) {
        const size_t at = i * terms_ * w_.blocks, n = std::min(kMaxRows / terms_, m - i);
        const Rounded part{rounded.q + at * kBlock, rounded.start + at * parts, rounded.scale + at,
                           rounded.sums ? rounded.sums + at : nullptr};
        multiply(part, n, first, count, y + i * columns() + first);
      }
    });
  }

  // task(i) for each row, some at a time
  template <class Task>
  static void for_rows(const Context& context, size_t m, const Task& task) {
    constexpr size_t kTogether = 8;
    context.parallel_for((m + kTogether - 1) / kTogether, [&](size_t t) {
      for (size_t i = t * kTogether; i < std::min(m, (t + 1) * kTogether); i++) task(i);
    });
  }

 private:
  static int64_t range(const KernelInfo& info, const char* name, int64_t otherwise, int64_t low, int64_t high) {
    const int64_t value = info.attribute(name, otherwise);
    if (value < low || value > high)
      refuse("%s is %lld, expected %d to %d", name, static_cast<long long>(value), int(low), int(high));
    return value;
  }

  static void read(const Tensor& tensor, Numbers& numbers) {
    if (tensor.type == kUint8)
      numbers.codes = tensor.data<uint8_t>();
    else if (tensor.type == kFloat16)
      numbers.float16 = tensor.data<uint16_t>();
    else
      numbers.floats = tensor.data<float>();
  }

  // A float for each 256 weights.
  const float* groups(const Tensor& tensor) const {
    const size_t groups = w_.blocks / 8;
    if (w_.blocks % 8) refuse("K is %zu, expected a multiple of 256 with %s of 256 weights", k(), tensor.label);
    if (tensor.size != w_.n * groups)
      refuse("%s has shape %s, expected [%zu, %zu]", tensor.label, to_string(tensor.shape).c_str(), w_.n, groups);
    return tensor.data<float>();
  }

  void read_scales(const Tensor& scales, const Tensor& row_scales, bool offsets) {
    const size_t blocks = w_.n * w_.blocks;
    const bool halves = scales.size == 2 * blocks;
    if (scales.size != blocks && !halves)
      refuse("scales has shape %s, expected [%zu, %zu]", to_string(scales.shape).c_str(), w_.n, w_.blocks);
    if (halves && (int4_ || offsets))
      refuse("scales has shape %s, expected [%zu, %zu]: a scale for each 16 weights needs 8 bits and no offsets",
             to_string(scales.shape).c_str(), w_.n, w_.blocks);
    w_.form = offsets ? Form::offsets : halves ? Form::halves : Form::plain;
    w_.scales.count = scales.size / w_.n;
    w_.scales.group_shift = halves ? 4 : 3;
    read(scales, w_.scales);
    if (!w_.scales.codes) {
      if (row_scales) refuse("row_scales is given, expected only with scales of uint8");
      return;
    }
    if (!row_scales) refuse("row_scales is missing, expected with scales of uint8");
    if (offsets || (row_scales.size != w_.n && w_.blocks % 8 == 0))
      w_.scales.groups = groups(row_scales);
    else
      w_.row_scales = vector(row_scales, w_.n);
  }

  void read_offsets(const Tensor& offsets, const Tensor& offset_scales) {
    if (!offsets && !offset_scales) return;
    if (!offsets) refuse("offset_scales is given, expected only with offsets");
    if (offsets.size != w_.n * w_.blocks)
      refuse("offsets has shape %s, expected [%zu, %zu]", to_string(offsets.shape).c_str(), w_.n, w_.blocks);
    w_.offsets.count = w_.blocks;
    w_.offsets.group_shift = 3;
    read(offsets, w_.offsets);
    if (w_.offsets.codes)
      w_.offsets.groups = groups(required(offset_scales));
    else if (offset_scales)
      refuse("offset_scales is given, expected only with offsets of uint8");
  }

  // At most kMaxRows / terms_ rows, and columns of Y from `first`.
  void multiply(const Rounded& x, size_t rows, size_t first, size_t count, float* y) const {
    if (gate_ < 0) {
      multiply_(w_, x, rows, terms_, first, count, y, columns());
      if (activation_ != Activation::none)
        for (size_t i = 0; i < rows; i++) {
          float* part = y + i * columns();
          kernels_.activate(activation_, part, nullptr, part, count);
        }
      return;
    }
    float halves[2][kMaxRows * kColumns];
    for (size_t from = 0; from < count; from += kColumns) {
      const size_t n = std::min(kColumns, count - from);
      for (size_t h = 0; h < 2; h++)
        multiply_(w_, x, rows, terms_, h * columns() + first + from, n, halves[h], kColumns);
      for (size_t i = 0; i < rows; i++)
        kernels_.activate(activation_, halves[gate_] + i * kColumns, halves[1 - gate_] + i * kColumns,
                          y + i * columns() + from, n);
    }
  }

  void run_tiles(const Context& context, const float* x, size_t m, float* y) const {
    constexpr size_t kHalf = kTileRows / 2;
    const size_t groups = (m + kHalf - 1) / kHalf, group_size = packed_rows_size(w_.blocks, terms_);
    const Scratch packed(allocator_, groups * group_size);
    uint8_t* rows = packed.get();
    context.parallel_for(groups, [&](size_t g) {
      tiles_->pack_rows(x + g * kHalf * k(), std::min(kHalf, m - g * kHalf), w_.blocks, terms_, rows + g * group_size);
    });
    const size_t halves = gate_ >= 0 ? 2 : 1, weights_size = packed_weights_size(w_.blocks, terms_);
    std::atomic<bool> out_of_memory{false};
    context.parallel_for((columns() + kTileRows - 1) / kTileRows, [&](size_t task) {
      const size_t first = task * kTileRows, count = std::min(kTileRows, columns() - first);
      const Scratch panel(allocator_, halves * weights_size);
      if (!panel.data()) {
        out_of_memory = true;
        return;
      }
      for (size_t h = 0; h < halves; h++)
        (int4_ ? tiles_->pack_weights_int4 : tiles_->pack_weights)(w_, h * columns() + first, count, terms_,
                                                                   panel.data() + h * weights_size);
      float tile[2][kTileRows * kTileRows];
      uint8_t saved[kTileConfig];
      tiles_->begin(saved);
      for (size_t i = 0; i < m; i += kTileRows) {
        const size_t n = std::min(kTileRows, m - i);
        float* to = y + i * columns() + first;
        auto multiply = [&](size_t h, float* product, size_t stride) {
          tiles_->multiply_tile(w_, panel.data() + h * weights_size, rows + i / kHalf * group_size, n, terms_,
                                h * columns() + first, count, product, stride);
        };
        if (halves == 1)
          multiply(0, to, columns());
        else
          for (size_t h = 0; h < 2; h++) multiply(h, tile[h], kTileRows);
        if (halves == 1 && activation_ == Activation::none) continue;
        for (size_t r = 0; r < n; r++, to += columns()) {
          const float* other = halves == 1 ? nullptr : tile[1 - gate_] + r * kTileRows;
          kernels_.activate(activation_, halves == 1 ? to : tile[gate_] + r * kTileRows, other, to, count);
        }
      }
      tiles_->end(saved);
    });
    if (out_of_memory) throw Error{ORT_FAIL, "no memory for intermediate results"};
  }

  const MatMulKernels& kernels_;
  const TileKernels* tiles_;
  Allocator allocator_;
  Multiply* multiply_ = nullptr;
  Weights w_{};
  bool int4_ = false;
  size_t terms_ = 1;
  Activation activation_ = Activation::none;
  int64_t gate_ = -1;
};

class MatMulInt8 {
 public:
  static constexpr const char* kName = "MatMulInt8";
  static constexpr Slot kInputs[] = {required(kFloat), required(kUint8), required(kAnyType), optional(kFloat),
                                     optional(kFloat), optional(kUint8), optional(kAnyType), optional(kFloat)};
  static constexpr Slot kOutputs[] = {required(kFloat)};

  explicit MatMulInt8(const KernelInfo& info) : product_(info, 1) {}

  void compute(const Context& context) const {
    const Tensor x = context.required_input(0, "X");
    const float* data = x.data<float>();
    const size_t m = product_.rows(x);
    product_.run(context, data, m, context.required_output(0, product_.output_shape(x.shape), "Y").data<float>());
  }

 private:
  Product product_;
};

class NormMatMulInt8 {
 public:
  static constexpr const char* kName = "NormMatMulInt8";
  static constexpr Slot kInputs[] = {required(kFloat), optional(kFloat),   required(kFloat), optional(kFloat),
                                     required(kUint8), required(kAnyType), optional(kFloat), optional(kFloat),
                                     optional(kUint8), optional(kAnyType), optional(kFloat)};
  static constexpr Slot kOutputs[] = {required(kFloat), optional(kFloat)};

  explicit NormMatMulInt8(const KernelInfo& info) : product_(info, 4) {
    gamma_ = vector(info.required_constant(2, "gamma"), product_.k());
    beta_ = vector(info.constant(3, "beta"), product_.k());
    const std::string norm = info.attribute("norm", "rms");
    if (norm != "rms" && norm != "layer") refuse("norm is \"%.40s\", expected \"rms\" or \"layer\"", norm.c_str());
    centered_ = norm == "layer";
    epsilon_ = info.attribute("epsilon", 1e-5f);
    if (!(epsilon_ >= 0)) refuse("epsilon is %g, expected a number of at least 0", double(epsilon_));
  }

  void compute(const Context& context) const {
    const Tensor x = context.required_input(0, "X"), skip = context.input(1, "skip");
    const float *from = x.data<float>(), *added = skip.data<float>();
    const size_t m = product_.rows(x), k = product_.k();
    if (skip && skip.shape != x.shape)
      refuse("skip has shape %s and X %s, expected the same", to_string(skip.shape).c_str(),
             to_string(x.shape).c_str());
    float* y = context.required_output(0, product_.output_shape(x.shape), "Y").data<float>();
    float* sum = context.output(1, x.shape, "S").data<float>();
    const Scratch scratch(product_.allocator(), m * k * sizeof(float));
    float* normed = reinterpret_cast<float*>(scratch.get());
    Product::for_rows(context, m, [&](size_t i) {
      const size_t at = i * k;
      product_.kernels().normalize(centered_, from + at, added ? added + at : nullptr, gamma_, beta_, epsilon_, k,
                                   sum ? sum + at : nullptr, normed + at);
    });
    product_.run(context, normed, m, y);
  }

 private:
  Product product_;
  const float* gamma_ = nullptr;
  const float* beta_ = nullptr;
  bool centered_ = false;
  float epsilon_ = 0;
};

}  // namespace

const OrtCustomOp* matmul_int8() { return custom_op<MatMulInt8>(); }
const OrtCustomOp* norm_matmul_int8() { return custom_op<NormMatMulInt8>(); }

}  // namespace pastkey

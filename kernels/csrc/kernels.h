// What the operators call, and each instruction set implements: tables of plain functions. The files of the instruction
// sets are compiled with flags of their own, so they share no inline function, template or container of the standard
// library: the linker would keep one copy of it, with instructions that another processor lacks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pastkey {

constexpr size_t kBlock = 32;     // weights along K with one scale
constexpr size_t kMaxRows = 32;   // rows times terms that a call of multiply takes
constexpr size_t kTileRows = 32;  // rows of X and of W that a call of multiply_tile takes

// W [n, blocks, 32], as com.microsoft.MatMulNBits stores weights: unsigned, at any address. Those of 8 bits have the
// zero point 128. Of 4 bits two are in a byte, the even one low; a block has a zero point of 4 bits, stored as they
// are.
struct Weights {
  const uint8_t* codes;        // [n, blocks, 32], or in 4 bits [n, blocks, 16]
  const uint8_t* scale_codes;  // [n, blocks], a block's scale in units of its row's; or nullptr
  const float* scales;         // [n, blocks], where scale_codes is nullptr
  const float* row_scales;     // [n], or nullptr
  const float* bias;           // [n], or nullptr
  const uint8_t* zeros;        // of 4 bits: [n, (blocks + 1) / 2], or nullptr where they are all 8
  size_t n;
  size_t blocks;  // K / 32
};

// Rows of X rounded to int8, one after the other. With two terms a row is followed by what its rounding left.
struct Rounded {
  int8_t* q;       // [rows * terms, blocks, 32]; for weights of 4 bits, a block's even elements before its odd ones
  int32_t* start;  // [rows * terms, blocks]: -128 * the sum of the block's q, since weights are unsigned
  float* scale;    // [rows * terms, blocks]: NaN where the block has a NaN or an infinity
};

enum class Activation { none, silu, gelu, gelu_tanh };

// The sum over a row's blocks is the same sequence of operations everywhere, so its bits are those of every level and
// number of rows:   d = sum of block b's 32 products, exact;
//                   acc[b % 4] = fma(float(d) * scale of x, scale of w, acc[b % 4]);
//                   sum = (acc[0] + acc[2]) + (acc[1] + acc[3])
// Then, with two terms, the first's sum + the second's; * row scale; + bias.
struct MatMulKernels {
  // x [blocks * 32] -> a row of Rounded, and what rounding left to `rest`, which may be x or nullptr.
  void (*round)(const float* x, size_t blocks, int8_t* q, int32_t* start, float* scale, float* rest);
  // y[i * stride + j] for rows i of X, at most kMaxRows / terms, and `count` rows of W from `first`, of 8 bits.
  void (*multiply)(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t first, size_t count, float* y,
                   size_t stride);
  // y[i] = act(x[i]), times other[i] where that is not nullptr. y may be x.
  void (*activate)(Activation activation, const float* x, const float* other, float* y, size_t n);
  // sum = x + skip (each may be nullptr); y = (sum - mean if centered) / deviation * gamma + beta (may be nullptr).
  // n is a multiple of 32.
  void (*normalize)(bool centered, const float* x, const float* skip, const float* gamma, const float* beta,
                    float epsilon, size_t n, float* sum, float* y);
  // The same as multiply with weights of 4 bits.
  void (*multiply_int4)(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t first, size_t count,
                        float* y, size_t stride);
};

constexpr size_t kTileConfig = 64;  // bytes

// Many rows, in bf16 by tiles of 32 x 32 results.
struct TileKernels {
  // 16 rows of x [rows, blocks * 32] -> `packed` of packed_rows_size(blocks, terms) bytes; rows past `rows` are zero.
  void (*pack_rows)(const float* x, size_t rows, size_t blocks, size_t terms, uint8_t* packed);
  // 32 rows of W from `first`, `count` of them there -> `packed` of packed_weights_size(blocks, terms) bytes.
  void (*pack_weights)(const Weights& w, size_t first, size_t count, size_t terms, uint8_t* packed);
  void (*pack_weights_int4)(const Weights& w, size_t first, size_t count, size_t terms, uint8_t* packed);
  // y[i * stride + j], with row scale and bias, for `rows` (at most 32) packed rows of x and `count` rows of W from
  // `first`. Only between begin and end, on one thread. Packed memory is aligned to 64 bytes.
  void (*multiply_tile)(const Weights& w, const uint8_t* weights, const uint8_t* x, size_t rows, size_t terms,
                        size_t first, size_t count, float* y, size_t stride);
  void (*begin)(uint8_t* saved);  // saved [kTileConfig]: the thread's configuration before, which end restores
  void (*end)(const uint8_t* saved);
};

static constexpr size_t packed_rows_size(size_t blocks, size_t terms) { return 16 * blocks * kBlock * 2 * terms; }
static constexpr size_t packed_weights_size(size_t blocks, size_t terms) {
  return kTileRows * blocks * kBlock * 2 * terms;
}

extern const MatMulKernels portable_matmul, avx2_matmul, avx_vnni_matmul, avx512_matmul;
extern const MatMulKernels neon_matmul, dotprod_matmul, i8mm_matmul;
extern const TileKernels amx_tiles;

}  // namespace pastkey

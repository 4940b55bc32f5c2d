// What the operators call, and each instruction set implements: tables of plain functions. The files of the instruction
// sets are compiled with flags of their own, so they share no inline function, template or container of the standard
// library: the linker would keep one copy of it, with instructions that another processor lacks.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_MSC_VER)
#define PASTKEY_APART __declspec(noinline)
#else
#define PASTKEY_APART __attribute__((noinline))  // within a loop, a function would take the loop's registers
#endif

namespace pastkey {

constexpr size_t kBlock = 32;      // weights along K with one scale
constexpr size_t kMaxRows = 32;    // rows times terms that a call of multiply takes
constexpr size_t kDecodeRows = 8;  // up to so many rows, or tokens, give the same bits as one, whatever the level
constexpr size_t kTileRows = 32;   // rows of X and of W that a call of multiply_tile takes

// What the weights of a block are:
//   plain    (code - zero point) * scale
//   halves   the same, with a scale for each 16 weights; of 8 bits only
//   offsets  code * scale - offset
enum class Form { plain, halves, offsets };
constexpr size_t kForms = 3;

// Scales or offsets of W [n, count]: floats, float16, or codes; the other two are nullptr.
struct Numbers {
  const uint8_t* codes;
  const float* groups;  // [n, count >> group_shift]: what codes are multiplied by; nullptr: nothing
  const float* floats;
  const uint16_t* float16;
  size_t count;          // blocks, or of halves 2 * blocks
  unsigned group_shift;  // log2 of the numbers of a group: 3, or of halves 4
};

// W [n, blocks, 32], as com.microsoft.MatMulNBits stores weights: unsigned, at any address. Of 4 bits two are in a
// byte, the even one low. Without offsets those of 8 bits have the zero point 128; of 4 bits a block has one of 4 bits,
// stored as they are.
struct Weights {
  const uint8_t* codes;  // [n, blocks, 32], or in 4 bits [n, blocks, 16]
  Form form;
  Numbers scales, offsets;
  const float* row_scales;  // [n], or nullptr
  const float* bias;        // [n], or nullptr
  const uint8_t* zeros;     // of 4 bits: [n, (blocks + 1) / 2], or nullptr where they are all 8
  size_t n;
  size_t blocks;  // K / 32
};

// Rows of X rounded to int8, one after the other. With two terms a row is followed by what its rounding left.
struct Rounded {
  int8_t* q;       // [rows * terms, blocks, 32]; for weights of 4 bits, a block's even elements before its odd ones
  int32_t* start;  // [rows * terms, blocks]: -128 * the sum of the block's q, since weights are unsigned; for halves
                   // [rows * terms, blocks, 2], of 16 each
  float* scale;    // [rows * terms, blocks]: NaN where the block has a NaN or an infinity
  float* sums;     // for offsets: [rows * terms, blocks]: the sum of the block's q times its scale
};

enum class Activation { none, silu, gelu, gelu_tanh };

// y[i * stride + j] for rows i of X, at most kMaxRows / terms, and `count` rows of W from `first`.
using Multiply = void(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t first, size_t count,
                      float* y, size_t stride);

// The sum over a row's blocks is the same sequence of operations everywhere, so its bits are those of every level and
// number of rows:   d = sum of block b's 32 products, exact; of halves, of 16, and then of the other 16;
//                   acc[b % 4] = fma(float(d) * scale of x, scale of w, acc[b % 4]);
//                   with offsets, acc[b % 4] = fma(float(sum of q) * scale of x, -offset, acc[b % 4]);
//                   sum = (acc[0] + acc[2]) + (acc[1] + acc[3])
// A scale or an offset is float(code) * group where there are groups.
// Then, with two terms, the first's sum + the second's; * row scale; + bias.
struct MatMulKernels {
  // x [blocks * 32] -> a row of Rounded, and what rounding left to `rest`, which may be x or nullptr.
  void (*round)(const float* x, size_t blocks, int8_t* q, int32_t* start, float* scale, float* rest);
  // y[i] = act(x[i]), times other[i] where that is not nullptr. y may be x.
  void (*activate)(Activation activation, const float* x, const float* other, float* y, size_t n);
  // sum = x + skip (each may be nullptr); y = (sum - mean if centered) / deviation * gamma + beta (may be nullptr).
  // n is a multiple of 32.
  void (*normalize)(bool centered, const float* x, const float* skip, const float* gamma, const float* beta,
                    float epsilon, size_t n, float* sum, float* y);
  // By Form. Of 4 bits there are no halves.
  Multiply* multiply[kForms];
  Multiply* multiply_int4[kForms];
};

constexpr size_t kTileConfig = 64;  // bytes

// Many rows, by tiles of 32 x 32 results. AMX computes them in bf16; AVX512 has the sums of MatMulKernels.
struct TileKernels {
  size_t few_rows;  // of X, which are faster without tiles; at least kDecodeRows
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
extern const TileKernels avx512_tiles, amx_tiles;

}  // namespace pastkey

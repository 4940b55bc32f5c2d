// Attention of many rows over an int8 cache by AMX-BF16. Codes are exact in bf16. The query and the weights of the
// values are sums of two bf16 numbers each, which leaves 2^-17 of them.
#include <immintrin.h>

#include <cstring>

#include "attention.h"

namespace pastkey {
namespace {

#include "tiles.inl"

constexpr size_t kTerms = 2;
constexpr size_t kKeys = 32;  // that two tiles of columns take
constexpr size_t kPartBlocks = kAttentionPart / 32;

size_t blocks_of(size_t head_size) { return (head_size + 31) / 32; }
size_t row_bytes(size_t head_size) { return head_size + sizeof(float); }

// packed: the query, then two tiles of columns for each block, then weights
size_t query_size(size_t head_size) { return kTerms * blocks_of(head_size) * 2048; }
size_t columns_size(size_t head_size) {
  const size_t blocks = blocks_of(head_size);
  return 2048 * (blocks > kPartBlocks ? blocks : kPartBlocks);
}
size_t size(size_t head_size) { return query_size(head_size) + columns_size(head_size) + kTerms * kPartBlocks * 2048; }

// x [count, width] at a distance of `stride` -> packed [terms][blocks][32 rows][32]. What stands in missing rows means
// nothing, since nobody reads their sums; columns from `width` on are zero.
void pack(const float* x, size_t stride, size_t count, size_t width, uint8_t* packed) {
  const size_t blocks = (width + 31) / 32;
  for (size_t r = 0; r < count; r++)
    for (size_t b = 0; b < blocks; b++) {
      const float* from = x + r * stride + b * 32;
      __m512 low = _mm512_loadu_ps(from);
      __m512 high = b * 32 + 16 < width ? _mm512_loadu_ps(from + 16) : _mm512_setzero_ps();
      for (size_t t = 0; t < kTerms; t++) {
        const __m512i bits = to_bf16(low, high);
        _mm512_store_si512(packed + (t * blocks + b) * 2048 + r * 64, bits);
        subtract_bf16(low, high, bits);
      }
    }
}

// 32 codes as bf16
__m512i from_codes(__m128i low, __m128i high) {
  return to_bf16(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high)));
}

__m128i codes_at(const char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// tiles = a [terms][blocks][32][32] * columns [2][blocks], written to y [32, 32] at a distance of `stride`; `both`: or
// the first 16 columns alone.
void multiply(const uint8_t* a, const uint8_t* columns, size_t blocks, bool both, float* y, size_t stride) {
  zero_tiles();
  for (size_t t = 0; t < kTerms; t++)
    multiply_blocks(a + t * blocks * 2048, columns, columns + blocks * 1024, blocks);
  const size_t bytes = stride * sizeof(float);
  _tile_stored(0, y, bytes);
  _tile_stored(2, y + 16 * stride, bytes);
  if (!both) return;
  _tile_stored(1, y + 16, bytes);
  _tile_stored(3, y + 16 * stride + 16, bytes);
}

void pack_query(const float* query, size_t count, size_t head_size, uint8_t* packed) {
  pack(query, head_size, count, head_size, packed);
}

void score(size_t head_size, const char* keys, size_t begin, size_t end, uint8_t* packed, float* scores) {
  const size_t blocks = blocks_of(head_size), stride = row_bytes(head_size);
  uint8_t* columns = packed + query_size(head_size);
  for (size_t first = begin / kKeys * kKeys; first < end; first += kKeys) {
    for (size_t half = 0; half < 2; half++)
      for (size_t b = 0; b < blocks; b++) {
        __m512i pairs[16];
        for (size_t j = 0; j < 16; j++) {
          const size_t key = first + half * 16 + j;
          const char* row = keys + (key < end ? key : end - 1) * stride + b * 32;
          pairs[j] = from_codes(codes_at(row), b * 32 + 16 < head_size ? codes_at(row + 16) : _mm_setzero_si128());
        }
        transpose(pairs);
        for (size_t i = 0; i < 16; i++) _mm512_store_si512(columns + (half * blocks + b) * 1024 + i * 64, pairs[i]);
      }
    multiply(packed, columns, blocks, true, scores + first, kAttentionPart);
  }
}

void add(size_t count, size_t head_size, const char* values, size_t begin, size_t end, const float* weights,
         uint8_t* packed, float* out) {
  const size_t first = begin / 32 * 32, blocks = (end - first + 31) / 32, stride = row_bytes(head_size);
  uint8_t* columns = packed + query_size(head_size);
  uint8_t* rows = columns + columns_size(head_size);
  pack(weights + first, kAttentionPart, count, blocks * 32, rows);
  for (size_t i = 0; i < head_size; i += 32) {
    const bool both = i + 16 < head_size;
    for (size_t half = 0; half < (both ? 2 : 1); half++)
      for (size_t b = 0; b < blocks; b++)
        for (size_t j = 0; j < 16; j++) {
          // values past the end have the weight 0: the last one stands for them
          const size_t key = first + b * 32 + 2 * j, last = end - 1;
          const char* at = values + i + half * 16;
          const __m128i one = codes_at(at + (key < last ? key : last) * stride);
          const __m128i next = codes_at(at + (key + 1 < last ? key + 1 : last) * stride);
          _mm512_store_si512(columns + (half * blocks + b) * 1024 + j * 64,
                             from_codes(_mm_unpacklo_epi8(one, next), _mm_unpackhi_epi8(one, next)));
        }
    multiply(rows, columns, blocks, both, out + i, head_size);
  }
}

}  // namespace

const AttentionTiles amx_attention_tiles = {size, pack_query, score, add, begin, end};

}  // namespace pastkey

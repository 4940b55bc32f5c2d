// Attention of many rows over a float16 cache by AMX-BF16. All numbers are sums of two bf16 numbers: float16 exactly,
// the query and the weights of the values to 2^-17. The product of the two lesser ones is left out, 2^-18.
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
size_t row_bytes(size_t head_size) { return head_size * sizeof(uint16_t); }

// packed: the query, then two tiles of columns for each term and block, then weights
size_t query_size(size_t head_size) { return kTerms * blocks_of(head_size) * 2048; }
size_t columns_size(size_t head_size) {
  const size_t blocks = blocks_of(head_size);
  return kTerms * 2048 * (blocks > kPartBlocks ? blocks : kPartBlocks);
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

// 32 float16 numbers as two terms
void from_float16(__m256i low, __m256i high, __m512i* first, __m512i* second) {
  __m512 a = _mm512_cvtph_ps(low), b = _mm512_cvtph_ps(high);
  *first = to_bf16(a, b);
  subtract_bf16(a, b, *first);
  *second = to_bf16(a, b);
}

// 16 of them
__m256i numbers_at(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// tiles = a [terms][blocks][32][32] * columns [terms][2][blocks], written to y [32, 32] at a distance of `stride`;
// `both`: or the first 16 columns alone.
void multiply(const uint8_t* a, const uint8_t* columns, size_t blocks, bool both, float* y, size_t stride) {
  zero_tiles();
  for (size_t t = 0; t < kTerms; t++)
    for (size_t u = 0; t + u < kTerms; u++) {
      const uint8_t* b = columns + u * blocks * 2048;
      multiply_blocks(a + t * blocks * 2048, b, b + blocks * 1024, blocks);
    }
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

size_t within(size_t i, size_t begin, size_t end) { return i < begin ? begin : i < end ? i : end - 1; }

void score(size_t head_size, const char* keys, size_t begin, size_t end, uint8_t* packed, float* scores) {
  const size_t blocks = blocks_of(head_size), stride = row_bytes(head_size);
  uint8_t* columns = packed + query_size(head_size);
  for (size_t first = begin / kKeys * kKeys; first < end; first += kKeys) {
    for (size_t half = 0; half < 2; half++)
      for (size_t b = 0; b < blocks; b++) {
        __m512i pairs[kTerms][16];
        for (size_t j = 0; j < 16; j++) {
          const size_t key = first + half * 16 + j;
          const char* row = keys + within(key, begin, end) * stride + b * 64;
          from_float16(numbers_at(row), b * 32 + 16 < head_size ? numbers_at(row + 32) : _mm256_setzero_si256(),
                       pairs[0] + j, pairs[1] + j);
        }
        for (size_t t = 0; t < kTerms; t++) {
          transpose(pairs[t]);
          uint8_t* to = columns + ((t * 2 + half) * blocks + b) * 1024;
          for (size_t i = 0; i < 16; i++) _mm512_store_si512(to + i * 64, pairs[t][i]);
        }
      }
    multiply(packed, columns, blocks, true, scores + first, kAttentionPart);
  }
}

bool all_finite(const char* values, size_t count) {
  const __m256i exponent = _mm256_set1_epi16(0x7c00);
  __m256i found = _mm256_setzero_si256();
  for (size_t i = 0; i < count; i += 16) {
    const __m256i bits = _mm256_and_si256(numbers_at(values + i * sizeof(uint16_t)), exponent);
    found = _mm256_or_si256(found, _mm256_cmpeq_epi16(bits, exponent));
  }
  return _mm256_testz_si256(found, found);
}

bool add(size_t count, size_t head_size, const char* values, size_t begin, size_t end, const float* weights,
         uint8_t* packed, float* out) {
  const size_t first = begin / 32 * 32, blocks = (end - first + 31) / 32, stride = row_bytes(head_size);
  if (!all_finite(values + begin * stride, (end - begin) * head_size)) return false;
  uint8_t* columns = packed + query_size(head_size);
  uint8_t* rows = columns + columns_size(head_size);
  pack(weights + first, kAttentionPart, count, blocks * 32, rows);
  for (size_t i = 0; i < head_size; i += 32) {
    const bool both = i + 16 < head_size;
    for (size_t half = 0; half < (both ? 2 : 1); half++)
      for (size_t b = 0; b < blocks; b++)
        for (size_t j = 0; j < 16; j++) {
          // values outside have the weight 0: the first or last one stands for them
          const size_t key = first + b * 32 + 2 * j;
          const char* at = values + (i + half * 16) * sizeof(uint16_t);
          const __m256i one = numbers_at(at + within(key, begin, end) * stride);
          const __m256i next = numbers_at(at + within(key + 1, begin, end) * stride);
          const __m256i low = _mm256_unpacklo_epi16(one, next), high = _mm256_unpackhi_epi16(one, next);
          __m512i terms[kTerms];
          from_float16(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31), terms,
                       terms + 1);
          for (size_t t = 0; t < kTerms; t++)
            _mm512_store_si512(columns + ((t * 2 + half) * blocks + b) * 1024 + j * 64, terms[t]);
        }
    multiply(rows, columns, blocks, both, out + i, head_size);
  }
  return true;
}

}  // namespace

const AttentionTiles amx_attention_tiles = {size, pack_query, score, add, begin, end};

}  // namespace pastkey

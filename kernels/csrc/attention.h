// What DecoderAttention's operator (attention.cc) and its functions for each instruction set share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "recurrence.h"

namespace pastkey {

// A row's keys are summed in parts that start at multiples of kAttentionPart and are merged in order. What a part holds
// depends on positions only, so a row has the same bits in any step, in any batch and on any number of threads.
constexpr size_t kAttentionPart = 128;
constexpr size_t kAttentionRows = 32;          // the most rows of one call
constexpr size_t kAttentionMaxHeadSize = 256;  // a head size is a multiple of 16

enum class CacheType { float32, float16 };

// Products of many rows with float16 keys and values by tiles; they are nullptr where there are none. Memory for them
// is aligned to 64 bytes.
struct AttentionTiles {
  size_t (*size)(size_t head_size);  // bytes of `packed`
  // query [count, D]; only between begin and end, on one thread, as score and add
  void (*pack_query)(const float* query, size_t count, size_t head_size, uint8_t* packed);
  // scores [kAttentionRows, kAttentionPart] = query * the keys [begin, end), and no others are read. Of the blocks of
  // 16 that hold these keys; what stands beside them means nothing.
  void (*score)(size_t head_size, const char* keys, size_t begin, size_t end, uint8_t* packed, float* scores);
  // out [kAttentionRows, D] = weights [count, kAttentionPart] * the values [begin, end), in blocks of 32. False where
  // one of these values is not finite: it would reach the rows that do not see it, whose weight is 0.
  bool (*add)(size_t count, size_t head_size, const char* values, size_t begin, size_t end, const float* weights,
              uint8_t* packed, float* out);
  void (*begin)(uint8_t* saved);  // as TileKernels
  void (*end)(const uint8_t* saved);
};

// Query rows that share one key head.
struct AttentionRows {
  size_t count;        // at most kAttentionRows
  size_t head_size;    // D
  const float* query;  // [count, D], rotated and scaled
  const size_t* from;  // [count]: a row sees the keys [from, to)
  const size_t* to;
  const char* keys;  // the first token's; only those that a row sees are there
  const char* values;
  CacheType cache;
  float softcap;  // 0: none
  float* copy;    // [kAttentionPart, D], or with tiles [kAttentionRows, D]; aligned to 64 bytes, or null: row by row
  const AttentionTiles* tiles;  // or null
  uint8_t* packed;              // of the tiles, with the query
};

// Softmax's state of rows: the largest score, the sum of exp(score - largest) and the values weighted by them.
struct AttentionSums {
  float* top;     // [kAttentionRows], at first -infinity
  float* sum;     // [kAttentionRows], at first 0
  float* values;  // [count, D], at first 0
};

struct AttentionKernels {
  // Adds the keys of one part.
  void (*attend)(const AttentionRows& rows, size_t part, const AttentionSums& sums);
  // Adds the sums of a later part, computed by themselves, to those of one row: the same bits as attend.
  void (*merge)(size_t head_size, const AttentionSums& part, const AttentionSums& sums);
  // Writes one row of the output. sink: a score that takes part in softmax's sum only, or null.
  void (*finish)(size_t head_size, const AttentionSums& sums, const float* sink, float* y);
  // What stands in attention's place in other layers, by the same lanes (recurrence.h).
  void (*recur)(const Recurrence& recurrence);
  void (*convolve)(const Convolution& convolution);
};

extern const AttentionTiles amx_attention_tiles;
extern const AttentionKernels portable_attention, avx2_attention, avx512_attention, neon_attention;

}  // namespace pastkey

// Included by AMX's files in an unnamed namespace: bf16 numbers, and tiles of 16 x 16 sums.

#include "transpose16.inl"

inline __m512i to_bf16(__m512 low, __m512 high) {
  const __m512bh pair = _mm512_cvtne2ps_pbh(high, low);
  __m512i bits;
  std::memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// What is left of 32 floats after `bits`, their bf16.
inline void subtract_bf16(__m512& low, __m512& high, __m512i bits) {
  const __m512i first = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16);
  const __m512i second = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16);
  low = _mm512_sub_ps(low, _mm512_castsi512_ps(first));
  high = _mm512_sub_ps(high, _mm512_castsi512_ps(second));
}

inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// tiles 0 to 3 += 32 rows a [blocks][32][32] times 32 columns b, 16 each in b0 and b1 [blocks][16 pairs][16][2]
inline void multiply_blocks(const uint8_t* a, const uint8_t* b0, const uint8_t* b1, size_t blocks) {
  for (size_t i = 0; i < blocks; i++) {
    _tile_loadd(4, a + i * 2048, 64);
    _tile_loadd(5, a + i * 2048 + 1024, 64);
    _tile_loadd(6, b0 + i * 1024, 64);
    _tile_loadd(7, b1 + i * 1024, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// The thread's tiles may be another library's, which does not configure them again: llama.cpp's.
void begin(uint8_t* saved) {
  _tile_storeconfig(saved);
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } configuration;
  for (int i = 0; i < 8; i++) configuration.row_bytes[i] = 64, configuration.rows[i] = 16;
  _tile_loadconfig(&configuration);
}

void end(const uint8_t* saved) {
  if (saved[0])
    _tile_loadconfig(saved);  // its palette
  else
    _tile_release();
}

// Included by the files of AVX2, AVX512 and NEON in an unnamed namespace.

// kAhead: bytes between the rows that are read and the weights that are fetched. On x86 a short way and into the L1
// cache reads up to 1.6 times as fast as far and into the L2, which ARM has, where nothing was timed. Few rows of X
// need both, and are 1.3 times as fast then; more rows wait for products, and the instructions cost them 3 %.
#if defined(__x86_64__) || defined(_M_X64)
constexpr size_t kAhead = 2048;
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p + 3072), _MM_HINT_T1); }
#elif defined(_MSC_VER) && !defined(__clang__)
constexpr size_t kAhead = 8192;
inline void prefetch(const uint8_t* p) { __prefetch(p); }
inline void prefetch_far(const uint8_t*) {}
#else
constexpr size_t kAhead = 8192;
inline void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_far(const uint8_t*) {}
#endif

// Fetches what comes after `rows` rows of W from `row`, as far as `n` of their blocks from `b` are read now: a block
// has `bytes`. In the order of addresses, since a processor's own prefetcher follows those. `few`: rows of X.
inline void fetch_ahead(const Weights& w, size_t row, size_t rows, size_t b, size_t n, size_t bytes, bool few = false) {
  const uint8_t* p = w.codes + ((row + rows) * w.blocks + rows * b) * bytes + kAhead;
  for (size_t i = 0; i < rows * n * bytes; i += 64) {
    prefetch(p + i);
    if (few) prefetch_far(p + i);
  }
}

// Fetches the scales or offsets of four rows of W that come a little after `row`: a processor's own prefetcher has lost
// their sequence by then.
inline void fetch_numbers(const Numbers& of, size_t row) {
  constexpr size_t kRowsAhead = 24;
  const auto fetch = [&](const void* numbers, size_t bytes) {  // of a row
    const uint8_t* p = static_cast<const uint8_t*>(numbers) + (row + kRowsAhead) * bytes;
    for (size_t i = 0; i < 4 * bytes; i += 64) prefetch(p + i);
  };
  if (of.codes) fetch(of.codes, of.count);
  if (of.groups) fetch(of.groups, (of.count >> of.group_shift) * sizeof(float));
  if (of.float16) fetch(of.float16, of.count * sizeof(uint16_t));
  if (of.floats) fetch(of.floats, of.count * sizeof(float));
}

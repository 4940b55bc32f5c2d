// Included by the files of AVX2, AVX512 and NEON in an unnamed namespace, after prefetch.

constexpr size_t kAhead = 8192;  // bytes between the rows that are read and the weights that are fetched

// Fetches what comes after `rows` rows of W from `row`, as far as `n` of their blocks from `b` are read now: a block has
// `bytes`. In the order of addresses, since a processor's own prefetcher follows those. An EPYC reads twice as fast so
// as in the order in which rows side by side are read.
inline void fetch_ahead(const Weights& w, size_t row, size_t rows, size_t b, size_t n, size_t bytes) {
  const uint8_t* p = w.codes + ((row + rows) * w.blocks + rows * b) * bytes + kAhead;
  for (size_t i = 0; i < rows * n * bytes; i += 64) prefetch(p + i);
}

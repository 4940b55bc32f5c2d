// Attention in terms of 16 float lanes. each instruction set's file defines the lanes in an unnamed namespace and includes
// this file there, so each has its own copy and all do the same operations in the same order: they give the same bits.
//
// Needed: Vec (16 floats) with zero, set1, load (of float, uint16_t as float16, int8_t), store, add, sub, mul, div, max, fma,
// exp2_bits, zero_below, reduce_max, reduce_add; Lanes fold(Vec); Quad fold4(Lanes[4]); Vec fold16(Quad[4]); prefetch;
// constexpr keys_at_once(R), columns_at_once(R): how many sums the registers hold.
// A sum of lanes adds those 8 apart first, then 4, 2 and 1.

constexpr size_t kPart = kAttentionPart;
constexpr size_t kPrefetchBytes = 4096;  // hardware stops at pages
constexpr float kInfinity = HUGE_VALF;

// Not std::min and std::max: the linker could keep this instruction set's copy of those for the whole library.
size_t least_of(size_t a, size_t b) { return a < b ? a : b; }
size_t most_of(size_t a, size_t b) { return a > b ? a : b; }

// exp(x) for x <= 0 or NaN, to 1e-7; 0 below -87, where floats become subnormal.
Vec exp16(Vec x) {
  // x + 1.5 * 2^23 rounds x to an integer, which then stands in the low bits
  const Vec shift = set1(12582912.f);
  Vec shifted = fma(x, set1(1.44269504f), shift);
  Vec n = sub(shifted, shift);
  Vec r = fma(n, set1(-0.693145752f), x);  // ln 2 in two parts, the first of 16 bits
  r = fma(n, set1(-1.42860677e-6f), r);
  Vec p = fma(set1(0.0013814539f), r, set1(0.008368745f));
  p = fma(p, r, set1(0.04166839f));
  p = fma(p, r, set1(0.16666521f));
  p = fma(p, r, set1(0.49999994f));
  p = fma(p, r, set1(1.f));
  p = fma(p, r, set1(1.f));
  return zero_below(x, -87.f, mul(p, exp2_bits(shifted)));
}

// cap * tanh(x / cap)
Vec soft_cap(Vec x, float cap) {
  Vec t = mul(x, set1(1 / cap));
  Vec negative = sub(zero(), t);
  Vec e = exp16(mul(set1(-2.f), max(negative, t)));  // NaN is carried: max returns its second argument then
  Vec size = mul(set1(cap), div(sub(set1(1.f), e), add(set1(1.f), e)));
  return mul(size, sign(t));
}

// The value that scores are taken relative to. With no finite score all weights are 0, not NaN.
float shift_of(float top) { return top == -kInfinity ? 0.f : top; }

template <class T>
constexpr size_t extra_bytes() { return sizeof(T) == 1 ? sizeof(float) : 0; }

float row_scale(const char* row, size_t head_size) {
  float scale;
  memcpy(&scale, row + head_size, sizeof scale);
  return scale;
}

// Scores of R rows for the keys [from, to) of a part, in blocks of 16 that start at multiples of 16. Keys beside them are
// not read; what stands in their places means nothing.
template <class T, size_t R>
void score_keys(const AttentionRows& a, const float* query, const char* keys, size_t from, size_t to, float* scores) {
  const size_t d = a.head_size, stride = d * sizeof(T) + extra_bytes<T>();
  constexpr size_t K = keys_at_once(R);
  for (size_t block = from / 16 * 16; block < to; block += 16) {
    const char* rows[16];
    for (size_t j = 0; j < 16; j++) rows[j] = keys + least_of(most_of(block + j, from), to - 1) * stride;
    Quad quads[R][4];
    for (size_t g = 0; g < 4; g++) {
      Lanes lanes[R][4];
      for (size_t j = 0; j < 4; j += K) {
        Vec sums[R][K];
        for (size_t k = 0; k < K; k++) {
          const char* row = rows[4 * g + j + k];
          for (size_t b = 0; b < stride; b += 64) prefetch(row + kPrefetchBytes + b);
          Vec key = load(reinterpret_cast<const T*>(row));
          for (size_t r = 0; r < R; r++) sums[r][k] = mul(load(query + r * d), key);
        }
        for (size_t i = 16; i < d; i += 16) {
          Vec key[K];
          for (size_t k = 0; k < K; k++) key[k] = load(reinterpret_cast<const T*>(rows[4 * g + j + k]) + i);
          for (size_t r = 0; r < R; r++) {
            Vec q = load(query + r * d + i);
            for (size_t k = 0; k < K; k++) sums[r][k] = fma(q, key[k], sums[r][k]);
          }
        }
        for (size_t r = 0; r < R; r++)
          for (size_t k = 0; k < K; k++) lanes[r][j + k] = fold(sums[r][k]);
      }
      for (size_t r = 0; r < R; r++) quads[r][g] = fold4(lanes[r]);
    }
    float scales[16];
    if (extra_bytes<T>())
      for (size_t j = 0; j < 16; j++) scales[j] = row_scale(rows[j], d);
    for (size_t r = 0; r < R; r++) {
      Vec s = fold16(quads[r]);
      if (extra_bytes<T>()) s = mul(s, load(scales));
      if (a.softcap > 0) s = soft_cap(s, a.softcap);
      store(scores + r * kPart + block, s);
    }
  }
}

// Scores [from, to) become exp(score - top); their sum. With scales, each is then multiplied by its value's.
float softmax_weights(float* scores, size_t from, size_t to, const float* scales, float* top) {
  const size_t begin = from / 16 * 16, end = (to + 15) / 16 * 16;
  for (size_t j = begin; j < from; j++) scores[j] = -kInfinity;
  for (size_t j = to; j < end; j++) scores[j] = -kInfinity;
  Vec most = load(scores + begin);
  for (size_t j = begin + 16; j < end; j += 16) most = max(most, load(scores + j));
  *top = reduce_max(most);
  const Vec shift = set1(shift_of(*top));
  Vec sum = zero();
  for (size_t j = begin; j < end; j += 16) {
    Vec e = exp16(sub(load(scores + j), shift));
    sum = add(sum, e);
    store(scores + j, scales ? mul(e, load(scales + j)) : e);
  }
  return reduce_add(sum);
}

// out [R, ld] += the values [from, to) of a part times their weights, C * 16 columns.
template <class T, size_t R, size_t C>
void add_columns(const float* weights, const char* values, size_t stride, size_t from, size_t to, float* out, size_t ld) {
  Vec sums[R][C];
  for (size_t r = 0; r < R; r++)
    for (size_t c = 0; c < C; c++) sums[r][c] = load(out + r * ld + c * 16);
  for (size_t j = from; j < to; j++) {
    const char* row = values + j * stride;
    for (size_t b = 0; b < C * 16 * sizeof(T); b += 64) prefetch(row + kPrefetchBytes + b);
    Vec value[C];
    for (size_t c = 0; c < C; c++) value[c] = load(reinterpret_cast<const T*>(row) + c * 16);
    for (size_t r = 0; r < R; r++) {
      Vec w = set1(weights[r * kPart + j]);
      for (size_t c = 0; c < C; c++) sums[r][c] = fma(w, value[c], sums[r][c]);
    }
  }
  for (size_t r = 0; r < R; r++)
    for (size_t c = 0; c < C; c++) store(out + r * ld + c * 16, sums[r][c]);
}

template <class T, size_t R>
void add_values(size_t d, const float* weights, const char* values, size_t from, size_t to, float* out) {
  if (from >= to) return;
  const size_t stride = d * sizeof(T) + extra_bytes<T>();
  constexpr size_t C = columns_at_once(R);
  size_t i = 0;
  for (; i + C * 16 <= d; i += C * 16)
    add_columns<T, R, C>(weights, values + i * sizeof(T), stride, from, to, out + i, d);
  for (; i < d; i += 16) add_columns<T, R, 1>(weights, values + i * sizeof(T), stride, from, to, out + i, d);
}

// Row r of `sums` and the sums of a later part.
void merge_row(size_t d, float top, float sum, const float* values, const AttentionSums& sums, size_t r) {
  const float most = sums.top[r] > top ? sums.top[r] : top, shift = shift_of(most);
  float factors[16] = {sums.top[r] - shift, top - shift};
  store(factors, exp16(load(factors)));
  sums.top[r] = most;
  sums.sum[r] = fmaf(sum, factors[1], sums.sum[r] * factors[0]);
  float* out = sums.values + r * d;
  const Vec before = set1(factors[0]), now = set1(factors[1]);
  for (size_t i = 0; i < d; i += 16) store(out + i, fma(load(values + i), now, mul(load(out + i), before)));
}

// Rows [first, first + R) and the part's keys [from[r], to[r]).
template <class T, size_t R>
void attend_rows(const AttentionRows& a, size_t first, const size_t* from, const size_t* to, const char* keys,
                const char* values, const float* value_scales, const AttentionSums& sums) {
  const size_t d = a.head_size;
  alignas(64) float weights[R * kPart];
  alignas(64) float out[R * kAttentionMaxHeadSize];
  size_t least = kPart, most = 0, begin = 0, end = kPart;  // keys that some row sees, and those that all do
  for (size_t r = 0; r < R; r++) {
    begin = most_of(begin, from[r]), end = least_of(end, to[r]);
    if (from[r] < to[r]) least = least_of(least, from[r]), most = most_of(most, to[r]);
  }
  if (least >= most) return;
  score_keys<T, R>(a, a.query + first * d, keys, least, most, weights);
  float top[R] = {}, sum[R] = {};
  for (size_t r = 0; r < R; r++)
    if (from[r] < to[r]) sum[r] = softmax_weights(weights + r * kPart, from[r], to[r], value_scales, top + r);
  for (size_t i = 0; i < R * d; i += 16) store(out + i, zero());
  if (begin >= end) begin = end = kPart;  // each row alone
  for (size_t r = 0; r < R; r++)
    add_values<T, 1>(d, weights + r * kPart, values, from[r], least_of(begin, to[r]), out + r * d);
  add_values<T, R>(d, weights, values, begin, end, out);
  for (size_t r = 0; r < R; r++) add_values<T, 1>(d, weights + r * kPart, values, end, to[r], out + r * d);
  for (size_t r = 0; r < R; r++)
    if (from[r] < to[r]) merge_row(d, top[r], sum[r], out + r * d, sums, first + r);
}

template <class T>
void attend_part(const AttentionRows& a, size_t part, const AttentionSums& sums) {
  const size_t start = part * kPart, stride = a.head_size * sizeof(T) + extra_bytes<T>();
  const char* keys = a.keys + start * stride;
  const char* values = a.values + start * stride;
  size_t from[kAttentionRows], to[kAttentionRows], least = kPart, most = 0;
  for (size_t r = 0; r < a.count; r++) {
    from[r] = most_of(a.from[r], start) - start;
    to[r] = least_of(most_of(a.to[r], start) - start, kPart);
    if (from[r] < to[r]) least = least_of(least, from[r]), most = most_of(most, to[r]);
  }
  alignas(64) float scales[kPart] = {};
  if (extra_bytes<T>())
    for (size_t j = least; j < most; j++) scales[j] = row_scale(values + j * stride, a.head_size);
  const float* used = extra_bytes<T>() ? scales : nullptr;
  size_t r = 0;
  for (; r + 4 <= a.count; r += 4) attend_rows<T, 4>(a, r, from + r, to + r, keys, values, used, sums);
  const size_t left = a.count - r;
  if (left == 3) attend_rows<T, 3>(a, r, from + r, to + r, keys, values, used, sums);
  if (left == 2) attend_rows<T, 2>(a, r, from + r, to + r, keys, values, used, sums);
  if (left == 1) attend_rows<T, 1>(a, r, from + r, to + r, keys, values, used, sums);
}

void attend(const AttentionRows& a, size_t part, const AttentionSums& sums) {
  switch (a.cache) {
    case CacheType::float32: return attend_part<float>(a, part, sums);
    case CacheType::float16: return attend_part<uint16_t>(a, part, sums);
    case CacheType::int8: return attend_part<int8_t>(a, part, sums);
  }
}

void merge(size_t head_size, const AttentionSums& part, const AttentionSums& sums) {
  merge_row(head_size, *part.top, *part.sum, part.values, sums, 0);
}

void finish(size_t head_size, const AttentionSums& sums, const float* sink, float* y) {
  float sum = *sums.sum, factor = 1;
  if (sink) {
    const float most = *sums.top > *sink ? *sums.top : *sink, shift = shift_of(most);
    float factors[16] = {*sums.top - shift, *sink - shift};
    store(factors, exp16(load(factors)));
    factor = factors[0];
    sum = fmaf(sum, factor, factors[1]);
  }
  for (size_t i = 0; i < head_size; i += 16)
    store(y + i, div(mul(load(sums.values + i), set1(factor)), set1(sum)));
}

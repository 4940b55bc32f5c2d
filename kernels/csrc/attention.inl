// Attention in terms of 16 float lanes. Each instruction set's file defines the lanes in an unnamed namespace and
// includes this file there, so each has a copy of its own. All do the same operations in the same order: the same bits.
//
// Vec is 16 floats. It has zero, set1, load (of float, and of uint16_t as float16), store, add, sub, mul, div,
// max (the second where one is NaN), fma, sign (1 or -1), exp2_bits, zero_below, reduce_max and reduce_add. A sum of
// lanes adds those 8 apart first, then 4, 2 and 1. Three steps do so for several vectors at once: fold (Vec -> Lanes),
// fold4 (4 Lanes -> Quad) and fold16 (4 Quads -> a Vec of 16 sums). keys_at_once(R) and columns_at_once(R) say how many
// sums the registers hold beside R rows.

constexpr size_t kPart = kAttentionPart;
constexpr size_t kPrefetchBytes = 4096;  // hardware stops at pages
constexpr float kInfinity = HUGE_VALF;

// Not std::min and std::max: the linker could keep this instruction set's copy of those for the whole library.
size_t least_of(size_t a, size_t b) { return a < b ? a : b; }
size_t most_of(size_t a, size_t b) { return a > b ? a : b; }

template <size_t N>
struct Count {
  static constexpr size_t value = N;
};

// e^x = p 2^n for x <= 0, to 1e-7: n is the low bits of `shifted`, and p = 1 + r q.
struct Exponential {
  Vec shifted, r, q;
};

Exponential parts_of_exp(Vec x) {
  // x + 1.5 * 2^23 rounds x to an integer, which then stands in the low bits
  const Vec shift = set1(12582912.f);
  Vec shifted = fma(x, set1(1.44269504f), shift);
  Vec n = sub(shifted, shift);
  Vec r = fma(n, set1(-0.693145752f), x);  // ln 2 in two parts, the first of 16 bits
  r = fma(n, set1(-1.42860677e-6f), r);
  Vec q = fma(set1(0.0013814539f), r, set1(0.008368745f));
  q = fma(q, r, set1(0.04166839f));
  q = fma(q, r, set1(0.16666521f));
  q = fma(q, r, set1(0.49999994f));
  return {shifted, r, fma(q, r, set1(1.f))};
}

// exp(x) for x <= 0 or NaN; 0 below -87, where floats become subnormal.
Vec exp16(Vec x) {
  const Exponential e = parts_of_exp(x);
  return zero_below(x, -87.f, mul(fma(e.q, e.r, set1(1.f)), exp2_bits(e.shifted)));
}

// cap * tanh(x / cap) = cap * (1 - e) / (1 + e) by e - 1, which is exact where a large cap makes e nearly 1.
Vec soft_cap(Vec x, float cap) {
  Vec t = mul(x, set1(1 / cap));
  Vec negative = sub(zero(), t);
  Vec u = max(set1(-20.f), mul(set1(-2.f), max(negative, t)));  // NaN is carried: max returns its second argument then
  const Exponential e = parts_of_exp(u);
  Vec power = exp2_bits(e.shifted);
  Vec less = fma(mul(e.q, e.r), power, sub(power, set1(1.f)));  // e - 1
  Vec size = mul(set1(cap), div(sub(zero(), less), add(set1(2.f), less)));
  return mul(size, sign(t));
}

// The value that scores are taken relative to. With no finite score all weights are 0, not NaN.
float shift_of(float top) { return top == -kInfinity ? 0.f : top; }

// Keys or values of a part.
template <class T>
struct Rows {
  const char* data;  // [128, d]
  size_t d;
  bool ahead;  // to ask for what lies behind, since these are read for the first time

  const char* row(size_t j) const { return data + j * d * sizeof(T); }
};

// Scores of R rows for the keys [from, to) of a part, in blocks of 16 that start at multiples of 16. Keys beside them
// are not read; other lanes are unspecified.
template <class T, size_t R>
void score_keys(const Rows<T>& keys, const float* query, size_t from, size_t to, float softcap, float* scores) {
  const size_t d = keys.d, stride = d * sizeof(T);
  constexpr size_t K = keys_at_once(R);
  for (size_t block = from / 16 * 16; block < to; block += 16) {
    const char* rows[16] = {};
    const char* row = keys.row(most_of(block, from));
    for (size_t j = 0; j < 16; j++) {
      rows[j] = row;
      if (block + j >= from && block + j + 1 < to) row += stride;
    }
    Quad quads[R][4];
    for (size_t g = 0; g < 4; g++) {
      if (keys.ahead)
        for (size_t b = 0; b < 4 * stride; b += 64) prefetch(rows[4 * g] + kPrefetchBytes + b);
      Lanes lanes[R][4];
      for (size_t j = 0; j < 4; j += K) {
        Vec sums[R][K];
        for (size_t k = 0; k < K; k++) {
          Vec key = load(reinterpret_cast<const T*>(rows[4 * g + j + k]));
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
    for (size_t r = 0; r < R; r++) {
      Vec s = fold16(quads[r]);
      if (softcap > 0) s = soft_cap(s, softcap);
      store(scores + r * kPart + block, s);
    }
  }
}

// What tiles leave undone of a row's scores [from, to).
void finish_scores(size_t from, size_t to, float softcap, float* scores) {
  for (size_t j = from / 16 * 16; j < to; j += 16) {
    Vec s = load(scores + j);
    store(scores + j, softcap > 0 ? soft_cap(s, softcap) : s);
  }
}

// Weights beside [from, to) become 0.
void zero_outside(size_t from, size_t to, float* weights) {
  if (from >= to) from = to = 0;
  for (size_t j = 0; j < from; j++) weights[j] = 0;
  for (size_t j = to; j < kPart; j++) weights[j] = 0;
}

// Scores [from, to) become exp(score - top); their sum.
float softmax_weights(float* scores, size_t from, size_t to, float* top) {
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
    store(scores + j, e);
  }
  return reduce_add(sum);
}

// Sums and those of a later part: `before` and `now` are what they are multiplied with to have one top, the larger.
void merge_tops(float* top, float* sum, const float* part_top, const float* part_sum, float* before, float* now) {
  float most[16];
  for (size_t i = 0; i < 16; i++) {
    most[i] = top[i] > part_top[i] ? top[i] : part_top[i];
    const float shift = shift_of(most[i]);
    before[i] = top[i] - shift, now[i] = part_top[i] - shift;
  }
  Vec b = exp16(load(before)), n = exp16(load(now));
  store(before, b), store(now, n), store(top, load(most));
  store(sum, fma(load(part_sum), n, mul(load(sum), b)));
}

void merge_values(size_t d, const float* part, float before, float now, float* values) {
  const Vec b = set1(before), n = set1(now);
  for (size_t i = 0; i < d; i += 16) store(values + i, fma(load(part + i), n, mul(load(values + i), b)));
}

// out [R, d] += the values [from, to) of a part times their weights, in columns [i, i + C * 16).
template <class T, size_t R, size_t C>
void add_columns(const Rows<T>& values, const float* weights, size_t from, size_t to, size_t i, float* out) {
  Vec sums[R][C];
  for (size_t r = 0; r < R; r++)
    for (size_t c = 0; c < C; c++) sums[r][c] = load(out + r * values.d + i + c * 16);
  for (size_t j = from; j < to; j++) {
    const T* row = reinterpret_cast<const T*>(values.row(j)) + i;
    if (values.ahead)
      for (size_t b = 0; b < C * 16 * sizeof(T); b += 64)
        prefetch(reinterpret_cast<const char*>(row) + kPrefetchBytes + b);
    Vec value[C];
    for (size_t c = 0; c < C; c++) value[c] = load(row + c * 16);
    for (size_t r = 0; r < R; r++) {
      Vec w = set1(weights[r * kPart + j]);
      for (size_t c = 0; c < C; c++) sums[r][c] = fma(w, value[c], sums[r][c]);
    }
  }
  for (size_t r = 0; r < R; r++)
    for (size_t c = 0; c < C; c++) store(out + r * values.d + i + c * 16, sums[r][c]);
}

template <class T, size_t R>
void add_values(const Rows<T>& values, const float* weights, size_t from, size_t to, float* out) {
  if (from >= to) return;
  constexpr size_t C = columns_at_once(R);
  size_t i = 0;
  for (; i + C * 16 <= values.d; i += C * 16) add_columns<T, R, C>(values, weights, from, to, i, out);
  for (; i < values.d; i += 16) add_columns<T, R, 1>(values, weights, from, to, i, out);
}

// The keys [from, to) of a part that each row sees, and those that some row does, or all do.
struct Ranges {
  size_t from[kAttentionRows], to[kAttentionRows];

  void any(size_t first, size_t count, size_t* begin, size_t* end) const {
    *begin = kPart, *end = 0;
    for (size_t r = first; r < first + count; r++)
      if (from[r] < to[r]) *begin = least_of(*begin, from[r]), *end = most_of(*end, to[r]);
  }
  void all(size_t first, size_t count, size_t* begin, size_t* end) const {
    *begin = 0, *end = kPart;
    for (size_t r = first; r < first + count; r++) *begin = most_of(*begin, from[r]), *end = least_of(*end, to[r]);
    if (*begin >= *end) *begin = *end = kPart;
  }
};

template <class T, size_t R>
void score_rows(const AttentionRows& a, Rows<T> keys, size_t first, const Ranges& ranges, float* weights) {
  size_t begin, end;
  ranges.any(first, R, &begin, &end);
  keys.ahead &= first == 0;
  if (begin < end)
    score_keys<T, R>(keys, a.query + first * a.head_size, begin, end, a.softcap, weights + first * kPart);
}

// sums = sums * before + now * the part's: in the order of the keys, those that all rows see at once.
template <class T, size_t R>
void add_rows(Rows<T> values, size_t first, const Ranges& ranges, const float* weights, const float* before,
              const float* now, float* sums) {
  const size_t d = values.d;
  alignas(64) float out[R * kAttentionMaxHeadSize];
  for (size_t i = 0; i < R * d; i += 16) store(out + i, zero());
  size_t begin, end;
  ranges.all(first, R, &begin, &end);
  weights += first * kPart;
  Rows<T> again = values;
  again.ahead = false;
  values.ahead &= first == 0;
  for (size_t r = 0; r < R; r++)
    add_values<T, 1>(again, weights + r * kPart, ranges.from[first + r], least_of(begin, ranges.to[first + r]),
                     out + r * d);
  add_values<T, R>(values, weights, begin, end, out);
  for (size_t r = 0; r < R; r++) add_values<T, 1>(again, weights + r * kPart, end, ranges.to[first + r], out + r * d);
  for (size_t r = 0; r < R; r++)
    if (ranges.from[first + r] < ranges.to[first + r])
      merge_values(d, out + r * d, before[first + r], now[first + r], sums + (first + r) * d);
}

// Calls f with 4, 3, 2 or 1 rows at once, and the first of them.
template <class F>
void each_rows(size_t count, const F& f) {
  size_t r = 0;
  for (; r + 4 <= count; r += 4) f(Count<4>(), r);
  if (count - r == 3) f(Count<3>(), r);
  if (count - r == 2) f(Count<2>(), r);
  if (count - r == 1) f(Count<1>(), r);
}

// As floats, aligned: faster where many rows read them.
template <class T>
Rows<float> copied(const Rows<T>& rows, size_t from, size_t to, float* copy) {
  for (size_t j = from; j < to; j++)
    for (size_t i = 0; i < rows.d; i += 16)
      store(copy + j * rows.d + i, load(reinterpret_cast<const T*>(rows.row(j)) + i));
  return {reinterpret_cast<const char*>(copy), rows.d, false};
}

template <class T>
void attend_part(const AttentionRows& a, size_t part, const AttentionSums& sums) {
  const size_t d = a.head_size, start = part * kPart, offset = start * d * sizeof(T);
  Ranges ranges;
  for (size_t r = 0; r < a.count; r++) {
    ranges.from[r] = most_of(a.from[r], start) - start;
    ranges.to[r] = least_of(most_of(a.to[r], start) - start, kPart);
  }
  size_t begin, end;
  ranges.any(0, a.count, &begin, &end);
  if (begin >= end) return;

  const Rows<T> keys = {a.keys + offset, d, true}, values = {a.values + offset, d, true};
  alignas(64) float weights[kAttentionRows * kPart];
  if (a.tiles) {
    a.tiles->score(d, keys.data, begin, end, a.packed, weights);
    for (size_t r = 0; r < a.count; r++) finish_scores(ranges.from[r], ranges.to[r], a.softcap, weights + r * kPart);
  } else if (a.copy) {
    const Rows<float> copy = copied(keys, begin, end, a.copy);
    each_rows(a.count, [&](auto n, size_t r) { score_rows<float, n.value>(a, copy, r, ranges, weights); });
  } else {
    each_rows(a.count, [&](auto n, size_t r) { score_rows<T, n.value>(a, keys, r, ranges, weights); });
  }

  float top[kAttentionRows], sum[kAttentionRows], before[kAttentionRows], now[kAttentionRows];
  for (size_t r = 0; r < kAttentionRows; r++) {
    const bool seen = r < a.count && ranges.from[r] < ranges.to[r];
    top[r] = -kInfinity, sum[r] = 0;
    if (seen) sum[r] = softmax_weights(weights + r * kPart, ranges.from[r], ranges.to[r], top + r);
  }
  for (size_t r = 0; r < a.count; r += 16)
    merge_tops(sums.top + r, sums.sum + r, top + r, sum + r, before + r, now + r);

  if (a.tiles) {
    float* out = a.copy;
    for (size_t r = 0; r < a.count; r++) zero_outside(ranges.from[r], ranges.to[r], weights + r * kPart);
    if (a.tiles->add(a.count, d, values.data, begin, end, weights, a.packed, out)) {
      for (size_t r = 0; r < a.count; r++)
        if (ranges.from[r] < ranges.to[r]) merge_values(d, out + r * d, before[r], now[r], sums.values + r * d);
      return;
    }
  }
  if (a.copy) {
    const Rows<float> copy = copied(values, begin, end, a.copy);
    each_rows(a.count,
              [&](auto n, size_t r) { add_rows<float, n.value>(copy, r, ranges, weights, before, now, sums.values); });
  } else {
    each_rows(a.count,
              [&](auto n, size_t r) { add_rows<T, n.value>(values, r, ranges, weights, before, now, sums.values); });
  }
}

void attend(const AttentionRows& a, size_t part, const AttentionSums& sums) {
  switch (a.cache) {
    case CacheType::float32: return attend_part<float>(a, part, sums);
    case CacheType::float16: return attend_part<uint16_t>(a, part, sums);
  }
}

void merge(size_t head_size, const AttentionSums& part, const AttentionSums& sums) {
  float top[16] = {*sums.top}, sum[16] = {*sums.sum}, before[16], now[16];
  const float part_top[16] = {*part.top}, part_sum[16] = {*part.sum};
  merge_tops(top, sum, part_top, part_sum, before, now);
  *sums.top = top[0], *sums.sum = sum[0];
  merge_values(head_size, part.values, before[0], now[0], sums.values);
}

void finish(size_t head_size, const AttentionSums& sums, const float* sink, float* y) {
  float top[16] = {*sums.top}, sum[16] = {*sums.sum}, factor[16] = {1}, now[16];
  if (sink) {
    const float sinks[16] = {*sink}, ones[16] = {1};
    merge_tops(top, sum, sinks, ones, factor, now);
  }
  const Vec f = set1(factor[0]), total = set1(sum[0]);
  for (size_t i = 0; i < head_size; i += 16) store(y + i, div(mul(load(sums.values + i), f), total));
}

// The operators with a state in terms of attention.inl's lanes: include it behind that. A token's numbers are the same
// operations in the same order in any run.

const float* at(const Steps& steps, size_t token) { return steps.data + token * steps.stride; }

// exp(x) of a decay, at most exp(88); NaN stays.
Vec decay16(Vec x) { return exp16(sub(zero(), max(set1(-88.f), sub(zero(), x)))); }

template <size_t C>
void recur_columns(const Recurrence& a, size_t t, size_t j, const float* e, const float* ke, const float* qe, float qk,
                   const float* from) {
  const size_t d = a.key_size, width = a.value_size;
  Vec r[C], p[C], u[C];
  for (size_t c = 0; c < C; c++) r[c] = p[c] = zero();
  for (size_t i = 0; i < d; i++) {
    const Vec k = set1(ke[i]), q = set1(qe[i]);
    for (size_t c = 0; c < C; c++) {
      const Vec s = load(from + i * width + j + c * 16);
      r[c] = fma(k, s, r[c]);
      p[c] = fma(q, s, p[c]);
    }
  }
  for (size_t c = 0; c < C; c++) {
    u[c] = load(at(a.value, t) + j + c * 16);
    if (a.delta) u[c] = mul(set1(*at(a.beta, t)), sub(u[c], r[c]));
    store(a.y + t * a.y_stride + j + c * 16, mul(set1(a.scale), fma(set1(qk), u[c], p[c])));
  }
  const float* key = at(a.key, t);
  for (size_t i = 0; i < d; i++) {
    const Vec k = set1(key[i]), decay = set1(e[i]);
    for (size_t c = 0; c < C; c++) {
      const size_t place = i * width + j + c * 16;
      store(a.state + place, fma(k, u[c], mul(decay, load(from + place))));
    }
  }
}

void recur(const Recurrence& a) {
  constexpr size_t C = columns_at_once(2);
  const size_t d = a.key_size;
  alignas(64) float e[kMaxKeySize], ke[kMaxKeySize], qe[kMaxKeySize];
  for (size_t t = 0; t < a.tokens; t++) {
    const float *query = at(a.query, t), *key = at(a.key, t);
    Vec decay = set1(1.f), product = zero();
    if (a.decay.data && !a.decay_per_key) decay = decay16(set1(*at(a.decay, t)));
    for (size_t i = 0; i < d; i += 16) {
      if (a.decay_per_key) decay = decay16(load(at(a.decay, t) + i));
      const Vec k = load(key + i), q = load(query + i);
      store(e + i, decay), store(ke + i, mul(k, decay)), store(qe + i, mul(q, decay));
      product = fma(q, k, product);
    }
    const float qk = reduce_add(product), *from = t ? a.state : a.past;
    size_t j = 0;
    for (; j + C * 16 <= a.value_size; j += C * 16) recur_columns<C>(a, t, j, e, ke, qe, qk, from);
    for (; j < a.value_size; j += 16) recur_columns<1>(a, t, j, e, ke, qe, qk, from);
  }
}

// x / (1 + exp(-x)), by exponentials of numbers up to 0.
Vec silu16(Vec x) {
  const Vec negative = sub(zero(), x);
  const Vec size = max(negative, x), below = max(zero(), negative);
  const Vec numerator = exp16(sub(zero(), below));
  return mul(x, div(numerator, add(set1(1.f), exp16(sub(zero(), size)))));
}

void convolve(const Convolution& a) {
  const size_t before = a.taps - 1;
  alignas(64) float weight[kMaxTaps][16], kept[kMaxTaps][16];
  Vec last[kMaxTaps];  // the tokens that the next one sees
  for (size_t i = 0; i < a.taps; i++)
    for (size_t c = 0; c < 16; c++) weight[i][c] = a.weight[c * a.taps + i];
  for (size_t i = 0; i < before; i++) {
    for (size_t c = 0; c < 16; c++) kept[i][c] = a.past[c * before + i];
    last[i] = load(kept[i]);
  }
  const Vec bias = a.bias ? load(a.bias) : zero();
  for (size_t t = 0; t < a.tokens; t++) {
    last[before] = load(at(a.x, t));
    Vec sum = bias;
    for (size_t i = 0; i < a.taps; i++) sum = fma(load(weight[i]), last[i], sum);
    store(a.y + t * a.y_stride, a.silu ? silu16(sum) : sum);
    for (size_t i = 0; i < before; i++) last[i] = last[i + 1];
  }
  for (size_t i = 0; i < before; i++) {
    store(kept[i], last[i]);
    for (size_t c = 0; c < 16; c++) a.state[c * before + i] = kept[i][c];
  }
}

// The choice of a token, as `runtime/sampling/` of pastkey defines it: biases, penalties, temperature, top_k, top_p and
// min_p. Called by Python after a run, while the logits are in the cache, and independent of onnxruntime. All that a
// token depends on is computed in double, but in another order than the definition does. Where the rounding of a sum
// could decide, the result is kUndecided, and the definition decides.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "levels.h"

#if defined(_WIN32)
#define PASTKEY_EXPORT extern "C" __declspec(dllexport)
#else
#define PASTKEY_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// One call. `runtime/sampling/native.py` has the same fields.
struct PastkeyDraw {
  uint64_t bytes;       // sizeof(PastkeyDraw): a caller with other fields is left to the definition
  const float* logits;  // [size], without NaN
  int64_t size;
  const int64_t* text;  // [text_size], ids that the penalties count
  int64_t text_size;
  const int64_t* biased;  // [bias_count], ids
  const double* biases;   // [bias_count]
  int64_t bias_count;
  int64_t top_k;  // 0: off
  double repetition_penalty, presence_penalty, frequency_penalty;
  double temperature, top_p, min_p;
  double u;  // [0, 1)
};

namespace pastkey {
namespace {

constexpr int64_t kUndecided = -1;
constexpr double kDoubt = 1e-10;  // of a total, many times the error of a sum
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Scored {
  int64_t id;
  double value;  // a logit, or its distance from the largest over the temperature
};

bool before(const Scored& a, const Scored& b) { return a.id < b.id; }

class Choice {
 public:
  explicit Choice(const PastkeyDraw& draw) : d_(draw), size_(static_cast<size_t>(draw.size)), others_(draw.logits) {
    touched_.clear();
  }

  int64_t token() {
    if (!touch()) return kUndecided;
    tops_.resize((size_ + kPart - 1) / kPart);
    kernels_.largest(others_, size_, tops_.data());
    for (float top : tops_)
      if (std::isnan(top)) return kUndecided;
    const int64_t token = find_largest();
    if (largest_ == -kInfinity) return kUndecided;  // every token is banned
    if (d_.temperature == 0) return token;
    if (!(std::fabs(largest_) < 1e6)) return kUndecided;
    double total = 0;
    if (d_.top_k > 0) {
      if (!keep_top_k()) return kUndecided;
      for (const Scored& s : kept_) total += std::exp(s.value);
    } else if (d_.top_p < 1) {
      total = sum();
      // Tokens below (1 - p) / V have less than 1 - p together, so the others reach p. Mostly far fewer do.
      const double sufficient = (1 - d_.top_p) / static_cast<double>(size_) * total;
      double reached = 0;
      for (double least = 1. / 256; reached < d_.top_p * total; least /= 8) {
        collect(largest_ + d_.temperature * std::log(std::max(least, sufficient)));
        reached = 0;
        for (const Scored& s : kept_) reached += std::exp(s.value);
        if (least <= sufficient) break;
      }
    } else if (d_.min_p > 0) {
      collect(largest_ + d_.temperature * std::log(d_.min_p));
    } else {
      return draw_of_all();
    }
    if (d_.top_p < 1 && !keep_top_p(total)) return kUndecided;
    return draw_of_kept();
  }

 private:
  // Biases and penalties: moves the ids that they touch from others_ to touched_. Whether the ids are in range.
  bool touch() {
    if (d_.text_size + d_.bias_count == 0) return true;
    copy_.assign(d_.logits, d_.logits + size_);
    others_ = copy_.data();
    place_.assign(size_, -1);
    std::vector<double>& counts = values_;
    counts.clear();
    auto add = [&](int64_t id) -> int32_t {
      if (id < 0 || id >= d_.size) return -1;
      int32_t& found = place_[static_cast<size_t>(id)];
      if (found < 0) {
        found = static_cast<int32_t>(touched_.size());
        touched_.push_back({id, static_cast<double>(d_.logits[id])});
        counts.push_back(0);
        copy_[static_cast<size_t>(id)] = -std::numeric_limits<float>::infinity();
      }
      return found;
    };
    for (int64_t i = 0; i < d_.bias_count; i++) {
      const int32_t at = add(d_.biased[i]);
      if (at < 0) return false;
      touched_[static_cast<size_t>(at)].value += d_.biases[i];
    }
    for (int64_t i = 0; i < d_.text_size; i++) {
      const int32_t at = add(d_.text[i]);
      if (at < 0) return false;
      counts[static_cast<size_t>(at)]++;
    }
    constexpr double kMost = std::numeric_limits<double>::max();
    for (size_t i = 0; i < touched_.size(); i++) {
      double& v = touched_[i].value;
      if (counts[i] == 0) continue;
      if (d_.repetition_penalty != 1 && v != -kInfinity) {
        v = v > 0 ? v / d_.repetition_penalty : v * d_.repetition_penalty;
        v = std::min(std::max(v, -kMost), kMost);
      }
      if (d_.presence_penalty != 0 || d_.frequency_penalty != 0)
        v -= counts[i] * d_.frequency_penalty + d_.presence_penalty;
    }
    std::sort(touched_.begin(), touched_.end(), before);
    return true;
  }

  int64_t find_largest() {
    const size_t part = static_cast<size_t>(std::max_element(tops_.begin(), tops_.end()) - tops_.begin());
    size_t at = part * kPart;
    while (others_[at] != tops_[part]) at++;  // it is there, since it is no NaN
    int64_t token = static_cast<int64_t>(at);
    largest_ = static_cast<double>(tops_[part]);
    for (const Scored& s : touched_)
      if (s.value > largest_ || (s.value == largest_ && s.id < token)) largest_ = s.value, token = s.id;
    return token;
  }

  double distance(double value) const { return (value - largest_) / d_.temperature; }

  // kept_: the ids of logits of at least `least`, ascending, and of a few below, with their distances.
  void collect(double least) {
    kept_.clear();
    const double below = least - 1e-6 * (std::fabs(least) + std::fabs(largest_));
    for (size_t part = 0; part < tops_.size(); part++) {
      if (!(static_cast<double>(tops_[part]) >= below)) continue;
      for (size_t i = part * kPart; i < std::min(size_, (part + 1) * kPart); i++) {
        const double value = static_cast<double>(others_[i]);
        if (value >= below) kept_.push_back({static_cast<int64_t>(i), distance(value)});
      }
    }
    const size_t middle = kept_.size();
    for (const Scored& s : touched_)
      if (s.value >= below) kept_.push_back({s.id, distance(s.value)});
    std::inplace_merge(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(middle), kept_.end(), before);
  }

  // The k largest, and those equal to the k-th. At least k are as large as the k-th largest of the parts' maxima.
  bool keep_top_k() {
    const uint64_t k = static_cast<uint64_t>(d_.top_k);
    auto kth = values_.begin();
    auto find = [&] {
      if (values_.size() < k) return false;
      kth = values_.begin() + static_cast<std::ptrdiff_t>(k - 1);
      std::nth_element(values_.begin(), kth, values_.end(), std::greater<>());
      return std::isfinite(*kth);
    };
    values_.assign(tops_.begin(), tops_.end());
    if (!find()) return false;
    collect(*kth);
    values_.clear();
    for (const Scored& s : kept_) values_.push_back(s.value);
    if (!find()) return false;
    keep([&](const Scored& s) { return s.value >= *kth; });
    return true;
  }

  template <class Condition>
  void keep(const Condition& condition) {
    kept_.erase(std::remove_if(kept_.begin(), kept_.end(), [&](const Scored& s) { return !condition(s); }),
                kept_.end());
  }

  // The fewest largest that together reach p of the total; the first of equal ones first.
  bool keep_top_p(double total) {
    std::sort(kept_.begin(), kept_.end(), [](const Scored& a, const Scored& b) {
      return a.value > b.value || (a.value == b.value && a.id < b.id);
    });
    const double wanted = d_.top_p * total;
    double reached = 0;
    for (size_t i = 0; i < kept_.size(); i++) {
      reached += std::exp(kept_[i].value);
      if (std::fabs(reached - wanted) <= kDoubt * total) return false;
      if (reached < wanted) continue;
      kept_.resize(i + 1);
      std::sort(kept_.begin(), kept_.end(), before);
      return true;
    }
    return false;
  }

  int64_t draw_of_kept() {
    if (d_.min_p > 0) keep([least = std::log(d_.min_p)](const Scored& s) { return s.value >= least; });
    double total = 0, reached = 0;
    for (Scored& s : kept_) total += s.value = std::exp(s.value);
    for (const Scored& s : kept_) {
      reached += s.value;
      if (std::fabs(reached - d_.u * total) <= kDoubt * total) return kUndecided;
      if (reached > d_.u * total) return s.id;
    }
    return kUndecided;
  }

  // sums_: of exp(distance) of each part. Returns their sum.
  double sum() {
    sums_.resize(tops_.size());
    kernels_.sum(others_, size_, largest_, 1 / d_.temperature, sums_.data());
    double total = 0;
    for (double s : sums_) total += s;
    for (const Scored& s : touched_) {
      const double e = std::exp(distance(s.value));
      sums_[static_cast<size_t>(s.id) / kPart] += e;
      total += e;
    }
    return total;
  }

  int64_t draw_of_all() {
    const double total = sum(), number = d_.u * total, margin = kDoubt * total;
    double reached = 0;
    size_t part = 0;
    while (part < sums_.size() && reached + sums_[part] <= number) reached += sums_[part++];
    if (part == sums_.size() || (part > 0 && number - reached <= margin)) return kUndecided;
    auto touched = std::lower_bound(touched_.begin(), touched_.end(), Scored{int64_t(part * kPart), 0}, before);
    for (size_t i = part * kPart; i < std::min(size_, (part + 1) * kPart); i++) {
      double value = static_cast<double>(others_[i]);
      if (touched != touched_.end() && touched->id == static_cast<int64_t>(i)) value = (touched++)->value;
      reached += std::exp(distance(value));
      if (std::fabs(reached - number) <= margin) return kUndecided;
      if (reached > number) return static_cast<int64_t>(i);
    }
    return kUndecided;
  }

  const PastkeyDraw& d_;
  const LogitKernels& kernels_ = level().logits;
  size_t size_;
  const float* others_;  // logits, minus infinity at touched_
  double largest_ = -kInfinity;
  // Memory of the next call: behind a run of onnxruntime, malloc takes longer than a greedy choice.
  static thread_local std::vector<float> copy_, tops_;
  static thread_local std::vector<int32_t> place_;
  static thread_local std::vector<Scored> touched_, kept_;
  static thread_local std::vector<double> sums_, values_;
};

thread_local std::vector<float> Choice::copy_, Choice::tops_;
thread_local std::vector<int32_t> Choice::place_;
thread_local std::vector<Scored> Choice::touched_, Choice::kept_;
thread_local std::vector<double> Choice::sums_, Choice::values_;

}  // namespace
}  // namespace pastkey

// The id of the token, or -1 where the definition must decide.
PASTKEY_EXPORT int64_t pastkey_kernels_draw(const PastkeyDraw* draw) {
  if (draw->bytes != sizeof(PastkeyDraw) || draw->size < 1) return pastkey::kUndecided;
  try {
    return pastkey::Choice(*draw).token();
  } catch (...) {  // no memory
    return pastkey::kUndecided;
  }
}

// Whether none of x [n] is NaN or infinite.
PASTKEY_EXPORT int pastkey_kernels_finite(const float* x, int64_t n) {
  return pastkey::level().logits.finite(x, static_cast<size_t>(n));
}

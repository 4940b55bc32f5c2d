// What the operators with a state (recurrence.cc) and their functions for each instruction set share.
#pragma once

#include <cstddef>

namespace pastkey {

constexpr size_t kMaxKeySize = 256;  // D of a recurrence
constexpr size_t kMaxTaps = 8;       // of a convolution

// Numbers of one head, or of some channels, token by token.
struct Steps {
  const float* data;  // nullptr: none
  size_t stride;      // from a token to the next
};

// A linear recurrence over the tokens of one row and head. S [D, Dv] is the state, e = exp(decay):
//   u = beta (v - S'k) for the delta rule, or v, with S' = e S;   S = S' + k u;   y = scale S q
struct Recurrence {
  size_t tokens, key_size, value_size;  // D and Dv, multiples of 16
  Steps query, key, value;
  Steps decay;  // its logarithm, one number or D of them; or none
  bool decay_per_key, delta;
  Steps beta;
  float scale;
  const float* past;  // [D, Dv]
  float* state;       // [D, Dv], which may be past
  float* y;
  size_t y_stride;
};

// A causal convolution of 16 channels, each with taps of its own, over the tokens of one row.
struct Convolution {
  size_t tokens, taps;
  Steps x;
  const float* weight;  // [16, taps]
  const float* bias;    // [16], or nullptr
  bool silu;
  const float* past;  // [16, taps - 1]: the last tokens of x before these
  float* state;       // [16, taps - 1], which may be past
  float* y;
  size_t y_stride;
};

}  // namespace pastkey

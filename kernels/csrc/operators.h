// The operators of domain "pastkey".
#pragma once

#include <vector>

#include "onnxruntime_c_api.h"

namespace pastkey {

// A node names the version that it was written for in its attribute `version`, and earlier ones run. An attribute or an
// input that is new, or means something else, takes a higher version: onnxruntime passes attributes that no kernel asks
// for, and does not tell a kernel what the graph imports.
constexpr int kOperatorVersion = 4;

const OrtCustomOp* matmul_int8();
const OrtCustomOp* norm_matmul_int8();
const OrtCustomOp* decoder_attention();
const OrtCustomOp* decoder_recurrence();
const OrtCustomOp* decoder_convolution();

inline std::vector<const OrtCustomOp*> operators() {
  return {matmul_int8(), norm_matmul_int8(), decoder_attention(), decoder_recurrence(), decoder_convolution()};
}

}  // namespace pastkey

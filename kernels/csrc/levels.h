// The instruction sets that there are kernels for, and the one that this process uses.
#pragma once

#include "attention.h"
#include "kernels.h"
#include "logits.h"

namespace pastkey {

// The functions of one instruction set. A level without functions of its own has a lower one's.
struct LevelKernels {
  const char* name;  // as PASTKEY_KERNELS has it
  bool (*supported)();
  const MatMulKernels& matmul;
  const AttentionKernels& attention;
  const LogitKernels& logits;
  const TileKernels* tiles = nullptr;
  const AttentionTiles* attention_tiles = nullptr;  // for a float16 cache
};

// The highest that the processor and the operating system allow, or what PASTKEY_KERNELS names. Chosen at the first
// call. Throws an Error where the variable names none, or one that this machine or this build lacks.
const LevelKernels& level();

}  // namespace pastkey

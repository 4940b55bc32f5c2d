// What the operators need of onnxruntime's C API. Inside, errors are exceptions; at the boundary, an OrtStatus.
// The API is the one that the kernel was created with, not a global: a process may hold two copies of onnxruntime.
#pragma once

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <iterator>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "onnxruntime_c_api.h"
#include "operators.h"

namespace pastkey {

struct Error {
  OrtErrorCode code;
  std::string message;
};

// Throws an Error that says what was found and what is expected. The boundary puts the operator's name in front.
[[noreturn]]
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
inline void refuse(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Error{ORT_INVALID_ARGUMENT, text};
}

using Shape = std::vector<int64_t>;

inline std::string to_string(const Shape& shape) {  // "[2, 3]"
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline const char* to_string(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return "int8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return "uint8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return "int32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return "int64";
    default: return "another type";
  }
}

template <class T>
constexpr ONNXTensorElementDataType element_type() {
  if constexpr (std::is_same_v<T, float>)
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  else if constexpr (std::is_same_v<T, int8_t>)
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
  else if constexpr (std::is_same_v<T, uint8_t>)
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  else if constexpr (std::is_same_v<T, int32_t>)
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  else if constexpr (std::is_same_v<T, uint16_t>)
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  else
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

// Throws where a call of the API failed.
inline void check(const OrtApi* api, OrtStatus* status) {
  if (!status) return;
  Error error{api->GetErrorCode(status), api->GetErrorMessage(status)};
  api->ReleaseStatus(status);
  throw error;
}

// A tensor that onnxruntime owns. `label` is its name in messages.
struct Tensor {
  const char* label = "";
  void* raw = nullptr;  // nullptr: an optional input that is absent
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  Shape shape;
  size_t size = 0;  // elements

  explicit operator bool() const { return raw != nullptr; }

  // The elements, refused where they are of another type, or do not lie as C++ has them: weights are where their file
  // is mapped.
  template <class T>
  T* data() const {
    if (raw && type != element_type<T>())
      refuse("%s is of %s, expected %s", label, to_string(type), to_string(element_type<T>()));
    if (reinterpret_cast<uintptr_t>(raw) % alignof(T))
      refuse("%s begins at an address, or an offset of its file, that is no multiple of %zu", label, alignof(T));
    return static_cast<T*>(raw);
  }
};

inline Tensor describe(const OrtApi* api, const OrtValue* value, const char* label) {
  int is_tensor = 0;
  check(api, api->IsTensor(value, &is_tensor));
  if (!is_tensor) refuse("%s is no tensor", label);
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api, api->GetTensorTypeAndShape(value, &info));
  Tensor tensor;
  tensor.label = label;
  size_t rank = 0;
  OrtStatus* status = api->GetTensorElementType(info, &tensor.type);
  if (!status) status = api->GetDimensionsCount(info, &rank);
  if (!status) {
    tensor.shape.resize(rank);
    status = api->GetDimensions(info, tensor.shape.data(), rank);
  }
  if (!status) status = api->GetTensorShapeElementCount(info, &tensor.size);
  api->ReleaseTensorTypeAndShapeInfo(info);
  check(api, status);
  check(api, api->GetTensorMutableData(const_cast<OrtValue*>(value), &tensor.raw));
  alignas(64) static char empty[64];  // a tensor without elements may have no address, and is there all the same
  if (!tensor.raw && tensor.size == 0) tensor.raw = empty;
  return tensor;
}

inline Tensor required(Tensor tensor) {
  if (!tensor) refuse("%s is missing", tensor.label);
  return tensor;
}

// onnxruntime's allocator of the session, for what a run needs and frees.
class Allocator {
 public:
  Allocator(const OrtApi* api, const OrtKernelInfo* info) : api_(api) {
    check(api, api->KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator_));
  }
  ~Allocator() { api_->ReleaseAllocator(allocator_); }
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  void* allocate(size_t bytes) const noexcept {  // nullptr: no memory
    void* found = nullptr;
    if (OrtStatus* status = api_->AllocatorAlloc(allocator_, bytes, &found)) {
      api_->ReleaseStatus(status);
      return nullptr;
    }
    return found;
  }
  void free(void* memory) const noexcept {
    if (OrtStatus* status = api_->AllocatorFree(allocator_, memory)) api_->ReleaseStatus(status);
  }

 private:
  const OrtApi* api_;
  OrtAllocator* allocator_ = nullptr;
};

// Memory for as long as a scope lasts, aligned to 64 bytes and not initialized. Does not throw, so that a task of
// parallel_for can have one: ask `data()` for nullptr there, or call `get()`, which throws, outside.
class Scratch {
 public:
  Scratch(const Allocator& allocator, size_t bytes) noexcept
      : allocator_(allocator), memory_(bytes <= SIZE_MAX - 64 ? allocator.allocate(bytes + 64) : nullptr) {}
  ~Scratch() {
    if (memory_) allocator_.free(memory_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  uint8_t* data() const noexcept {
    return memory_ ? reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64) : nullptr;
  }
  uint8_t* get() const {
    if (!memory_) throw Error{ORT_FAIL, "no memory for intermediate results"};
    return data();
  }

 private:
  const Allocator& allocator_;
  void* memory_;
};

// What a kernel's constructor can ask.
class KernelInfo {
 public:
  KernelInfo(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  const OrtApi* api() const { return api_; }
  const OrtKernelInfo* raw() const { return info_; }

  int64_t attribute(const char* name, int64_t otherwise) const {
    int64_t value = 0;
    if (ok(api_->KernelInfoGetAttribute_int64(info_, name, &value))) return value;
    return absent(name, "an integer"), otherwise;
  }
  float attribute(const char* name, float otherwise) const {
    float value = 0;
    if (ok(api_->KernelInfoGetAttribute_float(info_, name, &value))) return value;
    return absent(name, "a float"), otherwise;
  }
  std::string attribute(const char* name, const char* otherwise) const {
    size_t size = 0;  // with the zero at the end
    if (!ok(api_->KernelInfoGetAttribute_string(info_, name, nullptr, &size)))
      return absent(name, "a string"), otherwise;
    std::string value(size, '\0');
    check(api_, api_->KernelInfoGetAttribute_string(info_, name, value.data(), &size));
    value.resize(size ? size - 1 : 0);
    return value;
  }

  void require_version() const {
    const int64_t version = attribute("version", int64_t{1});
    if (version < 1 || version > kOperatorVersion)
      refuse("version is %lld, expected 1 to %d: a later one needs a newer library", static_cast<long long>(version),
             kOperatorVersion);
  }

  bool has_input(size_t index) const {
    size_t count = 0, size = 0;
    check(api_, api_->KernelInfo_GetInputCount(info_, &count));
    if (index >= count) return false;
    check(api_, api_->KernelInfo_GetInputName(info_, index, nullptr, &size));
    return size > 1;  // an absent one has an empty name
  }

  // An input that is a constant initializer; one that is absent is empty, one that is computed is refused.
  Tensor constant(size_t index, const char* label) const {
    Tensor none;
    none.label = label;
    if (!has_input(index)) return none;
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api_, api_->KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
    if (!is_constant || !value) refuse("%s is computed, expected a constant initializer", label);
    return describe(api_, value, label);
  }
  Tensor required_constant(size_t index, const char* label) const { return required(constant(index, label)); }

 private:
  bool ok(OrtStatus* status) const {
    if (status) api_->ReleaseStatus(status);
    return !status;
  }
  // The API does not tell an attribute that is missing from one of another type.
  void absent(const char* name, const char* expected) const {
    size_t size = 0;
    if (ok(api_->KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size)))
      refuse("attribute %s is of another type, expected %s", name, expected);
  }

  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

// What a run can ask.
class Context {
 public:
  Context(const OrtApi* api, OrtKernelContext* context) : api_(api), context_(context) {}

  Tensor input(size_t index, const char* label) const {  // empty where it is absent
    Tensor none;
    none.label = label;
    size_t count = 0;
    check(api_, api_->KernelContext_GetInputCount(context_, &count));
    const OrtValue* value = nullptr;
    if (index < count) check(api_, api_->KernelContext_GetInput(context_, index, &value));
    return value ? describe(api_, value, label) : none;
  }
  Tensor required_input(size_t index, const char* label) const { return required(input(index, label)); }
  Tensor output(size_t index, const Shape& shape, const char* label) const {  // empty where the node has no such output
    Tensor none;
    none.label = label;
    size_t count = 0;
    check(api_, api_->KernelContext_GetOutputCount(context_, &count));
    OrtValue* value = nullptr;
    if (index < count) check(api_, api_->KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
    return value ? describe(api_, value, label) : none;
  }
  // onnxruntime does not check the nodes of a graph in its own format.
  Tensor required_output(size_t index, const Shape& shape, const char* label) const {
    return required(output(index, shape, label));
  }

  // task(0) to task(tasks - 1) by the session's threads. A task must not throw.
  template <class Task>
  void parallel_for(size_t tasks, const Task& task) const {
    if (tasks == 1) task(size_t{0});
    if (tasks <= 1) return;
    auto call = [](void* data, size_t index) { (*static_cast<const Task*>(data))(index); };
    check(api_, api_->KernelContext_ParallelFor(context_, call, tasks, 0, const_cast<Task*>(&task)));
  }

 private:
  const OrtApi* api_;
  OrtKernelContext* context_;
};

// One input or output of an operator. UNDEFINED: of any type, which the kernel checks.
struct Slot {
  ONNXTensorElementDataType type;
  bool optional;
};

constexpr Slot required(ONNXTensorElementDataType type) { return {type, false}; }
constexpr Slot optional(ONNXTensorElementDataType type) { return {type, true}; }

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kFloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr auto kUint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr auto kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
constexpr auto kAnyType = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;

// Calls `body`, and turns what it throws into a status.
template <class Body>
OrtStatus* guarded(const OrtApi* api, const char* name, const Body& body) noexcept {
  // In a buffer: without memory, a string of the message would end the process.
  const auto failed = [&](OrtErrorCode code, const char* what) {
    char text[1024];
    std::snprintf(text, sizeof text, "%s: %s", name, what);
    return api->CreateStatus(code, text);
  };
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return failed(error.code, error.message.c_str());
  } catch (const std::exception& error) {
    return failed(ORT_FAIL, error.what());
  }
}

// The OrtCustomOp of a kernel class, which has
//   static constexpr const char* kName; static constexpr Slot kInputs[], kOutputs[];
//   explicit Kernel(const KernelInfo&); void compute(const Context&);
// onnxruntime may call compute from several threads at once.
template <class Kernel>
const OrtCustomOp* custom_op() {
  struct Instance {
    const OrtApi* api;
    Kernel kernel;
  };
  static const OrtCustomOp op = [] {
    OrtCustomOp o{};
    o.version = ORT_API_VERSION;
    o.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
      return guarded(api, Kernel::kName, [&] {
        const KernelInfo known(api, info);
        known.require_version();
        *kernel = new Instance{api, Kernel(known)};
      });
    };
    o.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      auto* instance = static_cast<Instance*>(kernel);
      return guarded(instance->api, Kernel::kName, [&] { instance->kernel.compute(Context(instance->api, context)); });
    };
    o.KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
    o.GetName = [](const OrtCustomOp*) { return Kernel::kName; };
    o.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    o.GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kInputs); };
    o.GetInputType = [](const OrtCustomOp*, size_t i) { return Kernel::kInputs[i].type; };
    o.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
      return Kernel::kInputs[i].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    };
    o.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    o.GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kOutputs); };
    o.GetOutputType = [](const OrtCustomOp*, size_t i) { return Kernel::kOutputs[i].type; };
    o.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) {
      return Kernel::kOutputs[i].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    };
    // onnxruntime asks for this function where outputs and more than one input are of any type. It then takes the
    // type of the last of these inputs, and the kernel checks them.
    for (const Slot& output : Kernel::kOutputs)
      if (output.type == kAnyType)
        o.InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext*) -> OrtStatusPtr { return nullptr; };
    o.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    o.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    o.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    o.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    o.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    o.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
    return o;
  }();
  return &op;
}

}  // namespace pastkey

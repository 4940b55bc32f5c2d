// The entry points: onnxruntime's SessionOptions.register_custom_ops_library calls RegisterCustomOps.
#include <map>
#include <mutex>

#include "levels.h"
#include "operators.h"
#include "ort.h"

#if defined(PASTKEY_STATIC)  // other static libraries have a RegisterCustomOps of their own
#define RegisterCustomOps PastkeyRegisterCustomOps
#endif
#if defined(_WIN32)
#define PASTKEY_EXPORT extern "C" __declspec(dllexport)
#else
#define PASTKEY_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace pastkey {
namespace {

// A domain must outlive every session that uses it, so it is never released: one for each copy of onnxruntime.
OrtCustomOpDomain* domain(const OrtApi* api) {
  static std::mutex mutex;
  static std::map<const OrtApi*, OrtCustomOpDomain*> domains;
  std::lock_guard<std::mutex> lock(mutex);
  OrtCustomOpDomain*& found = domains[api];
  if (!found) {
    OrtCustomOpDomain* made = nullptr;
    check(api, api->CreateCustomOpDomain("pastkey", &made));
    for (const OrtCustomOp* op : operators()) check(api, api->CustomOpDomain_Add(made, op));
    found = made;
  }
  return found;
}

}  // namespace
}  // namespace pastkey

PASTKEY_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api)
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, "pastkey kernels: expected onnxruntime 1.21 or newer");
  return pastkey::guarded(api, "pastkey kernels", [&] {
    pastkey::level();  // refuses a wrong PASTKEY_KERNELS
    pastkey::check(api, api->AddCustomOpDomain(options, pastkey::domain(api)));
  });
}

// The level in use, by the name that PASTKEY_KERNELS has; nullptr where PASTKEY_KERNELS is wrong.
PASTKEY_EXPORT const char* ORT_API_CALL pastkey_kernels_level() {
  try {
    return pastkey::level().name;
  } catch (...) {
    return nullptr;
  }
}

// The version of the operators; graphs of earlier ones run as well.
PASTKEY_EXPORT int ORT_API_CALL pastkey_kernels_operators() { return pastkey::kOperatorVersion; }

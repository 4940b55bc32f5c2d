// What csrc/ort.h does where memory ends, and where a node lacks what an
// operator needs: over an API of its own.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "ort.h"

static bool no_memory = false;
void* operator new(size_t bytes) {
  void* found = no_memory ? nullptr : std::malloc(bytes);
  if (!found) throw std::bad_alloc();
  return found;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

static char told[2048];

static OrtStatus* ORT_API_CALL create_status(OrtErrorCode, const char* text) noexcept {
  std::snprintf(told, sizeof told, "%s", text);
  return reinterpret_cast<OrtStatus*>(told);
}
static OrtStatus* ORT_API_CALL one_output(const OrtKernelContext*, size_t* count) noexcept {
  return *count = 1, nullptr;
}
static OrtStatus* ORT_API_CALL absent(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue** value) noexcept {
  return *value = nullptr, nullptr;
}

template <class Body>
static bool says(const OrtApi& api, const char* expected, const Body& body) {
  const OrtStatus* status = pastkey::guarded(&api, "an operator with a long name", body);
  if (status && std::strcmp(told, expected) == 0) return true;
  std::printf("found \"%s\", expected \"%s\"\n", status ? told : "no status", expected);
  return false;
}

int main() {
  OrtApi api{};
  api.CreateStatus = create_status;
  api.KernelContext_GetOutputCount = one_output;
  api.KernelContext_GetOutput = absent;
  const pastkey::Context context(&api, nullptr);
  const pastkey::Shape shape = {2, 3};
  bool right = says(api, "an operator with a long name: Y is missing",
                    [&] { context.required_output(0, shape, "Y").data<float>()[0] = 1; });
  no_memory = true;  // but for exceptions themselves
  right &= !pastkey::guarded(&api, "an operator with a long name", [] {});
  right &= says(api, "an operator with a long name: std::bad_alloc", [] { std::string text(100, ' '); });
  no_memory = false;
  return right ? 0 : 1;
}

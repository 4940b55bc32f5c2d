// The static library: onnxruntime's session options take its operators. Include onnxruntime_c_api.h first.
#pragma once

#ifdef __cplusplus
extern "C"
#endif
    OrtStatus* ORT_API_CALL PastkeyRegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

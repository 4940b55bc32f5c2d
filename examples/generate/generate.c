/*
 * A whole generation by one call of onnxruntime's C API: token ids in, token ids out. Text is the application's.
 *
 * Of onnxruntime: the header onnxruntime_c_api.h (Debian's package libonnxruntime-dev; API 21 is enough), and the
 * library of any release from the bundle's min_onnxruntime on, under the name libonnxruntime.so.1, as in the archives
 * of its releases (or a link of that name to the one in Python's package, onnxruntime/capi/libonnxruntime.so.*).
 *
 *     pastkey export checkpoint --out bundle --generate
 *     gcc -I /usr/include/onnxruntime generate.c -o generate -L FOLDER -l:libonnxruntime.so.1
 *     LD_LIBRARY_PATH=FOLDER ./generate bundle/onnx/generate.onnx 64 0.8 0 1 0 1 7 "0" 1 2 3
 *
 * The arguments: the graph, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, end ids in one
 * word with spaces between them, and the prompt's ids.
 */
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>

static const OrtApi* api;
static OrtMemoryInfo* memory;

static void check(OrtStatus* status) {
  if (status == NULL) return;
  fprintf(stderr, "%s\n", api->GetErrorMessage(status));
  exit(1);
}

/* The tensor's numbers stay where they are: they must live as long as it. */
static OrtValue* tensor(void* numbers, size_t bytes, ONNXTensorElementDataType type, int64_t count, size_t rank) {
  const int64_t sizes[] = {1, count};
  OrtValue* value = NULL;
  check(api->CreateTensorWithDataAsOrtValue(memory, numbers, bytes, sizes + 2 - rank, rank, type, &value));
  return value;
}

#define INTEGERS(numbers, count, rank) \
  tensor(numbers, (count) * sizeof(int64_t), ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, count, rank)
#define NUMBER(number) tensor(number, sizeof(float), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 1, 1)

int main(int count, char** words) {
  if (count < 11) return fprintf(stderr, "give a graph, eight settings and a prompt\n"), 2;
  int64_t *prompt = calloc(count, sizeof *prompt), ends[64], tokens = count - 10, end_count = 0;
  for (int i = 0; i < tokens; i++) prompt[i] = atoll(words[10 + i]);
  for (char *at = words[9], *next; end_count < 64; at = next, end_count++) {
    ends[end_count] = strtoll(at, &next, 10);
    if (next == at) break;
  }
  int64_t new_tokens = atoll(words[2]), top_k = atoll(words[4]), seed = atoll(words[8]);
  float temperature = atof(words[3]), top_p = atof(words[5]), min_p = atof(words[6]), penalty = atof(words[7]);

  OrtEnv* environment;
  OrtSessionOptions* options;
  OrtSession* session;
  api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (api == NULL) return fprintf(stderr, "the library is older than the header\n"), 1;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "generate", &environment));
  check(api->CreateSessionOptions(&options));
  check(api->CreateSession(environment, words[1], options, &session));
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));

  const char* names[] = {"input_ids", "max_new_tokens", "top_k", "seed", "end_ids",
                         "temperature", "top_p", "min_p", "repetition_penalty"};
  const OrtValue* values[] = {INTEGERS(prompt, tokens, 2), INTEGERS(&new_tokens, 1, 1), INTEGERS(&top_k, 1, 1),
                              INTEGERS(&seed, 1, 1),       INTEGERS(ends, end_count, 1), NUMBER(&temperature),
                              NUMBER(&top_p),              NUMBER(&min_p),              NUMBER(&penalty)};
  const char* output = "ids";
  OrtValue* ids = NULL;
  check(api->Run(session, NULL, names, values, 9, &output, 1, &ids));

  OrtTensorTypeAndShapeInfo* shape;
  int64_t* made;
  size_t new_count;
  check(api->GetTensorTypeAndShape(ids, &shape));
  check(api->GetTensorShapeElementCount(shape, &new_count));
  check(api->GetTensorMutableData(ids, (void**)&made));
  for (size_t i = 0; i < new_count; i++) printf(i ? " %lld" : "%lld", (long long)made[i]);
  printf("\n");
  return 0; /* what is left is released with the process; a longer one calls api->ReleaseValue and so on */
}

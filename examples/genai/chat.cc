// A chat in C++ with a bundle, by the C API of onnxruntime-genai: each line of standard input is a question, and
// Ctrl-C stops an answer. docs/apps.md has the commands that build and run it.
//
//   chat BUNDLE [MAX_NEW_TOKENS]

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>

// The package of Python has the library and no header: these are the functions of ort_genai_c.h that the chat calls.
extern "C" {
struct OgaResult;
struct OgaModel;
struct OgaTokenizer;
struct OgaTokenizerStream;
struct OgaSequences;
struct OgaGeneratorParams;
struct OgaGenerator;
const char* OgaResultGetError(const OgaResult*);
OgaResult* OgaCreateModel(const char* folder, OgaModel**);
OgaResult* OgaCreateTokenizer(const OgaModel*, OgaTokenizer**);
OgaResult* OgaCreateTokenizerStream(const OgaTokenizer*, OgaTokenizerStream**);
OgaResult* OgaTokenizerApplyChatTemplate(const OgaTokenizer*, const char* chat_template, const char* messages,
                                         const char* tools, bool add_generation_prompt, const char** text);
OgaResult* OgaTokenizerEncode(const OgaTokenizer*, const char* text, OgaSequences*);
OgaResult* OgaTokenizerStreamDecode(OgaTokenizerStream*, int32_t token, const char** text);
OgaResult* OgaCreateSequences(OgaSequences**);
size_t OgaSequencesGetSequenceCount(const OgaSequences*, size_t sequence);
OgaResult* OgaCreateGeneratorParams(const OgaModel*, OgaGeneratorParams**);
OgaResult* OgaGeneratorParamsSetSearchNumber(OgaGeneratorParams*, const char* name, double value);
OgaResult* OgaCreateGenerator(const OgaModel*, const OgaGeneratorParams*, OgaGenerator**);
OgaResult* OgaGenerator_AppendTokenSequences(OgaGenerator*, const OgaSequences*);
bool OgaGenerator_IsDone(OgaGenerator*);
OgaResult* OgaGenerator_GenerateNextToken(OgaGenerator*);
OgaResult* OgaGenerator_GetNextTokens(const OgaGenerator*, const int32_t** tokens, size_t* count);
void OgaDestroyResult(OgaResult*);
void OgaDestroyString(const char*);
void OgaDestroySequences(OgaSequences*);
void OgaDestroyTokenizerStream(OgaTokenizerStream*);
void OgaDestroyTokenizer(OgaTokenizer*);
void OgaDestroyGeneratorParams(OgaGeneratorParams*);
void OgaDestroyGenerator(OgaGenerator*);
void OgaDestroyModel(OgaModel*);
void OgaShutdown();
}

namespace {

volatile std::sig_atomic_t cancelled = 0;

void check(OgaResult* result) {
  if (result == nullptr) return;
  const std::string message = OgaResultGetError(result);
  OgaDestroyResult(result);
  throw std::runtime_error(message);
}

std::string quoted(const std::string& text) {  // as JSON
  std::string json = "\"";
  for (const char c : text) {
    char code[8];
    if (c == '"' || c == '\\') json += '\\';
    if (static_cast<unsigned char>(c) < 0x20)
      std::snprintf(code, sizeof code, "\\u%04x", c), json += code;
    else
      json += c;
  }
  return json + '"';
}

std::string answer(OgaModel* model, OgaTokenizer* tokenizer, const std::string& messages, double max_new_tokens) {
  const char* prompt = nullptr;
  check(OgaTokenizerApplyChatTemplate(tokenizer, nullptr, ("[" + messages + "]").c_str(), nullptr, true, &prompt));
  OgaSequences* ids = nullptr;
  check(OgaCreateSequences(&ids));
  check(OgaTokenizerEncode(tokenizer, prompt, ids));
  OgaDestroyString(prompt);
  OgaGeneratorParams* settings = nullptr;
  check(OgaCreateGeneratorParams(model, &settings));
  const auto prompt_tokens = static_cast<double>(OgaSequencesGetSequenceCount(ids, 0));
  check(OgaGeneratorParamsSetSearchNumber(settings, "max_length", prompt_tokens + max_new_tokens));
  OgaGenerator* generator = nullptr;
  check(OgaCreateGenerator(model, settings, &generator));
  check(OgaGenerator_AppendTokenSequences(generator, ids));
  OgaTokenizerStream* stream = nullptr;
  check(OgaCreateTokenizerStream(tokenizer, &stream));
  std::string text;
  for (cancelled = 0; !cancelled && !OgaGenerator_IsDone(generator);) {
    check(OgaGenerator_GenerateNextToken(generator));
    const int32_t* tokens = nullptr;
    size_t count = 0;
    check(OgaGenerator_GetNextTokens(generator, &tokens, &count));
    const char* piece = nullptr;  // the stream owns it
    check(OgaTokenizerStreamDecode(stream, tokens[0], &piece));
    text += piece;
    std::cout << piece << std::flush;
  }
  std::cout << (cancelled ? " (stopped)\n" : "\n") << std::flush;
  OgaDestroyTokenizerStream(stream);
  OgaDestroyGenerator(generator);
  OgaDestroyGeneratorParams(settings);
  OgaDestroySequences(ids);
  return text;
}

}  // namespace

int main(int count, char** words) try {
  if (count < 2) throw std::runtime_error("give the folder of a bundle");
  const double max_new_tokens = count > 2 ? std::atof(words[2]) : 256;
  setenv("ORT_DISABLE_TELEMETRY", "1", 1);
  OgaModel* model = nullptr;
  check(OgaCreateModel(words[1], &model));
  OgaTokenizer* tokenizer = nullptr;
  check(OgaCreateTokenizer(model, &tokenizer));
  struct sigaction stop{};  // without SA_RESTART, so that Ctrl-C at the prompt ends the input
  stop.sa_handler = [](int) { cancelled = 1; };
  sigaction(SIGINT, &stop, nullptr);
  std::string messages;
  for (std::string question; std::getline(std::cin, question);) {
    messages += (messages.empty() ? "" : ",") + std::string(R"({"role":"user","content":)") + quoted(question) + "}";
    const std::string text = answer(model, tokenizer, messages, max_new_tokens);
    messages += R"(,{"role":"assistant","content":)" + quoted(text) + "}";
  }
  OgaDestroyTokenizer(tokenizer);
  OgaDestroyModel(model);
  OgaShutdown();
  return 0;
} catch (const std::exception& error) {
  std::cerr << "chat: " << error.what() << "\n";
  return 2;
}

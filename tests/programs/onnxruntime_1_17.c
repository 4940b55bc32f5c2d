/*
 * The symbols of onnxruntime 1.17's library, which its binding for Java is linked against, out of the library in
 * $ONNXRUNTIME: linked as libonnxruntime.so.1.17.0 with these symbols of version VERS_1.17.0.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static void* symbol(const char* name) {
  void* library = dlopen(getenv("ONNXRUNTIME"), RTLD_NOW);
  void* found = library == NULL ? NULL : dlsym(library, name);
  if (found == NULL) fprintf(stderr, "%s\n", dlerror()), exit(1);
  return found;
}

const void* OrtGetApiBase(void) { return ((const void* (*)(void))symbol("OrtGetApiBase"))(); }

void* OrtSessionOptionsAppendExecutionProvider_CPU(void* options, int arena) {
  return ((void* (*)(void*, int))symbol("OrtSessionOptionsAppendExecutionProvider_CPU"))(options, arena);
}

/* ONNX Runtime through its C interface: the very library of the onnxruntime wheel that the check scored the golden pairs
 * with. The interface is a table of functions to which releases only append, so a function is its place in the table. */
#include "session.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LIBRARY "TICKSERVE_BACKEND_ONNXRUNTIME"
#define API_VERSION 16 /* any release since 1.16 hands out this table */
#define ONLY_ERRORS 3
#define SEQUENTIAL 0
#define ONNX_FLOAT 1
#define ONNX_INT64 7
#define DEVICE_ALLOCATOR 0
#define MEMORY_DEFAULT 0

typedef struct OrtStatus OrtStatus;
typedef void *const *Table; /* OrtApi */
typedef struct {
  Table (*get_api)(uint32_t version);
  const char *(*get_version)(void);
} OrtApiBase;

enum {
  GET_ERROR_MESSAGE = 2,
  CREATE_ENV = 3,
  CREATE_SESSION_FROM_ARRAY = 8,
  RUN = 9,
  CREATE_SESSION_OPTIONS = 10,
  SET_EXECUTION_MODE = 13,
  SET_LOG_SEVERITY = 22,
  SET_GRAPH_LEVEL = 23,
  SET_INTRA_THREADS = 24,
  SET_INTER_THREADS = 25,
  CREATE_TENSOR_WITH_DATA = 49,
  CREATE_CPU_MEMORY_INFO = 69,
  RELEASE_STATUS = 93,
  RELEASE_SESSION = 95,
  RELEASE_VALUE = 96,
  RELEASE_SESSION_OPTIONS = 100,
  ADD_CONFIG_ENTRY = 130,
};

typedef const char *(*GetErrorMessage)(const OrtStatus *status);
typedef OrtStatus *(*CreateEnv)(int severity, const char *name, void **env);
typedef OrtStatus *(*CreateSessionFromArray)(void *env, const void *graph, size_t bytes, void *options, void **session);
typedef OrtStatus *(*Run)(
    void *session, const void *options, const char *const *in_names, void *const *in, size_t inputs,
    const char *const *out_names, size_t outputs, void **out);
typedef OrtStatus *(*CreateSessionOptions)(void **options);
typedef OrtStatus *(*SetNumber)(void *options, int value);
typedef OrtStatus *(*AddConfigEntry)(void *options, const char *key, const char *value);
typedef OrtStatus *(*CreateTensorWithData)(
    void *memory, void *data, size_t bytes, const int64_t *shape, size_t rank, int type, void **value);
typedef OrtStatus *(*CreateCpuMemoryInfo)(int allocator, int kind, void **memory);
typedef void (*Release)(void *object);

struct Session {
  const Version *version;
  void *session;
  const char *in_names[MOST_TENSORS], *out_names[MOST_TENSORS];
};

/* Of the process: ONNX Runtime has one environment, and it stays. */
static struct {
  Table api;
  void *env, *memory;
  char reason[600];
} runtime;
static pthread_once_t once = PTHREAD_ONCE_INIT;

#define CALL(type, place) ((type)runtime.api[place])

/* The first line of the reason, which is what a caller may see; NULL where all went well. */
static TRITONSERVER_Error *of_status(OrtStatus *status, int code, const char *what) {
  if (status == NULL) return NULL;
  char message[400];
  snprintf(message, sizeof message, "%s: %.200s", what, CALL(GetErrorMessage, GET_ERROR_MESSAGE)(status));
  message[strcspn(message, "\n")] = 0;
  CALL(Release, RELEASE_STATUS)((void *)status);
  return TRITONSERVER_ErrorNew(code, message);
}

static void open_runtime(void) {
  const char *path = getenv(LIBRARY);
  void *library = path == NULL ? NULL : dlopen(path, RTLD_NOW | RTLD_LOCAL);
  OrtApiBase *(*base)(void) = library == NULL ? NULL : (OrtApiBase * (*)(void)) dlsym(library, "OrtGetApiBase");
  runtime.api = base == NULL ? NULL : base()->get_api(API_VERSION);
  if (runtime.api == NULL) {
    const char *why = path == NULL ? LIBRARY " has to name it" : dlerror();
    snprintf(runtime.reason, sizeof runtime.reason, "cannot load ONNX Runtime: %.500s", why ? why : "another interface");
    return;
  }
  TRITONSERVER_Error *error =
      of_status(CALL(CreateEnv, CREATE_ENV)(ONLY_ERRORS, "tickserve", &runtime.env), ERROR_INTERNAL, "ONNX Runtime");
  if (error == NULL)
    error = of_status(
        CALL(CreateCpuMemoryInfo, CREATE_CPU_MEMORY_INFO)(DEVICE_ALLOCATOR, MEMORY_DEFAULT, &runtime.memory),
        ERROR_INTERNAL, "ONNX Runtime");
  if (error != NULL) {
    snprintf(runtime.reason, sizeof runtime.reason, "%.500s", TRITONSERVER_ErrorMessage(error));
    TRITONSERVER_ErrorDelete(error);
  }
}

/* As the Python backend's session: the numbers are to be the same. */
static OrtStatus *set_options(void *options, const Version *version) {
  const struct {
    int place, value;
  } numbers[] = {
      {SET_EXECUTION_MODE, SEQUENTIAL},
      {SET_LOG_SEVERITY, ONLY_ERRORS},
      {SET_GRAPH_LEVEL, version->graph_level},
      {SET_INTRA_THREADS, version->intra_threads},
      {SET_INTER_THREADS, version->inter_threads},
  };
  for (size_t index = 0; index < sizeof numbers / sizeof numbers[0]; index++) {
    OrtStatus *status = CALL(SetNumber, numbers[index].place)(options, numbers[index].value);
    if (status != NULL) return status;
  }
  const struct {
    const char *key, *value;
  } entries[] = {
      /* Waiting threads that spin would take the core from Triton's own. */
      {"session.intra_op.allow_spinning", "0"},
      /* Without it AVX2 without VNNI adds products of 8-bit numbers in 16 bits, and cuts off what is more. */
      {"session.x64quantprecision", "1"},
  };
  for (size_t index = 0; index < sizeof entries / sizeof entries[0]; index++) {
    OrtStatus *status = CALL(AddConfigEntry, ADD_CONFIG_ENTRY)(options, entries[index].key, entries[index].value);
    if (status != NULL) return status;
  }
  return NULL;
}

TRITONSERVER_Error *open_session(Session **opened, const Version *version) {
  pthread_once(&once, open_runtime);
  if (runtime.reason[0]) return TRITONSERVER_ErrorNew(ERROR_INTERNAL, runtime.reason);
  Session *session = calloc(1, sizeof *session);
  if (session == NULL) return TRITONSERVER_ErrorNew(ERROR_INTERNAL, "no memory for a session");
  session->version = version;
  for (uint32_t index = 0; index < version->inputs; index++) session->in_names[index] = version->input[index].name;
  for (uint32_t index = 0; index < version->outputs; index++) session->out_names[index] = version->output[index].name;
  void *options = NULL;
  OrtStatus *status = CALL(CreateSessionOptions, CREATE_SESSION_OPTIONS)(&options);
  if (status == NULL) status = set_options(options, version);
  if (status == NULL)
    status = CALL(CreateSessionFromArray, CREATE_SESSION_FROM_ARRAY)(
        runtime.env, version->graph, version->graph_bytes, options, &session->session);
  if (options != NULL) CALL(Release, RELEASE_SESSION_OPTIONS)(options);
  TRITONSERVER_Error *error = of_status(status, ERROR_INVALID_ARG, "ONNX Runtime cannot load model.onnx");
  if (error == NULL)
    *opened = session;
  else
    free(session);
  return error;
}

/* Values over buffers that are ours, so that a run copies nothing. */
static OrtStatus *wrap(void **values, const Tensor *tensors, uint32_t count, int64_t rows, void *const *buffers) {
  for (uint32_t index = 0; index < count; index++) {
    const Tensor *tensor = &tensors[index];
    int64_t shape[MOST_RANK];
    memcpy(shape, tensor->shape, sizeof shape);
    shape[0] = rows;
    OrtStatus *status = CALL(CreateTensorWithData, CREATE_TENSOR_WITH_DATA)(
        runtime.memory, buffers[index], tensor->row_bytes * (size_t)rows, shape, tensor->rank,
        tensor->type == TYPE_FP32 ? ONNX_FLOAT : ONNX_INT64, &values[index]);
    if (status != NULL) return status;
  }
  return NULL;
}

static void release(void **values, uint32_t count) {
  for (uint32_t index = 0; index < count; index++)
    if (values[index] != NULL) CALL(Release, RELEASE_VALUE)(values[index]);
}

TRITONSERVER_Error *score(Session *session, int64_t rows, void *const *in, void *const *out) {
  const Version *version = session->version;
  void *inputs[MOST_TENSORS] = {NULL}, *outputs[MOST_TENSORS] = {NULL};
  OrtStatus *status = wrap(inputs, version->input, version->inputs, rows, in);
  if (status == NULL) status = wrap(outputs, version->output, version->outputs, rows, out);
  if (status == NULL)
    status = CALL(Run, RUN)(
        session->session, NULL, session->in_names, inputs, version->inputs, session->out_names, version->outputs, outputs);
  release(inputs, version->inputs);
  release(outputs, version->outputs);
  return of_status(status, ERROR_INVALID_ARG, "cannot score this request");
}

void close_session(Session *session) {
  CALL(Release, RELEASE_SESSION)(session->session);
  free(session);
}

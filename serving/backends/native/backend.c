/* Triton's `onnxruntime` backend for a machine without NVIDIA's, in the server's own process: no hop to a Python process
 * and back for a request (`python -m benchmarks.backends` prints what that costs). It serves what the check
 * (version.c) lets through and honours nothing on its own account. Letters: R requests of one batch, B rows of them. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "session.h"

typedef struct {
  void *bytes;
  size_t room;
} Buffer;

/* One instance: Triton calls it from one thread at a time. */
typedef struct {
  TRITONBACKEND_ModelInstance *triton;
  const Version *version;
  Session *session;
  Buffer in[MOST_TENSORS], out[MOST_TENSORS];
} Instance;

#define RETURN_IF(call)                       \
  do {                                        \
    TRITONSERVER_Error *error_ = (call);      \
    if (error_ != NULL) return error_;        \
  } while (0)

static uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void forget(TRITONSERVER_Error *error) {
  if (error != NULL) TRITONSERVER_ErrorDelete(error);
}

static TRITONSERVER_Error *make_room(Buffer *buffer, size_t bytes) {
  if (buffer->room >= bytes) return NULL; /* bytes of a batch: rows are few, and a row's bytes did not overflow */
  void *grown = NULL;
  if (posix_memalign(&grown, 64, bytes) != 0) return TRITONSERVER_ErrorNew(ERROR_INTERNAL, "no memory for a batch");
  free(buffer->bytes);
  buffer->bytes = grown;
  buffer->room = bytes;
  return NULL;
}

EXPORTED TRITONSERVER_Error *TRITONBACKEND_Initialize(TRITONBACKEND_Backend *backend) {
  (void)backend;
  uint32_t major, minor;
  RETURN_IF(TRITONBACKEND_ApiVersion(&major, &minor));
  if (major == BACKEND_API_MAJOR) return NULL;
  return TRITONSERVER_ErrorNew(ERROR_UNSUPPORTED, "this server's backend interface has another major version");
}

EXPORTED TRITONSERVER_Error *TRITONBACKEND_ModelInitialize(TRITONBACKEND_Model *model) {
  TRITONSERVER_Message *message;
  const char *config, *location;
  size_t config_bytes;
  uint64_t number;
  int kind;
  RETURN_IF(TRITONBACKEND_ModelRepository(model, &kind, &location));
  RETURN_IF(TRITONBACKEND_ModelVersion(model, &number));
  RETURN_IF(TRITONBACKEND_ModelConfig(model, 1, &message));
  Version *version = calloc(1, sizeof *version);
  TRITONSERVER_Error *error = version ? NULL : TRITONSERVER_ErrorNew(ERROR_INTERNAL, "no memory for a version");
  if (error == NULL) error = TRITONSERVER_MessageSerializeToJson(message, &config, &config_bytes);
  if (error == NULL) error = check_version(version, location, number, config, config_bytes);
  forget(TRITONSERVER_MessageDelete(message));
  if (error == NULL) error = TRITONBACKEND_ModelSetState(model, version);
  if (error != NULL && version != NULL) free_version(version);
  if (error != NULL) free(version);
  return error;
}

EXPORTED TRITONSERVER_Error *TRITONBACKEND_ModelFinalize(TRITONBACKEND_Model *model) {
  void *version;
  RETURN_IF(TRITONBACKEND_ModelState(model, &version));
  if (version != NULL) free_version(version);
  free(version);
  return NULL;
}

EXPORTED TRITONSERVER_Error *TRITONBACKEND_ModelInstanceInitialize(TRITONBACKEND_ModelInstance *triton) {
  TRITONBACKEND_Model *model;
  void *version;
  int kind;
  RETURN_IF(TRITONBACKEND_ModelInstanceKind(triton, &kind));
  if (kind != KIND_CPU)
    /* On a GPU host KIND_AUTO means the GPU; a silent fall back to the CPU would break the latency it was chosen for. */
    return TRITONSERVER_ErrorNew(
        ERROR_UNSUPPORTED, "instance kind: expected CPU, was GPU or another; serve.backend = \"python\" or NVIDIA's image can use a GPU");
  RETURN_IF(TRITONBACKEND_ModelInstanceModel(triton, &model));
  RETURN_IF(TRITONBACKEND_ModelState(model, &version));
  Instance *instance = calloc(1, sizeof *instance);
  if (instance == NULL) return TRITONSERVER_ErrorNew(ERROR_INTERNAL, "no memory for an instance");
  instance->triton = triton;
  instance->version = version;
  TRITONSERVER_Error *error = open_session(&instance->session, version);
  if (error == NULL) error = TRITONBACKEND_ModelInstanceSetState(triton, instance);
  if (error != NULL) {
    if (instance->session != NULL) close_session(instance->session);
    free(instance);
  }
  return error;
}

EXPORTED TRITONSERVER_Error *TRITONBACKEND_ModelInstanceFinalize(TRITONBACKEND_ModelInstance *triton) {
  void *state;
  RETURN_IF(TRITONBACKEND_ModelInstanceState(triton, &state));
  Instance *instance = state;
  if (instance == NULL) return NULL;
  close_session(instance->session);
  for (int index = 0; index < MOST_TENSORS; index++) {
    free(instance->in[index].bytes);
    free(instance->out[index].bytes);
  }
  free(instance);
  return NULL;
}

/* B of one request. Triton has held its shape against the configuration, but for a number of rows so large that it is
 * small again as 32 bits, which comes through over gRPC. */
static TRITONSERVER_Error *rows_of(const Version *version, TRITONBACKEND_Request *request, int64_t *rows) {
  TRITONBACKEND_Input *input;
  const int64_t *shape;
  RETURN_IF(TRITONBACKEND_RequestInput(request, version->input[0].name, &input));
  RETURN_IF(TRITONBACKEND_InputProperties(input, NULL, NULL, &shape, NULL, NULL, NULL));
  *rows = shape[0];
  if (*rows >= 1 && *rows <= version->most_rows) return NULL;
  return TRITONSERVER_ErrorNew(ERROR_INVALID_ARG, "cannot score this request: wrong number of rows");
}

/* One tensor of one request behind those before it. */
static TRITONSERVER_Error *copy_in(const Tensor *tensor, TRITONBACKEND_Request *request, int64_t rows, char *to) {
  TRITONBACKEND_Input *input;
  uint64_t bytes, left = tensor->row_bytes * (size_t)rows;
  uint32_t buffers;
  RETURN_IF(TRITONBACKEND_RequestInput(request, tensor->name, &input));
  RETURN_IF(TRITONBACKEND_InputProperties(input, NULL, NULL, NULL, NULL, &bytes, &buffers));
  if (bytes != left) return TRITONSERVER_ErrorNew(ERROR_INVALID_ARG, "a tensor's bytes do not match its shape");
  for (uint32_t index = 0; index < buffers; index++) {
    const void *from;
    int memory = MEMORY_CPU;
    int64_t memory_id = 0;
    RETURN_IF(TRITONBACKEND_InputBuffer(input, index, &from, &bytes, &memory, &memory_id));
    if (bytes > left || (memory != MEMORY_CPU && memory != MEMORY_CPU_PINNED))
      return TRITONSERVER_ErrorNew(ERROR_INVALID_ARG, "a tensor is not in this machine's memory");
    memcpy(to, from, bytes);
    to += bytes;
    left -= bytes;
  }
  return left ? TRITONSERVER_ErrorNew(ERROR_INVALID_ARG, "a tensor's bytes do not match its shape") : NULL;
}

/* Score `count` requests in one run; their outputs are then in `instance->out`, in order. */
static TRITONSERVER_Error *run(Instance *instance, TRITONBACKEND_Request **requests, uint32_t count, int64_t *total) {
  const Version *version = instance->version;
  void *in[MOST_TENSORS], *out[MOST_TENSORS];
  *total = 0;
  for (uint32_t index = 0; index < count; index++) {
    int64_t rows;
    RETURN_IF(rows_of(version, requests[index], &rows));
    *total += rows;
  }
  for (uint32_t each = 0; each < version->inputs; each++) {
    const Tensor *tensor = &version->input[each];
    RETURN_IF(make_room(&instance->in[each], tensor->row_bytes * (size_t)*total));
    char *to = in[each] = instance->in[each].bytes;
    for (uint32_t index = 0; index < count; index++) {
      int64_t rows;
      RETURN_IF(rows_of(version, requests[index], &rows));
      RETURN_IF(copy_in(tensor, requests[index], rows, to));
      to += tensor->row_bytes * (size_t)rows;
    }
  }
  for (uint32_t each = 0; each < version->outputs; each++) {
    RETURN_IF(make_room(&instance->out[each], version->output[each].row_bytes * (size_t)*total));
    out[each] = instance->out[each].bytes;
  }
  return score(instance->session, *total, in, out);
}

static TRITONSERVER_Error *copy_out(
    const Instance *instance, TRITONBACKEND_Response *response, const char *name, int64_t first, int64_t rows) {
  const Version *version = instance->version;
  for (uint32_t each = 0; each < version->outputs; each++) {
    const Tensor *tensor = &version->output[each];
    if (strcmp(tensor->name, name) != 0) continue;
    TRITONBACKEND_Output *output;
    int64_t shape[MOST_RANK], memory_id = 0;
    int memory = MEMORY_CPU;
    void *to;
    memcpy(shape, tensor->shape, sizeof shape);
    shape[0] = rows;
    size_t bytes = tensor->row_bytes * (size_t)rows;
    RETURN_IF(TRITONBACKEND_ResponseOutput(response, &output, name, tensor->type, shape, tensor->rank));
    RETURN_IF(TRITONBACKEND_OutputBuffer(output, &to, bytes, &memory, &memory_id));
    if (memory != MEMORY_CPU && memory != MEMORY_CPU_PINNED)
      return TRITONSERVER_ErrorNew(ERROR_UNSUPPORTED, "an output is wanted in memory that is not this machine's");
    memcpy(to, (const char *)instance->out[each].bytes + tensor->row_bytes * (size_t)first, bytes);
    return NULL;
  }
  return TRITONSERVER_ErrorNew(ERROR_INVALID_ARG, "the model has no such output");
}

/* Answer with the rows from `first` on, or with `error`, which is ended here. True when there were rows to answer with. */
static bool respond(
    const Instance *instance, TRITONBACKEND_Request *request, int64_t first, int64_t rows, TRITONSERVER_Error *error) {
  TRITONBACKEND_Response *response;
  TRITONSERVER_Error *lost = TRITONBACKEND_ResponseNew(&response, request);
  if (lost == NULL) {
    uint32_t wanted = 0;
    if (error == NULL) error = TRITONBACKEND_RequestOutputCount(request, &wanted);
    for (uint32_t index = 0; error == NULL && index < wanted; index++) {
      const char *name;
      error = TRITONBACKEND_RequestOutputName(request, index, &name);
      if (error == NULL) error = copy_out(instance, response, name, first, rows);
    }
    lost = TRITONBACKEND_ResponseSend(response, RESPONSE_FINAL, error);
  }
  bool answered = lost == NULL && error == NULL;
  forget(lost); /* nobody is there to be told */
  forget(error);
  return answered;
}

typedef struct {
  uint64_t start, compute_start, compute_end;
} Times;

/* Answer, count and let go of one request. */
static void finish(
    Instance *instance, TRITONBACKEND_Request *request, int64_t first, int64_t rows, Times times, TRITONSERVER_Error *error) {
  bool success = respond(instance, request, first, rows, error);
  forget(TRITONBACKEND_ModelInstanceReportStatistics(
      instance->triton, request, success, times.start, times.compute_start, times.compute_end, now_ns()));
  forget(TRITONBACKEND_RequestRelease(request, RELEASE_ALL));
}

static void report_batch(Instance *instance, int64_t rows, Times times) {
  forget(TRITONBACKEND_ModelInstanceReportBatchStatistics(
      instance->triton, (uint64_t)rows, times.start, times.compute_start, times.compute_end, now_ns()));
}

static TRITONSERVER_Error *timed_run(
    Instance *instance, TRITONBACKEND_Request **requests, uint32_t count, int64_t *total, Times *times) {
  times->start = times->compute_start = now_ns();
  TRITONSERVER_Error *error = run(instance, requests, count, total);
  times->compute_end = now_ns();
  return error;
}

EXPORTED TRITONSERVER_Error *TRITONBACKEND_ModelInstanceExecute(
    TRITONBACKEND_ModelInstance *triton, TRITONBACKEND_Request **requests, const uint32_t count) {
  void *state;
  RETURN_IF(TRITONBACKEND_ModelInstanceState(triton, &state));
  Instance *instance = state;
  Times times;
  int64_t total = 0;
  TRITONSERVER_Error *error = timed_run(instance, requests, count, &total, &times);
  if (error == NULL || count == 1) {
    if (error == NULL) report_batch(instance, total, times);
    for (int64_t index = 0, first = 0, rows = 0; index < count; index++, first += rows) {
      if (error == NULL) forget(rows_of(instance->version, requests[index], &rows)); /* `run` has read it already */
      finish(instance, requests[index], first, rows, times, error);
    }
    return NULL;
  }
  /* One bad request must not take its batch with it: score each alone. */
  forget(error);
  for (uint32_t index = 0; index < count; index++) {
    error = timed_run(instance, &requests[index], 1, &total, &times);
    if (error == NULL) report_batch(instance, total, times);
    finish(instance, requests[index], 0, total, times, error);
  }
  return NULL;
}

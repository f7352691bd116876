/* One served version as the check (serving/backends/served_version.py) hands it over: what to honour, and the graph. */
#ifndef TICKSERVE_VERSION_H
#define TICKSERVE_VERSION_H

#include <stddef.h>
#include <stdint.h>

#include "triton.h"

#define MOST_TENSORS 32
#define MOST_RANK 8
#define NAME_BYTES 256

typedef struct {
  char name[NAME_BYTES];
  int type;              /* TYPE_FP32 or TYPE_INT64 */
  uint32_t rank;         /* with the batch in front */
  int64_t shape[MOST_RANK]; /* shape[0] is the batch and set for each run */
  size_t row_bytes;
} Tensor;

typedef struct {
  int intra_threads, inter_threads, graph_level;
  int64_t most_rows; /* of one request */
  uint32_t inputs, outputs;
  Tensor input[MOST_TENSORS], output[MOST_TENSORS];
  unsigned char *graph; /* the bytes that were checked, and no other */
  size_t graph_bytes;
} Version;

/* Runs the check of version `number` in the model folder `location` for a model configured as `config` (JSON) says. It
 * verifies digests, signature of the graph and golden pairs. Returns NULL and fills `version`, or the reason. */
TRITONSERVER_Error *check_version(
    Version *version, const char *location, uint64_t number, const char *config, size_t config_bytes);

void free_version(Version *version);

#endif

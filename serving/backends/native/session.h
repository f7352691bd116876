/* One ONNX Runtime session: B rows in, B rows out, by the tensors of a Version. */
#ifndef TICKSERVE_SESSION_H
#define TICKSERVE_SESSION_H

#include "version.h"

typedef struct Session Session;

/* Raises nothing: returns NULL and fills `session`, or the reason. `version` has to outlive the session. */
TRITONSERVER_Error *open_session(Session **session, const Version *version);

/* Scores `rows` rows: `in[i]` holds rows * input[i].row_bytes, `out[i]` is filled with rows * output[i].row_bytes.
 * Returns NULL, or why these rows cannot be scored. One thread at a time. */
TRITONSERVER_Error *score(Session *session, int64_t rows, void *const *in, void *const *out);

void close_session(Session *session);

#endif

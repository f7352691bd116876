/* A version is checked by a Python process of its own, once per load: one place, in the language of the rest of the
 * house, knows what may be served. What it prints is what is honoured here: a few lines, then the graph's bytes. */
#include "version.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PYTHON "TICKSERVE_BACKEND_PYTHON"
#define CHECK "TICKSERVE_BACKEND_CHECK"
#define LIMIT "TICKSERVE_BACKEND_CHECK_LIMIT_S"
#define MOST_BYTES (1UL << 31)
#define REASON_BYTES 2000

extern char **environ;

typedef struct {
  unsigned char *bytes;
  size_t size;
} Text;

static TRITONSERVER_Error *internal(const char *what) {
  char message[300];
  snprintf(message, sizeof message, "the check of a version: %s: %s", what, strerror(errno));
  return TRITONSERVER_ErrorNew(ERROR_INTERNAL, message);
}

/* A file without a name that holds `size` bytes: the process reads it as its standard input and cannot block on us. */
static int as_file(const char *bytes, size_t size) {
  int file = memfd_create("config", MFD_CLOEXEC);
  if (file < 0) return -1;
  for (size_t written = 0; written < size;) {
    ssize_t more = write(file, bytes + written, size - written);
    if (more < 0 && errno == EINTR) continue;
    if (more <= 0) {
      close(file);
      return -1;
    }
    written += (size_t)more;
  }
  lseek(file, 0, SEEK_SET);
  return file;
}

static int64_t now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* 0 once there is something to read, or the end; -1 with errno ETIMEDOUT when `until_ms` has passed. */
static int wait_for(int from, int64_t until_ms) {
  struct pollfd one = {.fd = from, .events = POLLIN};
  for (;;) {
    int64_t left = until_ms - now_ms();
    int ready = left > 0 ? poll(&one, 1, left > 1000000 ? 1000000 : (int)left) : 0;
    if (ready > 0) return 0;
    if (ready < 0 && errno != EINTR) return -1;
    if (left <= 0) {
      errno = ETIMEDOUT;
      return -1;
    }
  }
}

static int read_all(int from, Text *text, int64_t until_ms) {
  size_t room = 0;
  for (;;) {
    if (wait_for(from, until_ms) != 0) return -1;
    if (text->size + 1 >= room) {
      room = room ? 2 * room : 1 << 16;
      unsigned char *grown = room > MOST_BYTES ? NULL : realloc(text->bytes, room);
      if (grown == NULL) {
        errno = ENOMEM;
        return -1;
      }
      text->bytes = grown;
    }
    ssize_t more = read(from, text->bytes + text->size, room - text->size - 1);
    if (more < 0 && errno == EINTR) continue;
    if (more < 0) return -1;
    if (more == 0) break;
    text->size += (size_t)more;
  }
  text->bytes[text->size] = 0;
  return 0;
}

static int start(pid_t *child, int input, int output, const char *location, uint64_t number) {
  char version[24];
  snprintf(version, sizeof version, "%llu", (unsigned long long)number);
  /* -I: nothing of the environment or of the working folder is imported; -B: nothing is written beside the sources. */
  char *const arguments[] = {getenv(PYTHON), "-I", "-B", getenv(CHECK), (char *)location, version, NULL};
  posix_spawn_file_actions_t files;
  posix_spawnattr_t attributes;
  sigset_t none, usual;
  sigemptyset(&none);
  sigfillset(&usual); /* what the server ignores is not for the check to ignore */
  posix_spawn_file_actions_init(&files);
  posix_spawnattr_init(&attributes);
  posix_spawn_file_actions_adddup2(&files, input, 0);
  posix_spawn_file_actions_adddup2(&files, output, 1);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  posix_spawnattr_setsigdefault(&attributes, &usual);
  posix_spawnattr_setsigmask(&attributes, &none);
  int failed = posix_spawn(child, arguments[0], &files, &attributes, arguments, environ);
  posix_spawn_file_actions_destroy(&files);
  posix_spawnattr_destroy(&attributes);
  errno = failed;
  return failed ? -1 : 0;
}

/* What the process printed, and how it ended (as waitpid says). */
static TRITONSERVER_Error *run(
    Text *said, int *ended, const char *location, uint64_t number, const char *config, size_t config_bytes) {
  double limit_s = getenv(LIMIT) == NULL ? 0 : atof(getenv(LIMIT));
  if (getenv(PYTHON) == NULL || getenv(CHECK) == NULL || !(limit_s > 0 && limit_s < 1e6))
    return TRITONSERVER_ErrorNew(ERROR_UNSUPPORTED, PYTHON ", " CHECK " and " LIMIT " have to say what to start");
  int64_t until_ms = now_ms() + (int64_t)(limit_s * 1000);
  int input = as_file(config, config_bytes), both[2];
  if (input < 0) return internal("its input");
  if (pipe2(both, O_CLOEXEC) != 0) {
    close(input);
    return internal("its output");
  }
  pid_t child;
  int started = start(&child, input, both[1], location, number);
  close(input);
  close(both[1]);
  int got = started == 0 ? read_all(both[0], said, until_ms) : -1;
  TRITONSERVER_Error *error = got == 0 ? NULL : internal(started == 0 ? "it says nothing more" : "cannot start it");
  close(both[0]);
  if (started == 0 && got != 0) kill(child, SIGKILL);
  pid_t waited = 0;
  while (started == 0 && (waited = waitpid(child, ended, 0)) < 0 && errno == EINTR) {
  }
  if (waited < 0 && error == NULL) error = internal("how it ended is not known");
  return error;
}

static int parse_tensor(const char *line, const char *kind, Tensor *tensor) {
  char type[8], format[32], side[8];
  int used = 0;
  snprintf(format, sizeof format, "%%7s %%%ds %%7s%%n", NAME_BYTES - 1);
  if (sscanf(line, format, side, tensor->name, type, &used) != 3 || strcmp(side, kind) != 0) return -1;
  if (strcmp(type, "FP32") != 0 && strcmp(type, "INT64") != 0) return -1;
  tensor->type = type[0] == 'F' ? TYPE_FP32 : TYPE_INT64;
  tensor->row_bytes = tensor->type == TYPE_FP32 ? 4 : 8;
  tensor->rank = 1;
  line += used;
  for (long long size; sscanf(line, "%lld%n", &size, &used) == 1; tensor->rank++, line += used) {
    if (tensor->rank == MOST_RANK || size < 1) return -1;
    tensor->shape[tensor->rank] = size;
    if (__builtin_mul_overflow(tensor->row_bytes, (size_t)size, &tensor->row_bytes)) return -1;
  }
  return 0;
}

static int parse_tensors(char **rest, const char *kind, uint32_t count, Tensor *tensors) {
  if (count < 1 || count > MOST_TENSORS) return -1;
  for (uint32_t index = 0; index < count; index++) {
    const char *line = strtok_r(NULL, "\n", rest);
    if (line == NULL || parse_tensor(line, kind, &tensors[index]) != 0) return -1;
  }
  return 0;
}

/* serving/backends/served_version.py: `handed_over` writes what this reads. */
static int parse(Version *version, Text *said) {
  unsigned char *blank = memmem(said->bytes, said->size, "\n\n", 2);
  if (blank == NULL) return -1;
  *blank = 0;
  unsigned char *graph = blank + 2;
  size_t graph_bytes = 0;
  char *rest, *line = strtok_r((char *)said->bytes, "\n", &rest);
  if (line == NULL ||
      sscanf(line, "served-version 1 threads %d %d level %d batch %" SCNd64 " inputs %u outputs %u graph %zu",
             &version->intra_threads, &version->inter_threads, &version->graph_level, &version->most_rows,
             &version->inputs, &version->outputs, &graph_bytes) != 7)
    return -1;
  if (parse_tensors(&rest, "input", version->inputs, version->input) != 0) return -1;
  if (parse_tensors(&rest, "output", version->outputs, version->output) != 0) return -1;
  if (graph_bytes != said->size - (size_t)(graph - said->bytes)) return -1;
  version->graph = malloc(graph_bytes ? graph_bytes : 1);
  if (version->graph == NULL) return -1;
  memcpy(version->graph, graph, graph_bytes);
  version->graph_bytes = graph_bytes;
  return 0;
}

TRITONSERVER_Error *check_version(
    Version *version, const char *location, uint64_t number, const char *config, size_t config_bytes) {
  Text said = {0};
  int ended = 0;
  TRITONSERVER_Error *error = run(&said, &ended, location, number, config, config_bytes);
  if (error == NULL && !(WIFEXITED(ended) && WEXITSTATUS(ended) == 0)) {
    char reason[REASON_BYTES];
    if (WIFSIGNALED(ended))
      snprintf(reason, sizeof reason, "the check of the version ended early, by signal %d", WTERMSIG(ended));
    else
      snprintf(reason, sizeof reason, "%.1900s", said.size ? (char *)said.bytes : "the check of the version ended early");
    error = TRITONSERVER_ErrorNew(ERROR_INVALID_ARG, reason);
  }
  if (error == NULL && parse(version, &said) != 0) {
    error = TRITONSERVER_ErrorNew(ERROR_INTERNAL, "the check of the version said something else than expected");
    free_version(version);
  }
  free(said.bytes);
  return error;
}

void free_version(Version *version) {
  free(version->graph);
  version->graph = NULL;
}

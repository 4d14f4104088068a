/* Fail the nth call of the system on files below a directory.
 *
 *   cc -shared -fPIC -O2 -o failing_calls.so failing_calls.c -ldl
 *   FAILING_CALLS=CONTROL LD_PRELOAD=failing_calls.so PROGRAM
 *
 * CONTROL is a file that all processes of the program map: which call fails, with which errno, and
 * how many there were. It sees what Python, Arrow, SentencePiece, TensorStore and Rust call alike.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_HANDLES 4096

struct control {
    atomic_long n;     /* the call that fails; 0: none is counted */
    atomic_long error; /* its errno */
    atomic_long count; /* calls so far */
    char call[64];     /* the name of the one that failed */
    char root[PATH_MAX];
};

static struct control *control;
static char is_below[MAX_HANDLES]; /* open files and directories below the root */

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void map_control(void) {
    const char *path = getenv("FAILING_CALLS");
    int handle = path ? REAL(open)(path, O_RDWR) : -1;
    if (handle < 0) return;
    void *found = mmap(0, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0);
    if (found != MAP_FAILED) control = found;
    REAL(close)(handle);
}

static int concerns_handle(int handle) {
    return handle >= 0 && handle < MAX_HANDLES && is_below[handle];
}

static int concerns(int directory, const char *path) {
    char whole[2 * PATH_MAX];
    if (!control || !control->n || !path) return 0;
    if (path[0] != '/') {
        if (directory != AT_FDCWD) return concerns_handle(directory);
        if (!getcwd(whole, PATH_MAX)) return 0;
        strcat(whole, "/");
        strncat(whole, path, PATH_MAX - 1);
        path = whole;
    }
    size_t length = strlen(control->root);
    return !strncmp(path, control->root, length) && (path[length] == '/' || !path[length]);
}

static int fails(int is_concerned, const char *name) {
    if (!is_concerned || !control || !control->n) return 0;
    if (atomic_fetch_add(&control->count, 1) + 1 != control->n) return 0;
    strncpy(control->call, name, sizeof control->call - 1);
    errno = control->error;
    return 1;
}

static int keep(int handle, int is_concerned) {
    if (handle >= 0 && handle < MAX_HANDLES) is_below[handle] = is_concerned;
    return handle;
}

#define OPEN(name)                                                                   \
    int name(const char *path, int flags, ...) {                                     \
        va_list more;                                                                \
        va_start(more, flags);                                                       \
        mode_t mode = va_arg(more, mode_t);                                          \
        va_end(more);                                                                \
        int is_concerned = concerns(AT_FDCWD, path);                                 \
        if (fails(is_concerned, "open")) return -1;                                  \
        return keep(REAL(name)(path, flags, mode), is_concerned);                    \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                 \
    int name(int directory, const char *path, int flags, ...) {                      \
        va_list more;                                                                \
        va_start(more, flags);                                                       \
        mode_t mode = va_arg(more, mode_t);                                          \
        va_end(more);                                                                \
        int is_concerned = concerns(directory, path);                                \
        if (fails(is_concerned, "open")) return -1;                                  \
        return keep(REAL(name)(directory, path, flags, mode), is_concerned);         \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                  \
    FILE *name(const char *path, const char *mode) {                                 \
        int is_concerned = concerns(AT_FDCWD, path);                                 \
        if (fails(is_concerned, "open")) return 0;                                   \
        FILE *file = REAL(name)(path, mode);                                         \
        if (file) keep(fileno(file), is_concerned);                                  \
        return file;                                                                 \
    }
FOPEN(fopen)
FOPEN(fopen64)

DIR *opendir(const char *path) {
    return fails(concerns(AT_FDCWD, path), "opendir") ? 0 : REAL(opendir)(path);
}

int close(int handle) {
    keep(handle, 0);
    return REAL(close)(handle);
}

/* of an open file */
#define ON_HANDLE(type, name, parameters, arguments)                                 \
    type name parameters {                                                           \
        return fails(concerns_handle(handle), #name) ? -1 : REAL(name) arguments;    \
    }
ON_HANDLE(ssize_t, read, (int handle, void *data, size_t n), (handle, data, n))
ON_HANDLE(ssize_t, pread, (int handle, void *data, size_t n, off_t at), (handle, data, n, at))
ON_HANDLE(ssize_t, pread64, (int handle, void *data, size_t n, off64_t at), (handle, data, n, at))
ON_HANDLE(ssize_t, write, (int handle, const void *data, size_t n), (handle, data, n))
ON_HANDLE(ssize_t, writev, (int handle, const struct iovec *data, int n), (handle, data, n))
ON_HANDLE(ssize_t, pwrite, (int handle, const void *data, size_t n, off_t at),
          (handle, data, n, at))
ON_HANDLE(ssize_t, pwrite64, (int handle, const void *data, size_t n, off64_t at),
          (handle, data, n, at))
ON_HANDLE(int, fsync, (int handle), (handle))
ON_HANDLE(int, fdatasync, (int handle), (handle))
ON_HANDLE(int, ftruncate, (int handle, off_t n), (handle, n))
ON_HANDLE(int, ftruncate64, (int handle, off64_t n), (handle, n))

/* of one name */
#define ON_NAME(name, parameters, arguments)                                         \
    int name parameters {                                                            \
        return fails(concerns(AT_FDCWD, path), #name) ? -1 : REAL(name) arguments;   \
    }
ON_NAME(unlink, (const char *path), (path))
ON_NAME(rmdir, (const char *path), (path))
ON_NAME(mkdir, (const char *path, mode_t mode), (path, mode))
ON_NAME(rename, (const char *path, const char *to), (path, to))
ON_NAME(link, (const char *path, const char *to), (path, to))
ON_NAME(truncate64, (const char *path, off64_t n), (path, n))
ON_NAME(stat, (const char *path, struct stat *found), (path, found))
ON_NAME(stat64, (const char *path, struct stat64 *found), (path, found))

/* of a name in an open directory */
#define IN_DIRECTORY(name, parameters, arguments)                                    \
    int name parameters {                                                            \
        return fails(concerns(directory, path), #name) ? -1 : REAL(name) arguments;  \
    }
IN_DIRECTORY(unlinkat, (int directory, const char *path, int flags), (directory, path, flags))
IN_DIRECTORY(mkdirat, (int directory, const char *path, mode_t mode), (directory, path, mode))
IN_DIRECTORY(renameat, (int directory, const char *path, int to_directory, const char *to),
             (directory, path, to_directory, to))

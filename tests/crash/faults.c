// Counts this process's calls that change files under a folder, and lets a fault happen at one of them (LD_PRELOAD).
// Kinds: "kill" (half of a write is done, then SIGKILL), "interrupt" (Ctrl-C), "full" (half of a write is done, from
// then on nothing has space), "error" (this call alone fails), "vanish" (the folder is renamed to FOLDER.gone), "clock"
// (from then on it is ten years later).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char folder[PATH_MAX], kind[16];
static long calls, at;

void faults_arm(const char* in, long number, const char* what) {
    snprintf(kind, sizeof kind, "%s", what);
    at = number;
    calls = 0;
    snprintf(folder, sizeof folder, "%s", in);
}

long faults_calls(void) { return calls; }

static int is_kind(const char* what) { return strcmp(kind, what) == 0; }

// Relative paths come with the descriptor of a folder that is being removed.
static int is_inside(const char* path) {
    return folder[0] && (path[0] != '/' || strncmp(path, folder, strlen(folder)) == 0);
}

static int is_open_inside(int handle) {
    char link[32], path[PATH_MAX] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    return folder[0] && readlink(link, path, sizeof path - 1) > 0 && path[0] == '/' && is_inside(path);
}

// Counts a call; returns the error that it fails with. `half` is true where a write must do half of its work first.
static int fault(int takes_space, int* half) {
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    *half = number == at && (is_kind("kill") || is_kind("full"));
    if (is_kind("full")) return number >= at && takes_space ? ENOSPC : 0;
    if (number != at) return 0;
    if (is_kind("interrupt")) kill(getpid(), SIGINT);
    if (is_kind("vanish")) {
        char gone[PATH_MAX + 8];
        snprintf(gone, sizeof gone, "%s.gone", folder);
        int (*real)(const char*, const char*) = dlsym(RTLD_NEXT, "rename");
        real(folder, gone);
    }
    return is_kind("error") ? EIO : 0;
}

static void die_if_killed(int half) {
    if (half && is_kind("kill")) kill(getpid(), SIGKILL);
}

int clock_gettime(clockid_t clock, struct timespec* now) {
    static int (*real)(clockid_t, struct timespec*);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    if (clock == CLOCK_REALTIME && is_kind("clock") && calls >= at) now->tv_sec += 10 * 365 * 24 * 3600;
    return code;
}

// A function with a path; those that make something take space.
#define CHANGE(type, name, inside, takes_space, parameters, arguments) \
    type name parameters {                                             \
        static type(*real) parameters;                                 \
        if (!real) real = dlsym(RTLD_NEXT, #name);                     \
        if (inside) {                                                  \
            int half, code = fault(takes_space, &half);                \
            die_if_killed(half);                                       \
            if (code) return errno = code, -1;                         \
        }                                                              \
        return real arguments;                                         \
    }

CHANGE(int, mkdir, is_inside(path), 1, (const char* path, mode_t mode), (path, mode))
CHANGE(int, mkdirat, is_inside(path), 1, (int base, const char* path, mode_t mode), (base, path, mode))
CHANGE(int, chmod, is_inside(path), 0, (const char* path, mode_t mode), (path, mode))
CHANGE(int, fchmodat, is_inside(path), 0, (int base, const char* path, mode_t mode, int flags),
       (base, path, mode, flags))
CHANGE(int, unlink, is_inside(path), 0, (const char* path), (path))
CHANGE(int, unlinkat, is_inside(path), 0, (int base, const char* path, int flags), (base, path, flags))
CHANGE(int, rmdir, is_inside(path), 0, (const char* path), (path))
CHANGE(int, rename, is_inside(to), 0, (const char* from, const char* to), (from, to))
CHANGE(int, renameat, is_inside(to), 0, (int a, const char* from, int b, const char* to), (a, from, b, to))
CHANGE(int, renameat2, is_inside(to), 0, (int a, const char* from, int b, const char* to, unsigned flags),
       (a, from, b, to, flags))
CHANGE(int, fsync, is_open_inside(handle), 1, (int handle), (handle))
CHANGE(int, ftruncate, is_open_inside(handle), 1, (int handle, off_t size), (handle, size))
CHANGE(int, ftruncate64, is_open_inside(handle), 1, (int handle, off64_t size), (handle, size))
CHANGE(ssize_t, sendfile, is_open_inside(to), 1, (int to, int from, off_t* first, size_t size), (to, from, first, size))
CHANGE(ssize_t, sendfile64, is_open_inside(to), 1, (int to, int from, off64_t* first, size_t size),
       (to, from, first, size))

// Opening for writing, which may create a file.
#define OPEN(name, base_parameter, base_argument)                               \
    int name(base_parameter const char* path, int flags, ...) {                 \
        static int (*real)(base_parameter const char*, int, ...);               \
        if (!real) real = dlsym(RTLD_NEXT, #name);                              \
        va_list rest;                                                           \
        va_start(rest, flags);                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                           \
        if ((flags & O_ACCMODE) != O_RDONLY && is_inside(path)) {               \
            int half, code = fault(flags & O_CREAT, &half);                     \
            die_if_killed(half);                                                \
            if (code) return errno = code, -1;                                  \
        }                                                                       \
        return real(base_argument path, flags, mode);                           \
    }
#define NOTHING
#define BASE_PARAMETER int base,
#define BASE_ARGUMENT base,
OPEN(open, NOTHING, NOTHING)
OPEN(open64, NOTHING, NOTHING)
OPEN(openat, BASE_PARAMETER, BASE_ARGUMENT)
OPEN(openat64, BASE_PARAMETER, BASE_ARGUMENT)

ssize_t write(int handle, const void* data, size_t size) {
    static ssize_t (*real)(int, const void*, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    if (is_open_inside(handle)) {
        int half, code = fault(1, &half);
        ssize_t written = half && size > 1 ? real(handle, data, size / 2) : 0;
        die_if_killed(half);
        if (written) return written;
        if (code) return errno = code, -1;
    }
    return real(handle, data, size);
}

ssize_t writev(int handle, const struct iovec* parts, int count) {
    static ssize_t (*real)(int, const struct iovec*, int);
    if (!real) real = dlsym(RTLD_NEXT, "writev");
    if (is_open_inside(handle)) {
        int half, code = fault(1, &half);
        ssize_t written = half && count > 1 ? real(handle, parts, count / 2) : 0;
        die_if_killed(half);
        if (written) return written;
        if (code) return errno = code, -1;
    }
    return real(handle, parts, count);
}

size_t fwrite(const void* data, size_t size, size_t count, FILE* file) {
    static size_t (*real)(const void*, size_t, size_t, FILE*);
    if (!real) real = dlsym(RTLD_NEXT, "fwrite");
    if (is_open_inside(fileno(file))) {
        int half, code = fault(1, &half);
        size_t written = half ? real(data, size, count / 2, file) : 0;
        if (half) fflush(file);
        die_if_killed(half);
        if (code) return errno = code, written;
    }
    return real(data, size, count, file);
}

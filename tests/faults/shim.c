/* Stands between a program and the disk (LD_PRELOAD): counts and records every change under one
 * folder, and makes a chosen one fail. Python and SQLite both go through it.
 *
 * shim_arm(root, at, how, log): from now on, change number `at` (from 0; -1 for none) meets
 * `how`: 'k' the process dies before it, 'n' the disk is full from then on, 'i' it fails with
 * EIO, once. Every change that took place goes to the descriptor `log` (-1 for none).
 * shim_mark(text): a note among the changes. shim_count(): changes so far.
 *
 * A record: one byte for its kind, then path, second path and data, each after its length
 * (uint32), and an offset (uint64) between paths and data.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_length;
static long target = -1, count;
static char manner;
static int log_fd = -1, full;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(type, name, ...)                         \
    static type (*real)(__VA_ARGS__);                 \
    if (!real) real = dlsym(RTLD_NEXT, name)

static void out(const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    const char *at = data;
    while (size) {
        ssize_t done = real(log_fd, at, size);
        if (done <= 0) abort();
        at += done, size -= done;
    }
}

static void record(char kind, const char *a, const char *b, uint64_t offset, const void *data,
                   uint32_t size) {
    if (log_fd < 0) return;
    uint32_t la = strlen(a), lb = b ? strlen(b) : 0;
    out(&kind, 1);
    out(&la, 4), out(a, la);
    out(&lb, 4), out(b, lb);
    out(&offset, 8);
    out(&size, 4), out(data, size);
}

void shim_arm(const char *folder, long at, char how, int log) {
    strncpy(root, folder, sizeof root - 1);
    root_length = strlen(root);
    target = at, manner = how, log_fd = log, count = 0, full = 0;
}

void shim_mark(const char *text) { record('A', text, NULL, 0, NULL, 0); }

long shim_count(void) { return count; }

static int within(const char *path) {
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

/* The absolute path if it lies under root, else NULL. */
static const char *ours(int folder, const char *path, char *into) {
    if (!root_length || !path) return NULL;
    if (path[0] == '/') {
        snprintf(into, PATH_MAX, "%s", path);
    } else {
        char link[64];
        if (folder == AT_FDCWD) {
            if (!getcwd(into, PATH_MAX)) return NULL;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t n = readlink(link, into, PATH_MAX - 1);
            if (n < 0) return NULL;
            into[n] = 0;
        }
        size_t n = strlen(into);
        snprintf(into + n, PATH_MAX - n, "/%s", path);
    }
    return within(into) ? into : NULL;
}

static const char *ours_fd(int fd, char *into) {
    if (!root_length) return NULL;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, into, PATH_MAX - 1);
    if (n < 0) return NULL;
    into[n] = 0;
    return within(into) ? into : NULL;
}

/* Whether the change that is about to happen fails; errno is set. */
static int fails(char kind) {
    long number = count++;
    int takes_space = strchr("CWTMR", kind) != NULL;
    if (number == target) {
        if (manner == 'k') raise(SIGKILL);
        if (manner == 'n') {
            full = 1;
            if (takes_space || kind == 'S') { errno = ENOSPC; return 1; }
        }
        if (manner == 'i') { errno = EIO; return 1; }
    }
    if (full && takes_space) { errno = ENOSPC; return 1; }
    return 0;
}

#define GUARD(kind)                                             \
    pthread_mutex_lock(&lock);                                  \
    if (fails(kind)) { pthread_mutex_unlock(&lock); return -1; }
#define LEAVE(result)                                           \
    do { int kept = errno; pthread_mutex_unlock(&lock); errno = kept; return result; } while (0)

static int opened(int folder, const char *path, int flags, mode_t mode) {
    REAL(int, "openat64", int, const char *, int, ...);
    char full_path[PATH_MAX];
    const char *p = flags & (O_CREAT | O_TRUNC) ? ours(folder, path, full_path) : NULL;
    if (!p) return real(folder, path, flags, mode);
    struct stat s;
    int there = stat(p, &s) == 0;
    if (there && !(flags & O_TRUNC)) return real(folder, path, flags, mode);
    GUARD('C');
    int fd = real(folder, path, flags, mode);
    if (fd >= 0 && !there) record('C', p, NULL, 0, NULL, 0);
    if (fd >= 0 && there) record('T', p, NULL, 0, NULL, 0);
    LEAVE(fd);
}

#define MODE(flags)                                             \
    mode_t mode = 0;                                            \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                    \
        va_list rest;                                           \
        va_start(rest, flags);                                  \
        mode = va_arg(rest, mode_t);                            \
        va_end(rest);                                           \
    }

int open(const char *path, int flags, ...) { MODE(flags); return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags); return opened(AT_FDCWD, path, flags, mode); }
int openat(int f, const char *path, int flags, ...) { MODE(flags); return opened(f, path, flags, mode); }
int openat64(int f, const char *path, int flags, ...) { MODE(flags); return opened(f, path, flags, mode); }
int creat64(const char *path, mode_t mode) {
    return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    char path[PATH_MAX];
    const char *p = ours_fd(fd, path);
    if (!p) return real(fd, data, size, offset);
    GUARD('W');
    ssize_t done = real(fd, data, size, offset);
    if (done > 0) record('W', p, NULL, offset, data, done);
    LEAVE(done);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    return pwrite64(fd, data, size, offset);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    char path[PATH_MAX];
    const char *p = ours_fd(fd, path);
    if (!p) return real(fd, data, size);
    off64_t offset = lseek64(fd, 0, fcntl(fd, F_GETFL) & O_APPEND ? SEEK_END : SEEK_CUR);
    GUARD('W');
    ssize_t done = real(fd, data, size);
    if (done > 0) record('W', p, NULL, offset, data, done);
    LEAVE(done);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    char path[PATH_MAX];
    if (!ours_fd(fd, path)) return real(fd, parts, n);
    return n ? write(fd, parts[0].iov_base, parts[0].iov_len) : 0; /* as short writes do */
}

int ftruncate64(int fd, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    char path[PATH_MAX];
    const char *p = ours_fd(fd, path);
    if (!p) return real(fd, size);
    GUARD('T');
    int done = real(fd, size);
    if (!done) record('T', p, NULL, size, NULL, 0);
    LEAVE(done);
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

static int synced(int fd, int (*real)(int)) {
    char path[PATH_MAX];
    const char *p = ours_fd(fd, path);
    if (!p) return real(fd);
    GUARD('S');
    int done = real(fd);
    if (!done) record('S', p, NULL, 0, NULL, 0);
    LEAVE(done);
}
int fsync(int fd) { REAL(int, "fsync", int); return synced(fd, real); }
int fdatasync(int fd) { REAL(int, "fdatasync", int); return synced(fd, real); }

int renameat(int fa, const char *a, int fb, const char *b) {
    REAL(int, "renameat", int, const char *, int, const char *);
    char pa[PATH_MAX], pb[PATH_MAX];
    const char *from = ours(fa, a, pa), *to = ours(fb, b, pb);
    if (!from || !to) return real(fa, a, fb, b);
    GUARD('R');
    int done = real(fa, a, fb, b);
    if (!done) record('R', from, to, 0, NULL, 0);
    LEAVE(done);
}
int rename(const char *a, const char *b) { return renameat(AT_FDCWD, a, AT_FDCWD, b); }

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    char full_path[PATH_MAX];
    const char *p = ours(folder, path, full_path);
    if (!p) return real(folder, path, flags);
    GUARD('U');
    int done = real(folder, path, flags);
    if (!done) record('U', p, NULL, 0, NULL, 0);
    LEAVE(done);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    char full_path[PATH_MAX];
    const char *p = ours(folder, path, full_path);
    if (!p) return real(folder, path, mode);
    struct stat s;
    if (stat(p, &s) == 0) return real(folder, path, mode);
    GUARD('M');
    int done = real(folder, path, mode);
    if (!done) record('M', p, NULL, 0, NULL, 0);
    LEAVE(done);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

/* Makes the nth change to a file below `root` fail with `err`; with `sticky`, all later ones too.
 * Preloaded: what fails is the system call as the C library makes it, for Python and every library alike. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char root[PATH_MAX];
static char last[PATH_MAX + 64];
static atomic_long count;
static long nth;
static int err, sticky;

void fault_arm(const char *where, long at, int number, int stays) {
    strncpy(root, where, sizeof root - 1);
    last[0] = 0;
    nth = at, err = number, sticky = stays, count = 0;
}
long fault_disarm(void) { root[0] = 0; return count; }
const char *fault_last(void) { return last; }

static int below(const char *path) {
    size_t n = strlen(root);
    return n && strncmp(path, root, n) == 0 && (path[n] == '/' || !path[n]);
}
static int of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    return n > 0;
}
static int fails(const char *call, int dir, const char *name) {
    char path[PATH_MAX * 2];
    if (!root[0]) return 0;
    if (!name) { if (!of_fd(dir, path)) return 0; }
    else if (name[0] == '/' || dir == AT_FDCWD) { strncpy(path, name, PATH_MAX - 1); path[PATH_MAX - 1] = 0; }
    else { of_fd(dir, path); strcat(path, "/"); strncat(path, name, PATH_MAX - 1); }
    if (!below(path)) return 0;
    long n = atomic_fetch_add(&count, 1) + 1;
    if (nth && (n == nth || (sticky && n > nth))) {
        if (n == nth) snprintf(last, sizeof last, "%s %s", call, path);
        errno = err;
        return 1;
    }
    return 0;
}
#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define WRAP(type, name, params, args, dir, path) \
    type name params { REAL(name); return fails(#name, dir, path) ? (type)-1 : real args; }

WRAP(ssize_t, write, (int fd, const void *b, size_t n), (fd, b, n), fd, NULL)
WRAP(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), fd, NULL)
WRAP(ssize_t, copy_file_range, (int i, off64_t *a, int o, off64_t *b, size_t n, unsigned f), (i, a, o, b, n, f), o, NULL)
ssize_t sendfile64(int out, int in, off64_t *o, size_t n) {
    ssize_t (*real)(int, int, off64_t *, size_t) = dlsym(RTLD_NEXT, "sendfile64");
    return fails("sendfile", out, NULL) ? -1 : real(out, in, o, n);
}
ssize_t sendfile(int out, int in, off_t *o, size_t n) {
    ssize_t (*real)(int, int, off_t *, size_t) = dlsym(RTLD_NEXT, "sendfile");
    return fails("sendfile", out, NULL) ? -1 : real(out, in, o, n);
}
WRAP(int, fsync, (int fd), (fd), fd, NULL)
WRAP(int, fdatasync, (int fd), (fd), fd, NULL)
WRAP(int, ftruncate64, (int fd, off64_t n), (fd, n), fd, NULL)
WRAP(int, rename, (const char *a, const char *b), (a, b), AT_FDCWD, b)
WRAP(int, renameat, (int d, const char *a, int e, const char *b), (d, a, e, b), e, b)
WRAP(int, link, (const char *a, const char *b), (a, b), AT_FDCWD, b)
WRAP(int, linkat, (int d, const char *a, int e, const char *b, int f), (d, a, e, b, f), e, b)
WRAP(int, symlink, (const char *a, const char *b), (a, b), AT_FDCWD, b)
WRAP(int, symlinkat, (const char *a, int e, const char *b), (a, e, b), e, b)
WRAP(int, mkdir, (const char *p, mode_t m), (p, m), AT_FDCWD, p)
WRAP(int, mkdirat, (int d, const char *p, mode_t m), (d, p, m), d, p)
WRAP(int, unlink, (const char *p), (p), AT_FDCWD, p)
WRAP(int, unlinkat, (int d, const char *p, int f), (d, p, f), d, p)
WRAP(int, rmdir, (const char *p), (p), AT_FDCWD, p)

#define OPEN(name, extra, pass, dir) \
    int name(extra const char *p, int flags, ...) { \
        va_list v; va_start(v, flags); mode_t m = va_arg(v, mode_t); va_end(v); \
        int (*real)() = dlsym(RTLD_NEXT, #name); \
        return (flags & O_CREAT) && fails("create", dir, p) ? -1 : real(pass p, flags, m); }
#define COMMA ,
OPEN(open, , , AT_FDCWD)
OPEN(open64, , , AT_FDCWD)
OPEN(openat, int d COMMA, d COMMA, d)
OPEN(openat64, int d COMMA, d COMMA, d)

/* Locks that do not work, for the whole process: FAULT_FLOCK is an error number, or "both": two holders at once. */
int flock(int fd, int op) {
    REAL(flock);
    const char *how = getenv("FAULT_FLOCK");
    if (!how) return real(fd, op);
    if (!strcmp(how, "both")) return 0;
    errno = atoi(how);
    return -1;
}

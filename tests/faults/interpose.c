/* Fails, or dies, at the N-th system call on files under a folder: a library to be preloaded.
 *
 * Calls that name a path under one of the armed folders, or use a descriptor of a file there, are counted.
 * Built by tests/faults/trials.py with the compiler that the project needs anyway.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, SIGNAL, ONCE, EVER };

static char folder[PATH_MAX];
static size_t folder_length;
static atomic_long calls;
static long wanted;
static int mode, number, only_growing;

/* From now on: at call `at` send signal `what` (SIGNAL), or fail with errno `what`: once, or from then on.
 * `growing`: only calls that may take room on the disk fail. */
void fault_arm(const char *under, int how, long at, int what, int growing) {
    snprintf(folder, sizeof folder, "%s", under);
    folder_length = strlen(folder);
    wanted = at;
    number = what;
    only_growing = growing;
    atomic_store(&calls, 0);
    mode = how;
}

long fault_calls(void) { return atomic_load(&calls); }

static int is_under(const char *path) { return strncmp(path, folder, folder_length) == 0; }

static int names(int at, const char *path) {
    char base[PATH_MAX], link[64];
    if (mode == OFF || path == NULL) return 0;
    if (path[0] == '/') return is_under(path);
    snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
    ssize_t length = syscall(SYS_readlink, link, base, sizeof base - 1);
    if (length < 0) return 0;
    base[length] = 0;
    return is_under(base) || (folder_length == (size_t)length + 1 && is_under(strcat(base, "/")));
}

static int uses(int descriptor) {
    char path[PATH_MAX], link[64];
    if (mode == OFF || descriptor < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlink, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_under(path);
}

/* Whether this call is to fail, with errno set. */
static int fails(int counted, int grows) {
    if (!counted) return 0;
    long now = atomic_fetch_add(&calls, 1) + 1;
    if (mode == SIGNAL && now == wanted) kill(getpid(), number);
    int due = mode == ONCE ? now == wanted : mode == EVER && now >= wanted;
    if (!due || (only_growing && !grows)) return 0;
    errno = number;
    return 1;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, #name)
#define PATHS(type, name, declared, passed, at, path, grows) \
    type name declared { REAL(name); return fails(names(at, path), grows) ? (type)-1 : real passed; }
#define FILES(type, name, declared, passed, grows) \
    type name declared { REAL(name); return fails(uses(descriptor), grows) ? (type)-1 : real passed; }

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
        return fails(names(AT_FDCWD, path), flags & O_CREAT) ? -1 : real(path, flags, bits); \
    }
#define OPENS_AT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
        return fails(names(at, path), flags & O_CREAT) ? -1 : real(at, path, flags, bits); \
    }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

FILES(ssize_t, write, (int descriptor, const void *data, size_t size), (descriptor, data, size), 1)
FILES(ssize_t, pwrite, (int descriptor, const void *data, size_t size, off_t at), (descriptor, data, size, at), 1)
FILES(ssize_t, pwrite64, (int descriptor, const void *data, size_t size, off64_t at), (descriptor, data, size, at), 1)
FILES(ssize_t, writev, (int descriptor, const struct iovec *parts, int count), (descriptor, parts, count), 1)
FILES(ssize_t, pwritev, (int descriptor, const struct iovec *parts, int count, off_t at), (descriptor, parts, count, at), 1)
FILES(ssize_t, pwritev64, (int descriptor, const struct iovec *parts, int count, off64_t at), (descriptor, parts, count, at), 1)
FILES(ssize_t, read, (int descriptor, void *data, size_t size), (descriptor, data, size), 0)
FILES(ssize_t, pread, (int descriptor, void *data, size_t size, off_t at), (descriptor, data, size, at), 0)
FILES(ssize_t, pread64, (int descriptor, void *data, size_t size, off64_t at), (descriptor, data, size, at), 0)
FILES(ssize_t, preadv, (int descriptor, const struct iovec *parts, int count, off_t at), (descriptor, parts, count, at), 0)
FILES(ssize_t, preadv64, (int descriptor, const struct iovec *parts, int count, off64_t at), (descriptor, parts, count, at), 0)
FILES(int, close, (int descriptor), (descriptor), 0)
FILES(int, fsync, (int descriptor), (descriptor), 1)
FILES(int, fdatasync, (int descriptor), (descriptor), 1)
FILES(int, ftruncate, (int descriptor, off_t size), (descriptor, size), 0)
FILES(int, ftruncate64, (int descriptor, off64_t size), (descriptor, size), 0)
FILES(int, flock, (int descriptor, int operation), (descriptor, operation), 0)
FILES(off64_t, lseek64, (int descriptor, off64_t at, int from), (descriptor, at, from), 0)
FILES(int, fstat, (int descriptor, struct stat *found), (descriptor, found), 0)
FILES(int, fstat64, (int descriptor, struct stat64 *found), (descriptor, found), 0)
FILES(int, fchmod, (int descriptor, mode_t bits), (descriptor, bits), 0)
FILES(int, fstatvfs64, (int descriptor, struct statvfs64 *found), (descriptor, found), 0)

int posix_fallocate64(int descriptor, off64_t at, off64_t size) {
    REAL(posix_fallocate64);
    return fails(uses(descriptor), 1) ? errno : real(descriptor, at, size);
}
int posix_fallocate(int descriptor, off_t at, off_t size) {
    REAL(posix_fallocate);
    return fails(uses(descriptor), 1) ? errno : real(descriptor, at, size);
}

PATHS(int, mkdir, (const char *path, mode_t bits), (path, bits), AT_FDCWD, path, 1)
PATHS(int, mkdirat, (int at, const char *path, mode_t bits), (at, path, bits), at, path, 1)
PATHS(int, rmdir, (const char *path), (path), AT_FDCWD, path, 0)
PATHS(int, unlink, (const char *path), (path), AT_FDCWD, path, 0)
PATHS(int, unlinkat, (int at, const char *path, int flags), (at, path, flags), at, path, 0)
PATHS(int, rename, (const char *path, const char *to), (path, to), AT_FDCWD, path, 1)
PATHS(int, renameat, (int at, const char *path, int there, const char *to), (at, path, there, to), at, path, 1)
PATHS(int, utimensat, (int at, const char *path, const struct timespec *times, int flags), (at, path, times, flags), at, path, 0)
PATHS(int, chmod, (const char *path, mode_t bits), (path, bits), AT_FDCWD, path, 0)
PATHS(int, stat, (const char *path, struct stat *found), (path, found), AT_FDCWD, path, 0)
PATHS(int, stat64, (const char *path, struct stat64 *found), (path, found), AT_FDCWD, path, 0)
PATHS(int, lstat, (const char *path, struct stat *found), (path, found), AT_FDCWD, path, 0)
PATHS(int, lstat64, (const char *path, struct stat64 *found), (path, found), AT_FDCWD, path, 0)
PATHS(int, fstatat, (int at, const char *path, struct stat *found, int flags), (at, path, found, flags), at, path, 0)
PATHS(int, fstatat64, (int at, const char *path, struct stat64 *found, int flags), (at, path, found, flags), at, path, 0)
PATHS(int, statvfs64, (const char *path, struct statvfs64 *found), (path, found), AT_FDCWD, path, 0)
PATHS(ssize_t, readlink, (const char *path, char *buffer, size_t size), (path, buffer, size), AT_FDCWD, path, 0)

DIR *opendir(const char *path) {
    REAL(opendir);
    return fails(names(AT_FDCWD, path), 0) ? NULL : real(path);
}
DIR *fdopendir(int descriptor) {
    REAL(fdopendir);
    return fails(uses(descriptor), 0) ? NULL : real(descriptor);
}

/* Preloaded by tools/torture.py: the Nth call that changes the disk below a folder fails, or kills the process.

   gcc -shared -fPIC -O1 -o faults.so faults.c -ldl */
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
#include <unistd.h>

static char below[PATH_MAX];
static long target, calls;
static int error_number, only_once; /* error_number 0: SIGKILL */

void faults_arm(const char *folder, long number, int error, int once) {
    strncpy(below, folder, sizeof below - 1);
    target = number, error_number = error, only_once = once, calls = 0;
}

long faults_calls(void) { return calls; }

static int is_below(const char *path) {
    size_t length = strlen(below);
    return length && !strncmp(path, below, length) && (path[length] == '/' || !path[length]);
}

static int place_of(int folder, char *place) { /* the path of a descriptor, or of the working folder */
    char link[64];
    if (folder == AT_FDCWD) return getcwd(place, PATH_MAX) != NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, place, PATH_MAX - 1);
    if (length < 0) return 0;
    place[length] = 0;
    return 1;
}

static int counts(int folder, const char *path) {
    char place[PATH_MAX], whole[2 * PATH_MAX + 2];
    int before = errno, found;
    if (!below[0]) return 0;
    if (path && path[0] == '/') found = is_below(path);
    else if (!place_of(folder, place)) found = 0;
    else {
        snprintf(whole, sizeof whole, "%s/%s", place, path ? path : "");
        if (!path) whole[strlen(whole) - 1] = 0;
        found = is_below(whole);
    }
    errno = before;
    return found;
}

static int its_turn(void) {
    long number = __sync_add_and_fetch(&calls, 1);
    return target > 0 && (only_once ? number == target : number >= target);
}

static int fails(int folder, const char *path) {
    if (!counts(folder, path) || !its_turn()) return 0;
    if (!error_number) kill(getpid(), SIGKILL);
    errno = error_number;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & O_CREAT) { va_list rest; va_start(rest, flags); mode = va_arg(rest, int); va_end(rest); }

int open(const char *path, int flags, ...) {
    MODE(flags)
    return WRITES(flags) && fails(AT_FDCWD, path) ? -1 : REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags)
    return WRITES(flags) && fails(AT_FDCWD, path) ? -1 : REAL(open64)(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    MODE(flags)
    return WRITES(flags) && fails(folder, path) ? -1 : REAL(openat)(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags)
    return WRITES(flags) && fails(folder, path) ? -1 : REAL(openat64)(folder, path, flags, mode);
}

/* A kill during a write, or a full disk, leaves a part of the data written. */
ssize_t write(int file, const void *content, size_t size) {
    if (counts(file, NULL) && its_turn()) {
        if (!error_number || error_number == ENOSPC) REAL(write)(file, content, size / 2);
        if (!error_number) kill(getpid(), SIGKILL);
        errno = error_number;
        return -1;
    }
    return REAL(write)(file, content, size);
}
size_t fwrite(const void *content, size_t size, size_t count, FILE *file) {
    return fails(fileno(file), NULL) ? 0 : REAL(fwrite)(content, size, count, file);
}

#define ON_FILE(type, name, parameters, ...) \
    type name parameters { return fails(file, NULL) ? -1 : REAL(name)(__VA_ARGS__); }
ON_FILE(ssize_t, pwrite, (int file, const void *content, size_t size, off_t at), file, content, size, at)
ON_FILE(ssize_t, pwrite64, (int file, const void *content, size_t size, off64_t at), file, content, size, at)
ON_FILE(ssize_t, writev, (int file, const struct iovec *parts, int count), file, parts, count)
ON_FILE(int, ftruncate, (int file, off_t size), file, size)
ON_FILE(int, ftruncate64, (int file, off64_t size), file, size)
ON_FILE(int, fsync, (int file), file)
ON_FILE(int, fdatasync, (int file), file)
ON_FILE(int, fchmod, (int file, mode_t mode), file, mode)
ssize_t sendfile(int file, int from, off_t *at, size_t size);
ON_FILE(ssize_t, sendfile, (int file, int from, off_t *at, size_t size), file, from, at, size)
ssize_t sendfile64(int file, int from, off64_t *at, size_t size);
ON_FILE(ssize_t, sendfile64, (int file, int from, off64_t *at, size_t size), file, from, at, size)

#define ON_PATH(name, parameters, folder, ...) \
    int name parameters { return fails(folder, path) ? -1 : REAL(name)(__VA_ARGS__); }
ON_PATH(mkdir, (const char *path, mode_t mode), AT_FDCWD, path, mode)
ON_PATH(mkdirat, (int at, const char *path, mode_t mode), at, at, path, mode)
ON_PATH(rmdir, (const char *path), AT_FDCWD, path)
ON_PATH(unlink, (const char *path), AT_FDCWD, path)
ON_PATH(unlinkat, (int at, const char *path, int flags), at, at, path, flags)
ON_PATH(chmod, (const char *path, mode_t mode), AT_FDCWD, path, mode)
ON_PATH(rename, (const char *path, const char *other), AT_FDCWD, path, other)
ON_PATH(renameat, (int at, const char *path, int to, const char *other), at, at, path, to, other)
ON_PATH(renameat2, (int at, const char *path, int to, const char *other, unsigned flags), at, at, path, to, other, flags)

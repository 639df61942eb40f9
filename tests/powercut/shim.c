/* Records what a process asks of the files below one folder, for tests/powercut.

   Preloaded (LD_PRELOAD) into the recorded process; see recorder.py for the environment and the
   reader of the log. Every interposed call does the real thing through syscall(2) and appends one
   record to the log. Rules:

   - One mutex: a call that changes a file or a name holds it from before the real call until its
     record is out, so the log's order is the order in which the kernel did things.
   - A sync writes SYNC_BEGIN, lets go of the mutex while the kernel syncs, then writes SYNC_END.
     What is recorded before SYNC_BEGIN is complete by then, and durable from SYNC_END on; what
     another thread writes in between is not covered, as POSIX has it.
   - A write to an O_DSYNC or O_SYNC descriptor is recorded as WRITE, then as DURABLE for its own
     range only.
   - Files are named by inode, as names change. A descriptor belongs to the folder if /proc says
     so at the time of the call: no table of descriptors to keep, dup and fcntl need no hook.
   - sync_file_range promises nothing, so it is not hooked. Stores through mmap, copy_file_range,
     sendfile and stdio are not seen: the recorder compares the replayed log with the folder at
     the end and refuses a recording that lacks something.
   - open("/powercut-mark/TEXT") records TEXT as a mark of the program itself and fails (ENOENT).
   - A forked child and a started program are not recorded. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 1, MKDIR, TRUNCATE, WRITE, ALLOCATE, SYNC_BEGIN, SYNC_END, DURABLE, RENAME, UNLINK, LINK, MARK };

struct record {
    uint8_t op, mode; /* mode: of fallocate */
    uint16_t path_len, other_len, unused;
    uint64_t inode, offset, length, data_len;
};

static const char MARK_PREFIX[] = "/powercut-mark/";
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_len;
static int log_fd = -1;
static int lying; /* syncs do nothing and say that they did */
static uint64_t sync_count;

static void lock(void) { pthread_mutex_lock(&order); }

static void unlock(void) { pthread_mutex_unlock(&order); }

static void stop_recording(void) { /* in a forked child */
    log_fd = -1;
    unlock();
}

__attribute__((constructor)) static void start_recording(void) {
    const char *folder = getenv("KVSTORE_POWERCUT_ROOT"), *log = getenv("KVSTORE_POWERCUT_LOG");
    if (!folder || !log || !realpath(folder, root)) return;
    root_len = strlen(root);
    lying = getenv("KVSTORE_POWERCUT_LYING") != NULL;
    int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    log_fd = fcntl(fd, F_DUPFD_CLOEXEC, 300); /* out of the way of the program's own */
    syscall(SYS_close, fd);
    unsetenv("LD_PRELOAD");
    unsetenv("KVSTORE_POWERCUT_ROOT");
    unsetenv("KVSTORE_POWERCUT_LOG");
    pthread_atfork(lock, unlock, stop_recording);
}

/* ---- the log ------------------------------------------------------------------------------ */

static void append_log(const void *bytes, size_t count) {
    for (const char *at = bytes; count > 0;) {
        ssize_t done = syscall(SYS_write, log_fd, at, count);
        if (done <= 0) {
            dprintf(2, "powercut shim: cannot write the log: %s\n", strerror(errno));
            abort();
        }
        at += done, count -= done;
    }
}

static void emit_head(struct record head, const char *path, const char *other) {
    head.path_len = path ? strlen(path) : 0;
    head.other_len = other ? strlen(other) : 0;
    append_log(&head, sizeof head);
    append_log(path, head.path_len);
    append_log(other, head.other_len);
}

static void emit_write(uint64_t inode, off_t offset, const struct iovec *parts, size_t count) {
    emit_head((struct record){.op = WRITE, .inode = inode, .offset = offset, .length = count, .data_len = count}, NULL, NULL);
    for (; count > 0; parts++) {
        size_t piece = parts->iov_len < count ? parts->iov_len : count;
        append_log(parts->iov_base, piece);
        count -= piece;
    }
}

/* ---- what is below the folder ------------------------------------------------------------- */

static int is_below(const char *path) {
    return strncmp(path, root, root_len) == 0 && (path[root_len] == '/' || path[root_len] == 0);
}

static int descriptor_path(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t count = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (count < 0) return 0;
    path[count] = 0;
    return 1;
}

/* Is the descriptor's file recorded? Then its inode is filled in. Keeps errno. */
static int is_recorded(int fd, uint64_t *inode) {
    char path[PATH_MAX];
    struct stat st;
    int before = errno, yes = log_fd >= 0 && fd != log_fd && descriptor_path(fd, path) && is_below(path) && fstat(fd, &st) == 0;
    if (yes) *inode = st.st_ino;
    errno = before;
    return yes;
}

/* The path relative to the folder, its parent resolved; NULL where it lies elsewhere. Keeps errno. */
static const char *relative(int dirfd, const char *path, char *out) {
    char whole[3 * PATH_MAX], base[PATH_MAX], parent[PATH_MAX];
    int before = errno;
    if (log_fd < 0 || !path || strlen(path) >= PATH_MAX) return NULL;
    if (path[0] == '/') base[0] = 0;
    else if (dirfd == AT_FDCWD ? !getcwd(base, sizeof base) : !descriptor_path(dirfd, base)) return NULL;
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    size_t end = strlen(whole);
    while (end > 1 && whole[end - 1] == '/') whole[--end] = 0;
    char *name = strrchr(whole, '/');
    *name++ = 0;
    int found = realpath(*whole ? whole : "/", parent) != NULL;
    errno = before;
    if (!found || !is_below(parent)) return NULL;
    snprintf(out, PATH_MAX, "%s%s%s", parent + root_len + (parent[root_len] == '/'), parent[root_len] ? "/" : "", name);
    return out;
}

static uint64_t inode_at(int dirfd, const char *path) { /* 0: nothing there. Keeps errno. */
    struct stat st;
    int before = errno, found = fstatat(dirfd, path, &st, AT_SYMLINK_NOFOLLOW) == 0;
    errno = before;
    return found ? st.st_ino : 0;
}

/* ---- opening ------------------------------------------------------------------------------ */

static int record_mark(const char *text) {
    if (log_fd >= 0) {
        struct iovec part = {(void *)text, strlen(text)};
        lock();
        emit_head((struct record){.op = MARK, .data_len = part.iov_len}, NULL, NULL);
        append_log(text, part.iov_len);
        unlock();
    }
    errno = ENOENT;
    return -1;
}

static int open_at(int dirfd, const char *path, int flags, mode_t mode) {
    char buffer[PATH_MAX];
    if (path && strncmp(path, MARK_PREFIX, sizeof MARK_PREFIX - 1) == 0) return record_mark(path + sizeof MARK_PREFIX - 1);
    const char *name = flags & (O_CREAT | O_TRUNC) ? relative(dirfd, path, buffer) : NULL;
    if (!name) return syscall(SYS_openat, dirfd, path, flags, mode);
    lock();
    uint64_t was = inode_at(dirfd, path);
    int fd = syscall(SYS_openat, dirfd, path, flags, mode), before = errno;
    if (fd >= 0 && !was) {
        struct stat st;
        fstat(fd, &st);
        emit_head((struct record){.op = CREATE, .inode = st.st_ino}, name, NULL);
    } else if (fd >= 0 && flags & O_TRUNC) {
        emit_head((struct record){.op = TRUNCATE, .inode = was}, NULL, NULL);
    }
    unlock();
    errno = before;
    return fd;
}

#define MODE(flags, mode)                                                                          \
    mode_t mode = 0;                                                                               \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                           \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode = va_arg(rest, mode_t);                                                               \
        va_end(rest);                                                                              \
    }

int open(const char *path, int flags, ...) { MODE(flags, mode) return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, mode) return open_at(AT_FDCWD, path, flags, mode); }
int openat(int dirfd, const char *path, int flags, ...) { MODE(flags, mode) return open_at(dirfd, path, flags, mode); }
int openat64(int dirfd, const char *path, int flags, ...) { MODE(flags, mode) return open_at(dirfd, path, flags, mode); }
int creat(const char *path, mode_t mode) { return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

/* ---- content ------------------------------------------------------------------------------ */

/* offset -1: the descriptor's own position, as pwritev2(2) has it. */
static ssize_t put(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    uint64_t inode;
    if (!is_recorded(fd, &inode)) return syscall(SYS_pwritev2, fd, parts, count, offset, 0L, flags);
    lock();
    ssize_t done = syscall(SYS_pwritev2, fd, parts, count, offset, 0L, flags);
    int before = errno;
    if (done > 0) {
        if (offset == -1) offset = syscall(SYS_lseek, fd, 0, SEEK_CUR) - done;
        emit_write(inode, offset, parts, done);
        if (!lying && (fcntl(fd, F_GETFL) & O_DSYNC || flags & (RWF_DSYNC | RWF_SYNC)))
            emit_head((struct record){.op = DURABLE, .inode = inode, .offset = offset, .length = done}, NULL, NULL);
    }
    unlock();
    errno = before;
    return done;
}

ssize_t write(int fd, const void *bytes, size_t count) {
    uint64_t inode;
    struct iovec part = {(void *)bytes, count};
    if (!is_recorded(fd, &inode)) return syscall(SYS_write, fd, bytes, count);
    return put(fd, &part, 1, -1, 0);
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t offset) {
    struct iovec part = {(void *)bytes, count};
    return put(fd, &part, 1, offset, 0);
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t offset) { return pwrite(fd, bytes, count, offset); }
ssize_t writev(int fd, const struct iovec *parts, int count) { return put(fd, parts, count, -1, 0); }
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) { return put(fd, parts, count, offset, 0); }
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) { return put(fd, parts, count, offset, 0); }
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) { return put(fd, parts, count, offset, flags); }
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) { return put(fd, parts, count, offset, flags); }

int ftruncate(int fd, off_t length) {
    uint64_t inode;
    if (!is_recorded(fd, &inode)) return syscall(SYS_ftruncate, fd, length);
    lock();
    int result = syscall(SYS_ftruncate, fd, length), before = errno;
    if (result == 0) emit_head((struct record){.op = TRUNCATE, .inode = inode, .length = length}, NULL, NULL);
    unlock();
    errno = before;
    return result;
}

int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }

int truncate(const char *path, off_t length) {
    int fd = open_at(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0) return -1;
    int result = ftruncate(fd, length), before = errno;
    syscall(SYS_close, fd);
    errno = before;
    return result;
}

int truncate64(const char *path, off64_t length) { return truncate(path, length); }

int fallocate(int fd, int mode, off_t offset, off_t length) {
    uint64_t inode;
    if (!is_recorded(fd, &inode)) return syscall(SYS_fallocate, fd, mode, offset, length);
    lock();
    int result = syscall(SYS_fallocate, fd, mode, offset, length), before = errno;
    if (result == 0) emit_head((struct record){.op = ALLOCATE, .mode = mode, .inode = inode, .offset = offset, .length = length}, NULL, NULL);
    unlock();
    errno = before;
    return result;
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length) { return fallocate(fd, mode, offset, length); }
int posix_fallocate(int fd, off_t offset, off_t length) { return fallocate(fd, 0, offset, length) ? errno : 0; }
int posix_fallocate64(int fd, off64_t offset, off64_t length) { return posix_fallocate(fd, offset, length); }

/* ---- durability --------------------------------------------------------------------------- */

static int sync_fd(long call, int fd) {
    uint64_t inode;
    if (!is_recorded(fd, &inode)) return syscall(call, fd);
    if (lying) return 0;
    lock();
    struct record head = {.op = SYNC_BEGIN, .inode = inode, .offset = ++sync_count};
    emit_head(head, NULL, NULL);
    unlock();
    int result = syscall(call, fd), before = errno;
    if (result == 0) {
        head.op = SYNC_END;
        lock();
        emit_head(head, NULL, NULL);
        unlock();
    }
    errno = before;
    return result;
}

int fsync(int fd) { return sync_fd(SYS_fsync, fd); }
int fdatasync(int fd) { return sync_fd(SYS_fdatasync, fd); }

/* ---- names -------------------------------------------------------------------------------- */

int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    char old_buffer[PATH_MAX], new_buffer[PATH_MAX];
    const char *old = relative(from_dir, from, old_buffer), *new = relative(to_dir, to, new_buffer);
    if (!old && !new) return syscall(SYS_renameat2, from_dir, from, to_dir, to, 0);
    lock();
    uint64_t inode = inode_at(from_dir, from);
    int result = syscall(SYS_renameat2, from_dir, from, to_dir, to, 0), before = errno;
    if (result == 0) emit_head((struct record){.op = RENAME, .inode = inode}, old, new);
    unlock();
    errno = before;
    return result;
}

int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

int unlinkat(int dirfd, const char *path, int flags) {
    char buffer[PATH_MAX];
    const char *name = relative(dirfd, path, buffer);
    if (!name) return syscall(SYS_unlinkat, dirfd, path, flags);
    lock();
    uint64_t inode = inode_at(dirfd, path);
    int result = syscall(SYS_unlinkat, dirfd, path, flags), before = errno;
    if (result == 0) emit_head((struct record){.op = UNLINK, .inode = inode}, name, NULL);
    unlock();
    errno = before;
    return result;
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int dirfd, const char *path, mode_t mode) {
    char buffer[PATH_MAX];
    const char *name = relative(dirfd, path, buffer);
    if (!name) return syscall(SYS_mkdirat, dirfd, path, mode);
    lock();
    int result = syscall(SYS_mkdirat, dirfd, path, mode), before = errno;
    if (result == 0) emit_head((struct record){.op = MKDIR, .inode = inode_at(dirfd, path)}, name, NULL);
    unlock();
    errno = before;
    return result;
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    char buffer[PATH_MAX];
    const char *name = relative(to_dir, to, buffer);
    if (!name) return syscall(SYS_linkat, from_dir, from, to_dir, to, flags);
    lock();
    int result = syscall(SYS_linkat, from_dir, from, to_dir, to, flags), before = errno;
    if (result == 0) emit_head((struct record){.op = LINK, .inode = inode_at(to_dir, to)}, name, NULL);
    unlock();
    errno = before;
    return result;
}

int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

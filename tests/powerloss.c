/* Preloaded into a program (LD_PRELOAD): records what it writes to the files of one folder, and when it syncs them.

   POWERLOSS_FOLDER  whose files are recorded (but SQLite's -shm, which is no data)
   POWERLOSS_JOURNAL where to: records one behind the other, of any number of processes, each appended by one write:
                     kind ('w' write, 't' truncate, 'u' unlink,
                     'r' rename, 's' sync), length of the path (1 byte), offset, length (8 bytes
                     each, the machine's own order), path, data

   A sync is recorded and not made: it is what the test decides over. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int journal = -1;
static const char *folder;

static int recorded(int fd, char *path) {
    char link[64];
    if (!folder) {
        folder = getenv("POWERLOSS_FOLDER");
        if (!folder) folder = "";
    }
    if (!*folder) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, 255);
    if (length <= 0) return 0;
    path[length] = 0;
    if (strncmp(path, folder, strlen(folder)) || strstr(path, "-shm")) return 0;
    return 1;
}

static void record(char kind, const char *path, uint64_t offset, uint64_t length, const void *data) {
    if (journal < 0) journal = open(getenv("POWERLOSS_JOURNAL"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    unsigned char head[18] = {(unsigned char)kind, (unsigned char)strlen(path)};
    memcpy(head + 2, &offset, 8);
    memcpy(head + 10, &length, 8);
    struct iovec parts[3] = {
        {head, sizeof head}, {(void *)path, strlen(path)}, {(void *)data, kind == 'w' || kind == 'r' ? length : 0}};
    if (writev(journal, parts, 3) < 0) abort();
}

static ssize_t written(int fd, const void *data, size_t length, int64_t offset) {
    static ssize_t (*real)(int, const void *, size_t);
    static ssize_t (*real_at)(int, const void *, size_t, off64_t);
    if (!real) {
        real = dlsym(RTLD_NEXT, "write");
        real_at = dlsym(RTLD_NEXT, "pwrite64");
    }
    char path[256];
    if (!recorded(fd, path)) return offset < 0 ? real(fd, data, length) : real_at(fd, data, length, offset);
    pthread_mutex_lock(&lock);
    int64_t at = offset;
    if (offset < 0) {
        struct stat64 facts;
        at = fcntl(fd, F_GETFL) & O_APPEND && !fstat64(fd, &facts) ? facts.st_size : lseek64(fd, 0, SEEK_CUR);
    }
    ssize_t done = offset < 0 ? real(fd, data, length) : real_at(fd, data, length, offset);
    if (done > 0) record('w', path, at, done, data);
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t write(int fd, const void *data, size_t length) { return written(fd, data, length, -1); }
ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return written(fd, data, length, offset); }
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) { return written(fd, data, length, offset); }

static int truncated(int fd, int64_t length) {
    static int (*real)(int, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "ftruncate64");
    char path[256];
    if (!recorded(fd, path)) return real(fd, length);
    pthread_mutex_lock(&lock);
    int done = real(fd, length);
    if (!done) record('t', path, length, 0, NULL);
    pthread_mutex_unlock(&lock);
    return done;
}

int ftruncate(int fd, off_t length) { return truncated(fd, length); }
int ftruncate64(int fd, off64_t length) { return truncated(fd, length); }

int rename(const char *from, const char *to) {
    static int (*real)(const char *, const char *);
    if (!real) real = dlsym(RTLD_NEXT, "rename");
    char unused[256];
    recorded(-1, unused); /* looks for the folder's name */
    if (!*folder || strncmp(from, folder, strlen(folder))) return real(from, to);
    pthread_mutex_lock(&lock);
    int done = real(from, to);
    if (!done) record('r', from, 0, strlen(to), to);
    pthread_mutex_unlock(&lock);
    return done;
}

int unlink(const char *path) {
    static int (*real)(const char *);
    if (!real) real = dlsym(RTLD_NEXT, "unlink");
    char unused[256];
    recorded(-1, unused); /* looks for the folder's name */
    if (!*folder || strncmp(path, folder, strlen(folder)) || strstr(path, "-shm")) return real(path);
    pthread_mutex_lock(&lock);
    int done = real(path);
    if (!done) record('u', path, 0, 0, NULL);
    pthread_mutex_unlock(&lock);
    return done;
}

static int synced(int fd, const char *name) {
    char path[256];
    if (!recorded(fd, path)) {
        int (*real)(int) = dlsym(RTLD_NEXT, name);
        return real(fd);
    }
    pthread_mutex_lock(&lock);
    record('s', path, 0, 0, NULL);
    pthread_mutex_unlock(&lock);
    return 0;
}

int fsync(int fd) { return synced(fd, "fsync"); }
int fdatasync(int fd) { return synced(fd, "fdatasync"); }

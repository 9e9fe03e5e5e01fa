/* What the workloads share. */
#ifndef LAB_H
#define LAB_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MS 1000000L

static inline void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

/* Sleeps the whole time: CRIU's restore makes a sleep return EINTR. */
static inline void sleep_ns(long ns) {
    struct timespec left = {ns / 1000000000L, ns % 1000000000L};
    while (nanosleep(&left, &left) && errno == EINTR)
        ;
}

static inline uint64_t wallclock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline int open_ticks(const char *path) {
    if (!strcmp(path, "-"))
        return 1;
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd < 0)
        die(path);
    return fd;
}

static inline void write_tick(int fd, uint64_t tick) {
    char line[64];
    int size = snprintf(line, sizeof line, "%" PRIu64 " %" PRIu64 "\n", tick, wallclock_ns());
    ssize_t done;
    do
        done = write(fd, line, (size_t)size);
    while (done < 0 && errno == EINTR);
    if (done != size)
        die("write");
}

#endif

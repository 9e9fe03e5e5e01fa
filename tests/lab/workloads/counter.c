/* counter FILE: appends "tick wallclock_ns\n" every 10 ms ("-": standard output).
 *
 * The tick lives in memory only: a restart begins again at 0, a restore goes on. The longest step between two wall-clock times is
 * the downtime as the workload saw it.
 */
#include "lab.h"

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: counter FILE\n");
        return 2;
    }
    int fd = open_ticks(argv[1]);
    for (uint64_t tick = 0;; tick++) {
        write_tick(fd, tick);
        sleep_ns(10 * MS);
    }
}

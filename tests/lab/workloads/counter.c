/* counter FILE [MS]: appends "tick wallclock_ns\n" every MS (10) milliseconds ("-": standard output).
 *
 * The tick lives in memory only: a restart begins again at 0, a restore goes on. The longest step between two wall-clock times is
 * the downtime as the workload saw it.
 */
#include "lab.h"

int main(int argc, char **argv) {
    long step = argc == 3 ? atol(argv[2]) : 10;
    if (argc < 2 || argc > 3 || step < 1) {
        fprintf(stderr, "usage: counter FILE [MS]\n");
        return 2;
    }
    int fd = open_ticks(argv[1]);
    for (uint64_t tick = 0;; tick++) {
        write_tick(fd, tick);
        sleep_ns(step * MS);
    }
}

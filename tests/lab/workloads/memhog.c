/* memhog MIB DIRTY_MB_S FILE: holds MIB of memory, half of it incompressible, rewrites DIRTY_MB_S of it a second, and writes ticks
 * to FILE as counter does (every 10 ms).
 *
 * Every page's checksum is kept beside it. A hundredth of the memory is checked at each tick (all of it each second, at most 5 MiB a
 * tick), so that checking makes no gap of its own; a page that differs ends the program with status 3.
 */
#include <sys/mman.h>

#include "lab.h"

#define PAGE 4096u
#define WORDS (PAGE / 8u)
#define CHECKED_MAX (5u << 20)

static uint64_t random_state = 88172645463325252u;

static uint64_t next_random(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

/* Even pages are random, odd pages hold one word over and over. */
static void fill(uint64_t *page, size_t number) {
    uint64_t word = next_random();
    for (size_t i = 0; i < WORDS; i++)
        page[i] = number % 2 ? word : next_random();
}

static uint64_t checksum(const uint64_t *page) {
    uint64_t lanes[4] = {1, 2, 3, 4};
    for (size_t i = 0; i < WORDS; i += 4)
        for (size_t k = 0; k < 4; k++)
            lanes[k] = ((lanes[k] << 1) | (lanes[k] >> 63)) + page[i + k];
    return lanes[0] ^ (lanes[1] << 1) ^ (lanes[2] << 2) ^ (lanes[3] << 3);
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: memhog MIB DIRTY_MB_S FILE\n");
        return 2;
    }
    size_t pages = strtoul(argv[1], NULL, 10) * 256;
    double dirty_per_tick = strtod(argv[2], NULL) * 1e6 / PAGE / 100;
    if (!pages) {
        fprintf(stderr, "memhog: MIB must be at least 1\n");
        return 2;
    }
    uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t *sums = malloc(pages * sizeof *sums);
    if (memory == MAP_FAILED || !sums)
        die("memory");
    for (size_t p = 0; p < pages; p++) {
        fill(memory + p * WORDS, p);
        sums[p] = checksum(memory + p * WORDS);
    }
    int fd = open_ticks(argv[3]);
    size_t check_per_tick = pages / 100 + 1, next = 0;
    if (check_per_tick > CHECKED_MAX / PAGE)
        check_per_tick = CHECKED_MAX / PAGE;
    double owed = 0;
    for (uint64_t tick = 0;; tick++) {
        write_tick(fd, tick);
        for (owed += dirty_per_tick; owed >= 1; owed--) {
            size_t p = next_random() % pages;
            fill(memory + p * WORDS, p);
            sums[p] = checksum(memory + p * WORDS);
        }
        for (size_t i = 0; i < check_per_tick; i++, next = (next + 1) % pages)
            if (checksum(memory + next * WORDS) != sums[next]) {
                fprintf(stderr, "memhog: page %zu is wrong after tick %" PRIu64 "\n", next, tick);
                return 3;
            }
        sleep_ns(10 * MS);
    }
}

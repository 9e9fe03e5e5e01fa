/* warm MIB PORT START_MS FILE [ADDRESS]: a service that starts slowly. It waits START_MS, holds MIB of memory, half of it incompressible,
 * appends a line to FILE for each time that it was started, and then answers every connection to PORT (of ADDRESS alone) with the number of
 * answers that it has given, and ends it.
 *
 * An answer looks at 16 pages; one that is not as it was written ends the program with status 3.
 */
#include <arpa/inet.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "lab.h"

#define PAGE 4096u
#define WORDS (PAGE / 8u)
#define LOOKED_AT 16

static uint64_t word_of(size_t page, size_t word) {
    uint64_t x = page * 0x9E3779B97F4A7C15u + 1;
    if (page % 2 == 0)
        x += word * 0xBF58476D1CE4E5B9u;
    x ^= x >> 31;
    x *= 0x94D049BB133111EBu;
    return x ^ x >> 29;
}

int main(int argc, char **argv) {
    if (argc != 5 && argc != 6) {
        fprintf(stderr, "usage: warm MIB PORT START_MS FILE [ADDRESS]\n");
        return 2;
    }
    size_t pages = strtoul(argv[1], NULL, 10) * 256;
    uint16_t port = (uint16_t)atoi(argv[2]);
    sleep_ns(atol(argv[3]) * MS);
    uint64_t *memory = mmap(NULL, (pages + 1) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        die("memory");
    for (size_t p = 0; p < pages; p++)
        for (size_t i = 0; i < WORDS; i++)
            memory[p * WORDS + i] = word_of(p, i);
    int fd = open_ticks(argv[4]);
    write_tick(fd, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (argc == 6 && inet_pton(AF_INET, argv[5], &address.sin_addr) != 1)
        die(argv[5]);
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    if (listener < 0)
        die("socket");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16))
        die("listen");
    fprintf(stderr, "serving on port %u\n", port);
    for (uint64_t answers = 1;; answers++) {
        int client;
        while ((client = accept(listener, NULL, NULL)) < 0)
            if (errno != EINTR && errno != ECONNABORTED)
                die("accept");
        for (uint64_t look = 0; pages && look < LOOKED_AT; look++) {
            size_t page = (answers * 7919 + look * 104729) % pages;
            for (size_t i = 0; i < WORDS; i++)
                if (memory[page * WORDS + i] != word_of(page, i)) {
                    fprintf(stderr, "page %zu is wrong\n", page);
                    return 3;
                }
        }
        char line[32];
        int size = snprintf(line, sizeof line, "%" PRIu64 "\n", answers);
        if (send(client, line, (size_t)size, MSG_NOSIGNAL) == size)
            shutdown(client, SHUT_WR);
        close(client);
    }
}

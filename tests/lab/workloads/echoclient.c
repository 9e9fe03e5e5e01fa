/* echoclient HOST PORT FILE: one TCP connection to an echoserver (HOST is an IPv4 address) for as long as it lives. Every 20 ms it
 * sends the next sequence number, waits for its echo however long that takes, and appends "seq wallclock_ns\n" to FILE.
 * A lost, changed or doubled byte or a broken connection ends it with status 1.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include "lab.h"

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: echoclient HOST PORT FILE\n");
        return 2;
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[2]))};
    if (inet_pton(AF_INET, argv[1], &address.sin_addr) != 1) {
        fprintf(stderr, "echoclient: %s is not an IPv4 address\n", argv[1]);
        return 2;
    }
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        die("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    int ticks = open_ticks(argv[3]);
    for (uint64_t seq = 0;; seq++) {
        uint64_t echo;
        ssize_t done;
        do
            done = send(fd, &seq, sizeof seq, MSG_NOSIGNAL);
        while (done < 0 && errno == EINTR);
        if (done != sizeof seq)
            die("send");
        for (size_t got = 0; got < sizeof echo;) {
            done = recv(fd, (char *)&echo + got, sizeof echo - got, 0);
            if (done < 0 && errno == EINTR)
                continue;
            if (done < 0)
                die("recv");
            if (done == 0) {
                fprintf(stderr, "echoclient: the server closed the connection at %" PRIu64 "\n", seq);
                return 1;
            }
            got += (size_t)done;
        }
        if (echo != seq) {
            fprintf(stderr, "echoclient: sent %" PRIu64 ", got %" PRIu64 "\n", seq, echo);
            return 1;
        }
        write_tick(ticks, seq);
        sleep_ns(20 * MS);
    }
}

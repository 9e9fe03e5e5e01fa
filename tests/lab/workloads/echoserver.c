/* echoserver PORT: sends back whatever comes, to up to 64 clients. */
#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>

#include "lab.h"

#define CLIENTS 64

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: echoserver PORT\n");
        return 2;
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1]))};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    if (listener < 0)
        die("socket");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16))
        die("listen");
    struct pollfd fds[1 + CLIENTS] = {{.fd = listener, .events = POLLIN}};
    nfds_t count = 1;
    for (;;) {
        fds[0].events = count <= CLIENTS ? POLLIN : 0;
        if (poll(fds, count, -1) < 0) {
            if (errno == EINTR)
                continue;
            die("poll");
        }
        for (nfds_t i = count; i-- > 1;) {
            if (!fds[i].revents)
                continue;
            char data[4096];
            ssize_t size = recv(fds[i].fd, data, sizeof data, 0), sent = 0;
            if (size < 0 && errno == EINTR)
                continue;
            while (sent < size) {
                ssize_t done = send(fds[i].fd, data + sent, (size_t)(size - sent), MSG_NOSIGNAL);
                if (done < 0 && errno == EINTR)
                    continue;
                if (done < 0)
                    break;
                sent += done;
            }
            if (size <= 0 || sent < size) {
                close(fds[i].fd);
                fds[i] = fds[--count];
            }
        }
        if (fds[0].revents & POLLIN) {
            int client = accept(listener, NULL, NULL);
            if (client >= 0)
                fds[count++] = (struct pollfd){.fd = client, .events = POLLIN};
        }
    }
}

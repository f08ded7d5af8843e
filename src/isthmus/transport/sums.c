/* A sum of FP32 values over ranks by recursive doubling over sockets: for each peer in turn, send what there is, receive
 * as much, add. Messages begin with a header that is the same in both directions. Structure as in native_sums.py. */

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

enum { DONE, INTERRUPTED, SILENT, OTHER };

typedef struct {
    const int32_t *sockets; /* by step */
    char *outgoing, *incoming;
    int64_t num_steps, num_bytes, header_bytes;
    int64_t step, sent, received; /* how far it has come */
} Sum;

/* Goes on from where ``sum`` says. INTERRUPTED: by a signal; SILENT: nothing came within the socket's time limit; OTHER:
 * the kernel does not take the whole message now, the peer is gone, or its header is another. */
int add_up(Sum *sum) {
    for (; sum->step < sum->num_steps; sum->step++, sum->sent = sum->received = 0) {
        const int socket = sum->sockets[sum->step];
        while (sum->sent < sum->num_bytes) {
            const ssize_t count =
                send(socket, sum->outgoing + sum->sent, sum->num_bytes - sum->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (count < 0) return errno == EINTR ? INTERRUPTED : OTHER;
            sum->sent += count;
        }
        while (sum->received < sum->num_bytes) {
            const ssize_t count = recv(socket, sum->incoming + sum->received, sum->num_bytes - sum->received, 0);
            if (count < 0) return errno == EINTR ? INTERRUPTED : errno == EAGAIN || errno == EWOULDBLOCK ? SILENT : OTHER;
            if (count == 0) return OTHER;
            sum->received += count;
            if (sum->received >= sum->header_bytes && memcmp(sum->outgoing, sum->incoming, sum->header_bytes)) return OTHER;
        }
        float *values = (float *)(sum->outgoing + sum->header_bytes);
        const float *others = (const float *)(sum->incoming + sum->header_bytes);
        for (int64_t i = 0; i < (sum->num_bytes - sum->header_bytes) / 4; i++) values[i] += others[i];
    }
    return DONE;
}

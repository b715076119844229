/* A light stand-in for a vendor: OpenAI-shaped answers, whole or token by token, from one epoll loop.
 *
 *   upstream PORT
 *
 * What it does is said by the question itself, since a gateway passes nothing else on:
 * "TOKENS=100 RATE=100" asks for 100 tokens, 100 a second (RATE=0: as fast as they are taken),
 * and "stream": true for a stream; a whole answer comes after as long. Every token is "@<nanoseconds of CLOCK_MONOTONIC>@ ", the moment
 * it was sent, so that the reader can tell how late it is. On stdout: "closed NS SENT" when a
 * connection ends inside an answer.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FD = 65536, IN = 1 << 16, OUT = 1 << 12 };

typedef struct {
    int fd, used;
    size_t have;
    char *in;
    int streaming, thinking;
    long left, sent;
    int64_t due, step;
    char out[OUT];
    size_t out_at, out_len;
} Conn;

static Conn *conns[MAX_FD];
static int active[MAX_FD], n_active;
static int ep;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void not_active(const Conn *c) {
    for (int i = 0; i < n_active; i++)
        if (active[i] == c->fd) { active[i] = active[--n_active]; break; }
}

static void drop(Conn *c) {
    if (c->streaming) {
        printf("closed %lld %ld\n", (long long)now_ns(), c->sent);
        fflush(stdout);
        not_active(c);
    }
    conns[c->fd] = NULL;
    close(c->fd);
    free(c->in);
    free(c);
}

/* 1: all written, 0: the socket is full, -1: the connection is gone */
static int flush_out(Conn *c) {
    while (c->out_at < c->out_len) {
        ssize_t n = send(c->fd, c->out + c->out_at, c->out_len - c->out_at, MSG_NOSIGNAL);
        if (n < 0) return errno == EAGAIN ? 0 : -1;
        c->out_at += (size_t)n;
    }
    c->out_at = c->out_len = 0;
    return 1;
}

static void chunk(Conn *c, const char *payload) {
    size_t n = strlen(payload);
    c->out_len += (size_t)snprintf(c->out + c->out_len, OUT - c->out_len, "%zx\r\n%s\r\n", n, payload);
}

static const char *META =
    "\"created\":1790000000,\"id\":\"021790000000000abcdef0123456789abcdef0123456789abcdef\","
    "\"model\":\"bench-model\",\"service_tier\":\"default\",\"object\":\"chat.completion.chunk\"";

static int stream_step(Conn *c, int64_t now) {
    char payload[1024];
    if (flush_out(c) != 1) return 0;
    while (c->left > 0 && (c->step == 0 || c->due <= now)) {
        snprintf(payload, sizeof payload,
                 "data: {\"choices\":[{\"delta\":{\"content\":\"@%lld@ \",\"role\":\"assistant\"},\"index\":0}],%s,\"usage\":null}\n\n",
                 (long long)now_ns(), META);
        chunk(c, payload);
        c->left--;
        c->sent++;
        c->due += c->step;
        int r = flush_out(c);
        if (r < 0) return -1;
        if (r == 0) return 0;
    }
    if (c->left > 0) return 0;
    snprintf(payload, sizeof payload,
             "data: {\"choices\":[{\"delta\":{\"content\":\"\",\"role\":\"assistant\"},\"finish_reason\":\"stop\",\"index\":0}],%s,\"usage\":null}\n\n", META);
    chunk(c, payload);
    snprintf(payload, sizeof payload,
             "data: {\"choices\":[],%s,\"usage\":{\"completion_tokens\":%ld,\"prompt_tokens\":20,\"total_tokens\":%ld}}\n\n",
             META, c->sent, c->sent + 20);
    chunk(c, payload);
    chunk(c, "data: [DONE]\n\n");
    c->out_len += (size_t)snprintf(c->out + c->out_len, OUT - c->out_len, "0\r\n\r\n");
    c->streaming = 0;
    not_active(c);
    return flush_out(c) < 0 ? -1 : 0;
}

static long number_after(const char *text, const char *name, long otherwise) {
    const char *at = strstr(text, name);
    return at ? atol(at + strlen(name)) : otherwise;
}

static int whole_answer(Conn *c) {
    char json[1024];
    int n = snprintf(json, sizeof json,
        "{\"choices\":[{\"finish_reason\":\"stop\",\"index\":0,\"logprobs\":null,\"message\":{\"content\":\"The answer to the "
        "question is that returns are free within thirty days. @%lld@ \",\"role\":\"assistant\"}}],\"created\":1790000000,"
        "\"id\":\"021790000000000abcdef0123456789abcdef0123456789abcdef\",\"model\":\"bench-model\",\"service_tier\":\"default\","
        "\"object\":\"chat.completion\",\"usage\":{\"completion_tokens\":17,\"prompt_tokens\":20,\"total_tokens\":37,"
        "\"prompt_tokens_details\":{\"cached_tokens\":0},\"completion_tokens_details\":{\"reasoning_tokens\":0}}}",
        (long long)now_ns());
    c->out_len = (size_t)snprintf(c->out, OUT,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nX-Request-Id: bench\r\n\r\n%s", n, json);
    return flush_out(c) < 0 ? -1 : 0;
}

static int answer(Conn *c, char *body) {
    long tokens = number_after(body, "TOKENS=", 20), rate = number_after(body, "RATE=", 100);
    const char *flag = strstr(body, "\"stream\":");
    if (flag) { flag += 9; while (isspace((unsigned char)*flag)) flag++; }
    if (flag && !strncmp(flag, "true", 4)) {
        c->streaming = 1;
        c->left = tokens;
        c->sent = 0;
        c->step = rate > 0 ? 1000000000LL / rate : 0;
        c->due = now_ns();
        c->out_len = (size_t)snprintf(c->out, OUT,
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
            "X-Request-Id: bench\r\n\r\n");
        active[n_active++] = c->fd;
        return stream_step(c, c->due);
    }
    if (rate > 0) { /* thinks first, as long as its tokens would take */
        c->streaming = c->thinking = 1;
        c->due = now_ns() + tokens * (1000000000LL / rate);
        active[n_active++] = c->fd;
        return 0;
    }
    return whole_answer(c);
}

static int readable(Conn *c) {
    for (;;) {
        if (c->have == IN - 1) return -1;
        ssize_t n = recv(c->fd, c->in + c->have, IN - 1 - c->have, 0);
        if (n == 0) return -1;
        if (n < 0) { if (errno == EAGAIN) break; return -1; }
        c->have += (size_t)n;
    }
    c->in[c->have] = 0;
    char *head_end = strstr(c->in, "\r\n\r\n");
    if (!head_end || c->streaming) return 0;
    size_t head = (size_t)(head_end - c->in) + 4, length = 0;
    char *cl = strcasestr(c->in, "\r\ncontent-length:");
    if (cl && cl < head_end) {
        length = strtoul(cl + 17, NULL, 10);
    } else if (strcasestr(c->in, "\r\ntransfer-encoding: chunked")) {
        char *end = strstr(head_end, "\r\n0\r\n\r\n");
        if (!end) return 0;
        length = (size_t)(end + 7 - c->in) - head;
    }
    if (c->have < head + length) return 0;
    int r = answer(c, c->in + head);
    c->have = 0;
    return r;
}

int main(int argc, char **argv) {
    if (argc != 2) { fputs("usage: upstream PORT\n", stderr); return 2; }
    int ls = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    setsockopt(ls, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1])), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    if (bind(ls, (struct sockaddr *)&a, sizeof a) || listen(ls, 4096)) { perror("upstream"); return 1; }
    ep = epoll_create1(0);
    struct epoll_event ev = {.events = EPOLLIN, .data.fd = ls}, evs[512];
    epoll_ctl(ep, EPOLL_CTL_ADD, ls, &ev);
    int tick = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct itimerspec every = {{0, 1000000}, {0, 1000000}};
    timerfd_settime(tick, 0, &every, NULL);
    ev.data.fd = tick;
    epoll_ctl(ep, EPOLL_CTL_ADD, tick, &ev);
    for (;;) {
        int n = epoll_wait(ep, evs, 512, -1);
        for (int i = 0; i < n; i++) {
            int fd = evs[i].data.fd;
            if (fd == ls) {
                int s;
                while ((s = accept4(ls, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    if (s >= MAX_FD) { close(s); continue; }
                    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    Conn *c = calloc(1, sizeof *c);
                    c->in = malloc(IN);
                    c->fd = s;
                    conns[s] = c;
                    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.fd = s};
                    epoll_ctl(ep, EPOLL_CTL_ADD, s, &e);
                }
                continue;
            }
            if (fd == tick) {
                uint64_t ticks;
                if (read(tick, &ticks, sizeof ticks) < 0) continue;
                int64_t now = now_ns();
                for (int k = n_active - 1; k >= 0; k--) {
                    Conn *c = conns[active[k]];
                    if ((c->step || c->thinking) && c->due > now) continue;
                    if (c->thinking) {
                        c->streaming = c->thinking = 0;
                        not_active(c);
                        if (whole_answer(c) < 0) drop(c);
                    } else if (stream_step(c, now) < 0) drop(c);
                }
                continue;
            }
            Conn *c = conns[fd];
            if (!c) continue;
            if (evs[i].events & (EPOLLERR | EPOLLHUP | EPOLLRDHUP)) { drop(c); continue; }
            if ((evs[i].events & EPOLLIN) && readable(c) < 0) { drop(c); continue; }
            if ((evs[i].events & EPOLLOUT) && c->out_len) {
                if (flush_out(c) < 0 || (c->streaming && stream_step(c, now_ns()) < 0)) drop(c);
            }
        }
    }
}

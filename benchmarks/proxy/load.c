/* A light reader for gateways: keeps connections busy from one epoll loop and tells how late tokens are.
 *
 *   load json   PORT PATH CONNECTIONS REQUESTS BODY [HEADER ...]
 *   load stream PORT PATH CONNECTIONS REQUESTS BODY [HEADER ...]
 *
 * Each connection asks again as soon as its answer is whole, until REQUESTS were answered in all.
 * On stdout one JSON object: answered, failed, tokens, seconds, and in microseconds p50 and p99 of
 * the whole answer, of the first token after the question, and of tokens behind their own time stamp.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FD = 65536, CARRY = 64, BUF = 1 << 18 };

typedef struct {
    int fd, in_head, chunked, bad, got_first;
    long length; /* of the body; -1: until [DONE] or chunk end */
    long body;
    int64_t asked;
    char head[8192];
    size_t head_len;
    char tail[CARRY];
    size_t tail_len;
} Conn;

static Conn *conns[MAX_FD];
static char request[1 << 17];
static size_t request_len;
static int ep, streaming, port;
static long wanted, asked, answered, failed, tokens;

typedef struct { int64_t *v; size_t n, cap; } Samples;
static Samples whole, first, late;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void put(Samples *s, int64_t v) {
    if (s->n == s->cap) s->v = realloc(s->v, (s->cap = s->cap ? s->cap * 2 : 4096) * sizeof *s->v);
    s->v[s->n++] = v;
}

static int by_value(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void show(const char *name, Samples *s) {
    qsort(s->v, s->n, sizeof *s->v, by_value);
    printf(", \"%s_p50_us\": %.1f, \"%s_p99_us\": %.1f", name, s->n ? s->v[s->n / 2] / 1000.0 : -1.0, name,
           s->n ? s->v[s->n * 99 / 100] / 1000.0 : -1.0);
}

static void ask(Conn *c) {
    c->in_head = 1;
    c->head_len = c->tail_len = 0;
    c->body = 0;
    c->got_first = c->bad = 0;
    c->asked = now_ns();
    asked++;
    if (send(c->fd, request, request_len, MSG_NOSIGNAL) != (ssize_t)request_len) c->bad = 1;
}

static void open_conn(void) {
    int s = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    if (s < 0 || s >= MAX_FD || connect(s, (struct sockaddr *)&a, sizeof a)) { failed++; asked++; if (s >= 0) close(s); return; }
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    Conn *c = calloc(1, sizeof *c);
    c->fd = s;
    conns[s] = c;
    struct epoll_event e = {.events = EPOLLIN, .data.fd = s};
    epoll_ctl(ep, EPOLL_CTL_ADD, s, &e);
    ask(c);
}

static void drop(Conn *c) {
    conns[c->fd] = NULL;
    close(c->fd);
    free(c);
}

static void again(Conn *c, int ok, int keep) {
    if (ok) { answered++; put(&whole, now_ns() - c->asked); } else failed++;
    if (asked >= wanted) { drop(c); return; }
    if (keep) ask(c); else { drop(c); open_conn(); }
}

static void scan(Conn *c, const char *data, size_t n, int64_t now) {
    static char joined[CARRY + BUF];
    memcpy(joined, c->tail, c->tail_len);
    memcpy(joined + c->tail_len, data, n);
    size_t len = c->tail_len + n, at = 0;
    char *p;
    while (at < len && (p = memchr(joined + at, '@', len - at))) {
        size_t i = (size_t)(p - joined) + 1, j = i;
        while (j < len && joined[j] >= '0' && joined[j] <= '9') j++;
        if (j == len) { at = (size_t)(p - joined); goto carry; }
        if (joined[j] == '@' && j - i >= 10) {
            put(&late, now - strtoll(joined + i, NULL, 10));
            if (!c->got_first) { c->got_first = 1; put(&first, now - c->asked); }
            tokens++;
            at = j + 1;
        } else at = j;
    }
    at = len;
carry:
    c->tail_len = len - at < CARRY ? len - at : 0;
    memcpy(c->tail, joined + at, c->tail_len);
}

static int ends_chunked(const Conn *c, const char *data, size_t n) {
    (void)c;
    return n >= 5 && !memcmp(data + n - 5, "0\r\n\r\n", 5);
}

static void readable(Conn *c) {
    static char buf[BUF];
    ssize_t n = recv(c->fd, buf, BUF, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    int64_t now = now_ns();
    if (n <= 0) {
        int closed_well = !c->in_head && c->length < 0 && !c->chunked && !c->bad && n == 0;
        again(c, closed_well, 0);
        return;
    }
    char *data = buf;
    size_t len = (size_t)n;
    if (c->in_head) {
        size_t room = sizeof c->head - 1 - c->head_len, take = len < room ? len : room;
        memcpy(c->head + c->head_len, data, take);
        size_t before = c->head_len;
        c->head_len += take;
        c->head[c->head_len] = 0;
        char *end = strstr(c->head, "\r\n\r\n");
        if (!end) { if (take == room) again(c, 0, 0); return; }
        size_t head = (size_t)(end - c->head) + 4;
        data += head - before;
        len -= head - before;
        *end = 0;
        c->bad = strncmp(c->head + 8, " 200", 4) != 0;
        char *cl = strcasestr(c->head, "\r\ncontent-length:");
        c->chunked = strcasestr(c->head, "\r\ntransfer-encoding: chunked") != NULL;
        c->length = cl ? atol(cl + 17) : -1;
        c->in_head = 0;
    }
    if (len) scan(c, data, len, now);
    c->body += (long)len;
    if (c->length >= 0 ? c->body >= c->length : c->chunked && len && ends_chunked(c, data, len)) again(c, !c->bad, 1);
}

int main(int argc, char **argv) {
    if (argc < 7) { fputs("usage: load json|stream PORT PATH CONNECTIONS REQUESTS BODY [HEADER ...]\n", stderr); return 2; }
    streaming = !strcmp(argv[1], "stream");
    port = atoi(argv[2]);
    int connections = atoi(argv[4]);
    wanted = atol(argv[5]);
    request_len = (size_t)snprintf(request, sizeof request,
        "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n", argv[3], port, strlen(argv[6]));
    for (int i = 7; i < argc; i++)
        request_len += (size_t)snprintf(request + request_len, sizeof request - request_len, "%s\r\n", argv[i]);
    request_len += (size_t)snprintf(request + request_len, sizeof request - request_len, "\r\n%s", argv[6]);
    ep = epoll_create1(0);
    int64_t begun = now_ns();
    for (int i = 0; i < connections && asked < wanted; i++) open_conn();
    struct epoll_event evs[512];
    while (answered + failed < wanted) {
        int n = epoll_wait(ep, evs, 512, 60000);
        if (n == 0) break; /* a minute of silence: what is missing counts as failed */
        for (int i = 0; i < n; i++)
            if (conns[evs[i].data.fd]) readable(conns[evs[i].data.fd]);
    }
    failed += wanted - answered - failed;
    printf("{\"answered\": %ld, \"failed\": %ld, \"tokens\": %ld, \"seconds\": %.3f", answered, failed, tokens, (now_ns() - begun) / 1e9);
    show("whole", &whole);
    show("first", &first);
    show("late", &late);
    puts("}");
    return failed ? 1 : 0;
}

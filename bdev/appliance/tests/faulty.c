/* A handler that does wrong what can be done wrong: which is said by the block of the request. For tests. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ringstone_appliance.h"

#ifndef VERSION
#define VERSION RS_APPLIANCE_VERSION
#endif
#ifndef SIZE
#define SIZE sizeof(struct rs_handler)
#endif

struct worker {
    const struct rs_host *host;
    uint64_t kept[4096];
    size_t count;
};

/* Of the worker that was destroyed last. */
static const struct rs_host *old_host;
static uint64_t last_token, old_token, held_at_the_end;

static void submit(void *argument, const struct rs_request *const *requests, size_t count)
{
    struct worker *worker = argument;
    const struct rs_host *host = worker->host;
    for (size_t i = 0; i < count; i++) {
        uint64_t token = requests[i]->token;
        uint32_t bytes = requests[i]->payload_bytes;
        if (requests[i]->op == RS_OP_READ)
            for (uint32_t n = 0; n < requests[i]->buffer_count; n++)
                memset(requests[i]->buffers[n].base, 7, requests[i]->buffers[n].bytes);
        switch (requests[i]->lba) {
        case 1: /* twice */
            host->complete(host, token, RS_SUCCESS, bytes);
            host->complete(host, token, RS_SUCCESS, bytes);
            break;
        case 2: /* the wrong length */
            host->complete(host, token, RS_SUCCESS, bytes - 1);
            break;
        case 3: /* tokens that never were */
            host->complete(host, 0, RS_SUCCESS, bytes);
            host->complete(host, UINT64_MAX, RS_SUCCESS, bytes);
            host->complete(host, token + (UINT64_C(1) << 16), RS_SUCCESS, bytes);
            host->complete(host, token ^ 1, RS_SUCCESS, bytes);
            host->complete(NULL, token, RS_SUCCESS, bytes);
            host->complete(host, token, RS_SUCCESS, bytes);
            break;
        case 4: /* a status that there is not */
            host->complete(host, token, 0x7fff, bytes);
            break;
        case 5: /* never, unless it is aborted, or the device is reset */
            worker->kept[worker->count++] = token;
            break;
        case 6: /* for the worker before, which is gone */
            host->complete(old_host, old_token, RS_SUCCESS, bytes);
            host->complete(old_host, held_at_the_end, RS_SUCCESS, bytes);
            host->complete(host, token, RS_SUCCESS, bytes);
            break;
        default:
            host->complete(host, token, RS_SUCCESS, bytes);
        }
        last_token = token;
    }
}

static void abort_request(void *argument, uint64_t token)
{
    struct worker *worker = argument;
    for (size_t i = 0; i < worker->count; i++)
        if (worker->kept[i] == token) {
            worker->kept[i] = worker->kept[--worker->count];
            worker->host->complete(worker->host, token, RS_ABORTED, 0);
            return;
        }
}

static void reset(void *argument)
{
    struct worker *worker = argument;
    while (worker->count > 0)
        worker->host->complete(worker->host, worker->kept[--worker->count], RS_ABORTED, 0);
}

static int worker_create(void *handler, uint32_t index, const struct rs_host *host, void **out)
{
    struct worker *worker = calloc(1, sizeof *worker);
    (void)handler;
    (void)index;
    worker->host = host;
    *out = worker;
    return 0;
}

static void worker_destroy(void *argument)
{
    struct worker *worker = argument;
    old_host = worker->host;
    old_token = last_token;
    if (worker->count > 0)
        held_at_the_end = worker->kept[0];
    free(worker);
}

static int create(const struct rs_device *device, char *error, size_t error_bytes, void **out)
{
    if (strstr(device->options, "refuse") != NULL) {
        snprintf(error, error_bytes, "I was asked to refuse");
        return 22;
    }
    *out = NULL;
    return 0;
}

static void capabilities(void *handler, struct rs_capabilities *out)
{
    (void)handler;
    out->ops = 1u << RS_OP_READ | 1u << RS_OP_WRITE | 1u << RS_OP_FLUSH;
}

static void destroy(void *handler)
{
    (void)handler;
}

#ifndef NO_ENTRY
const struct rs_handler *ringstone_appliance_handler(void)
{
    static const struct rs_handler handler = {
        .struct_bytes = SIZE,
        .version = VERSION,
        .name = "faulty",
        .create = create,
        .capabilities = capabilities,
        .destroy = destroy,
        .worker_create = worker_create,
#ifndef NO_SUBMIT
        .submit = submit,
#endif
        .abort = abort_request,
        .reset = reset,
        .worker_destroy = worker_destroy,
    };
    return &handler;
}
#endif

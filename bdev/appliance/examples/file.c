/*
 * One file: the smallest useful handler in C. Requests are done where they come, one after another, on the worker's
 * thread; with several workers several of them at once.
 *
 *     cc -std=c11 -O2 -Wall -Wextra -shared -fPIC -I ../include -o file.so file.c
 *
 * Option: {"path": "/some/file"}. The file is made when it is not there, and kept when the device is deleted. What was
 * written survives the end of the process; what was flushed survives the end of the machine.
 */
#define _XOPEN_SOURCE 700
#define _FILE_OFFSET_BITS 64

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ringstone_appliance.h"

struct store {
    int fd;
    uint32_t block_size;
};

struct worker {
    struct store *store;
    const struct rs_host *host;
};

/* The text of a key of a flat JSON object, for values without escapes. */
static int find_text(const char *json, const char *key, char *out, size_t out_bytes)
{
    const char *at = strstr(json, key);
    if (at == NULL || (at = strchr(at + strlen(key), ':')) == NULL)
        return 0;
    at += 1 + strspn(at + 1, " \t\r\n");
    if (*at++ != '"')
        return 0;
    size_t length = strcspn(at, "\"\\");
    if (at[length] != '"' || length == 0 || length >= out_bytes)
        return 0;
    memcpy(out, at, length);
    out[length] = 0;
    return 1;
}

static int create(const struct rs_device *device, char *error, size_t error_bytes, void **out)
{
    char path[4096];
    if (!find_text(device->options, "\"path\"", path, sizeof path)) {
        snprintf(error, error_bytes, "say where the data goes: {\"path\": \"/some/file\"}");
        return EINVAL;
    }
    struct store *store = calloc(1, sizeof *store);
    if (store == NULL)
        return ENOMEM;
    store->block_size = device->block_size;
    store->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (store->fd < 0 || ftruncate(store->fd, (off_t)(device->num_blocks * device->block_size)) != 0) {
        int errnum = errno;
        snprintf(error, error_bytes, "%s: %s", path, strerror(errnum));
        if (store->fd >= 0)
            close(store->fd);
        free(store);
        return errnum;
    }
    *out = store;
    return 0;
}

static void capabilities(void *handler, struct rs_capabilities *out)
{
    (void)handler;
    out->ops = 1u << RS_OP_READ | 1u << RS_OP_WRITE | 1u << RS_OP_FLUSH;
    out->flags = RS_CAP_VOLATILE_CACHE;
}

static int resize(void *handler, uint64_t num_blocks)
{
    struct store *store = handler;
    return ftruncate(store->fd, (off_t)(num_blocks * store->block_size)) == 0 ? 0 : errno;
}

static void destroy(void *handler)
{
    struct store *store = handler;
    close(store->fd);
    free(store);
}

static int worker_create(void *handler, uint32_t index, const struct rs_host *host, void **out)
{
    struct worker *worker = calloc(1, sizeof *worker);
    (void)index;
    if (worker == NULL)
        return ENOMEM;
    worker->store = handler;
    worker->host = host;
    *out = worker;
    return 0;
}

static uint16_t handle(struct store *store, const struct rs_request *request)
{
    off_t at = (off_t)(request->lba * store->block_size);
    int is_read = request->op == RS_OP_READ;
    if (request->op == RS_OP_FLUSH)
        return fdatasync(store->fd) == 0 ? RS_SUCCESS : RS_WRITE_ERROR;
    if (!is_read && request->op != RS_OP_WRITE)
        return RS_NOT_SUPPORTED;
    for (uint32_t i = 0; i < request->buffer_count; i++) {
        char *base = request->buffers[i].base;
        size_t left = request->buffers[i].bytes;
        while (left > 0) {
            ssize_t n = is_read ? pread(store->fd, base, left, at) : pwrite(store->fd, base, left, at);
            if (n < 0 && errno == EINTR)
                continue;
            if (n < 0 && errno == ENOSPC)
                return RS_NO_SPACE;
            if (n < 0)
                return is_read ? RS_READ_ERROR : RS_WRITE_ERROR;
            if (n == 0) /* The file ends here: the device has shrunk. */
                return RS_OUT_OF_RANGE;
            base += n;
            left -= (size_t)n;
            at += n;
        }
    }
    if (!is_read && request->flags & RS_FLAG_FUA && fdatasync(store->fd) != 0)
        return RS_WRITE_ERROR;
    return RS_SUCCESS;
}

static void submit(void *argument, const struct rs_request *const *requests, size_t count)
{
    struct worker *worker = argument;
    for (size_t i = 0; i < count; i++) {
        uint16_t status = handle(worker->store, requests[i]);
        uint32_t bytes = status == RS_SUCCESS ? requests[i]->payload_bytes : 0;
        worker->host->complete(worker->host, requests[i]->token, status, bytes);
    }
}

static void worker_destroy(void *worker)
{
    free(worker);
}

const struct rs_handler *ringstone_appliance_handler(void)
{
    static const struct rs_handler handler = {
        .struct_bytes = sizeof(struct rs_handler),
        .version = RS_APPLIANCE_VERSION,
        .name = "file.c",
        .create = create,
        .capabilities = capabilities,
        .resize = resize,
        .destroy = destroy,
        .worker_create = worker_create,
        .submit = submit,
        .worker_destroy = worker_destroy,
    };
    return &handler;
}

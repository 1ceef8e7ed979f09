/*
 * Blocks in memory: an example of a handler in C, to copy.
 *
 * Each worker has a thread of its own that does the work, so requests are completed on another thread than the one that
 * submitted them, in batches, and out of order: what came last is done first. A real one would start I/O there.
 *
 *     cc -std=c11 -O2 -Wall -Wextra -shared -fPIC -I ../include -o memory.so memory.c -lpthread
 */
#define _XOPEN_SOURCE 700

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ringstone_appliance.h"

struct store {
    uint32_t block_size;
    uint64_t num_blocks;
    unsigned char *data;
    /* Held for reading while blocks are copied, for writing while the size changes. One block is written by one thread at
     * a time: `stripes` are locks for ranges of blocks. */
    pthread_rwlock_t size;
    pthread_mutex_t stripes[64];
};

/* A request that waits for the worker's thread. Requests themselves stay valid until they are completed. */
struct job {
    const struct rs_request *request;
    struct job *next;
};

struct worker {
    struct store *store;
    const struct rs_host *host;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct job *jobs; /* newest first */
    struct job *spare;
    bool ending;
};

#define BLOCKS_IN_STRIPE 256

static void lock_range(struct store *store, uint64_t lba, uint64_t blocks, bool lock)
{
    uint64_t first = lba / BLOCKS_IN_STRIPE, last = (lba + blocks - 1) / BLOCKS_IN_STRIPE;
    uint64_t wanted = 0;
    for (uint64_t stripe = first; stripe <= last && stripe - first < 64; stripe++)
        wanted |= UINT64_C(1) << (stripe % 64);
    /* In the order of their numbers, so that no two threads wait for each other. */
    for (int i = 0; i < 64; i++)
        if (wanted >> i & 1) {
            if (lock)
                pthread_mutex_lock(&store->stripes[i]);
            else
                pthread_mutex_unlock(&store->stripes[i]);
        }
}

static uint16_t move_blocks(struct store *store, const struct rs_request *request)
{
    unsigned char *at = store->data + request->lba * store->block_size;
    uint16_t status = RS_SUCCESS;
    lock_range(store, request->lba, request->blocks, true);
    for (uint32_t i = 0; i < request->buffer_count; i++) {
        const struct rs_buffer *buffer = &request->buffers[i];
        switch (request->op) {
        case RS_OP_READ:
            memcpy(buffer->base, at, buffer->bytes);
            break;
        case RS_OP_WRITE:
            memcpy(at, buffer->base, buffer->bytes);
            break;
        default:
            if (memcmp(at, buffer->base, buffer->bytes) != 0)
                status = RS_COMPARE_FAILED;
        }
        at += buffer->bytes;
    }
    if (request->op == RS_OP_UNMAP || request->op == RS_OP_WRITE_ZEROES)
        memset(at, 0, request->blocks * store->block_size);
    lock_range(store, request->lba, request->blocks, false);
    return status;
}

static uint16_t handle(struct store *store, const struct rs_request *request)
{
    uint16_t status = RS_SUCCESS;
    pthread_rwlock_rdlock(&store->size);
    switch (request->op) {
    case RS_OP_FLUSH:
        break;
    case RS_OP_READ:
    case RS_OP_WRITE:
    case RS_OP_UNMAP:
    case RS_OP_WRITE_ZEROES:
    case RS_OP_COMPARE:
        if (request->blocks == 0)
            break;
        if (request->lba > store->num_blocks || request->blocks > store->num_blocks - request->lba)
            status = RS_OUT_OF_RANGE;
        else
            status = move_blocks(store, request);
        break;
    default:
        status = RS_NOT_SUPPORTED;
    }
    pthread_rwlock_unlock(&store->size);
    return status;
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    pthread_mutex_lock(&worker->lock);
    for (;;) {
        while (worker->jobs == NULL && !worker->ending)
            pthread_cond_wait(&worker->changed, &worker->lock);
        if (worker->jobs == NULL)
            break;
        struct job *jobs = worker->jobs, *last = jobs;
        worker->jobs = NULL;
        pthread_mutex_unlock(&worker->lock);
        for (struct job *job = jobs; job != NULL; job = job->next) {
            const struct rs_request *request = job->request;
            uint16_t status = handle(worker->store, request);
            uint32_t bytes = status == RS_SUCCESS ? request->payload_bytes : 0;
            /* Neither the request nor its buffers may be touched after this. */
            worker->host->complete(worker->host, request->token, status, bytes);
            last = job;
        }
        pthread_mutex_lock(&worker->lock);
        last->next = worker->spare;
        worker->spare = jobs;
    }
    pthread_mutex_unlock(&worker->lock);
    return NULL;
}

static void submit(void *argument, const struct rs_request *const *requests, size_t count)
{
    struct worker *worker = argument;
    pthread_mutex_lock(&worker->lock);
    for (size_t i = 0; i < count; i++) {
        struct job *job = worker->spare;
        if (job != NULL)
            worker->spare = job->next;
        else if ((job = malloc(sizeof *job)) == NULL) {
            worker->host->complete(worker->host, requests[i]->token, RS_FAILED, 0);
            continue;
        }
        job->request = requests[i];
        job->next = worker->jobs;
        worker->jobs = job;
    }
    pthread_cond_signal(&worker->changed);
    pthread_mutex_unlock(&worker->lock);
}

/* All that waits is given up; what the thread has in its hands is done in a moment. */
static void reset(void *argument)
{
    struct worker *worker = argument;
    pthread_mutex_lock(&worker->lock);
    while (worker->jobs != NULL) {
        struct job *job = worker->jobs;
        worker->jobs = job->next;
        worker->host->complete(worker->host, job->request->token, RS_ABORTED, 0);
        job->next = worker->spare;
        worker->spare = job;
    }
    pthread_mutex_unlock(&worker->lock);
}

static int worker_create(void *handler, uint32_t index, const struct rs_host *host, void **out)
{
    struct worker *worker = calloc(1, sizeof *worker);
    (void)index;
    if (worker == NULL)
        return ENOMEM;
    worker->store = handler;
    worker->host = host;
    pthread_mutex_init(&worker->lock, NULL);
    pthread_cond_init(&worker->changed, NULL);
    int error = pthread_create(&worker->thread, NULL, work, worker);
    if (error != 0) {
        free(worker);
        return error;
    }
    *out = worker;
    return 0;
}

static void worker_destroy(void *argument)
{
    struct worker *worker = argument;
    pthread_mutex_lock(&worker->lock);
    worker->ending = true;
    pthread_cond_signal(&worker->changed);
    pthread_mutex_unlock(&worker->lock);
    pthread_join(worker->thread, NULL);
    while (worker->spare != NULL) {
        struct job *job = worker->spare;
        worker->spare = job->next;
        free(job);
    }
    pthread_cond_destroy(&worker->changed);
    pthread_mutex_destroy(&worker->lock);
    free(worker);
}

static int create(const struct rs_device *device, char *error, size_t error_bytes, void **out)
{
    struct store *store = calloc(1, sizeof *store);
    if (store == NULL)
        return ENOMEM;
    /* Memory that is never written is not taken from the system. */
    store->data = calloc(device->num_blocks, device->block_size);
    if (store->data == NULL) {
        snprintf(error, error_bytes, "no memory for %llu blocks of %u bytes; make a smaller device",
                 (unsigned long long)device->num_blocks, (unsigned)device->block_size);
        free(store);
        return ENOMEM;
    }
    store->block_size = device->block_size;
    store->num_blocks = device->num_blocks;
    pthread_rwlock_init(&store->size, NULL);
    for (int i = 0; i < 64; i++)
        pthread_mutex_init(&store->stripes[i], NULL);
    *out = store;
    return 0;
}

static void capabilities(void *handler, struct rs_capabilities *out)
{
    (void)handler;
    out->ops = 1u << RS_OP_READ | 1u << RS_OP_WRITE | 1u << RS_OP_FLUSH | 1u << RS_OP_UNMAP | 1u << RS_OP_WRITE_ZEROES |
               1u << RS_OP_COMPARE;
    out->flags = RS_CAP_UNMAP_ZEROES;
}

static int resize(void *handler, uint64_t num_blocks)
{
    struct store *store = handler;
    int error = 0;
    pthread_rwlock_wrlock(&store->size);
    if (num_blocks > SIZE_MAX / store->block_size) {
        error = EFBIG;
    } else if (num_blocks != store->num_blocks) {
        size_t before = store->num_blocks * store->block_size, after = num_blocks * store->block_size;
        unsigned char *data = realloc(store->data, after);
        if (data == NULL) {
            error = ENOMEM;
        } else {
            if (after > before)
                memset(data + before, 0, after - before);
            store->data = data;
            store->num_blocks = num_blocks;
        }
    }
    pthread_rwlock_unlock(&store->size);
    return error;
}

static void destroy(void *handler)
{
    struct store *store = handler;
    for (int i = 0; i < 64; i++)
        pthread_mutex_destroy(&store->stripes[i]);
    pthread_rwlock_destroy(&store->size);
    free(store->data);
    free(store);
}

const struct rs_handler *ringstone_appliance_handler(void)
{
    static const struct rs_handler handler = {
        .struct_bytes = sizeof(struct rs_handler),
        .version = RS_APPLIANCE_VERSION,
        .name = "memory.c",
        .create = create,
        .capabilities = capabilities,
        .resize = resize,
        .destroy = destroy,
        .worker_create = worker_create,
        .submit = submit,
        .reset = reset,
        .worker_destroy = worker_destroy,
    };
    return &handler;
}

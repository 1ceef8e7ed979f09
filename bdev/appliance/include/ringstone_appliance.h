/*
 * Handlers for Ringstone's appliance bdevs in C: your own code behind a block device.
 *
 * Build a shared object that defines ringstone_appliance_handler(), and give its absolute path as "handler" to
 * bdev_appliance_create. Or serve it from a process of its own with "ringstone appliance --handler /path/to/lib.so".
 *
 *     cc -std=c11 -O2 -Wall -shared -fPIC -I bdev/appliance/include -o memory.so examples/memory.c -lpthread
 *
 * Threads. Every function that is given a worker is called on that worker's thread, one at a time. Functions that are given
 * the handler may be called on any thread, also at the same time. Nothing here is called from a signal handler. A function
 * of yours that blocks holds up the requests of its worker and of no other device.
 *
 * Requests. submit() gives you requests; from then on each is yours until you call complete() for its token, once, on any
 * thread, in any order, at once or later. A request that is not completed by its deadline fails at the host without you;
 * it stays yours all the same, with its buffers, until you complete it.
 *
 * Structs begin with their size. This side fills in the size it knows; look at a field that a later version has added only
 * if struct_bytes reaches it. Structs that you fill in: set struct_bytes to sizeof of the struct.
 */
#ifndef RINGSTONE_APPLIANCE_H
#define RINGSTONE_APPLIANCE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when handlers built before would not work any more. */
#define RS_APPLIANCE_VERSION 1u

/* rs_request.op. Bit 1u << op in rs_capabilities.ops says that the handler does it. */
#define RS_OP_READ 0u              /* fill the buffers */
#define RS_OP_WRITE 1u             /* store the buffers */
#define RS_OP_FLUSH 2u             /* all that was completed before is on stable media; lba and blocks mean nothing */
#define RS_OP_UNMAP 3u             /* the contents may be forgotten; no payload */
#define RS_OP_WRITE_ZEROES 4u      /* the blocks read as zeroes afterwards; no payload */
#define RS_OP_COMPARE 5u           /* RS_SUCCESS, or RS_COMPARE_FAILED */
#define RS_OP_COMPARE_AND_WRITE 6u /* the first half of the payload is compared, the second written if it was equal */
#define RS_OP_COPY 7u              /* copy from source_lba of the same device; no payload */

/* rs_request.flags */
#define RS_FLAG_FUA 1u       /* on stable media before the completion */
#define RS_FLAG_MAY_UNMAP 2u /* write zeroes: the space may be given back */

/* Status of a completion. */
#define RS_SUCCESS 0u
#define RS_FAILED 1u
#define RS_OUT_OF_RANGE 2u
#define RS_INVALID 3u
#define RS_NOT_SUPPORTED 4u
#define RS_NO_DEVICE 5u
#define RS_ABORTED 6u
#define RS_TIMED_OUT 7u
#define RS_READ_ERROR 8u
#define RS_WRITE_ERROR 9u
#define RS_COMPARE_FAILED 10u
#define RS_READ_ONLY 11u
#define RS_NO_SPACE 12u
/* A status of NVMe's own, passed on as it is: status code type 0-7, status code, and whether not to retry. */
#define RS_NVME_STATUS(sct, sc, dnr) (0x8000u | ((sct) & 7u) << 8 | ((sc) & 0xffu) | ((dnr) ? 0x800u : 0u))

/* rs_capabilities.flags */
#define RS_CAP_VOLATILE_CACHE 1u /* completed writes may be lost before the next flush */
#define RS_CAP_UNMAP_ZEROES 2u   /* unmapped blocks read as zeroes */

/* rs_host.log */
#define RS_LOG_ERROR 1
#define RS_LOG_WARN 2
#define RS_LOG_INFO 3
#define RS_LOG_DEBUG 4

/* A piece of a payload. The first byte of the first piece is aligned to 4096 in the target's process. */
struct rs_buffer {
    void *base;
    size_t bytes;
};

/* A request. Valid, with its buffers, until complete() is called for its token. */
struct rs_request {
    uint32_t struct_bytes;
    uint8_t op;
    uint8_t flags;
    uint16_t reserved;
    uint64_t token;      /* names it to complete() and abort(); never used again */
    uint64_t id;         /* names it in the server's log */
    uint64_t lba;        /* first block; may lie behind the end after the device has shrunk: RS_OUT_OF_RANGE */
    uint64_t blocks;
    uint64_t source_lba; /* RS_OP_COPY: first block to copy from */
    uint64_t timeout_ns; /* until its deadline, from submit() on; UINT64_MAX: none */
    uint32_t payload_bytes;
    uint32_t buffer_count;
    const struct rs_buffer *buffers;
};

/* What a worker is lent. Valid for ever, so that a late call does no harm. */
struct rs_host {
    uint32_t struct_bytes;
    uint32_t version;
    /*
     * Ends a request. On any thread; never blocks. bytes: payload bytes that were moved, which with RS_SUCCESS is
     * payload_bytes. Another number, a token that was completed already, or that never was one, is a bug: it is logged, and
     * does nothing (token) or fails the request (bytes, status). Neither the request nor its buffers may be touched
     * afterwards.
     */
    void (*complete)(const struct rs_host *host, uint64_t token, uint16_t status, uint32_t bytes);
    /* Has poll() called soon. On any thread. */
    void (*wake)(const struct rs_host *host);
    /* Writes a line to the server's log. On any thread. */
    void (*log)(const struct rs_host *host, int level, const char *text);
};

/* The device that a handler is made for. Valid until create() returns. */
struct rs_device {
    uint32_t struct_bytes;
    uint32_t block_size;
    uint64_t num_blocks;
    const char *bdev;    /* its name */
    const char *options; /* the options of bdev_appliance_create: the text of a JSON object */
    uint32_t workers;    /* threads that worker_create() will be called on */
    uint32_t reserved;
};

/* What a handler does by itself. What is missing is made of reads and writes where that can be. */
struct rs_capabilities {
    uint32_t struct_bytes;
    uint32_t ops; /* 1u << RS_OP_...; RS_OP_READ must be there, and RS_OP_FLUSH with RS_CAP_VOLATILE_CACHE */
    uint32_t flags;
    uint32_t max_rw_blocks; /* larger reads and writes are split; 0: no limit */
};

/* A handler. Functions marked optional may be NULL. Functions that return an int return 0, or an errno value. */
struct rs_handler {
    uint32_t struct_bytes;
    uint32_t version; /* RS_APPLIANCE_VERSION */
    const char *name; /* in messages */

    /* Makes a handler for a device. On failure, a text in error (NUL-terminated, at most error_bytes) says what to do. */
    int (*create)(const struct rs_device *device, char *error, size_t error_bytes, void **handler);
    /* What it does by itself; struct_bytes is set, the rest zero. Called once. */
    void (*capabilities)(void *handler, struct rs_capabilities *capabilities);
    /* The device has another size from now on; requests go on meanwhile. An error leaves the size. Optional: it cannot. */
    int (*resize)(void *handler, uint64_t num_blocks);
    /* The device is gone, and so are all workers. */
    void (*destroy)(void *handler);

    /* Makes the part that lives on one thread, on that thread. host is the worker's for ever. */
    int (*worker_create)(void *handler, uint32_t index, const struct rs_host *host, void **worker);
    /* Takes requests, all of them. The array itself is valid until it returns. */
    void (*submit)(void *worker, const struct rs_request *const *requests, size_t count);
    /* Called at every round of the thread's loop: 1 if there was work, 0 if not. Optional. */
    int (*poll)(void *worker);
    /* The request is to end early: complete it as RS_ABORTED if that can be, or take no notice. Optional. */
    void (*abort)(void *worker, uint64_t token);
    /*
     * The device is being reset or removed: end early what can be ended. What is not completed within 500 ms is given up,
     * and must not change the contents any more. Optional.
     */
    void (*reset)(void *worker);
    /* Ends it. After it returns no thread touches a request or buffer of this worker any more; what was not completed fails. */
    void (*worker_destroy)(void *worker);
};

/* The one symbol that a shared object must have: its handler, valid for ever. */
const struct rs_handler *ringstone_appliance_handler(void);

#ifdef __cplusplus
}
#endif

#endif

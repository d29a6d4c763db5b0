/* A plugin for qemu-aarch64: how often each block of instructions ran.
 *
 *     qemu-aarch64 -plugin executed.so,out=FILE PROGRAM
 *
 * FILE gets a line `address instructions times` for each translated block, an empty line, and the process's memory map,
 * by which addresses become places in modules. Each call of getsid, which nothing else makes, ends a part: a line `--`,
 * after which counting begins anew. Counters are not atomic: programs must run one thread at a time.
 *
 * QEMU's header is not in Debian's packages. What is used of its interface (version 1, docs/devel/tcg-plugins of QEMU
 * 7.2) is declared here. */
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
enum { ADD_TO_U64 = 0, GETSID = 156 };
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*callback)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int operation, void *counter, uint64_t by);
typedef void (*syscall_callback)(qemu_plugin_id_t, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                                 uint64_t, uint64_t, uint64_t);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t id, syscall_callback callback);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*callback)(qemu_plugin_id_t, void *), void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *block);

EXPORT int qemu_plugin_version = 1;

struct block {
    uint64_t address, instructions, times;
    struct block *next;
};

static struct block *blocks;
static FILE *file;

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *translation) {
    (void)id;
    struct block *block = calloc(1, sizeof *block);
    if (block == NULL) abort();
    block->address = qemu_plugin_tb_vaddr(translation);
    block->instructions = qemu_plugin_tb_n_insns(translation);
    block->next = blocks;
    blocks = block;
    qemu_plugin_register_vcpu_tb_exec_inline(translation, ADD_TO_U64, &block->times, 1);
}

static void write_counts(void) {
    for (struct block *block = blocks; block != NULL; block = block->next)
        if (block->times != 0) {
            fprintf(file, "%" PRIx64 " %" PRIu64 " %" PRIu64 "\n", block->address, block->instructions, block->times);
            block->times = 0;
        }
}

static void called(qemu_plugin_id_t id, unsigned cpu, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                   uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
    (void)id, (void)cpu, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
    if (number != GETSID) return;
    write_counts();
    fputs("--\n", file);
}

static void finished(qemu_plugin_id_t id, void *data) {
    (void)id, (void)data;
    write_counts();
    fputc('\n', file);
    FILE *map = fopen("/proc/self/maps", "r");
    for (int letter; map != NULL && (letter = fgetc(map)) != EOF;) fputc(letter, file);
    fclose(file);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void *information, int count, char **arguments) {
    (void)information;
    for (int i = 0; i < count; ++i)
        if (strncmp(arguments[i], "out=", 4) == 0) file = fopen(arguments[i] + 4, "w");
    if (file == NULL) return 1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    qemu_plugin_register_atexit_cb(id, finished, NULL);
    return 0;
}

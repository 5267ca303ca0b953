// Run one statically linked program of one thread on a bare machine: load it, and do what it asks a system for (Linux's
// x86-64 system calls). It writes to port 0xE9, whatever the file. Port 0x8900 turns the emulated machine off.
#include <elf.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>

typedef uint64_t Word;

enum {
    kHeap = 0x02000000,
    kHeapEnd = 0x0F000000,
    kStack = 0x1FF00000,  // its arguments, from here on
    kMapped = 0x20000000,
    kMappedEnd = 0x7F000000,
    kNotFound = -2,
    kBadFile = -9,
    kNoMemory = -12,
    kInvalid = -22,
    kNoTerminal = -25,
    kNotImplemented = -38,
    kSetFs = 0x1002,       // ARCH_SET_FS
    kAllowTiles = 0x1023,  // ARCH_REQ_XCOMP_PERM
};

extern const char program[];
extern const Word fault_entries[32];
void on_system_call(void);
_Noreturn void enter_program(Word first, Word* stack);

void* memcpy(void* to, const void* from, size_t n) {
    for (size_t i = 0; i < n; ++i) ((char*)to)[i] = ((const char*)from)[i];
    return to;
}

void* memset(void* to, int value, size_t n) {
    for (size_t i = 0; i < n; ++i) ((char*)to)[i] = (char)value;
    return to;
}

static void out(uint16_t port, char byte) { __asm__ volatile("outb %0, %1" ::"a"(byte), "Nd"(port)); }

static void write_text(const char* text) {
    while (*text != 0) out(0xE9, *text++);
}

static void write_number(Word number) {
    for (int shift = 60; shift >= 0; shift -= 4) out(0xE9, "0123456789abcdef"[number >> shift & 15]);
    out(0xE9, ' ');
}

static _Noreturn void turn_off(void) {
    for (const char* c = "Shutdown"; *c != 0; ++c) out((uint16_t)0x8900, *c);
    for (;;) __asm__("hlt");
}

static void set_register(uint32_t number, Word value) {
    __asm__ volatile("wrmsr" ::"c"(number), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)));
}

_Noreturn void fault(const Word* frame) {
    write_text("\nFAULT: number, error code, instruction, code segment, flags, stack\n");
    for (int i = 0; i < 6; ++i) write_number(frame[i]);
    turn_off();
}

struct Registers {
    Word rax, rdi, rsi, rdx, r10, r8, r9;
};

struct Vector {
    const char* begin;
    Word size;
};

static Word write_bytes(const char* from, Word n) {
    for (Word i = 0; i < n; ++i) out(0xE9, from[i]);
    return n;
}

static Word write_vectors(const struct Vector* vectors, Word n) {
    Word written = 0;
    for (Word i = 0; i < n; ++i) written += write_bytes(vectors[i].begin, vectors[i].size);
    return written;
}

static int64_t map(Word size) {
    static Word end = kMapped;
    const Word n = (size + 4095) & ~(Word)4095, begin = end;
    if (n > kMappedEnd - end) return kNoMemory;
    end += n;
    memset((void*)begin, 0, n);
    return (int64_t)begin;
}

static Word grow_heap(Word asked) {
    static Word end = kHeap;
    if (asked >= kHeap && asked <= kHeapEnd) {
        if (asked > end) memset((void*)end, 0, asked - end);
        end = asked;
    }
    return end;
}

int64_t system_call(const struct Registers* r) {
    switch (r->rax) {
        case SYS_write: return (int64_t)write_bytes((const char*)r->rsi, r->rdx);
        case SYS_writev: return (int64_t)write_vectors((const struct Vector*)r->rsi, r->rdx);
        case SYS_mmap: return map(r->rsi);  // never given back
        case SYS_brk: return (int64_t)grow_heap(r->rdi);
        case SYS_mremap: return kNoMemory;  // the C library copies
        case SYS_mprotect:
        case SYS_munmap:
        case SYS_madvise:
        case SYS_rt_sigaction:
        case SYS_rt_sigprocmask:
        case SYS_sched_yield:
        case SYS_futex: return 0;
        case SYS_getpid:
        case SYS_gettid:
        case SYS_set_tid_address: return 1;
        case SYS_ioctl: return kNoTerminal;
        case SYS_arch_prctl:
            if (r->rdi == kAllowTiles) return 0;  // they are on
            if (r->rdi != kSetFs) return kInvalid;
            set_register(0xC0000100, r->rsi);  // FS_BASE
            return 0;
        case SYS_sched_getaffinity: *(Word*)r->rdx = 1; return sizeof(Word);
        case SYS_clock_gettime: memset((void*)r->rsi, 0, 2 * sizeof(Word)); return 0;
        case SYS_getrandom: memset((void*)r->rdi, 1, r->rsi); return (int64_t)r->rsi;
        case SYS_exit:
        case SYS_exit_group:
            write_text("\nEXIT ");
            write_number(r->rdi);
            turn_off();
        case SYS_open:
        case SYS_openat:
        case SYS_access:
        case SYS_newfstatat:
        case SYS_readlink:
        case SYS_readlinkat: return kNotFound;
        case SYS_fstat: return kBadFile;
        default: return kNotImplemented;  // the C library does without, also without clone: no threads
    }
}

static void take_faults(void) {
    static struct {
        uint16_t low, segment, type, middle;
        uint32_t high, unused;
    } table[32];
    for (int i = 0; i < 32; ++i) {
        const Word entry = fault_entries[i];
        table[i].low = (uint16_t)entry;
        table[i].segment = 8;
        table[i].type = 0x8E00;
        table[i].middle = (uint16_t)(entry >> 16);
        table[i].high = (uint32_t)(entry >> 32);
    }
    const struct __attribute__((packed)) {
        uint16_t limit;
        Word begin;
    } pointer = {sizeof(table) - 1, (Word)table};
    __asm__ volatile("lidt %0" ::"m"(pointer));
}

// x87, SSE, AVX, AVX-512 and AMX, as far as the processor has them.
static void allow_vectors(void) {
    uint32_t low = 13, ebx, count = 0, high;
    __asm__ volatile("cpuid" : "+a"(low), "=b"(ebx), "+c"(count), "=d"(high));
    __asm__ volatile("xsetbv" ::"a"(low & 0x600E7), "d"(0), "c"(0));
}

static void take_system_calls(void) {
    set_register(0xC0000081, (Word)8 << 32);         // STAR: the code segment
    set_register(0xC0000082, (Word)on_system_call);  // LSTAR
    set_register(0xC0000084, 0x400);                 // SFMASK: the direction flag
}

// Split a line at its spaces, in place; its words are counted in *n.
static Word* put_words(char* line, Word* to, Word* n) {
    for (*n = 0; *line != 0;) {
        while (*line == ' ') *line++ = 0;
        if (*line == 0) break;
        *to++ = (Word)line;
        ++*n;
        while (*line != 0 && *line != ' ') ++line;
    }
    *to++ = 0;
    return to;
}

_Noreturn void start(const uint32_t* loader_information) {
    take_faults();
    allow_vectors();
    take_system_calls();
    const Elf64_Ehdr* const header = (const Elf64_Ehdr*)program;
    const Elf64_Phdr* const parts = (const Elf64_Phdr*)(program + header->e_phoff);
    for (int i = 0; i < header->e_phnum; ++i) {
        if (parts[i].p_type != PT_LOAD) continue;
        memset((void*)parts[i].p_vaddr, 0, parts[i].p_memsz);
        memcpy((void*)parts[i].p_vaddr, program + parts[i].p_offset, parts[i].p_filesz);
    }
    static const char random[16] = "sixteen letters";
    const Word about[] = {AT_PHDR,   parts[0].p_vaddr + header->e_phoff,
                          AT_PHENT,  header->e_phentsize,
                          AT_PHNUM,  header->e_phnum,
                          AT_ENTRY,  header->e_entry,
                          AT_PAGESZ, 4096,
                          AT_RANDOM, (Word)random,
                          AT_NULL,   0};
    Word* const stack = (Word*)kStack;
    Word* end = put_words((char*)(Word)loader_information[4], stack + 1, stack);
    *end++ = (Word) "OMP_THREAD_LIMIT=1";
    *end++ = 0;
    memcpy(end, about, sizeof(about));
    enter_program(header->e_entry, stack);
}

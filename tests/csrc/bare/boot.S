// Enter 64-bit mode from a Multiboot loader (its specification 0.6.96), call start() in kernel.c, and take system calls and faults.
// Memory is mapped one to one, 4 GiB in pages of 2 MiB. All runs in ring 0, with interrupts off.

.section .head, "awx"
.code32
.align 4
header:
    .long 0x1BADB002, 0x00010002, -(0x1BADB002 + 0x00010002)  // with memory information, and the addresses that follow
    .long header, image_begin, image_end, memory_end, enter

.globl enter
enter:
    mov $stack_top, %esp
    mov %ebx, loader_information
    movl $page_directory_pointers + 3, page_map  // 3: present, writable
    mov $page_directory_pointers, %edi
    mov $page_directories + 3, %eax
    mov $4, %ecx
1:  mov %eax, (%edi)
    add $4096, %eax
    add $8, %edi
    loop 1b
    mov $page_directories, %edi
    mov $0x83, %eax  // present, writable, 2 MiB
    mov $2048, %ecx
1:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    loop 1b
    mov $page_map, %eax
    mov %eax, %cr3
    mov $0x50620, %eax  // CR4: PAE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE
    mov %eax, %cr4
    mov $0xC0000080, %ecx  // EFER: LME, SCE
    rdmsr
    or $0x101, %eax
    wrmsr
    mov $0x80000033, %eax  // CR0: PG, NE, ET, MP, PE
    mov %eax, %cr0
    lgdt descriptors_pointer
    ljmp $8, $in_64_bits

.code64
in_64_bits:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $stack_top, %rsp
    mov loader_information, %edi
    call start

.globl enter_program  // (its first instruction, its stack)
enter_program:
    mov %rsi, %rsp
    xor %edx, %edx  // nothing to call at its end
    xor %ebp, %ebp
    jmp *%rdi

.globl on_system_call  // on a stack apart: the program may keep data below its own
on_system_call:
    mov %rsp, program_stack
    mov $kernel_stack_top, %rsp
    push %rcx
    push %r11
    push %r9
    push %r8
    push %r10
    push %rdx
    push %rsi
    push %rdi
    push %rax
    mov %rsp, %rdi
    call system_call
    add $8, %rsp
    pop %rdi
    pop %rsi
    pop %rdx
    pop %r10
    pop %r8
    pop %r9
    pop %r11
    pop %rcx
    mov program_stack, %rsp
    jmp *%rcx

.macro ENTRY number
entry\number:
    .if (\number != 8) && ((\number < 10) || (\number > 14)) && (\number != 17) && (\number != 21)
    push $0  // for the error code that the others have
    .endif
    push $\number
    jmp 1f
.endm
.macro ADDRESS number
    .quad entry\number
.endm
.altmacro
.set i, 0
.rept 32
    ENTRY %i
    .set i, i + 1
.endr
1:  mov %rsp, %rdi
    mov $kernel_stack_top, %rsp
    call fault

.section .rodata
.globl fault_entries
.align 8
fault_entries:
.set i, 0
.rept 32
    ADDRESS %i
    .set i, i + 1
.endr

.section .data
.align 8
descriptors: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff  // none, code, data
descriptors_pointer:
    .word 23
    .long descriptors
.globl program
.align 4096
program: .incbin PROGRAM

.section .bss
.align 4096
page_map: .skip 4096
page_directory_pointers: .skip 4096
page_directories: .skip 16384
loader_information: .skip 8
program_stack: .skip 8
.align 16
.skip 65536
stack_top:
.skip 65536
kernel_stack_top:
